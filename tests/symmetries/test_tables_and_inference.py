"""Tables against inference: two independent derivations of the same symmetries, which have to agree on every one."""

import itertools
from dataclasses import replace

import pytest
from conftest import ALL_OR_SOME, FIRST, TINY, drawn, forward_pass
from mutating_tables import mutations

from hf_rebasin import Checkpoint, RebasinError, spec_for
from hf_rebasin.symmetries.binding import bind_to
from hf_rebasin.symmetries.patterns import Leaf, Product, children, parse
from hf_rebasin.symmetries.table import table_for

# Inference looks for no scales, and for no turns.
SEEN_AS = {"signed": "permutation", "scaled": "permutation", "nonzero": "permutation"}

# Some versions of transformers scale the outputs of a tied head, for which the table only permutes; others do not.
SCALED_SOMEWHERE = ("MT5ForConditionalGeneration",)


def places(spec, node, length):
    """For every index along an axis the (moving symmetry, place in it) pairs that it stands for."""
    if isinstance(node, Leaf):
        size = node.size or (spec.symmetries[node.name].size if node.name else length)
        return [{(node.name, i)} if node.name in spec.free else set() for i in range(size)]
    parts = [places(spec, child, length) for child in children(node)]
    if isinstance(node, Product):
        return [set().union(*one) for one in itertools.product(*parts)]
    return list(itertools.chain.from_iterable(parts))


def moving(spec):
    """{(key, axis): places} of the axes along which anything moves."""
    return {
        (key, d): found
        for key, shape in spec.shapes.items()
        for d, axis in enumerate(parse(spec.table.rows[key]))
        if any(found := places(spec, axis, shape[d]))
    }


def without_turns(spec):
    return spec.limited({name: "held" for name, s in spec.symmetries.items() if s.kind == "rotary"})


def disagreement(one, other):
    """The first difference between two specs of one model, whose names are matched by where they stand; or None."""
    one, other = without_turns(one), without_turns(other)
    a, b = moving(one), moving(other)
    if a.keys() != b.keys():
        return f"only one of them moves {sorted(a.keys() ^ b.keys())}"
    partners = {}
    for where in a:
        for here, there in zip(a[where], b[where], strict=True):
            if len(here) != len(there):
                return f"{where}: {here} and {there}"
            for name, place in here:
                same = {theirs for theirs, p in there if p == place}
                partners[name] = partners.get(name, same) & same
    found = {}
    while partners:
        name = min(partners, key=lambda n: len(partners[n]))
        left = partners.pop(name) - set(found.values())
        if not left:
            return f"nothing moves like {name}"
        found[name] = min(left)
    for name, theirs in found.items():
        kinds = [spec.symmetries[n].kind for spec, n in ((one, name), (other, theirs))]
        if len({SEEN_AS.get(kind, kind) for kind in kinds}) > 1:
            return f"{name} is {kinds[0]}, {theirs} is {kinds[1]}"
        inside = {found[context] for context in one.symmetries[name].contexts if context in one.free}
        if inside != {context for context in other.symmetries[theirs].contexts if context in other.free}:
            return f"{name} is {one.symmetries[name].group}, {theirs} is {other.symmetries[theirs].group}"
    return None


def test_a_table_and_the_forward_pass_agree(tiny):
    table, shown = spec_for(tiny), forward_pass(tiny)
    if type(tiny).__name__ in SCALED_SOMEWHERE:
        table, shown = table.restricted(), shown.restricted()
    assert disagreement(table, shown) is None


@ALL_OR_SOME
@pytest.mark.parametrize("name", FIRST.values())
def test_a_wrong_row_would_be_seen(name, everything):
    """Also where moving the weights shows nothing, as for the biases of keys."""
    model = Checkpoint.open(TINY[name])
    table, shown = table_for(model.config), forward_pass(TINY[name])
    todo = {
        (row, leaf, what): mutant
        for row in {tensor.row for tensor in spec_for(model).tensors}
        for leaf, what, mutant in mutations(table, row)
    }
    unseen = []
    for case in drawn(todo, everything, [model]):
        try:
            if disagreement(bind_to(todo[case], model), shown) is None:
                unseen.append(case)
        except RebasinError:
            pass
    assert unseen == []


def test_a_wrong_context_would_be_seen():
    model = TINY["llama-0-LlamaForCausalLM"]
    table = table_for(model.config)
    flat = replace(table, groups={**table.groups, "group.*": "permutation"})
    assert "group" in disagreement(bind_to(flat, Checkpoint.open(model)), forward_pass(model))
