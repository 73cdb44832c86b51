"""Streams: reading ranges and writing chunks gives what whole tensors in memory give, or nothing at all."""

import hashlib
import json
import os
import random
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, moved_copy, other_seed, same_tensors
from safetensors.torch import load_file, save_file
from torch import nn

from hf_rebasin import Alignment, Checkpoint, align, merge, registry
from hf_rebasin.checkpoints import checkpoint, folder, lazy
from hf_rebasin.checkpoints import tensor_files as files
from hf_rebasin.checkpoints.lazy import Computed, InMemory, Tensors
from hf_rebasin.checkpoints.tensor_files import DTYPES, read_file, write_file
from hf_rebasin.errors import CheckpointError, NoSpaceError, OptionError, TargetExistsError

ONE, MANY, INDEX = "model.safetensors", "model-00002-of-00003.safetensors", "model.safetensors.index.json"


def some_tensors():
    """Tensors of every dtype, with difficult names and shapes."""
    numbers = torch.Generator().manual_seed(0)
    tensors = {"b.ö\"'": torch.zeros(0, 4), "a scalar": torch.tensor(3.0), "a.10": torch.ones(2), "a.9": torch.ones(3)}
    for i, dtype in enumerate(DTYPES.values()):
        tensors[f"t{i}"] = torch.randint(0, 2, (5, i % 3 + 1), generator=numbers).to(dtype)
    return tensors


def test_files_are_byte_for_byte_those_of_the_library(tmp_path):
    tensors = some_tensors()
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    digest = write_file(tmp_path / "ours", {k: InMemory.of(t) for k, t in tensors.items()}, lambda _: None)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert digest == hashlib.sha256((tmp_path / "theirs").read_bytes()).hexdigest()
    again = read_file(tmp_path / "theirs")
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert again[key].dtype == tensor.dtype
        assert again[key].shape == tensor.shape
        assert again[key].read().tolist() == tensor.tolist()
        assert again[key].chunk(0, tensor.numel() // 2).tolist() == tensor.reshape(-1)[: tensor.numel() // 2].tolist()


def test_what_is_no_contiguous_tensor_is_written_as_it_looks(tmp_path):
    turned = torch.arange(6.0).reshape(2, 3).T
    write_file(tmp_path / "f", {"x": InMemory.of(turned), "y": InMemory.of(turned[1:])}, lambda _: None)
    assert torch.equal(load_file(tmp_path / "f")["x"], turned)
    assert torch.equal(load_file(tmp_path / "f")["y"], turned[1:])
    with pytest.raises(CheckpointError, match=r"safetensors files cannot hold torch.complex128"):
        write_file(tmp_path / "g", {"x": InMemory.of(turned.to(torch.complex128))}, lambda _: None)


@pytest.fixture
def reads(monkeypatch):
    """Record all reads of files, each by its offset and length."""
    seen = []
    fill = files.OpenFile.fill

    def spy(self, buffer, offset):
        seen.append((offset, len(buffer)))
        fill(self, buffer, offset)

    monkeypatch.setattr(files.OpenFile, "fill", spy)
    return seen


@pytest.fixture
def pair(bert, tmp_path):
    """Folders of two models in float32, the second in shards."""
    a, b = (Checkpoint.open(m).model(torch.float32) for m in (bert, other_seed(bert)))
    Checkpoint.open(a).save(tmp_path / "a")
    Checkpoint.open(b).save(tmp_path / "b", max_shard_size="17KB")
    assert (tmp_path / "b" / INDEX).is_file()
    return tmp_path / "a", tmp_path / "b"


def test_nothing_is_read_before_it_is_written(pair, reads, tmp_path):
    a, b = map(Checkpoint.open, pair)
    headers = list(reads)
    moved = Alignment.random(registry_spec(a), torch.Generator().manual_seed(0)).apply(b)
    merged = merge([a, moved])
    assert reads == headers, "opening, moving and merging read headers alone"
    size = sum(t.numel() * t.element_size() for t in load_file(pair[0] / ONE).values())
    out = merged.save(tmp_path / "out")
    written = header_size(out / ONE)
    assert sum(n for _, n in reads[len(headers) :]) == 2 * size + written, "and saving reads every byte once"


def header_size(file):
    """Return the bytes of a file's header, which is read once more when the output is checked."""
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def registry_spec(checkpoint):
    from hf_rebasin import spec_for

    return spec_for(checkpoint)


# all methods are held to it, on small tensors, in test_method_laws.py
@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare_linear", "model_stock", "tsv_m"])
def test_streamed_is_in_memory(method, pair, bert, tmp_path, monkeypatch):
    """For any length of chunks; moved tensors stream like all others."""
    g = Alignment.random(registry_spec(Checkpoint.open(pair[0])), torch.Generator().manual_seed(0))
    states = [dict(Checkpoint.open(folder).tensors) for folder in pair]
    base = (
        None
        if registry.merge_method(method).base == "none"
        else Checkpoint.open(other_seed(bert, 7)).model(torch.float32)
    )
    for name, others in (("plain", (pair[1], states[1])), ("moved", (g.apply(pair[1]), g.apply(states[1])))):
        kept = merge([states[0], others[1]], method, base=base)
        for size in (1000, 1 << 18):
            monkeypatch.setattr(lazy, "CHUNK", size)
            out = merge([pair[0], others[0]], method, base=base).save(tmp_path / f"{name}-{size}")
            assert same_tensors(out, kept), f"chunks of {size}"


def test_tensors_in_memory_are_merged_as_they_are_now():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    merged = merge([a, b])
    expected = merged.tensors["weight"].clone()
    with torch.no_grad():
        a.weight.zero_()
    assert torch.equal(merged.tensors["weight"], expected)


def test_a_file_that_is_replaced_is_still_read_as_it_was(pair, bert, tmp_path):
    a = Checkpoint.open(pair[0])
    expected = {k: t.clone() for k, t in a.tensors.items()}
    Checkpoint.open(other_seed(bert, 5)).save(pair[0], overwrite=True)
    assert all(torch.equal(t, expected[k]) for k, t in a.tensors.items())


def test_sums_are_those_of_the_files(pair):
    for model in pair:
        checksums = dict(line.split("  ")[::-1] for line in (model / "SHA256SUMS").read_text().splitlines())
        written = [file for file in model.iterdir() if file.name != "SHA256SUMS"]
        assert checksums == {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in written}


def test_a_configuration_is_that_of_the_weights_it_was_opened_with(pair, tmp_path):
    merged, settings = merge(list(pair)), json.loads((pair[0] / "config.json").read_text())
    (pair[0] / "config.json").write_text(json.dumps(settings | {"layer_norm_eps": 0.5}))
    assert json.loads((merged.save(tmp_path / "out") / "config.json").read_text()) == settings
    assert merged.model().config.layer_norm_eps == settings["layer_norm_eps"]
    for file in pair[0].iterdir():
        file.unlink()
    pair[0].rmdir()
    assert same_tensors(merged.model(), tmp_path / "out"), "what is open can be read to its end"
    with pytest.raises(CheckpointError, match=r"a is gone, with the tokenizer"):
        merged.save(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_tensor_in_two_shards_is_where_the_index_says(pair):
    b, names = pair[1], sorted(file.name for file in pair[1].glob("*.safetensors"))
    expected = {key: tensor.clone() for key, tensor in Checkpoint.open(b).tensors.items()}
    first, last = (load_file(b / name) for name in (names[0], names[-1]))
    key = next(iter(first))
    save_file(last | {key: first[key] + 1}, b / names[-1], {"format": "pt"})
    assert all(torch.equal(t, expected[k]) for k, t in Checkpoint.open(b).tensors.items())


# --- alignments between disk and memory ------------------------------------------------------------------------------


def test_alignments_from_disk_move_modules_and_the_other_way_round(family, tmp_path):
    moved, _ = moved_copy(family, seed=3)
    Checkpoint.open(family).save(tmp_path / "a")
    Checkpoint.open(moved).save(tmp_path / "b", max_shard_size="40KB")
    from_disk = align(tmp_path / "a", tmp_path / "b", starts=1).alignment.save(tmp_path / "disk.safetensors")
    from_modules = align(family, moved, starts=1).alignment.save(tmp_path / "modules.safetensors")
    assert all(load_file(from_modules)[name].equal(order) for name, order in load_file(from_disk).items())
    one = Alignment.load(from_disk).apply(moved)
    other = Alignment.load(from_modules).apply(tmp_path / "b").save(tmp_path / "moved")
    assert same_tensors(one, other)
    assert same_tensors(one, family)


# --- old files -------------------------------------------------------------------------------------------------------


def test_pickled_weights_merge_like_others(pair, tmp_path):
    a = Checkpoint.open(pair[0])
    for name, split in (("one", 1), ("two", 2)):
        out = tmp_path / name
        out.mkdir()
        (out / "config.json").write_text((pair[0] / "config.json").read_text())
        keys = list(a.tensors)
        shards = {f"pytorch_model-{i}.bin": keys[i::split] for i in range(split)}
        for file, mine in shards.items():
            torch.save({k: a.tensors[k] for k in mine}, out / (file if split > 1 else "pytorch_model.bin"))
        if split > 1:
            index = {"weight_map": {k: file for file, mine in shards.items() for k in mine}}
            (out / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        assert same_tensors(out, pair[0])
        assert same_tensors(merge([out, pair[1]]).save(tmp_path / f"m-{name}"), merge([pair[0], pair[1]]))
    torch.save(dict(a.tensors), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "old").mkdir()
    (tmp_path / "old.bin").rename(tmp_path / "old" / "pytorch_model.bin")
    assert same_tensors(tmp_path / "old", pair[0])


def test_pickled_weights_are_lazy(pair, reads, tmp_path):
    tensors = dict(Checkpoint.open(pair[0]).tensors)
    torch.save(tensors | {"slice": tensors["cls.predictions.bias"][5:9]}, tmp_path / "pytorch_model.bin")
    reads.clear()
    lazily = Checkpoint.open(tmp_path).tensors
    assert reads == []
    assert torch.equal(lazily["slice"], tensors["cls.predictions.bias"][5:9])
    assert [n for _, n in reads] == [16]
    matrix = tensors["bert.embeddings.word_embeddings.weight"]
    torch.save(tensors | {"turned": matrix.mT}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="was changed after it was opened"):
        _ = lazily["slice"]
    assert torch.equal(Checkpoint.open(tmp_path).tensors["turned"], matrix.mT)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/hf-rebasin-was-here",)


def test_pickles_run_no_code(tmp_path):
    for content, message in (
        ({"x": Evil()}, "cannot be read"),
        ({"x": 3}, "is not a state dict"),
        ([1], "is not a state dict"),
    ):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(tmp_path)
    torch.save({"x": torch.ones(1).expand(10**10)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"x \(10000000000,\) would be larger than the file"):
        Checkpoint.open(tmp_path)
    torch.save({"x": torch.ones(9)}, tmp_path / "stored.zip")
    packed = zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "stored.zip") as old, packed as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    with pytest.raises(CheckpointError, match=r"is compressed, which torch.save never does"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoint.open(tmp_path)
    assert not Path("/tmp/hf-rebasin-was-here").exists()


# --- what goes wrong -------------------------------------------------------------------------------------------------


def cut(file, at):
    os.truncate(file, at if at >= 0 else file.stat().st_size + at)


def header_says(file, change, more=0):
    """Return the file with another header, and extra bytes at its end."""
    data = file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    text = json.dumps(change(json.loads(data[8 : 8 + n]))).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :] + bytes(more))


def moved_by(step):
    """Return the header with all tensors but the first moved."""

    def change(header):
        names = [k for k in header if k != "__metadata__"]
        moved = {k: header[k] | {"data_offsets": [at + step for at in header[k]["data_offsets"]]} for k in names[1:]}
        return header | moved

    return change


def deep(levels):
    return levels.to_bytes(8, "little") + b"[" * levels


def first_name(header):
    return next(k for k in header if k != "__metadata__")


def first_tensor(message):
    def change(header):
        name = first_name(header)
        return header | {name: header[name] | message}

    return change


FAULTS = {
    "cut in the data": (lambda b: cut(b / MANY, -1), r"00002.* cannot be read: it is truncated"),
    "cut in the header": (
        lambda b: cut(b / MANY, 20),
        r"00002.* truncated, or not a safetensors file",
    ),
    "cut to nothing": (lambda b: cut(b / MANY, 3), r"00002.* cannot be read: it has 3 bytes"),
    "no safetensors": (
        lambda b: (b / MANY).write_bytes(b"\x08" + bytes(7) + b"not JSON"),
        r"00002.* no safetensors header",
    ),
    "other JSON": (
        lambda b: (b / MANY).write_bytes(b"\x08" + bytes(7) + b"[1, 2,3]"),
        r"00002.* no safetensors header",
    ),
    "a shape too large": (lambda b: header_says(b / MANY, first_tensor({"shape": [10**6]})), r"cannot fill bytes"),
    "no dtype of ours": (
        lambda b: header_says(b / MANY, first_tensor({"dtype": "F3"})),
        r"has dtype F3, which is not supported",
    ),
    "an overlap": (lambda b: header_says(b / MANY, moved_by(-4)), r"00002.* begins at byte \d+ instead of \d+"),
    "a hole": (lambda b: header_says(b / MANY, moved_by(4), more=4), r"00002.* begins at byte \d+ instead of \d+"),
    "more than is said": (lambda b: header_says(b / MANY, dict, more=4), r"00002.* its header describes \d+"),
    "a name twice": (
        lambda b: (b / MANY).write_bytes(b"\x10" + bytes(7) + b'{"a": 1, "a": 2}'),
        r"00002.* given twice",
    ),
    "a name that moves the cursor": (
        lambda b: header_says(b / MANY, lambda header: header | {"\x1b[2J": header.pop(first_name(header))}),
        r"the name '.x1b\[2J' has unprintable characters",
    ),
    "pairs": (lambda b: (b / MANY).write_bytes(b"\x02" + bytes(7) + b"[]"), r"a list, not an object"),
    "a deep header": (lambda b: (b / MANY).write_bytes(deep(10**5)), r"00002.* no safetensors header"),
    "a shape of fractions": (
        lambda b: header_says(b / MANY, first_tensor({"shape": [1e400]})),
        r"00002.* no safetensors header",
    ),
    "a deep index": (lambda b: (b / INDEX).write_text("[" * 10**5), r"is not JSON"),
    "a name that no system has": (lambda b: index_says(b, lambda m: m | {"x": "a\0b"}), r"cannot be read"),
    "no place": (
        lambda b: header_says(b / MANY, first_tensor({"data_offsets": [0]})),
        r"00002.* no safetensors header",
    ),
    "unreadable": (lambda b: ((b / MANY).unlink(), (b / MANY).mkdir()), r"00002.* cannot be read: not a file"),
    "missing": (lambda b: (b / MANY).unlink(), r"00002.* cannot be read: .*No such file"),
    "outside": (lambda b: index_says(b, lambda m: m | {"x": "../a/model.safetensors"}), r"points outside its folder"),
    "absolute": (lambda b: index_says(b, lambda m: m | {"x": "/etc/passwd"}), r"points outside its folder"),
    "a key too many": (lambda b: index_says(b, lambda m: m | {"x": MANY}), r"that are missing from its files: x"),
    "no map": (lambda b: (b / INDEX).write_text("{}"), r"has no weight_map"),
    "a map of lists": (lambda b: index_says(b, lambda m: {k: [f] for k, f in m.items()}), r"has no weight_map"),
}


def index_says(model, change):
    index = json.loads((model / INDEX).read_text())
    (model / INDEX).write_text(json.dumps(index | {"weight_map": change(index["weight_map"])}))


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_inputs_are_named_and_nothing_is_written(fault, pair, tmp_path):
    b = pair[1]
    assert (b / MANY).is_file()
    before = sorted(tmp_path.iterdir())
    breaks, message = FAULTS[fault]
    breaks(b)
    with pytest.raises(CheckpointError, match=message):
        merge([pair[0], b]).save(tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_is_cut_while_it_is_read(pair, tmp_path):
    merged = merge([pair[0], pair[1]])
    cut(pair[0] / ONE, -1)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"model.safetensors was changed after it was opened"):
        merged.save(tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_any_byte_of_a_header_may_be_wrong(tmp_path):
    """Either the file is read, or CheckpointError is raised; nothing else is, and nothing hangs."""
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, tmp_path / ONE)
    data = (tmp_path / ONE).read_bytes()
    chance = random.Random(0)
    for _ in range(400):
        at = chance.randrange(len(data) - 40)
        broken = data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
        (tmp_path / ONE).write_bytes(broken[: chance.choice([len(data), chance.randrange(len(data))])])
        with suppress(CheckpointError):
            tensors = Checkpoint.open(tmp_path).tensors
            assert sum(tensors[key].numel() * tensors[key].element_size() for key in tensors) == 40


def test_two_runs_do_not_write_to_one_target(pair, tmp_path, monkeypatch):
    write = folder.write_tensors
    errors = []

    def meanwhile(partial, *rest):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "write_tensors", write)
            with pytest.raises(TargetExistsError, match="another run is writing") as error:
                Checkpoint.open(pair[1]).save(tmp_path / "out")
            errors.append(error)
        return write(partial, *rest)

    monkeypatch.setattr(checkpoint, "write_tensors", meanwhile)
    out = Checkpoint.open(pair[0]).save(tmp_path / "out")
    assert len(errors) == 1
    assert same_tensors(out, pair[0])
    (tmp_path / ".other.partial").mkdir()
    (tmp_path / ".other.partial" / "thesis.tex").write_text("mine")
    with pytest.raises(TargetExistsError, match=r"holds entries that do not belong to a model \(thesis.tex\)"):
        Checkpoint.open(pair[0]).save(tmp_path / "other")
    assert (tmp_path / ".other.partial" / "thesis.tex").read_text() == "mine"


def test_what_cannot_be_written_is_said(pair, tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for model, name, size, error, message in (
        (pair[0], "circle", "5GB", TargetExistsError, "cannot be a folder|already"),
        ({}, "x", "5GB", CheckpointError, "no tensors"),
        ({"__metadata__": torch.ones(1)}, "x", "5GB", CheckpointError, "__metadata__"),
        (pair[0], "x", "huge", OptionError, "'huge' is not a size"),
    ):
        with pytest.raises(error, match=message):
            Checkpoint.open(model).save(tmp_path / name, max_shard_size=size)
        assert not (tmp_path / "x").exists()


def test_values_that_would_spread_are_found_on_the_way(pair, bert, tmp_path):
    key = "bert.encoder.layer.1.output.dense.weight"
    tensors = load_file(pair[0] / ONE)
    tensors[key][3, 1] = float("nan")
    save_file(tensors, pair[0] / ONE, {"format": "pt"})
    for models, name in ((pair, "a"), (pair[::-1], "a")):
        with pytest.raises(CheckpointError, match=rf"{name}: {key} \(.*\) has 1 values that are NaN"):
            merge(list(models)).save(tmp_path / "out")
    with pytest.raises(CheckpointError, match=rf"a: {key}"):
        merge(list(pair[::-1]), "lerp", t=0).save(tmp_path / "out")  # which uses nothing of it
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_is_said_first(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=99))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(NoSpaceError, match=r"has 0.00 GB left, but 0.00 GB are to be written") as error:
        merge(list(pair)).save(tmp_path / "out")
    assert isinstance(error.value, OSError)
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_runs_full(pair, tmp_path):
    """A limit on the size of files, in a process of its own, makes the real system call fail as on a full disk."""
    script = (
        "import resource, sys; from hf_rebasin.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "sys.argv = ['hf-rebasin', 'merge', 'a', 'b', '--no-align', '-o', 'out']; main()"
    )
    before = sorted(tmp_path.iterdir())
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "File too large" in done.stderr
    assert "model.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_computed_tensors_say_what_they_are():
    x = InMemory.of(torch.arange(6.0).reshape(2, 3))
    double = Computed(x.shape, x.dtype, [x], lambda tensors: tensors[0] * 2, True)
    assert (double.numel, double.nbytes, double.lasting) == (6, 24, False)
    assert torch.equal(Tensors({"x": double})["x"], x.tensor * 2)
    assert double.read().shape == (2, 3)


# --- killed at any moment --------------------------------------------------------------------------------------------

KILLED = """
import os, random, signal, sys, time
import torch
import transformers.conversion_mapping, transformers.models.bert.modeling_bert  # once, not in every child
import transformers.utils.loading_report
from hf_rebasin import merge
from hf_rebasin.checkpoints import lazy
torch.set_num_threads(1)
moments, overwrite = int(sys.argv[1]), sys.argv[2] == "overwrite"
lazy.CHUNK = 1 << 12
chance = random.Random(0)

def run():
    merge(["a", "b"]).save("out", overwrite=overwrite)

def child():
    pid = os.fork()
    if not pid:
        try:
            run()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid

seconds = []
for _ in range(3):  # the first of them warms up
    os.system("rm -rf first")
    start = time.perf_counter()
    assert os.waitpid(child(), 0)[1] == 0
    seconds.append(time.perf_counter() - start)
    os.rename("out", "first")
whole = min(seconds)
print(whole, flush=True)
killed = 0
for _ in range(moments):
    if overwrite and not os.path.exists("out") and not os.path.exists(".out.old"):
        os.system("cp -r old out")
    pid = child()
    time.sleep(chance.uniform(0, whole * 1.1))
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    _, status = os.waitpid(pid, 0)
    killed += os.WIFSIGNALED(status)
    there = sorted(name for name in os.listdir() if "out" in name)
    assert set(there) <= {"out", ".out.partial", ".out.old"}, there
    same = lambda x, y: os.system(f"diff -r {x} {y} > /dev/null") == 0
    if "out" in there:
        assert same("out", "first") or (overwrite and same("out", "old")), there
        if same("out", "first"):
            os.system("rm -rf out .out.old")  # killed while it removed what it had replaced: that may be half gone
    if overwrite and "out" not in there:
        assert same(".out.old", "old"), "what was there before is kept aside"
if overwrite and not os.path.exists("out") and not os.path.exists(".out.old"):
    os.system("cp -r old out")
assert os.waitpid(child(), 0)[1] == 0
assert os.system("diff -r out first") == 0
assert [name for name in os.listdir() if "out" in name] == ["out"], "leftovers are cleaned by the next run"
print("killed", killed)
"""


@pytest.mark.parametrize("overwrite", ["fresh", "overwrite"])
def test_a_killed_merge_leaves_all_or_nothing(overwrite, pair, bert, tmp_path):
    moments = 50
    for name in ("notes.txt", "layers/norms.py"):  # files that go along have any name
        (pair[0] / name).parent.mkdir(exist_ok=True)
        (pair[0] / name).write_text("of the model")
    merge([pair[0], bert]).save(tmp_path / "old")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(moments), overwrite],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > moments // 4, "most runs are killed in the middle"
