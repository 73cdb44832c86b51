"""The laws, for every TINY model of every table. A new file in symmetries/specs/ is picked up automatically."""

import json
import re
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import ALL_OR_SOME, FIRST, TINY, distance, moved_copy, same_tensors, sample_cases, store_ties_like
from moved_outputs import outputs_moved, unmoved
from mutating_tables import mutations

from hf_rebasin import Alignment, Checkpoint, RebasinError, Status, align, check, merge, registry, spec_for
from hf_rebasin.alignment.action import act
from hf_rebasin.alignment.exactness import compute_outputs, example_inputs
from hf_rebasin.alignment.gauge import find_gauges, gauge_vectors
from hf_rebasin.alignment.groups.permutation import Element as Permutation
from hf_rebasin.solving.canonical import STRETCHING
from hf_rebasin.symmetries.binding import bind_to, read_spec
from hf_rebasin.symmetries.table import canonical_view, table_for

# every model in its full groups, and one model per table in permutations only
MOVED = pytest.mark.parametrize(
    ("name", "groups"),
    [(name, "full") for name in TINY]
    + [pytest.param(n, "permutation", marks=[] if n in FIRST.values() else pytest.mark.slow) for n in TINY],
)


@pytest.mark.parametrize("seeds", [[0], pytest.param([1, 2], marks=pytest.mark.slow)])
def test_moving_at_random_keeps_the_function(tiny, seeds):
    for seed in seeds:
        result = check(tiny, seed=seed)
        assert result.holds, str(result)
        assert 0 < result.symmetries // 2 < result.moved


def test_inverse_and_composition_of_permutations_are_exact(tiny):
    spec, model = spec_for(tiny).restricted(), Checkpoint.open(tiny)
    g, h = (Alignment.random(spec, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    moved = g.apply(model)
    assert not same_tensors(moved, model)
    assert same_tensors(g.inverse().apply(moved), model)
    assert same_tensors(h.compose(g).apply(model), h.apply(moved))
    assert same_tensors(Alignment.identity(spec).apply(model), model)
    assert not same_tensors(g.compose(h).apply(model), h.apply(moved)), "these groups do not commute"


def test_inverse_and_composition_in_the_full_groups(tiny):
    spec, model = spec_for(tiny), Checkpoint.open(tiny)
    g, h = (Alignment.random(spec, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    moved = g.apply(model)
    assert distance(store_ties_like(model, moved), g.inverse().apply(moved)) <= 1e-10
    assert distance(h.compose(g).apply(model), h.apply(moved)) <= 1e-10
    assert distance(g.compose(h).apply(model), h.apply(moved)) > 1e-2, "these groups do not commute"


def test_a_gauge_is_put_on_and_taken_off(tiny):
    """A model in the gauge of another has its gains, and the same function; the inverse gives it its own back."""
    spec = spec_for(tiny)
    if not spec.gauged:
        return
    model, other = (Checkpoint.open(m) for m in (tiny, other_gains(tiny)))
    mine, theirs = (gauge_vectors(find_gauges(spec), c.state(spec.table.prefix)) for c in (model, other))
    g = replace(Alignment.random(spec, torch.Generator().manual_seed(0)), gauge=theirs, origin=mine)
    moved = g.apply(model)
    state = moved.state(spec.table.prefix)
    assert all(torch.equal(state[key], vector) for key, vector in theirs.items())
    inputs = example_inputs(tiny.config, torch.Generator().manual_seed(0))
    before, float32_inside = compute_outputs(tiny, inputs)
    after, _ = compute_outputs(moved.model(torch.float64), inputs)
    assert (before - after).abs().max() <= (1e-5 if float32_inside else 1e-10) * before.abs().max()
    assert distance(store_ties_like(model, moved), g.inverse().apply(moved)) <= 1e-9


def test_half_precision_is_moved_in_float32(tiny):
    """Only vectors of norms are computed in float64, as they are small beside the matrices."""
    model = Checkpoint.open(Checkpoint.open(tiny).model(torch.bfloat16))
    spec = spec_for(model)
    moved = Alignment.random(spec, torch.Generator().manual_seed(0)).on(spec, model.state(spec.table.prefix))

    def kinds(part):
        return {part.dtype}.union(*map(kinds, getattr(part, "inputs", ())))

    vectors_of_norms = {key for gauge in find_gauges(spec) for key in gauge.keys}
    wide = {key for key, part in moved.parts.items() if torch.float64 in kinds(part)}
    assert wide <= vectors_of_norms


def other_gains(model):
    model = Checkpoint.open(model).model()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = 0.5 + torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


@MOVED
def test_what_is_saved_is_what_is_loaded(name, tmp_path, groups):
    tiny = TINY[name]
    moved, alignment = moved_copy(tiny, groups=groups)
    loaded = Alignment.load(alignment.save(tmp_path / "alignment.safetensors"))
    assert loaded.spec.symmetries == alignment.spec.symmetries
    assert same_tensors(loaded.apply(tiny), moved)
    folder = Checkpoint.open(moved).save(tmp_path / "model")
    assert same_tensors(folder, moved)
    assert same_tensors(alignment.apply(Checkpoint.open(Checkpoint.open(tiny).save(tmp_path / "unmoved"))), moved)


@MOVED
def test_an_alignment_moves_a_loaded_module_to_the_weights_it_moves_the_disk_to(name, groups):
    tiny = TINY[name]
    moved, alignment = moved_copy(tiny, groups=groups)
    assert type(moved) is type(tiny)
    assert same_tensors(moved, alignment.apply(Checkpoint.open(tiny)))
    assert same_tensors(moved, alignment.apply(dict(Checkpoint.open(tiny).tensors)))


def test_planted_alignments_come_back_exactly(tiny):
    moved, alignment = moved_copy(tiny, seed=7)
    solution = align(tiny, moved, seed=0)
    assert solution.status is Status.EQUAL
    assert same_tensors(solution.apply(moved), tiny)
    solved, planted = solution.alignment, alignment.inverse()
    assert all(torch.equal(solved[name].order, planted[name].order) for name in planted.elements)


def test_planted_elements_of_the_full_groups_come_back(sample):
    moved, _ = moved_copy(sample, seed=7, groups="full")
    solution = align(sample, moved, seed=0)
    assert solution.status is Status.EQUAL
    back = solution.apply(moved)
    assert distance(store_ties_like(sample, back), back) <= 1e-5


def test_permutations_alone_do_not_bring_them_back(family):
    moved, _ = moved_copy(family, seed=7, groups="full")
    permuted = align(family, moved, seed=0, groups="permutation").apply(moved)
    larger = spec_for(family).symmetries != spec_for(family).restricted().symmetries
    assert (distance(store_ties_like(family, permuted), permuted) > 0.1) is larger


@pytest.mark.parametrize("restricted", [False, True])
def test_a_spec_survives_its_own_text(tiny, restricted):
    spec = spec_for(tiny).restricted() if restricted else spec_for(tiny)
    again = read_spec(spec.to_json())
    assert again.symmetries == spec.symmetries
    assert [t.blocks for t in again.tensors] == [t.blocks for t in spec.tensors]
    assert again.norms == spec.norms
    assert again.to_json() == spec.to_json()


def test_the_prefix_of_a_table_is_that_of_its_classes(tiny):
    prefix = table_for(tiny.config).prefix
    assert Checkpoint.open(tiny).base_prefix in ((prefix,) if isinstance(prefix, str) else prefix)


# --- negative controls of the full groups ---------------------------------------------------------------------------


def changed_by(model, spec, elements, **other):
    """Return the relative change of the outputs under elements that need not form a valid alignment."""
    checkpoint, inputs, before, _ = unmoved(model)
    moved = Alignment(spec, elements, **other).apply(checkpoint)
    return ((compute_outputs(moved.model(torch.float64), inputs)[0] - before).abs().max() / before.abs().max()).item()


def test_a_rotation_that_moves_the_ones_vector_changes_the_function(family):
    spec = spec_for(family)
    for name in [name for name in spec.free if spec.symmetries[name].kind == "centred"]:
        element = registry.group("orthogonal").element
        turned = element.random((), spec.symmetries[name].size, torch.Generator().manual_seed(0))
        assert changed_by(family, spec, {name: turned}) > 1e-3
        kept = registry.group("centred").element.project(turned.matrix)
        assert changed_by(family, spec, {name: kept}) <= 1e-10


def test_a_gain_that_is_not_folded_changes_the_function(tiny):
    spec = spec_for(tiny)
    for norm in spec.gauged:
        rest = replace(spec, norms=tuple(n for n in spec.norms if n is not norm))
        streams = {n: e for n, e in Alignment.random(spec, torch.Generator()).elements.items() if n == norm.stream}
        if spec.untied_by(streams):
            continue  # the moved model would have to be untied
        checkpoint, inputs, before, _ = unmoved(tiny)
        state = checkpoint.state(spec.table.prefix)
        moved = canonical_view(checkpoint, spec.table).with_state(Alignment(rest, streams).on(rest, state))
        after = compute_outputs(moved.model(torch.float64), inputs)[0]
        assert (after - before).abs().max() > 1e-4 * before.abs().max(), norm.gain


def forgetful(element):
    """Return an element that acts on readers as on writers."""
    group = type(element)

    class Forgetful(group):
        def act(self, x, mark=""):
            return group.act(self, x, mark.replace("'", ""))

    return Forgetful(**element.tensors())


def test_a_dual_that_is_forgotten_changes_the_function(family):
    spec = spec_for(family)
    for name in [name for name in spec.free if spec.symmetries[name].kind in STRETCHING]:
        element = Alignment.random(spec, torch.Generator().manual_seed(0))[name]
        assert changed_by(family, spec, {name: forgetful(element)}) > 1e-4, name
        assert changed_by(family, spec, {name: element}) <= 1e-5


# --- negative controls: every mutation of one row is seen, by binding or by the function -----------------------------

# A softmax cancels what all keys have in common, so a key bias that is not moved changes no output. These are the
# rows, and the leaves in them, for which that is the case.
CANCELLED = {
    "encoder.layer.*.attention.self.key.bias": {0, 1, None},
    "encoder.layer.*.attention.attention.key.bias": {0, 1, None},
    "transformer.layer.*.attention.k_lin.bias": {0, 1, None},
    "h.*.attn.c_attn.bias": {2, 3},  # query, key, value: two leaves each
    "layers.*.attention.query_key_value.bias": {6},  # the part of a key that RoPE does not rotate
    "decoder.layers.*.self_attn.k_proj.bias": {0, 1, None},
    "encoder.layers.*.self_attn.k_proj.bias": {0, 1, None},
    "text_model.encoder.layers.*.self_attn.k_proj.bias": {0, 1, None},
    "vision_model.encoder.layers.*.self_attn.k_proj.bias": {0, 1, None},
}


def deranged(alignment):
    """Return an alignment without identities in any context, so that an unmoved axis changes the function."""

    def moved(order):
        rows = order.clone().reshape(-1, order.shape[-1])
        for i, row in enumerate(rows):
            if torch.equal(row, torch.arange(len(row))):
                rows[i] = row.roll(1)
        return rows.reshape(order.shape)

    return Alignment(alignment.spec, {name: e.map(moved) for name, e in alignment.elements.items()})


def is_seen(model, table):
    """Whether binding refuses a table, or moving a model by it changes the function."""
    checkpoint, _, before, _ = unmoved(model)
    try:
        spec = bind_to(table, checkpoint).restricted()
    except RebasinError:
        return True
    for seed in range(2):
        g = deranged(Alignment.random(spec, torch.Generator().manual_seed(seed)))
        after = outputs_moved(model, spec, g.elements)
        if (before - after).abs().max() > 1e-5 * before.abs().max():
            return True
    return False


@ALL_OR_SOME
@pytest.mark.parametrize("name", registry.names("table"))
def test_every_mutation_of_one_row_is_seen(name, everything):
    models = [model for key, model in TINY.items() if key.startswith(f"{name}-")]
    todo = {}
    for model in models:
        table = table_for(model.config)
        for row in {tensor.row for tensor in spec_for(model).tensors}:
            for leaf, change, mutant in mutations(table, row):
                todo.setdefault((row, leaf, change), []).append((model, mutant))
    cases = sample_cases(todo, everything, models)
    unseen = [case for case in cases if not any(is_seen(*way) for way in todo[case])]
    assert len(cases) > 50
    assert [case for case in unseen if case[1] not in CANCELLED.get(case[0], ())] == []
    if len(cases) == len(todo):
        listed = {row for row in CANCELLED if any(row == case[0] for case in cases)}
        assert listed == {case[0] for case in unseen}, "a row that is listed is seen after all"


# --- rows that are numbered outside the weights ----------------------------------------------------------------------


def with_rows(model, name, order):
    """Return the model with its label or token rows reordered by its table."""
    checkpoint = Checkpoint.open(model)
    spec = spec_for(checkpoint)
    elements = {name: Permutation(torch.tensor(order))}
    state = act(spec, elements, checkpoint.state(spec.table.prefix))
    return canonical_view(checkpoint, spec.table).with_state(state).model()


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def test_label_rows_order_the_logits(tiny):
    if not re.search("Classification|Segmentation", type(tiny).__name__):
        assert "label" not in spec_for(tiny).symmetries
        return
    dim = 1 if "Segmentation" in type(tiny).__name__ else -1  # a map for every label
    inputs = example_inputs(tiny.config, torch.Generator().manual_seed(0))
    order = torch.arange(tiny.config.num_labels).roll(1)
    before, after = logits(tiny, inputs), logits(with_rows(tiny, "label", order.tolist()), inputs)
    torch.testing.assert_close(after, before.index_select(dim, order))
    assert not torch.allclose(after, before)


def test_token_rows_follow_the_tokens(tiny):
    inputs = example_inputs(tiny.config, torch.Generator().manual_seed(0))
    if "input_ids" not in inputs:
        assert "vocab" not in spec_for(tiny).symmetries
        return
    vocabulary = getattr(tiny.config, "text_config", tiny.config).vocab_size
    order = [0, 1, *(2 + torch.arange(vocabulary - 2).roll(5)).tolist()]  # padding stays
    place = torch.tensor(order).argsort()
    before = logits(tiny, inputs)
    renamed = {name: x if x.is_floating_point() else place[x] for name, x in inputs.items()}
    after = logits(with_rows(tiny, "vocab", order), renamed)
    has_token_logits = before.shape[-1] == vocabulary
    torch.testing.assert_close(after, before[..., order] if has_token_logits else before)


# --- classes and files do not always agree ---------------------------------------------------------------------------

LOADED_AS = [
    ("bert-1-BertForMaskedLM", "AutoModelForSequenceClassification"),
    ("bert-1-BertForMaskedLM", "AutoModelForTokenClassification"),
    ("bert-3-BertForPreTraining", "AutoModelForMaskedLM"),
    ("bert-4-BertForSequenceClassification", "AutoModel"),
    ("gpt2-0-GPT2LMHeadModel", "AutoModel"),
    ("llama-0-LlamaForCausalLM", "AutoModel"),
    ("resnet-0-ResNetForImageClassification", "AutoModel"),
    ("vit-0-ViTForImageClassification", "AutoModel"),
]


@pytest.mark.parametrize(("name", "loader"), LOADED_AS)
def test_a_module_of_another_class_than_its_file_keeps_its_function(name, loader, tmp_path):
    """As at the start of a fine-tune: the configuration still names the class of the file."""
    folder = Checkpoint.open(TINY[name]).save(tmp_path / "file")
    model = getattr(transformers, loader).from_pretrained(folder)
    assert type(model).__name__ not in model.config.architectures
    assert check(model).holds
    saved = Checkpoint.open(model).save(tmp_path / "saved")
    assert type(Checkpoint.open(saved).model()) is type(model)
    moved, alignment = moved_copy(model)
    assert align(model, moved).status in (Status.EQUAL, Status.CONVERGED)
    assert same_tensors(alignment.inverse().apply(moved), model)


def test_an_unknown_class_is_held_rather_than_guessed(sample, tmp_path):
    """An unknown class is built as the bare model, whose outputs must not move."""
    if type(sample).__name__ == "ResNetModel":
        pytest.skip("its symmetries are those of the bare model")
    folder = Checkpoint.open(sample).save(tmp_path / "file")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MyOwnModel"]}))
    try:
        checkpoint = Checkpoint.open(folder)
        model = checkpoint.model(torch.float64)
    except RebasinError:
        return  # a head whose bare class has other tensors
    assert check(model).holds
    spec = spec_for(checkpoint)
    g = Alignment.random(spec, torch.Generator().manual_seed(0))
    inputs = example_inputs(model.config, torch.Generator().manual_seed(0))
    before, float32_inside = compute_outputs(model, inputs)
    after, _ = compute_outputs(g.apply(checkpoint).model(torch.float64), inputs)
    assert (before - after).abs().max() <= (1e-5 if float32_inside else 1e-10) * before.abs().max()


@pytest.mark.parametrize(
    ("name", "tower"),
    [("clip-2-CLIPTextModel", "text_model."), ("clip-4-CLIPVisionModel", "vision_model.")],
)
def test_a_tower_is_known_as_a_part_of_the_whole_too(name, tower, tmp_path):
    """Files of one tower that older versions of transformers wrote, such as the text encoders of diffusion models."""
    checkpoint = Checkpoint.open(TINY[name])
    old = replace(checkpoint, tensors={tower + key: tensor for key, tensor in checkpoint.tensors.items()})
    folder = old.save(tmp_path / "old")
    assert check(folder).holds
    assert spec_for(folder).symmetries == spec_for(TINY[name]).symmetries
    assert align(TINY[name], moved_copy(folder)[0]).status is Status.EQUAL
    assert same_tensors(merge([TINY[name], folder]), TINY[name])
    assert same_tensors(merge([folder, TINY[name]]), folder)


def test_what_a_router_reports_is_not_an_output():
    model = Checkpoint.open(TINY[FIRST["mixtral"]]).model()
    model.config.output_router_logits = True
    assert check(model).holds


def test_a_file_with_more_than_its_class_is_checked_and_aligned(tmp_path):
    """As google-bert/bert-base-uncased: a masked language model whose file has a pooler and a second head, too."""
    folder = Checkpoint.open(TINY["bert-3-BertForPreTraining"]).save(tmp_path / "file")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    assert check(folder).holds
    module = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    alignment = Alignment.random(spec_for(folder), torch.Generator().manual_seed(0))
    assert "pool" in alignment.elements
    moved = alignment.apply(folder)
    assert same_tensors(
        alignment.apply(module), transformers.AutoModelForMaskedLM.from_pretrained(moved.save(tmp_path / "m"))
    )
    assert align(folder, moved).status is Status.EQUAL
