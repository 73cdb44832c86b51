"""Tables and inference are two independent derivations of the same symmetries, and have to agree on every one."""

import itertools
from dataclasses import replace

import pytest
from conftest import ALL_OR_SOME, FIRST, TINY, infer_or_skip, sample_cases
from mutating_tables import mutations

from hf_rebasin import Checkpoint, RebasinError, spec_for
from hf_rebasin.symmetries.binding import bind_to
from hf_rebasin.symmetries.patterns import Leaf, Product, children, parse_pattern
from hf_rebasin.symmetries.table import table_for

# Inference looks for neither scales nor rotations of pairs.
INFERRED_AS = {"signed": "permutation", "scaled": "permutation", "nonzero": "permutation"}

# Some versions of transformers scale the outputs of the tied head, so the table allows only permutations.
SCALED_SOMEWHERE = ("MT5ForConditionalGeneration",)


def places(spec, node, length):
    """For every index along an axis, the (free symmetry, index in it) pairs that it stands for."""
    if isinstance(node, Leaf):
        size = node.size or (spec.symmetries[node.name].size if node.name else length)
        return [{(node.name, i)} if node.name in spec.free else set() for i in range(size)]
    parts = [places(spec, child, length) for child in children(node)]
    if isinstance(node, Product):
        return [set().union(*combination) for combination in itertools.product(*parts)]
    return list(itertools.chain.from_iterable(parts))


def moving(spec):
    """`{(key, axis): places}` for the axes along which anything moves."""
    return {
        (key, d): by_index
        for key, shape in spec.shapes.items()
        for d, axis in enumerate(parse_pattern(spec.table.rows[key]))
        if any(by_index := places(spec, axis, shape[d]))
    }


def hold_rotary(spec):
    """Hold the rotary symmetries of a spec."""
    return spec.limited({name: "held" for name, s in spec.symmetries.items() if s.kind == "rotary"})


def disagreement(first, second):
    """The first difference between two specs of a model, or None; names are matched by where they occur."""
    first, second = hold_rotary(first), hold_rotary(second)
    a, b = moving(first), moving(second)
    if a.keys() != b.keys():
        return f"only one of them moves {sorted(a.keys() ^ b.keys())}"
    candidates = {}
    for key_and_axis in a:
        for in_first, in_second in zip(a[key_and_axis], b[key_and_axis], strict=True):
            if len(in_first) != len(in_second):
                return f"{key_and_axis}: {in_first} and {in_second}"
            for name, index in in_first:
                same = {other for other, i in in_second if i == index}
                candidates[name] = candidates.get(name, same) & same
    matches = {}
    while candidates:
        name = min(candidates, key=lambda n: len(candidates[n]))
        left = candidates.pop(name) - set(matches.values())
        if not left:
            return f"nothing moves like {name}"
        matches[name] = min(left)
    for name, other in matches.items():
        kinds = [spec.symmetries[n].kind for spec, n in ((first, name), (second, other))]
        if len({INFERRED_AS.get(kind, kind) for kind in kinds}) > 1:
            return f"{name} is {kinds[0]}, {other} is {kinds[1]}"
        contexts = {matches[context] for context in first.symmetries[name].contexts if context in first.free}
        if contexts != {context for context in second.symmetries[other].contexts if context in second.free}:
            return f"{name} is {first.symmetries[name].group}, {other} is {second.symmetries[other].group}"
    return None


def test_a_table_and_the_forward_pass_agree(tiny):
    table, inferred = spec_for(tiny), infer_or_skip(tiny)
    if type(tiny).__name__ in SCALED_SOMEWHERE:
        table, inferred = table.restricted(), inferred.restricted()
    assert disagreement(table, inferred) is None


@ALL_OR_SOME
@pytest.mark.parametrize("name", FIRST.values())
def test_a_wrong_row_would_be_detected(name, everything):
    """Even where moving the weights changes no output, as for the biases of keys."""
    model = Checkpoint.open(TINY[name])
    table, inferred = table_for(model.config), infer_or_skip(TINY[name])
    mutants = {
        (row, leaf, change): mutant
        for row in {tensor.row for tensor in spec_for(model).tensors}
        for leaf, change, mutant in mutations(table, row)
    }
    undetected = []
    for case in sample_cases(mutants, everything, [model]):
        try:
            if disagreement(bind_to(mutants[case], model), inferred) is None:
                undetected.append(case)
        except RebasinError:
            pass
    assert undetected == []


def test_a_wrong_context_would_be_detected():
    model = TINY["llama-0-LlamaForCausalLM"]
    table = table_for(model.config)
    flat = replace(table, groups={**table.groups, "group.*": "permutation"})
    assert "group" in disagreement(bind_to(flat, Checkpoint.open(model)), infer_or_skip(model))
