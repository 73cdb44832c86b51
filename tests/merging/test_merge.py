"""Merging: laws for every registered method, and nothing is lost, invented or averaged by mistake."""

import inspect
import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY, RandomSolver, distance, moved_copy, other_seed, same_tensors, store_ties_like
from safetensors.torch import load_file, save_file

from hf_rebasin import Alignment, Checkpoint, align, merge, registry, spec_for
from hf_rebasin.errors import CheckpointError, MismatchError, OptionError, UnknownNameError
from hf_rebasin.modules.forward import example_inputs
from hf_rebasin.recipes.recipe import Recipe
from hf_rebasin.recipes.runner import open_models

METHODS = [name for name in registry.names("merge method") if registry.merge_method(name).finish is None]
# Random masks are drawn by the position in a tensor, so they do not move with its rows.
MOVABLE = [m for m in METHODS if "uniforms" not in inspect.signature(registry.merge_method(m).merge).parameters]


def pair(model, tmp_path):
    """Folders of two models of one class with unrelated weights."""
    return (
        Checkpoint.open(model).save(tmp_path / "a"),
        Checkpoint.open(other_seed(model)).save(tmp_path / "b"),
    )


@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_merging_a_model_with_itself_gives_it_back(method, family):
    """Of every family; all methods are held to it in test_method_laws.py."""
    if registry.merge_method(method).base == "none":
        assert same_tensors(merge([family, family], method), family)
        return
    merged, model = merge([family, family], method, base=other_seed(family)).tensors, Checkpoint.open(family).tensors
    assert merged.keys() == model.keys()
    for key in (key for key in model if model[key].is_floating_point()):  # counts are those of the base
        torch.testing.assert_close(merged[key], model[key], rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("method", MOVABLE)
def test_merges_commute_with_moving_all(method, bert):
    """Merging depends on coordinates only: moving all models moves the merge."""
    g = Alignment.random(spec_for(bert).restricted(), torch.Generator().manual_seed(0))
    one_model = method in ("passthrough", "nearswap", "arcee_fusion")
    models = [bert] if one_model else [bert, other_seed(bert)]
    base = None if registry.merge_method(method).base == "none" else other_seed(bert, 7)
    merged = merge(models, method, base=base)
    moved = merge([g.apply(model) for model in models], method, base=None if base is None else g.apply(base))
    for key, tensor in g.apply(merged).tensors.items():
        torch.testing.assert_close(tensor, moved.tensors[key], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", ["vit", "gpt2", "llama"])
def test_backbones_are_rotated_where_the_heads_are_others(family):
    """A head that is not merged still reads a norm of the gauge."""
    names = [name for name in TINY if name.startswith(f"{family}-") and name.endswith("Classification")]
    model = TINY[names[0]]
    moved = Alignment.random(spec_for(model), torch.Generator().manual_seed(0)).apply(model)
    head = "classifier" if hasattr(moved, "classifier") else "score"
    old = getattr(moved, head)
    setattr(moved, head, torch.nn.Linear(old.in_features, old.out_features + 2, bias=old.bias is not None).double())
    moved.config.num_labels = old.out_features + 2
    solution = align(model, moved, backbone_only=True)
    assert solution.alignment.moved
    inputs = example_inputs(model.config, torch.Generator().manual_seed(0))
    back = solution.apply(moved)
    torch.testing.assert_close(back(**inputs)[0], moved(**inputs)[0], rtol=1e-5, atol=1e-5)
    assert distance(merge([model, back], backbone_only=True), model) <= 1e-4


@pytest.mark.parametrize("name", [m for m in METHODS if m in ("lerp", "slerp")])
def test_both_ends_are_the_models_bit_for_bit(name, resnet):
    other = other_seed(resnet)
    minus = {"w": torch.tensor([-0.0, 1.0])}
    for t, models in enumerate(([minus, {"w": torch.ones(2)}], [{"w": torch.ones(2)}, minus])):
        merged = merge(models, name, t=t).tensors["w"]
        assert torch.equal(merged.view(torch.int32), minus["w"].view(torch.int32)), "the sign of a zero, too"
    assert same_tensors(merge([resnet, other], name, t=0), resnet)
    at_the_end, model = merge([resnet, other], name, t=1).tensors, Checkpoint.open(other).tensors
    assert all(torch.equal(at_the_end[k], t) for k, t in model.items() if t.is_floating_point())


@pytest.mark.parametrize("keep_tied", [True, False])
def test_random_pairs_of_every_class_keep_the_keys_of_the_first_and_load_clean(tiny, tmp_path, keep_tied):
    """Except for a head that a rotated stream unties, which the solution reports."""
    if not keep_tied and not spec_for(tiny).untied_by(spec_for(tiny).symmetries):
        return
    a, b = pair(tiny, tmp_path)
    solution = align(a, b, solver=RandomSolver(), keep_tied=keep_tied)
    moved = solution.apply(b)
    out = merge([a, moved]).save(tmp_path / "out")
    mine, merged, theirs = load_file(a / "model.safetensors"), load_file(out / "model.safetensors"), moved.tensors
    if keep_tied:
        assert list(merged) == list(mine)
    else:
        mine = dict(store_ties_like(a, moved).tensors)
        assert merged.keys() - load_file(a / "model.safetensors").keys() == {"lm_head.weight"}
        assert "lm_head.weight is stored apart" in " ".join(solution.notes)
    for key, tensor in mine.items():
        assert (merged[key].shape, merged[key].dtype) == (tensor.shape, tensor.dtype)
        if tensor.is_floating_point():  # the exact mean, rounded once
            assert torch.equal(merged[key], (tensor + theirs[key]) / 2)
        else:
            assert torch.equal(merged[key], tensor)
    model, info = type(tiny).from_pretrained(out, output_loading_info=True)
    assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same_tensors(model, out), "what is loaded is what was saved"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mean_is_rounded_once(dtype, bert):
    a, b = Checkpoint.open(bert).model(dtype), Checkpoint.open(other_seed(bert)).model(dtype)
    merged, a, b = merge([a, b]).tensors, Checkpoint.open(a).tensors, Checkpoint.open(b).tensors
    for key, tensor in merged.items():
        assert torch.equal(tensor, ((a[key].double() + b[key].double()) / 2).to(dtype))


def test_the_dtype_of_the_output(bert, tmp_path):
    import json

    out = merge([bert, other_seed(bert)], dtype=torch.bfloat16).save(tmp_path / "out")
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    huge = {"w": torch.full((2,), 1e6)}
    with pytest.raises(
        CheckpointError, match=r"w of the merge has values that do not fit torch.float16 \(up to 1e\+06\)"
    ):
        merge([huge, huge], dtype=torch.float16)


def test_weights_and_many_models():
    states = [{"w": torch.tensor([x])} for x in (2.0, 6.0, 10.0)]
    assert merge(states).tensors["w"].item() == 6
    assert merge(states, weights=[3, 1, 0]).tensors["w"].item() == 3
    assert merge(states, weights=[1, 1, 1], normalize=False).tensors["w"].item() == 18
    with pytest.raises(OptionError, match=r"2 weights for 3 models"):
        merge(states, weights=[1, 2])
    with pytest.raises(OptionError, match=r"sum to 0"):
        merge(states[:2], weights=[1, -1])
    with pytest.raises(OptionError, match=r"lerp merges 2 models, got 3; use linear"):
        merge(states, "lerp")
    with pytest.raises(OptionError, match=r"slerp merges 2 models, got 3"):
        merge(states, "slerp")
    with pytest.raises(OptionError, match=r"nothing to merge"):
        merge([])
    for parameters, message in (
        ({"weights": 3}, "weights: 3 does not fit"),
        ({"weights": [1, "x"]}, "weights: .* does not fit"),
    ):
        with pytest.raises(OptionError, match=message):
            merge(states, **parameters)
    for t, message in (
        ("abc", "t: 'abc' does not fit: input should be a valid number"),
        (float("nan"), "got t = nan"),
    ):
        with pytest.raises(OptionError, match=message):
            merge(states[:2], "lerp", t=t)


def test_slerp_keeps_the_length_on_the_arc():
    a, b = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}
    middle = merge([a, b], "slerp").tensors["w"]
    torch.testing.assert_close(middle, torch.tensor([0.5, 0.5]).sqrt())
    torch.testing.assert_close(merge([a, b], "slerp", t=1 / 3).tensors["w"], torch.tensor([3**0.5 / 2, 0.5]))
    opposite = merge([a, {"w": -a["w"]}], "slerp").tensors["w"]
    assert torch.equal(opposite, torch.zeros(2)), "no arc between opposites: the straight line"
    assert torch.equal(merge([{"w": torch.zeros(2)}, b], "slerp").tensors["w"], torch.tensor([0.0, 0.5]))


def test_unknown_methods_and_parameters_name_the_nearest(bert):
    with pytest.raises(UnknownNameError, match=r"no merge method 'linaer'; did you mean 'linear'"):
        merge([bert], "linaer")
    with pytest.raises(OptionError, match=r"weigths: no such parameter; did you mean 'weights'"):
        merge([bert], "linear", weigths=[1])


def test_counts_are_not_averaged(resnet):
    a, b = Checkpoint.open(resnet), Checkpoint.open(resnet)
    counted = {k: t + 7 if k.endswith("num_batches_tracked") else t for k, t in b.tensors.items()}
    merged = merge([a, replace(b, tensors=counted)])
    counts = [k for k in a.tensors if k.endswith("num_batches_tracked")]
    assert counts
    assert all(torch.equal(merged.tensors[k], a.tensors[k]) for k in counts)


def test_what_is_broken_is_named_before_anything_is_written(bert, tmp_path):
    a = Checkpoint.open(bert)
    key = "bert.embeddings.LayerNorm.bias"
    for bad in (float("nan"), float("inf")):
        broken = dict(a.tensors) | {key: a.tensors[key].clone().index_fill_(0, torch.tensor([2]), bad)}
        with pytest.raises(CheckpointError, match=rf"{key} \(24,\) has 1 values that are NaN or infinite of 24"):
            merge([a, replace(a, tensors=broken)]).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_extra_and_differently_shaped_tensors_are_named(bert):
    a = Checkpoint.open(bert)
    first, *_ = a.tensors
    for tensors, message in (
        ({k: t for k, t in a.tensors.items() if k != first}, "it lacks: "),
        (dict(a.tensors) | {"bert.extra": torch.ones(1)}, "it has what BertForMaskedLM lacks: extra"),
        (dict(a.tensors) | {first: a.tensors[first][..., :-1]}, r"it has other shapes: .* \(.*\) instead of \("),
    ):
        with pytest.raises(MismatchError, match=message):
            merge([a, replace(a, tensors=tensors)])


def test_tied_weights_stay_tied_and_unequal_ones_are_refused(bert, tmp_path):
    assert "cls.predictions.decoder.weight" not in Checkpoint.open(bert).tensors
    out = merge([bert, other_seed(bert)]).save(tmp_path / "out")
    model = type(bert).from_pretrained(out)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    a = Checkpoint.open(bert)
    both = dict(a.tensors) | {"cls.predictions.decoder.weight": a.tensors["bert.embeddings.word_embeddings.weight"]}
    assert same_tensors(merge([a, replace(a, tensors=both)]), a), "stored twice, but the same"
    again = merge([replace(a, tensors=both, given_ties={}), a])
    assert again.tensors.keys() == both.keys(), "the first stores it twice, so the merge does"
    both["cls.predictions.decoder.weight"] = both["cls.predictions.decoder.weight"] * 2
    with pytest.raises(MismatchError, match=r"has values of its own for what .* ties: cls.predictions.decoder.weight"):
        merge([a, replace(a, tensors=both)])


def test_old_spellings_prefixes_and_masks_line_up(tmp_path, bert):
    """An old file: gamma and beta, no base prefix, position ids; the output has the keys of the first model."""
    a, b = Checkpoint.open(bert), Checkpoint.open(other_seed(bert))
    old = {
        k.removeprefix("bert.")
        .replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta"): t
        for k, t in b.tensors.items()
    } | {"embeddings.position_ids": torch.arange(16)[None]}
    merged = merge([a, replace(b, tensors=old)])
    assert same_tensors(merged, merge([a, b]))
    spelt = merge([replace(b, tensors=old), a])
    assert spelt.tensors.keys() == old.keys()
    with pytest.raises(CheckpointError, match=r"are two keys for one tensor, 'embeddings.LayerNorm.weight'"):
        merge([a, replace(b, tensors=old | {"bert.embeddings.LayerNorm.weight": torch.ones(24)})])


def test_gpt2_masks_are_passed_on(tmp_path):
    from conftest import FIRST, TINY

    gpt2 = TINY[FIRST["gpt2"]]
    a = Checkpoint.open(gpt2).save(tmp_path / "a")
    tensors = load_file(a / "model.safetensors") | {"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16).tril()}
    save_file(tensors, a / "model.safetensors", {"format": "pt"})
    moved, _ = moved_copy(gpt2)
    solution = align(a, moved)
    assert same_tensors(solution.apply(moved), gpt2)
    merged = merge([a, solution.apply(moved)])
    assert torch.equal(merged.tensors["transformer.h.0.attn.bias"], tensors["transformer.h.0.attn.bias"])


@pytest.fixture
def two_heads():
    """A classifier, and the same backbone in other coordinates under a head of seven classes."""
    a = TINY["bert-4-BertForSequenceClassification"]
    torch.manual_seed(0)
    b = type(a)(type(a.config)(**(a.config.to_dict() | {"num_labels": 7}))).to(a.dtype).eval()
    b.bert.load_state_dict(moved_copy(a)[0].bert.state_dict())
    return a, b


def test_backbones_merge_under_the_head_of_the_first(two_heads, tmp_path):
    a, b = two_heads
    with pytest.raises(MismatchError, match=r"classifier.weight \(7, 24\) instead of .*--backbone-only"):
        merge([a, b])
    out = merge([a, b], backbone_only=True).save(tmp_path / "out")
    merged, mine, theirs = (Checkpoint.open(model).tensors for model in (out, a, b))
    assert merged.keys() == mine.keys()
    for key in mine:
        head = key.startswith("classifier")
        expected = mine[key] if head else (mine[key] + theirs[key]) / 2
        torch.testing.assert_close(merged[key], expected, rtol=1e-15, atol=1e-15)
    narrow = merge([a, b], backbone_only=True, dtype=torch.bfloat16).save(tmp_path / "narrow")
    assert {t.dtype for t in Checkpoint.open(narrow).tensors.values()} == {torch.bfloat16}
    bare = a.bert
    assert same_tensors(merge([a, bare], backbone_only=True), a), "a bare model is all backbone"
    assert same_tensors(merge([bare, a], backbone_only=True), bare)
    with pytest.raises(MismatchError, match="no class is known"):
        merge([dict(mine), dict(theirs)], backbone_only=True)


def test_heads_that_are_not_merged_do_not_decide_an_alignment(two_heads, tmp_path):
    a, b = two_heads
    with pytest.raises(MismatchError, match="labels"):
        align(a, b)
    solution = align(a, b, backbone_only=True)
    moved = solution.apply(b)
    assert same_tensors(moved.bert, a.bert)
    assert moved.num_labels == 7
    again = Alignment.load(solution.alignment.save(tmp_path / "g.safetensors"))
    assert same_tensors(again.apply(b).bert, a.bert)
    assert same_tensors(merge([a, moved], backbone_only=True), a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrower_result_is_rounded_once(dtype):
    """The value is closer to a tie than float32 resolves; torch alone would round by way of float32."""
    step = torch.finfo(dtype).eps
    tie = torch.tensor([1 + step / 2, 1 + 3 * step / 2, -1 - step / 2, 2 + step], dtype=torch.float64)
    for beside, up in ((2.0**-40, 1), (-(2.0**-40), -1)):
        exact = tie + beside
        expected = (tie + up * step / 4).to(dtype)
        merged = merge([{"w": exact.clone()}, {"w": exact.clone()}], dtype=dtype).tensors["w"]
        assert torch.equal(merged, expected)
    twice = (tie + 2.0**-40).to(dtype)
    assert not torch.equal(twice, (tie + step / 4).to(dtype)), "torch rounds twice; else this would not be needed"
    assert torch.equal(merge([{"w": tie}, {"w": tie}], dtype=dtype).tensors["w"], tie.to(dtype)), "ties to even"
    huge = {"w": torch.tensor([1e300, 1.0], dtype=torch.float64)}
    with pytest.raises(CheckpointError, match="do not fit"):
        merge([huge, huge], dtype=dtype)


def test_half_precision_beside_wider_models_is_summed_wide():
    numbers = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(10000, generator=numbers) for _ in range(3))
    a = a.bfloat16()
    for dtype in (torch.float32, torch.float64):
        merged = merge([{"w": a}, {"w": b}, {"w": c}], dtype=dtype).tensors["w"]
        assert torch.equal(merged, ((a.double() + b + c) / 3).to(dtype))


def test_other_kinds_of_numbers_are_refused():
    for other in (torch.tensor([2, 3]), torch.tensor([True, False]), torch.tensor([1j, 2j])):
        with pytest.raises(MismatchError, match="other kinds of numbers: w torch"):
            merge([{"w": torch.ones(2)}, {"w": other}])
    with pytest.raises(MismatchError, match="only floating-point numbers are averaged"):
        merge([{"w": torch.tensor([1j])}, {"w": torch.tensor([2j])}])


def test_what_is_not_merged_is_not_the_callers_either(two_heads):
    a, b = two_heads
    a = Checkpoint.open(a).model()
    merged = merge([a, b], backbone_only=True)
    expected = {key: tensor.clone() for key, tensor in merged.tensors.items()}
    with torch.no_grad():
        for parameter in a.parameters():
            parameter.fill_(7)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in merged.tensors.items())
    one, two = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    merged = merge([one, two])
    one.num_batches_tracked += 5
    assert merged.tensors["num_batches_tracked"] == 0


def test_a_head_that_is_kept_is_looked_at_too(two_heads):
    a = Checkpoint.open(two_heads[0])
    broken = dict(a.tensors) | {"classifier.bias": torch.full_like(a.tensors["classifier.bias"], torch.nan)}
    with pytest.raises(CheckpointError, match=r"classifier.bias .* NaN"):
        merge([replace(a, tensors=broken), two_heads[1]], backbone_only=True)


@pytest.mark.parametrize("name", ["bert-1-BertForMaskedLM", "gpt2"])
def test_a_tied_head_stays_tied_where_the_file_stores_it(name, tmp_path):
    """As in old files: the head is kept, but it is the embedding, which is merged."""
    model = TINY.get(name) or next(m for n, m in TINY.items() if n.startswith(name) and "LMHead" in n)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, one in zip(folders, (model, other_seed(model)), strict=True):
        checkpoint = Checkpoint.open(one)
        stored = {target: checkpoint.tensors[kept] for target, kept in checkpoint.ties.items()}
        assert stored
        replace(checkpoint, tensors=dict(checkpoint.tensors) | stored, given_ties={}).save(folder)
    merged = merge(folders, backbone_only=True).tensors
    for target, kept in Checkpoint.open(model).ties.items():
        assert torch.equal(merged[target], merged[kept])
        assert not kept.endswith("weight") or not torch.equal(merged[kept], Checkpoint.open(model).tensors[kept])


def test_a_bare_model_is_moved_as_a_part_of_the_one_with_a_head(tmp_path):
    from hf_rebasin.recipes.recipe import Recipe
    from hf_rebasin.recipes.runner import run_merge

    a = TINY["bert-4-BertForSequenceClassification"]
    bare = moved_copy(a)[0].bert
    Checkpoint.open(a).save(tmp_path / "a")
    Checkpoint.open(bare).save(tmp_path / "bare")
    recipe = {"models": [str(tmp_path / "a"), str(tmp_path / "bare")], "backbone_only": True}
    assert same_tensors(run_merge(Recipe.from_dict(recipe)).checkpoint, a)


def test_slerp_of_the_largest_numbers():
    a, b = ({"w": torch.tensor(w, dtype=torch.float64) * 1e150} for w in ([1.0, 0.0], [0.0, 1.0]))
    middle = merge([a, b], "slerp").tensors["w"]
    torch.testing.assert_close(middle, torch.tensor([0.5, 0.5], dtype=torch.float64).sqrt() * 1e150)


def test_a_head_that_one_model_has_apart_is_noted(tmp_path, caplog):
    """In Python and by a recipe, once; a copy of the embedding that is stored too is not apart."""
    model = TINY["gpt2-0-GPT2LMHeadModel"]
    a, b = (Checkpoint.open(model).save(tmp_path / name) for name in "ab")
    tensors = load_file(b / "model.safetensors")
    embedding = tensors["transformer.wte.weight"]
    caplog.set_level("INFO", "hf_rebasin")
    for scale, count in ((1, 0), (2, 1)):
        save_file(tensors | {"lm_head.weight": scale * embedding}, b / "model.safetensors", {"format": "pt"})
        config = json.loads((a / "config.json").read_text()) | {"tie_word_embeddings": False}
        (b / "config.json").write_text(json.dumps(config))
        for run in (lambda: merge([a, b]), lambda: open_models(Recipe.from_dict({"models": [str(a), str(b)]}))):
            caplog.clear()
            run()
            notes = [note for note in caplog.messages if "stores lm_head.weight separately" in note]
            assert len(notes) == count
            assert all(f"{a} ties it to transformer.wte.weight" in note and str(b) in note for note in notes)
