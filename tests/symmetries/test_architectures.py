"""Every architecture merges without alignment, from file keys alone.

Expected results are computed without the package: files are read with safetensors, and means are rounded by hand.
"""

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from safetensors import safe_open
from safetensors.torch import save_file

from hf_rebasin import merge

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FRACTION = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}  # bits of the mantissa
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def build(name):
    kind, settings = ARCHITECTURES[name]
    owner = getattr(transformers, kind)
    return owner(owner.config_class(**settings)).eval()


@torch.no_grad()
def randomise(model, seed):
    """Make all stored values random over many orders of magnitude, so that adding two loses bits of one of them."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            scale = 2.0 ** torch.randint(-12, 3, tensor.shape, generator=generator)
            zeros = torch.rand(tensor.shape, generator=generator) < 0.02  # of both signs
            noise = noise * scale * ~zeros
            tensor.copy_(noise.abs() + 1e-3 if key.endswith("running_var") else noise)
        elif key.endswith("num_batches_tracked"):
            tensor.fill_(seed)
    return model


def read(folder):
    """`{key: tensor}` of all safetensors of a folder."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no dictionary
                assert key not in tensors
                tensors[key] = file.get_tensor(key)
    assert tensors
    return tensors


def rounded_mean(a, b):
    """Return the number of the dtype nearest to (a + b) / 2, ties to even, rounded once on the bits of float64.

    Two values of at most 11 bits whose exponents differ by less than 42 add up without loss in the 53 of float64, and
    so do most of float32; what an addition loses is itself a float64 (Knuth's TwoSum), and has to be 0 here, or else
    `exact` is False there. Halving is exact. Rounding to nearest even is then integer arithmetic: add half of the last
    kept place, less one where that place is even, and cut. What is left has as many bits as the dtype, so the
    conversion at the end has nothing to round. None is subnormal.
    """
    dtype = a.dtype
    x, y = (t.double().reshape(-1).numpy() for t in (a, b))
    total = x + y
    back = total - x
    exact = (x - (total - back)) + (y - back) == 0
    drop = np.uint64(52 - FRACTION[dtype])
    unit, bits = np.uint64(1), (total / 2).view(np.uint64)
    rounded = (bits + (unit << (drop - unit)) - unit + (bits >> drop & unit)) >> drop << drop
    mean = rounded.view(np.float64)
    assert ((mean == 0) | (np.abs(mean) >= torch.finfo(dtype).tiny)).all()
    return torch.from_numpy(mean).reshape(a.shape).to(dtype), torch.from_numpy(exact).reshape(a.shape)


def expected(a, b):
    """Return the expected merge of two tensors of one dtype."""
    if not a.is_floating_point():
        return a
    # Float64 has more than twice the bits of float32 and two more, so rounding a sum first to it changes nothing.
    mean = ((a.double() + b.double()) / 2).to(a.dtype)
    by_hand, exact = rounded_mean(a, b)
    if a.dtype is not torch.float32:  # torch goes from float64 to half precision by way of float32
        assert exact.all()
        return by_hand
    assert torch.equal(mean[exact], by_hand[exact])
    return mean


def same_bits(a, b):
    return torch.equal(a.view(BITS[a.element_size()]), b.view(BITS[b.element_size()]))


def wrong(merged, a, b):
    """List the errors in the merge of `a` and `b`, all three `{key: tensor}`."""
    errors = [f"{key} is missing" for key in sorted(a.keys() - merged.keys())]
    errors += [f"{key} is new" for key in sorted(merged.keys() - a.keys())]
    for key in sorted(a.keys() & merged.keys()):
        got, want = merged[key], expected(a[key], b[key])
        if (got.shape, got.dtype) != (want.shape, want.dtype):
            errors.append(f"{key} is {tuple(got.shape)} {got.dtype}, not {tuple(want.shape)} {want.dtype}")
        elif not same_bits(got, want):
            errors.append(f"{key} is not the mean in {(got != want).sum()} places of {got.numel()}")
    return errors


class Pair(NamedTuple):
    """Folders of two models of one class and one dtype, saved by transformers, and how many parameters each has."""

    owner: type
    dtype: torch.dtype
    a: Path
    b: Path
    parameters: int


def saved(model, folder):
    for seed, name in enumerate(("a", "b"), 3):
        randomise(model, seed).save_pretrained(folder / name)
    return folder / "a", folder / "b"


@pytest.fixture(scope="module", params=[(name, dtype) for name in ARCHITECTURES for dtype in DTYPES], ids="-".join)
def pair(request, tmp_path_factory):
    """Not to be changed: all tests see the same."""
    name, dtype = request.param
    model = build(name).to(DTYPES[dtype])
    folders = saved(model, tmp_path_factory.mktemp(name))
    return Pair(type(model), DTYPES[dtype], *folders, len(list(model.parameters())))


def test_the_merge_has_the_keys_of_the_first_and_the_mean_of_both(pair, tmp_path):
    first, second = read(pair.a), read(pair.b)
    assert first.keys() == second.keys()
    floating = [key for key, tensor in first.items() if tensor.is_floating_point()]
    assert {first[key].dtype for key in floating} == {pair.dtype}
    assert not any(same_bits(first[key], second[key]) for key in floating if first[key].numel()), "nothing is the same"
    out = merge([pair.a, pair.b]).save(tmp_path / "out")
    merged = read(out)
    assert wrong(merged, first, second) == []
    assert json.loads((out / "config.json").read_text()) == json.loads((pair.a / "config.json").read_text())

    model, info = pair.owner.from_pretrained(out, dtype=pair.dtype, output_loading_info=True)
    assert {problem: keys for problem, keys in info.items() if keys} == {}, "it loads clean"
    model.save_pretrained(tmp_path / "again")
    again = read(tmp_path / "again")
    assert again.keys() == merged.keys()  # with the values of the file; a few classes widen some to float32
    assert all(same_bits(again[key].double(), tensor.double()) for key, tensor in merged.items())
    assert len(list(model.parameters())) == pair.parameters, "what was tied is tied"


def merges_with(settings, folders, copies):
    """Whether two folders merge with other settings in their configurations and the same weights."""
    a, b = (shutil.copytree(folder, copies / folder.name) for folder in folders)
    for folder in (a, b):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({k: x for k, x in (config | settings).items() if x is not None})
        )
    out = merge([a, b]).save(copies / "out")
    assert json.loads((out / "config.json").read_text()) == json.loads((a / "config.json").read_text())
    return wrong(read(out), read(a), read(b)) == []


def test_it_takes_no_class(pair, tmp_path):
    """Files with a model type that transformers does not know."""
    assert merges_with({"model_type": "of-tomorrow", "architectures": ["New"]}, (pair.a, pair.b), tmp_path)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("detr", {"backbone_config": None, "backbone": "resnet50", "use_timm_backbone": True}),  # as on the Hub
        ("swin", {"model_type": "dinat", "architectures": ["DinatForImageClassification"]}),
        ("gemma2", {"layer_types": ["sliding_attention", "attention_of_tomorrow"]}),
        ("llama", {"architectures": ["LlamaForTomorrow"]}),
        ("t5", {"architectures": None}),
        ("clip", {"model_type": "clip_text_model", "architectures": ["CLIPOfSomebody"]}),
    ],
    ids=["needs timm", "needs natten", "unknown setting", "unknown class", "no class", "another class"],
)
def test_what_cannot_be_built_here_merges(name, settings, tmp_path):
    """Transformers knows the type but cannot build the model; a mean does not need one."""
    assert merges_with(settings, saved(build(name), tmp_path / "as built"), tmp_path)


def test_there_are_many_architectures():
    kinds = {getattr(transformers, kind).config_class.model_type for kind, _ in ARCHITECTURES.values()}
    assert len(kinds) >= 34


def test_what_is_wrong_would_be_seen(tmp_path):
    """Negative controls, one for every kind of error."""
    a, b = ({k: t.clone() for k, t in randomise(build("resnet"), seed).state_dict().items()} for seed in (3, 4))
    good = {key: expected(a[key], b[key]) for key in a}
    assert wrong(good, a, b) == []
    key = "classifier.1.weight"
    count = next(k for k in a if k.endswith("num_batches_tracked"))
    one_off = good[key].clone()
    one_off.view(torch.int32)[0, 0] += 1
    minus = torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])
    for bad, says in (
        ({k: t for k, t in good.items() if k != key}, [f"{key} is missing"]),
        (good | {"more": torch.ones(1)}, ["more is new"]),
        (good | {key: one_off}, [f"{key} is not the mean in 1 places of 48"]),
        (good | {key: a[key]}, [f"{key} is not the mean in {(a[key] != good[key]).sum()} places of 48"]),
        (good | {key: good[key].T}, [f"{key} is (16, 3) torch.float32, not (3, 16) torch.float32"]),
        (good | {key: good[key].double()}, [f"{key} is (3, 16) torch.float64, not (3, 16) torch.float32"]),
        (good | {count: b[count]}, [f"{count} is not the mean in 1 places of 1"]),
    ):
        assert wrong(bad, a, b) == says
    assert torch.equal(*minus)
    assert not same_bits(*minus), "the sign of a zero is a bit, too"


def test_the_mean_is_rounded_to_the_nearest_and_ties_to_even():
    """In bfloat16, 1 is followed by 1 + 2^-7 and 1 + 2^-6, so means between them are easy to round by hand."""
    step = 2.0**-7
    for a, b, mean in (
        (1, 1, 1),
        (1, 1 + step, 1),  # half-way: the even one, below
        (1 + step, 1 + 2 * step, 1 + 2 * step),  # half-way: the even one, above
        (1, 1 + 3 * step, 1 + 2 * step),  # half-way again
        (1, 1 + 2 * step, 1 + step),
        (4, step, 2),
        (4, -4, 0),
        (-1 - step, -1 - 2 * step, -1 - 2 * step),
    ):
        x, y = torch.tensor([a, b], dtype=torch.bfloat16).reshape(2, 1)
        assert [x.item(), y.item()] == [a, b]
        (by_hand,), (exact,) = rounded_mean(x, y)
        assert exact
        assert by_hand.item() == mean
        assert merge([{"w": x}, {"w": y}]).tensors["w"].item() == mean


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float16], ids=[*DTYPES, "float16"])
def test_the_mean_of_three_is_within_half_a_step(dtype):
    """The mean of two is rounded once in any arithmetic, but the mean of three is not in the arithmetic of the dtype.

    A wider format rounds, too, by up to a 512th of a step.
    """
    states = [{k: t.to(dtype) for k, t in randomise(build("bert"), seed).state_dict().items()} for seed in (3, 4, 5)]
    states = [{k: t for k, t in state.items() if t.is_floating_point()} for state in states]
    worst = Fraction(0)
    for key, tensor in merge(states).tensors.items():
        columns = [t.flatten().tolist() for t in (tensor, *(state[key] for state in states))]
        for got, *values in zip(*columns, strict=True):
            step = Fraction(2) ** int(np.frexp(max(abs(got), torch.finfo(dtype).tiny))[1] - 1 - FRACTION[dtype])
            worst = max(worst, abs(Fraction(got) - sum(map(Fraction, values)) / 3) / step)
    assert Fraction(4, 10) < worst <= Fraction(1, 2) + Fraction(1, 2**9)


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float16], ids=[*DTYPES, "float16"])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_as_large_as_can_be_is_the_mean_of_itself(dtype, sign):
    """Masks hold the lowest number of the dtype, and the sum of two of them overflows."""
    lowest = {"mask": torch.full((4,), sign * torch.finfo(dtype).max, dtype=dtype)}
    assert same_bits(merge([lowest, lowest]).tensors["mask"], lowest["mask"])


@pytest.mark.parametrize("name", ["bert", "mixtral"])
def test_shards_merge_with_one_file(name, tmp_path):
    """How a model is split into files does not matter."""
    for seed, (folder, size) in enumerate((("a", "8KB"), ("b", "5GB")), 3):
        randomise(build(name), seed).save_pretrained(tmp_path / folder, max_shard_size=size)
    a, b = tmp_path / "a", tmp_path / "b"
    assert len(list(a.glob("*.safetensors"))) > 2
    for first, second in ((a, b), (b, a)):
        out = merge([first, second]).save(tmp_path / "out", overwrite=True, max_shard_size="8KB")
        assert len(list(out.glob("*.safetensors"))) > 2
        assert wrong(read(out), read(first), read(second)) == []
        _, info = getattr(transformers, ARCHITECTURES[name][0]).from_pretrained(out, output_loading_info=True)
        assert not any(info.values())


def test_dtypes_may_be_mixed(tmp_path):
    """Some keep norms or output maps of half-precision models in float32: each key has the dtype of the first."""
    for seed, folder in enumerate(("a", "b"), 3):
        tensors = {}
        for key, tensor in randomise(build("t5"), seed).state_dict().items():
            tensors[key] = tensor.clone().to(torch.float32 if ".wo." in key else torch.bfloat16)
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors", {"format": "pt"})
    a, b = tmp_path / "a", tmp_path / "b"
    assert {t.dtype for t in read(a).values()} == {torch.float32, torch.bfloat16}
    assert wrong(read(merge([a, b]).save(tmp_path / "out")), read(a), read(b)) == []


def test_weights_alone_are_enough(tmp_path):
    """A folder of nothing but weights, as some training loops write it."""
    a, b = saved(build("vit"), tmp_path)
    for folder in (a, b):
        (folder / "config.json").unlink()
    out = merge([a, b]).save(tmp_path / "out")
    assert not list(out.glob("*config*")), "no configuration is made up"
    assert wrong(read(out), read(a), read(b)) == []
