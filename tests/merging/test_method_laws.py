"""Laws of all merge methods, each with a method that breaks it; files that are added are held to them, too.

Of methods that work on the entire merge with data, the tensorwise part is tested.
"""

import inspect
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file

from hf_rebasin import Checkpoint, registry
from hf_rebasin.checkpoints import lazy
from hf_rebasin.checkpoints.lazy import Lazy, Tensors
from hf_rebasin.errors import CheckpointError, OptionError
from hf_rebasin.merging import merge as merging
from hf_rebasin.merging import pieces, randomness
from hf_rebasin.merging.parameters import PerModel, make_resolved, resolve_method
from hf_rebasin.registry import MergeMethod, is_per_model

METHODS = registry.names("merge method")
BASED = {"none": [False], "optional": [False, True], "required": [True]}  # whether they are given a base
CASES = [
    pytest.param(name, based, id=f"{name}{' with a base' * based}")
    for name in METHODS
    for based in BASED[registry.merge_method(name).base]
]
RANDOM = [name for name in METHODS if "uniforms" in inspect.signature(registry.merge_method(name).merge).parameters]
every_method = pytest.mark.parametrize(("name", "based"), CASES)

# Parameters under which methods do all that they can: three models at most, no two of which count the same.
VALUES = {"weights": [0.7, 0.2, 0.4], "densities": [0.5, 0.6, 0.7], "select_topk": 0.5, "t": 0.3}
SHAPES = {
    "model.embed_tokens.weight": (7, 5),
    "model.layers.0.mlp.up_proj.weight": (6, 5),
    "model.layers.0.mlp.down_proj.weight": (5, 6),
    "model.layers.1.mlp.up_proj.weight": (6, 5),
    "model.layers.1.mlp.down_proj.weight": (5, 6),
    "model.layers.1.conv.weight": (3, 2, 1, 2),
    "model.norm.weight": (5,),
}
UNMOVED = "model.layers.1.mlp.up_proj.weight"  # the same in all models
UNMOVED_IN_FIRST = "model.layers.1.mlp.down_proj.weight"
GRID = 2.0**-6  # values are multiples of it, so that many are zero and many are of one magnitude


def draw_models(count, dtype=torch.float64, seed=0, shapes=SHAPES):
    """Return (models, base): fine-tunes with exact zeros, equal magnitudes, and tensors that some did not move."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape, scale):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64) / GRID).round() * GRID

    base = {key: draw(shape, 0.1) for key, shape in shapes.items()}
    models = []
    for i in range(count):
        moved = {key: tensor + draw(tensor.shape, 0.05) for key, tensor in base.items()}
        kept = [key for key in (UNMOVED, UNMOVED_IN_FIRST) if key in base and (key == UNMOVED or i == 0)]
        models.append({**moved, **{key: base[key].clone() for key in kept}})
    return [{key: tensor.to(dtype) for key, tensor in model.items()} for model in models], {
        key: tensor.to(dtype) for key, tensor in base.items()
    }


def named(state, name):
    """Return a model under a name for messages; a checkpoint with the name that it has."""
    return replace(Checkpoint.open(state), name=name) if isinstance(state, dict) else state


def merge_tensors(name, models, base=None, *, seed=0, dtype=None, **parameters):
    """Merge models tensor by tensor, without what the method does to the entire merge."""
    opened = [named(model, letter) for model, letter in zip(models, "abc", strict=False)]
    resolved = resolve_method(name, parameters, seed=seed)
    base = None if base is None else named(base, "base")
    return dict(merging.combine(opened, resolved, base=base, dtype=dtype).tensors)


def count_models(name):
    """Return how many models the tests give a method: three, or as many as it takes."""
    for count in (3, 2):
        try:
            resolve_method(name, {}).refuse_unfit(count)
        except OptionError:
            continue
        return count
    return 1


def values_for(name, count):
    """Return those of `VALUES` that a method takes."""
    known = registry.merge_method(name).parameters
    values = {parameter: value for parameter, value in VALUES.items() if parameter in known}
    return {parameter: value[:count] if isinstance(value, list) else value for parameter, value in values.items()}


def make_case(name, based, dtype=torch.float64, **settings):
    """Return (models, base or None) for a method."""
    models, base = draw_models(count_models(name), dtype, **settings)
    return models, base if based else None


def find_difference(one, other):
    """Return the largest difference between two models."""
    assert one.keys() == other.keys()
    return max((one[key].double() - other[key].double()).abs().max().item() for key in one if one[key].numel())


def equal_bytes(one, other):
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and one[key].shape == other[key].shape and torch.equal(one[key], other[key])
        for key in one
    )


@pytest.fixture
def plug_in(monkeypatch):
    """Return a function that registers a merge function as the method "broken"."""
    find = registry.merge_method

    def add(merge, **contract):
        method = MergeMethod(name="broken", merge=merge, **contract)
        monkeypatch.setattr(registry, "merge_method", lambda name: method if name == method.name else find(name))
        return method.name

    return add


# --- which models come out -------------------------------------------------------------------------------------------

NEAR = 1e-7  # of values near 0.1; what solves a linear system adds a ridge of 1e-8


def check_first_weight(name, based):
    method = registry.merge_method(name)
    models, base = make_case(name, based)
    weights = [1.0] + [0.0] * (len(models) - 1)
    merged = merge_tensors(name, models, base, weights=weights, **method.keeps)
    assert find_difference(merged, models[0]) <= NEAR


@every_method
def test_weights_of_the_first_alone_give_the_first_model(name, based):
    method = registry.merge_method(name)
    if "weights" not in method.parameters or method.keeps is None:
        pytest.skip("it has no weights, or promises nothing")
    check_first_weight(name, based)


def average_equally(tensors, *, weights: list[float] | None = None):
    return torch.stack(list(tensors)).mean(0)


def test_a_method_that_ignores_weights_is_found(plug_in):
    with pytest.raises(AssertionError):
        check_first_weight(plug_in(average_equally), False)


def check_identical_models(name, based):
    method = registry.merge_method(name)
    models, base = make_case(name, based)
    merged = merge_tensors(name, [models[-1]] * len(models), base, **method.keeps)
    assert find_difference(merged, models[-1]) <= NEAR


@every_method
def test_identical_models_give_that_model(name, based):
    if registry.merge_method(name).keeps is None:
        pytest.skip("it promises nothing")
    check_identical_models(name, based)


def add_up(tensors):
    return torch.stack(list(tensors)).sum(0)


def test_a_method_that_adds_up_is_found(plug_in):
    for based in (False, True):
        with pytest.raises(AssertionError):
            check_identical_models(plug_in(add_up, base="optional"), based)


# --- the order of models ---------------------------------------------------------------------------------------------


def differences_by_order(name, based, parameters):
    """Yield the difference that another order of the models makes; values per model go along."""
    models, base = make_case(name, based)
    per_model = {key: value for key, value in parameters.items() if isinstance(value, list)}
    merged = merge_tensors(name, models, base, **parameters)
    backwards = range(len(models))[::-1]
    for order in (backwards, [*backwards[1:], *backwards[:1]]):
        own = {key: [value[i] for i in order] for key, value in per_model.items()}
        yield find_difference(merge_tensors(name, [models[i] for i in order], base, **parameters | own), merged)


def check_order(name, based):
    """Without weights sums are exact; with weights no two of them cancel, so that rounding flips no sign."""
    count, symmetric = count_models(name), registry.merge_method(name).symmetric
    settings = ({}, values_for(name, count))
    differences = [change for setting in settings for change in differences_by_order(name, based, setting)]
    if symmetric:
        assert max(differences, default=0) <= 1e-10
    else:
        assert max(differences) > GRID / 8


@every_method
def test_the_order_of_models_matters_where_a_method_says_so(name, based):
    check_order(name, based)


def take_first(tensors):
    return 1.0 * tensors[0]


def test_a_method_that_is_wrong_about_its_order_is_found(plug_in):
    for merge, symmetric in ((take_first, True), (average_equally, False)):
        with pytest.raises(AssertionError):
            check_order(plug_in(merge, symmetric=symmetric), False)
    check_order(plug_in(take_first, symmetric=False), False)


# --- pieces, files and processes -------------------------------------------------------------------------------------

LONG = {**SHAPES, "model.layers.0.self_attn.q_proj.weight": (40, 30)}  # more than one piece of 1000
STREAMED = {key: LONG[key] for key in (UNMOVED, "model.norm.weight", "model.layers.0.self_attn.q_proj.weight")}


def check_pieces(name, based, monkeypatch):
    monkeypatch.setattr(randomness, "BLOCK", 64)  # so that pieces end within blocks, and hold several
    models, base = make_case(name, based, torch.float32, shapes=STREAMED)
    merged = []
    for size in (1 << 18, 1000, 7):
        monkeypatch.setattr(lazy, "CHUNK", size)
        merged.append(merge_tensors(name, models, base, **values_for(name, len(models))))
    assert all(equal_bytes(other, merged[0]) for other in merged[1:])


@every_method
def test_pieces_of_any_size_give_equal_bytes(name, based, monkeypatch):
    check_pieces(name, based, monkeypatch)


def centre(tensors):
    return tensors[0] - tensors[0].mean()


def test_a_method_that_needs_more_than_its_piece_is_found(plug_in, monkeypatch):
    for kind in ("elements", "rows"):
        with pytest.raises(AssertionError):
            check_pieces(plug_in(centre, pieces=kind), False, monkeypatch)
    check_pieces(plug_in(centre), False, monkeypatch)


def save_case(name, based, folder):
    """Save the models of a case in folders, the first one in shards; return (models, base, folders, folder of it)."""
    models, base = make_case(name, based, torch.float32, shapes=STREAMED)
    folders = [Checkpoint.open(model).save(folder / letter) for model, letter in zip(models, "abc", strict=False)]
    Checkpoint.open(models[0]).save(folder / "a", overwrite=True, max_shard_size="2KB")
    return models, base, folders, None if base is None else Checkpoint.open(base).save(folder / "base")


def open_case(folders, base):
    return [Checkpoint.open(folder) for folder in folders], None if base is None else Checkpoint.open(base)


@every_method
def test_files_and_memory_give_equal_bytes(name, based, tmp_path):
    models, base, *stored = save_case(name, based, tmp_path)
    parameters = values_for(name, len(models))
    opened, opened_base = open_case(*stored)
    resolved = resolve_method(name, parameters)
    out = merging.combine(opened, resolved, base=opened_base).save(tmp_path / "out", max_shard_size="3KB")
    assert equal_bytes(dict(Checkpoint.open(out).tensors), merge_tensors(name, models, base, **parameters))


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from hf_rebasin import merge
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
models, base = [folder / name for name in "abc"], folder / "base"
for method in METHODS:
    merge(models, method, base=base, **PARAMETERS).save(folder / f"{method}-{rank}")
"""


def test_two_processes_give_equal_bytes(tmp_path):
    """Strings hash differently in them, so that the order of sets differs."""
    methods = ["ties", *RANDOM]
    models, base, *_ = save_case("ties", True, tmp_path)
    script = SCRIPT.replace("METHODS", repr(methods)).replace("PARAMETERS", "{'density': 0.5}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    running = [
        subprocess.Popen([*command, str(rank)], env=environment | {"PYTHONHASHSEED": str(rank)}) for rank in (0, 1)
    ]
    assert [process.wait() for process in running] == [0, 0]
    for name in methods:
        merged = merge_tensors(name, models, base, density=0.5)
        for rank in (0, 1):
            assert equal_bytes(load_file(tmp_path / f"{name}-{rank}" / "model.safetensors"), merged), name


# --- random numbers --------------------------------------------------------------------------------------------------


def find_mask(name, model, base, **settings):
    """Return which entries of one model's difference survive, by key."""
    merged = merge_tensors(name, [model], base, density=0.5, **settings)
    return {key: merged[key] != base[key] for key in base}


def check_masks(name):
    """Other masks for another seed, model or key, and for nothing else."""
    ones = {key: torch.ones(16, 16) for key in ("model.layers.0.x", "model.layers.1.x")}
    base = {key: torch.zeros(16, 16) for key in ones}
    twos = {key: 2 * tensor for key, tensor in ones.items()}
    mask = find_mask(name, ones, base)
    assert equal_bytes(find_mask(name, ones, base), mask)
    assert equal_bytes(find_mask(name, dict(reversed(ones.items())), base), mask), "the order of keys"
    first, second = mask.values()
    assert first.any()
    assert not first.all()
    others = [find_mask(name, ones, base, seed=1), find_mask(name, twos, base)]
    assert not any(torch.equal(first, other) for other in (second, *(mask["model.layers.0.x"] for mask in others)))


@pytest.mark.parametrize("name", RANDOM)
def test_masks_depend_on_seed_model_and_key(name):
    check_masks(name)


def drop_at_random(tensors, *, densities: list[float] | None = None):
    return tensors[0] * (torch.rand(tensors[0].shape) < 0.5)


def drop_alike(tensors, *, densities: list[float] | None = None):
    return tensors[0] * (torch.rand(tensors[0].shape, generator=torch.Generator().manual_seed(0)) < 0.5)


def test_methods_with_random_numbers_of_their_own_are_found(plug_in):
    for merge in (drop_at_random, drop_alike, take_first):
        with pytest.raises((AssertionError, OptionError)):
            check_masks(plug_in(merge, base="required"))


@pytest.mark.parametrize("name", RANDOM)
def test_masks_do_not_depend_on_files_or_on_the_order_of_models(name, tmp_path):
    """Sums of multiples of a power of two are exact in any order."""
    models, base, *stored = save_case(name, True, tmp_path)
    parameters = {
        "density": 0.5,
        "rescale": False if registry.merge_method(name).parameters["rescale"] is bool else "none",
    }
    merged = merge_tensors(name, models, base, **parameters)
    assert equal_bytes(merge_tensors(name, *open_case(*stored), **parameters), merged)
    assert equal_bytes(merge_tensors(name, models[::-1], base, **parameters), merged)
    models[1][UNMOVED] = models[1][UNMOVED] + GRID  # other content, so other masks of all its tensors
    changed = merge_tensors(name, models, base, **parameters)
    assert not torch.equal(changed["model.norm.weight"], merged["model.norm.weight"]) or not torch.equal(
        changed["model.layers.0.self_attn.q_proj.weight"], merged["model.layers.0.self_attn.q_proj.weight"]
    )


# --- half precision --------------------------------------------------------------------------------------------------


def unit(values, dtype):
    """Return the distance of neighbouring numbers of a dtype at some values."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp_min(info.tiny))
    return torch.ldexp(torch.full_like(values, info.eps), exponent - 1)


def check_half_precision(name, based, dtype, monkeypatch):
    """Half a unit, and what one rounding of a sum in float32 may add to it."""
    monkeypatch.setattr(merging, "content_hash", lambda checkpoint: checkpoint.name.encode())  # equal masks
    models, base = draw_models(count_models(name), dtype)
    generator = torch.Generator().manual_seed(1)
    for model in models:  # sums that need more bits than the dtype has
        for key in (key for key in model if key != UNMOVED):
            model[key] = (model[key].double() * (1 + torch.rand(model[key].shape, generator=generator))).to(dtype)
    wide = [{key: tensor.double() for key, tensor in model.items()} for model in (*models, base)]
    parameters = values_for(name, len(models))
    merged = merge_tensors(name, models, base if based else None, **parameters)
    exact = merge_tensors(name, wide[:-1], wide[-1] if based else None, **parameters)
    for key, tensor in merged.items():
        assert tensor.dtype == dtype
        error = (tensor.double() - exact[key]).abs()
        allowed = 0.5 * unit(exact[key], dtype) * (1 + (0 if based else 2.0**-10))
        assert (error <= allowed).all(), (key, (error / allowed).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_method
def test_half_precision_is_rounded_once(name, based, dtype, monkeypatch):
    check_half_precision(name, based, dtype, monkeypatch)


def average_narrowly(tensors):
    narrow = torch.bfloat16 if tensors[0].dtype == torch.float32 else torch.float64
    return torch.stack([tensor.to(narrow) / 3 for tensor in tensors]).sum(0).to(tensors[0].dtype)


def test_a_method_that_rounds_on_the_way_is_found(plug_in, monkeypatch):
    with pytest.raises(AssertionError):
        check_half_precision(plug_in(average_narrowly), False, torch.bfloat16, monkeypatch)
    check_half_precision(plug_in(average_equally), False, torch.bfloat16, monkeypatch)


# --- values that are refused -----------------------------------------------------------------------------------------


def check_broken_values(name, based, bad):
    models, base = make_case(name, based, torch.float32)
    key = "model.layers.0.mlp.up_proj.weight"
    everything = [*models, *([base] if based else [])]
    for model, letter in zip(everything, [*"abc"[: len(models)], "base"], strict=False):
        kept = model[key]
        model[key] = kept.clone().index_fill_(1, torch.tensor([2]), bad)
        with pytest.raises(CheckpointError) as caught:
            merge_tensors(name, models, base)
        assert str(caught.value).startswith(f"{letter}: {key} (6, 5) has 6 values that are NaN or infinite of 30")
        model[key] = kept


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@every_method
def test_nan_and_infinity_are_refused_in_any_model(name, based, bad):
    check_broken_values(name, based, bad)


def test_values_that_are_let_through_are_found(plug_in, monkeypatch):
    monkeypatch.setattr(pieces, "all_finite", lambda tensor: True)
    with pytest.raises(pytest.fail.Exception):
        check_broken_values("linear", False, math.nan)


def check_overflow(name, based):
    *models, base = (
        {key: tensor + 1e6 for key, tensor in model.items()}
        for model in [*draw_models(count_models(name))[0], draw_models(1)[1]]
    )
    parameters = values_for(name, len(models))
    with pytest.raises(CheckpointError, match=r"^model\S+ of the merge has values that do not fit torch.float16"):
        merge_tensors(name, models, base if based else None, dtype=torch.float16, **parameters)


@every_method
def test_results_that_do_not_fit_are_refused(name, based):
    check_overflow(name, based)


def shrink(tensors):
    return 1e-6 * tensors[0]


def test_results_that_fit_are_not_refused(plug_in):
    with pytest.raises(pytest.fail.Exception):
        check_overflow(plug_in(shrink), False)


# --- parameters ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unread(Lazy):
    """A tensor whose values must not be read."""

    @property
    def lasting(self):
        return True

    def ready(self):
        return self

    def chunk(self, start, stop):
        raise AssertionError("values are read")


def unread(count):
    """Return models whose values must not be read."""
    parts = {key: Unread(shape, torch.float32) for key, shape in SHAPES.items()}
    return [Checkpoint(Tensors(parts), name=letter) for letter in "abcdefg"[:count]]


def wrong_values(name):
    """Yield (parameter, a value that is wrong for a method)."""
    method, count = registry.merge_method(name), count_models(name)
    for parameter, kind in method.parameters.items():
        if is_per_model(kind):
            yield from ((parameter, [1.0] * (count + more)) for more in (1, -1) if count + more)
            yield from ((parameter, [*[1.0] * (count - 1), bad]) for bad in (math.nan, math.inf))
        elif kind is float:
            yield from ((parameter, bad) for bad in (math.nan, math.inf))
        yield parameter, "wrong"
        yield parameter, {"value": 1}


def check_wrong_values(name, based):
    count = count_models(name)
    for parameter, value in wrong_values(name):
        *models, base = unread(count + 1)
        with pytest.raises(OptionError) as caught:
            merge_tensors(name, models, base if based else None, **{parameter: value})
        words = {parameter, registry.singular(parameter)}
        assert any(word in str(caught.value) for word in words), (parameter, value, str(caught.value))


@every_method
def test_wrong_parameters_are_refused_before_any_value_is_read(name, based):
    check_wrong_values(name, based)


def scale(tensors, *, factor: float = 1.0):
    return factor * tensors[0]


def test_a_method_that_checks_nothing_is_found(plug_in):
    with pytest.raises((pytest.fail.Exception, CheckpointError)):
        check_wrong_values(plug_in(scale), False)


def check_gaps(name, based):
    """None stands for the default of a model that has no number of its own."""
    method = registry.merge_method(name)
    models, base = make_case(name, based)
    opened = [named(model, letter) for model, letter in zip(models, "abc", strict=False)]
    base = None if base is None else named(base, "base")

    def merge_with(parameter, values):
        resolved = make_resolved(method, {parameter: PerModel(tuple(values))})
        return dict(merging.combine(opened, resolved, base=base).tensors)

    plain = merge_tensors(name, models, base)
    for parameter in method.per_model.values():
        gaps = [None] * len(models)
        assert equal_bytes(merge_with(parameter, gaps), plain)
        merge_with(parameter, [VALUES.get(parameter, [0.5])[0], *gaps[1:]])


@every_method
def test_a_model_without_a_number_has_the_default(name, based):
    check_gaps(name, based)


def average_gaps(tensors, *, weights: list[float] | None = None):
    weights = [weight or 0.0 for weight in weights or [1.0] * len(tensors)]
    return sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True)) / len(tensors)


def test_a_method_that_drops_models_without_a_number_is_found(plug_in):
    with pytest.raises(AssertionError):
        check_gaps(plug_in(average_gaps), False)


def check_defaults(name):
    for keyword in inspect.signature(registry.merge_method(name).merge).parameters.values():
        if keyword.kind is keyword.KEYWORD_ONLY and keyword.name not in registry.FILLED_IN:
            default = keyword.default
            assert default is not keyword.empty, keyword.name
            assert default is None or isinstance(default, str) or math.isfinite(default), keyword.name


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_has_a_default(name):
    check_defaults(name)


def scale_by(tensors, *, scale: float):
    return scale * tensors[0]


def cut_off(tensors, *, most: float = math.inf):
    return tensors[0].clamp(max=most)


def test_parameters_without_a_default_are_found(plug_in):
    for merge in (scale_by, cut_off):
        with pytest.raises(AssertionError):
            check_defaults(plug_in(merge))


# --- small tensors and bases -----------------------------------------------------------------------------------------

SMALL = [(0,), (0, 3), (3, 0), (), (1,), (1, 1), (1, 4), (4, 1)]


def check_small(name, based):
    """Zeros, equal models, opposite differences, and ordinary values."""
    count = count_models(name)
    for shape in SMALL:
        key = "model.layers.0.mlp.up_proj.weight"
        ones = torch.ones(shape)
        for values in ([0.0] * 3, [1.0] * 3, [1.0, -1.0, 0.0], [0.5, 2.0, -0.25]):
            for origin in (0.0, 1.0):
                models = [{key: origin + value * ones} for value in values[:count]]
                for parameters in ({}, values_for(name, count)):
                    base = {key: origin * ones} if based else None
                    merged = merge_tensors(name, models, base, **parameters)[key]
                    assert merged.shape == shape
                    assert merged.isfinite().all()
                    assert any(values) or torch.equal(merged, models[0][key]), (
                        "where no model moved, nor does the merge"
                    )


@every_method
def test_the_smallest_tensors_have_finite_merges(name, based):
    check_small(name, based)


def test_a_method_that_fails_on_empty_tensors_is_found(plug_in):
    with pytest.raises((AssertionError, CheckpointError)):
        check_small(plug_in(lambda tensors: tensors[0] / tensors[0].norm()), False)
    with pytest.raises((AssertionError, RuntimeError)):
        check_small(plug_in(lambda tensors: tensors[0] - tensors[0].max()), False)


def check_base(name):
    use, count = registry.merge_method(name).base, count_models(name)
    *models, base = unread(count + 1)
    if use == "required":
        with pytest.raises(OptionError, match=rf"'{name}' merges differences .*; name it \(base_model in a recipe"):
            merge_tensors(name, models)
    if use == "none":
        with pytest.raises(OptionError, match=rf"'{name}' does not use a base model; leave it out, or list it"):
            merge_tensors(name, models, base)


@pytest.mark.parametrize("name", METHODS)
def test_a_base_is_asked_for_or_refused(name):
    check_base(name)


def test_a_method_that_takes_what_it_does_not_use_is_found(monkeypatch):
    monkeypatch.setattr(merging, "refuse_unfit_base", lambda method, has_base: None)
    for name in ("linear", "ties"):
        with pytest.raises((pytest.fail.Exception, AssertionError)):
            check_base(name)
