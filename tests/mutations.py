"""What may be wrong with a recipe, a model's folder or an alignment: one function each, drawn by a generator.

A mutation of a folder is called with (generator, world, folder or file) and returns False, or raises, where there is
nothing that it could change. One of a recipe changes the mapping; `Raw` values are put into its YAML as they are.
"""

import io
import json
import os
import pickle
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

import torch
import yaml

CHECKPOINTS, ALIGNMENTS, RECIPES = {}, {}, {}
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
PATHS = (
    *("..", ".", "../..", "/", "~", "~nobody", "file:///etc/passwd", "https://example.com/x", "a\0b", "nobody/nothing"),
    *("../outside", "../outside/secret.txt", "/dev/zero", "/proc/self/mem", "a@b@c", "a@main", "-o", "a\nb", "\x1b[2J"),
    *("C:\\x", "//x/y", "x/y/z", "a/../../outside", "$HOME", "`id`", "{a,b}", "**", " ", "ö", "../cli", "__init__"),
    *("os.path", "linear.py", "_private", "hf_rebasin.cli", "x" * 10_000, "/" + "x/" * 3000),
)
NUMBERS = (0, -1, 1, 2, 0.5, 10**6, 10**9, 10**12, 2**63, 10**30, -(10**30), 1e308)
OTHERS = (None, True, False, "", [], {}, [[]], [None], {"a": 1}, {"a": {"b": [{}]}}, "no", "1", "NaN", [1] * 1000)
DEEP = 5_000


def junk(r):
    return r.choice((r.choice(PATHS), r.choice(NUMBERS), r.choice(OTHERS), float("inf"), float("nan")))


def places(said, path=()):
    """The paths to everything in nested mappings and lists."""
    items = said.items() if isinstance(said, dict) else enumerate(said) if isinstance(said, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(said, path):
    for key in path:
        said = said[key]
    return said


def somewhere(r, said):
    """(what holds it, its key) of something anywhere in a mapping."""
    *path, key = r.choice(sorted(places(said), key=repr))
    return at(said, path), key


def misspelt(r, word):
    i = r.randrange(len(word) + 1)
    return r.choice((word[:i] + word[i + 1 :], word[:i] + "x" + word[i:], word.upper(), f"{word} ", f"{word}\0"))


def mutates(*pools):
    def keep(function):
        for pool in pools:
            pool[function.__name__] = function
        return function

    return keep


# --- recipes ---------------------------------------------------------------------------------------------------------

GOOD = (
    {"models": ["a", "b"], "merge_method": "linear", "align": {"solver": "weight_matching", "seed": 0, "starts": 1}},
    {
        "models": [{"model": "a", "parameters": {"weight": 1.0}}, {"model": "b", "parameters": {"weight": 0.5}}],
        "merge_method": "linear",
        "parameters": {"normalize": True},
        "align": False,
        "dtype": "bfloat16",
    },
    {
        "models": ["a", "b"],
        "merge_method": "slerp",
        "base_model": "b",
        "parameters": {"t": 0.3},
        "assume": ["labels"],
        "align": {"starts": 1, "groups": "permutation", "hold": ["ff.*"]},
    },
    {
        "models": [{"model": "a"}, {"model": "b", "revision": None}],
        "parameters": {"weights": [1, 2]},
        "align": False,
        "backbone_only": False,
    },
)
DATA = {"dataset": "corpus.txt", "samples": 2, "batch_size": 1, "max_length": 4, "labels": False}


class Raw(str):
    """YAML as it is."""


def recipe_text(r, world, mutations):
    """The bytes of a recipe with mutations, first those of the mapping, then those of the text."""
    said, raw, changes = json.loads(json.dumps(r.choice(GOOD))), {}, []
    for mutation in mutations:
        with suppress(Exception):  # nothing is left that it could change
            change = mutation(r, world, said)
            changes += [change] if callable(change) else []

    def plain(value):
        if isinstance(value, Raw):
            raw[f"RAW-{len(raw)}-WAR"] = value
            return list(raw)[-1]
        if isinstance(value, dict):
            return {plain(key): plain(one) for key, one in value.items()}
        return [plain(one) for one in value] if isinstance(value, list) else value

    text = yaml.dump(plain(said), Dumper=_Flat, sort_keys=False, allow_unicode=True)
    for mark, value in raw.items():
        text = text.replace(mark, value)
    data = text.encode("utf-8", "surrogatepass")
    for change in changes:
        data = change(data)
    return data


class _Flat(yaml.SafeDumper):
    """Without aliases of its own."""

    def ignore_aliases(self, data):
        return True


def puts(*values):
    """A mutation that puts one of some values anywhere."""

    def change(r, world, said):
        held, key = somewhere(r, said)
        value = r.choice(values)
        held[key] = value(r, world) if callable(value) else value

    return change


def raws(name, *texts):
    RECIPES[name] = puts(*map(Raw, texts))


RECIPES["wrong type"] = puts(lambda r, world: junk(r))
RECIPES["path"] = puts(lambda r, world: r.choice(PATHS))
RECIPES["absolute path"] = puts(lambda r, world: str(r.choice((world.outside, world.outside / "model", world.root))))
RECIPES["deep nesting"] = puts(
    Raw("[" * DEEP + "]" * DEEP), Raw("{a: " * 200 + "1" + "}" * 200), Raw("[" * 60 + "]" * 60)
)
raws("huge number", "9" * 5000, "1e999", "0x" + "f" * 5000, "-" + "9" * 30, ":".join(["59"] * 500), "0b" + "1" * 9999)
raws("not a number", ".nan", ".inf", "-.inf", "2001-99-99", "2024-01-01", "12:30:45", "!!int x", "!!int ''")
raws("not a value", "!!float x", "!!bool x", "!!timestamp x", "!!binary '*'", "!!set {a}", "!!omap [a]", "!!null x")
raws("unresolved", "*nobody", "&a", "&a *a", "<<", "? a", "!", "!<x>", "%YAML 9", "@", "`", "\t", "- - -", "=")
raws("recursive alias", "&r [*r]", "&r {a: *r}", "&r [[*r], *r]", "&r {*r : 1}", "&r {<<: *r}")
raws(
    "tag",
    "!!python/object/apply:os.system ['echo run >> ../canary']",
    "!!python/object/new:subprocess.Popen [['touch', '../canary']]",
    "!!python/name:os.system",
    "!!python/module:antigravity",
    "!!python/tuple [1, 2]",
    "!!python/object:hf_rebasin.recipe.Recipe {}",
    "!x {a: b}",
    "!include ../outside/secret.txt",
    "!!str [a]",
    "!!map a",
    "!!seq a",
)


def bomb(levels, of="[{}]", each=9):
    """Laughs by the billion: every level says the one before it nine times over."""
    lists = ["&l0 " + of.format(", ".join(["lol"] * each))]
    lists += [f"&l{i} " + of.format(", ".join([f"*l{i - 1}"] * each)) for i in range(1, levels)]
    return Raw("[" + ", ".join(lists) + "]")


def merging_bomb(levels):
    levels = [f"- &m{i} {{<<: [*m{i - 1}, *m{i - 1}, *m{i - 1}], k{i}: 1}}" for i in range(1, levels)]
    return Raw("[&m0 {a: 1}, " + ", ".join(level[2:] for level in levels) + "]")


RECIPES["bomb"] = puts(bomb(9), bomb(30), bomb(300, each=2), merging_bomb(20), bomb(4))
RECIPES["aliases"] = puts(Raw("&x [0.5, 0.5]"), Raw("[&y a, *y]"), Raw("{<<: {seed: 1}}"), bomb(2, each=3))


@mutates(RECIPES)
def misspelt_key(r, world, said):
    held, key = somewhere(r, said)
    if isinstance(key, str):
        held[misspelt(r, key)] = held.pop(key)


@mutates(RECIPES)
def odd_key(r, world, said):
    held = at(said, r.choice([(), ("align",), ("parameters",), ("models", 0)]))
    if isinstance(held, dict):
        held[r.choice([*map(str, PATHS), "__class__", "model_extra", "self", Raw("? [a]\n: 1\n#"), Raw("1"), Raw("~")])] = 1


@mutates(RECIPES)
def missing_key(r, world, said):
    held, key = somewhere(r, said)
    del held[key]


@mutates(RECIPES)
def names(r, world, said):
    """Names of methods and solvers that are paths, parts of the package, or nobody."""
    said["merge_method"] = r.choice([*PATHS, "lerpp", "linear ", "Linear", "linear\0"])
    if r.random() < 0.5:
        said["align"] = {"solver": r.choice([*PATHS, "weight", "os", "weight_matching\n"])}


@mutates(RECIPES)
def models(r, world, said):
    others = ["a", "b", *PATHS, str(world.outside / "model"), "../outside/model", "b@", "@", "a/", "./a", "corpus.txt"]
    said["models"] = [r.choice(others) for _ in range(r.choice((0, 1, 2, 2, 2, 3, 500)))]


@mutates(RECIPES)
def data(r, world, said):
    """Data that are not there, not a dataset's, or somebody else's."""
    said[r.choice(("data", "evaluate"))] = DATA | {
        r.choice(("dataset", "files", "split", "column", "labels", "name", "revision", "samples")): junk(r)
    }


@mutates(RECIPES)
def repeated_key(r, world, said):
    return lambda text: text + b"\n" + r.choice((b"models: [a]", b"align: false", b"align: {seed: 0, seed: 1}"))


@mutates(RECIPES)
def cut_text(r, world, said):
    return lambda text: text[: r.randrange(len(text) + 1)]


@mutates(RECIPES)
def flipped_text(r, world, said):
    return lambda text: flipped(r, text, r.choice((1, 3, 20)))


@mutates(RECIPES)
def binary_text(r, world, said):
    return lambda text: r.choice((b"", b"\0", r.randbytes(1000), b"\x80\x04N.", b"\xff\xfe" + text, b"[1]", b"a", b"---"))


@mutates(RECIPES)
def another_encoding(r, world, said):
    kind = r.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-le"))
    return lambda text: text.decode("utf-8", "replace").encode(kind, "replace")


@mutates(RECIPES)
def odd_bytes(r, world, said):
    return lambda text: text.replace(b"a", r.choice((b"\xe9", b"\xff", b"\xed\xa0\x80", b"\0", b"\x1b", b"\xe2\x80\xa8")), 1)


@mutates(RECIPES)
def large_text(r, world, said):
    long = (b"x" * 3_000_000, b"# " + b"x" * 3_000_000, b"k: [" + b"1, " * 300_000 + b"1]", b"- " * 200_000, b"[" * 10**6)
    return lambda text: text + b"\n" + r.choice(long)


@mutates(RECIPES)
def several_documents(r, world, said):
    return lambda text: text + b"\n---\n" + text


@mutates(RECIPES)
def weights_that_break(r, world, said):
    """A good recipe of a broken model."""
    name = r.choice(sorted(CHECKPOINTS))
    CHECKPOINTS[name](r, world, world.work / r.choice("ab"))


# --- files of tensors ------------------------------------------------------------------------------------------------


def weights_in(r, model):
    """One of the files with weights that are still files; or the file itself."""
    if model.is_file():
        return model
    return r.choice(sorted(f for f in model.iterdir() if f.is_file() and f.suffix in (".safetensors", ".bin")))


def flipped(r, data, times):
    data = bytearray(data)
    for _ in range(times):
        data[r.randrange(len(data))] = r.randrange(256)
    return bytes(data)


def header_of(file):
    """(header, data) of a safetensors file."""
    data = file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def write_header(file, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def tensors_of(header):
    return sorted(key for key in header if key != "__metadata__")


def headers(function):
    """A mutation of one tensor's entry in a header: called with (generator, header, key)."""

    def change(r, world, model):
        file = weights_in(r, model)
        if file.suffix != ".safetensors":
            return False
        header, data = header_of(file)
        result = function(r, header, r.choice(tensors_of(header)))
        write_header(file, header if result is None else result, data)
        return None

    for pool in (CHECKPOINTS, ALIGNMENTS):
        pool[function.__name__] = change
    return change


@mutates(CHECKPOINTS, ALIGNMENTS)
def cut(r, world, model):
    file = weights_in(r, model)
    os.truncate(file, r.choice((0, 1, 7, 8, 9, file.stat().st_size - 1, r.randrange(file.stat().st_size))))


@mutates(CHECKPOINTS, ALIGNMENTS)
def longer(r, world, model):
    with weights_in(r, model).open("ab") as file:
        file.write(r.randbytes(r.choice((1, 8, 4096))))


@mutates(CHECKPOINTS, ALIGNMENTS)
def random_bytes(r, world, model):
    weights_in(r, model).write_bytes(r.randbytes(r.choice((0, 1, 8, 100, 5000))))


@mutates(CHECKPOINTS, ALIGNMENTS)
def flipped_bytes(r, world, model):
    file = weights_in(r, model)
    file.write_bytes(flipped(r, file.read_bytes(), r.choice((1, 3, 50))))


@mutates(CHECKPOINTS, ALIGNMENTS)
def flipped_header(r, world, model):
    file = weights_in(r, model)
    data = file.read_bytes()
    n = min(2000, len(data))
    file.write_bytes(flipped(r, data[:n], r.choice((1, 3, 10))) + data[n:])


@mutates(CHECKPOINTS, ALIGNMENTS)
def header_length(r, world, model):
    file = weights_in(r, model)
    data = file.read_bytes()
    n = r.choice((0, 1, 2, len(data) - 8, len(data) - 7, len(data), 10**8, 10**8 + 1, 2**32, 2**63, 2**64 - 1))
    file.write_bytes(n.to_bytes(8, "little") + data[8:])


@headers
def header_text(r, header, key):
    text = json.dumps(header)
    return r.choice(
        (
            *(b"", b"{", b"[]", b"null", b"1", b'"x"', b"[" * DEEP, b'{"a":' * DEEP, b"\xff\xfe", b"{}", b"\0" * 64),
            *(text.encode("utf-16"), text.encode() + b"x", b" " + text.encode(), json.dumps(list(header.items())).encode()),
            *(text.replace(key, "\ud800").encode("utf-8", "surrogatepass"), text.replace("0", "1e999", 1).encode()),
        )
    )


@headers
def repeated_name(r, header, key):
    again = json.dumps({key: header[key] | r.choice(({}, {"dtype": "I32"}, {"shape": [1]}))})
    return (json.dumps(header)[:-1] + "," + again[1:]).encode()


@headers
def offsets(r, header, key):
    first, last = header[key]["data_offsets"]
    step = r.choice((-8, -4, 4, 8, 10**6, 10**12, 2**63))
    header[key]["data_offsets"] = r.choice(
        ([first + step, last + step], [first, last + step], [last, first], [first], [], [first, last, last], None)
        + ([float(first), float(last)], [str(first), str(last)], [-1, 3], [0, 0], [True, last], {"0": 1}, [None, None])
    )


@headers
def overlapping(r, header, key):
    other = r.choice(tensors_of(header))
    header[key]["data_offsets"] = header[other]["data_offsets"]


@headers
def shape(r, header, key):
    shape = header[key]["shape"]
    header[key]["shape"] = r.choice(
        ([*reversed(shape)], [*shape, 1], [1, *shape], [n + 1 for n in shape], [-n for n in shape], [2**32, 2**32])
        + ([float(n) for n in shape], [True, *shape], [2**63, 0], [0, 10**12], "x", None, {}, [[n] for n in shape])
        + ([10**30], [], [1] * 70 + shape, [1] * 3000)
    )


@headers
def dtype(r, header, key):
    header[key]["dtype"] = r.choice(("F64", "F16", "BF16", "I32", "U32", "BOOL", "F8_E4M3", "C64", "f32", "", None, [], {}))


@headers
def entry(r, header, key):
    header[key] = r.choice((None, [], 3, "x", {}, {"dtype": "F32"}, header[key] | {"more": [1]}))


@headers
def metadata(r, header, key):
    header["__metadata__"] = r.choice((None, 3, [], {"format": "tf"}, {"format": 3}, {"x": "y" * 10_000}, {}))


@headers
def another_name(r, header, key):
    new = r.choice((*PATHS, "__class__", "__metadata__.x", "a..b", ".", key + "\n", key.upper(), key + ".9" * 500, "*", "<x>"))
    header[new if r.random() < 0.7 else key.replace("0", r.choice(("9", "-1", "99999999999", "x")))] = header.pop(key)


@headers
def exchanged(r, header, key):
    other = r.choice(tensors_of(header))
    header[key], header[other] = header[other], header[key]


@headers
def quantised(r, header, key):
    header[key.removesuffix(".weight") + r.choice((".qweight", ".SCB", ".weight_scale", ".absmax"))] = header.pop(key)


def with_tensors(function):
    """A mutation of the tensors of a file: called with (generator, tensors, key)."""

    def change(r, world, model):
        from safetensors.torch import load_file, save_file

        file = weights_in(r, model)
        pickled = file.suffix == ".bin"
        header = {} if pickled else header_of(file)[0].get("__metadata__")
        tensors = torch.load(file, weights_only=True) if pickled else load_file(file)
        function(r, tensors, r.choice(sorted(tensors)))
        torch.save(tensors, file) if pickled else save_file(tensors, file, header)

    for pool in (CHECKPOINTS, ALIGNMENTS):
        pool[function.__name__] = change
    return change


@with_tensors
def broken_values(r, tensors, key):
    bad = r.choice((float("nan"), float("inf"), -float("inf"), 3e38, 0.0, -1))
    tensors[key].reshape(-1)[: r.choice((1, 10**6))] = bad if tensors[key].is_floating_point() else r.choice((-1, 10**9))


@with_tensors
def tensor_gone(r, tensors, key):
    del tensors[key]


@with_tensors
def tensor_more(r, tensors, key):
    tensors[r.choice(("more", key + "x", "x." + key, key.replace("0", "1")))] = tensors[key].clone()


@with_tensors
def tensor_cut(r, tensors, key):
    tensors[key] = tensors[key][..., : r.randrange(2)].clone()


@with_tensors
def tensor_type(r, tensors, key):
    tensors[key] = tensors[key].to(r.choice((torch.int8, torch.bool, torch.float8_e5m2, torch.float64, torch.int64)))


# --- indexes and links -----------------------------------------------------------------------------------------------


def index_of(model):
    return next(model / name for name in INDEX if (model / name).is_file())


@mutates(CHECKPOINTS)
def index_place(r, world, model):
    file = index_of(model)
    said = json.loads(file.read_text())
    places = said["weight_map"]
    other = r.choice(
        ("../outside/model/model.safetensors", str(world.outside / "model" / "model.safetensors"), "../a/x", "~/x", "/dev/zero")
        + ("nobody.safetensors", ".", "..", "", "config.json", "a\0b", "x" * 300, file.name, "sub/x.safetensors", "..\\x")
    )
    for key in places if r.random() < 0.3 else [r.choice(sorted(places))]:
        places[key] = other
    file.write_text(json.dumps(said))


@mutates(CHECKPOINTS)
def index_says(r, world, model):
    file = index_of(model)
    said = json.loads(file.read_text())
    held, key = somewhere(r, said)
    if r.random() < 0.5:
        said["weight_map"] = held = dict(said["weight_map"])
        key = r.choice((*PATHS, "more"))
    held[key] = junk(r)
    file.write_text(json.dumps(said))


@mutates(CHECKPOINTS)
def json_text(r, world, model):
    """Any JSON file of the model, with other bytes."""
    file = r.choice(sorted(f for f in model.glob("*.json") if f.is_file()))
    text = file.read_bytes()
    texts = (b"", b"{", b"[]", b"null", b"3", b"[" * DEEP, b'{"a":' * DEEP, b"\xff", b"\0", r.randbytes(99), text[:-2], text * 2)
    more = (text.decode().encode("utf-16"), b"\xef\xbb\xbf" + text, b"{" + b'"a": 1, ' * 9 + text[1:], b'{"a": ' + b"9" * 5000 + b"}")
    file.write_bytes(r.choice((*texts, *more)))


@mutates(CHECKPOINTS)
def index_of_its_own(r, world, model):
    """An index in a folder that had none."""
    name = r.choice(INDEX)
    if r.random() < 0.7:
        for file in model.glob("*.safetensors"):
            file.rename(model / "kept.safetensors")
    (model / name).write_text(json.dumps({"weight_map": {"x": r.choice(("kept.safetensors", "../b/model.safetensors"))}}))


@mutates(CHECKPOINTS)
def weights_elsewhere(r, world, model):
    """Weights that are links, or no files at all."""
    file = weights_in(r, model)
    kept = file.rename(world.outside / f"kept{file.suffix}")
    target = r.choice(
        (kept, world.outside / "model" / "model.safetensors", world.outside / "secret.txt", Path("/dev/zero"), Path("/dev/null"))
        + (Path("/proc/self/mem"), world.outside / "nobody", file, world.outside, Path("/dev/stdin"), "fifo", "folder", "gone")
    )
    if target == "fifo":
        os.mkfifo(file)
    elif target == "folder":
        file.mkdir()
    elif target != "gone":
        file.symlink_to(target)


@mutates(CHECKPOINTS)
def side_file_elsewhere(r, world, model):
    """What goes along with a merge is a link to what is somebody else's."""
    kinds = ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja", "vocab.txt", "x.model", "modeling_x.py")
    file = model / r.choice(kinds)
    targets = (world.outside / "secret.txt", world.outside / "config.json", Path("/dev/zero"), world.outside, Path("nobody"))
    file.unlink(missing_ok=True)
    target = r.choice(targets)
    file.symlink_to(target if r.random() < 0.5 else os.path.relpath(target, model))


@mutates(CHECKPOINTS)
def side_folder_elsewhere(r, world, model):
    part = model / "1_Pooling"
    kind = r.choice(("link", "inside", "loops", "fifo"))
    if kind == "link":
        (world.outside / "part").mkdir()
        (world.outside / "part" / "config.json").write_text((world.outside / "config.json").read_text())
        part.symlink_to(world.outside / "part")
        return
    part.mkdir()
    (part / "config.json").write_text("{}")
    if kind == "inside":
        (part / "vocab.txt").symlink_to(world.outside / "secret.txt")
    elif kind == "loops":
        for name in "xyz":
            (part / name).symlink_to(".")
    else:
        os.mkfifo(part / "tokenizer.json")


@mutates(CHECKPOINTS)
def links_of_a_cache(r, world, model):
    """As the cache of the Hub lays it out: links to blobs beside the snapshots. Harmless."""
    blobs, snapshot = world.outside / "hub" / "blobs", world.outside / "hub" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in sorted(model.iterdir()):
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    model.rmdir()
    model.symlink_to(snapshot)


@mutates(CHECKPOINTS)
def odd_files(r, world, model):
    """What is not a model's lies in its folder."""
    name = r.choice(("x\n.model", "\x1b[2J.model", "tokenizer" + "x" * 200, "-rf.model", "vocab.*", "config.json.tokenizer"))
    (model / name).write_text("x")


# --- pickles ---------------------------------------------------------------------------------------------------------


class Payload:
    """Runs when it is unpickled by what lets it."""

    def __init__(self, call, *arguments):
        self.made = call, arguments

    def __reduce__(self):
        return self.made


def payload(r, world):
    code = f"import os; os.environ['HF_REBASIN_FUZZ_CANARY'] = '1'; open({str(world.canary)!r}, 'w')"
    return r.choice((Payload(os.system, world.payload()), Payload(exec, code), Payload(eval, f"exec({code!r})")))


@mutates(CHECKPOINTS)
def pickled_code(r, world, model):
    """Code in weights."""
    file = weights_in(r, model)
    what = r.choice(({"x": payload(r, world)}, payload(r, world), {"x": torch.ones(1), "y": [payload(r, world)]}))
    how = r.choice(("zip", "legacy", "bare"))
    if how == "bare":
        file.write_bytes(pickle.dumps(what))
    else:
        torch.save(what, file, _use_new_zipfile_serialization=how == "zip")


@mutates(CHECKPOINTS)
def code_beside(r, world, model):
    """Code in files that nobody asked for."""
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"):
        if not (model / name).exists():
            torch.save(payload(r, world), model / name)
    for name in ("__init__.py", "setup.py", "conftest.py", "sitecustomize.py", "modeling_bert.py", "tokenization_x.py"):
        (model / name).write_text(f"import os\nos.system({world.payload()!r})\n")


@mutates(CHECKPOINTS)
def pickled_others(r, world, model):
    """Pickles of other things than tensors by name, and of tensors that lie."""
    file = weights_in(r, model)
    if file.suffix != ".bin":
        return False
    state = torch.load(file, weights_only=True)
    key = r.choice(sorted(state))
    kind = r.choice(("list", "value", "key", "nested", "expanded", "sparse", "meta", "legacy", "deflated", "turned", "parameter"))
    if kind == "list":
        state = list(state.values())
    elif kind == "value":
        state[key] = r.choice((3, None, "x", [state[key]]))
    elif kind == "key":
        state[r.choice((3, None, ("a",), b"a"))] = state.pop(key)
    elif kind == "nested":
        state = {"state_dict": state, "epoch": 3}
    elif kind == "expanded":
        state[key] = torch.ones(1).expand(r.choice((10**6, 10**10, 10**15)))
    elif kind == "sparse":
        state[key] = torch.ones(2, 2).to_sparse()
    elif kind == "meta":
        state[key] = torch.empty(10**6, 10**6, device="meta")
    elif kind == "turned":
        state[key] = state[key].movedim(0, -1)
    elif kind == "parameter":
        state[key] = torch.nn.Parameter(state[key])
    torch.save(state, file, _use_new_zipfile_serialization=kind != "legacy")
    if kind == "deflated":
        _deflated(file, r.choice((0, 300_000_000)))
    return None


def _deflated(file, zeros):
    """The same records, compressed; the first storage as long as is said."""
    out = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, bytes(zeros) if zeros and "/data/0" in record.filename else old.read(record))
    file.write_bytes(out.getvalue())


# --- configurations and tokenizers -----------------------------------------------------------------------------------

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "max_position_embeddings")


def config_of(model, name="config.json"):
    return json.loads((model / name).read_text())


def configures(r, world, model, said, name="config.json"):
    (model / name).write_text(json.dumps(said))


@mutates(CHECKPOINTS)
def config_value(r, world, model):
    said = config_of(model)
    held, key = somewhere(r, said)
    held[key] = junk(r)
    configures(r, world, model, said)


@mutates(CHECKPOINTS)
def config_more(r, world, model):
    said = config_of(model)
    names = ("num_labels", "id2label", "label2id", "dtype", "torch_dtype", "architectures", "model_type", "attn_implementation")
    more = ("_attn_implementation", "quantization_config", "text_config", "rope_scaling", "pruned_heads", "tie_word_embeddings")
    said[r.choice((*names, *more, *PATHS, "__class__", "self", "to_dict", "name_or_path", "_name_or_path"))] = junk(r)
    configures(r, world, model, said)


@mutates(CHECKPOINTS)
def config_gone(r, world, model):
    said = config_of(model)
    del said[r.choice(sorted(said))]
    configures(r, world, model, said)


@mutates(CHECKPOINTS)
def huge_sizes(r, world, model):
    said = config_of(model)
    for key in r.sample((*SIZES, "num_labels", "type_vocab_size"), r.choice((1, 1, 2, 8))):
        said[key] = r.choice((10**5, 10**9, 10**12, 2**62, 10**30, 0, -1, 7))
    configures(r, world, model, said)


@mutates(CHECKPOINTS)
def another_type(r, world, model):
    said = config_of(model)
    others = ("gpt2", "llama", "resnet", "t5", "mixtral", "clip", "qwen2", "timm_backbone", "biogpt", "encoder-decoder", "vit")
    more = ("sentence-transformers", "__class__", "bert\n", "albert", "whisper", "rag", "auto", "layoutlmv2", "mamba", "swin")
    said["model_type"] = r.choice((*others, *more, *PATHS))
    if r.random() < 0.5:
        del said["architectures"]
    if r.random() < 0.3:
        said["num_hidden_layers"] = r.choice((10**6, 10**9))
    configures(r, world, model, said)


@mutates(CHECKPOINTS)
def own_code(r, world, model):
    """Code that transformers would run if it were trusted."""
    said = config_of(model)
    module = r.choice(("modeling_evil", "evil", "../outside/evil", "org/repo--modeling_evil"))
    classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForMaskedLM": "Model", "AutoTokenizer": ["Tokenizer", None]}
    said |= {
        "auto_map": {auto: f"{module}.{cls}" if isinstance(cls, str) else [f"{module}.Tokenizer", None] for auto, cls in classes.items()},
        "trust_remote_code": True,
        "custom_pipelines": {"x": {"impl": f"{module}.Model"}},
        "model_type": r.choice(("bert", "evil")),
        "architectures": [r.choice(("Model", "BertForMaskedLM"))],
        "_attn_implementation": r.choice(("eager", "org/kernel", "evil")),
    }
    for folder in (model, world.outside):
        for name in ("modeling_evil.py", "evil.py"):
            (folder / name).write_text(f"import os\nos.system({world.payload()!r})\nclass Model: pass\nConfig = Tokenizer = Model\n")
    configures(r, world, model, said)
    if r.random() < 0.5:
        tokens = config_of(model, "tokenizer_config.json")
        tokens |= {"auto_map": said["auto_map"], "tokenizer_class": "Tokenizer", "trust_remote_code": True}
        configures(r, world, model, tokens, "tokenizer_config.json")


@mutates(CHECKPOINTS)
def tokenizer_value(r, world, model):
    name = r.choice(("tokenizer.json", "tokenizer_config.json"))
    said = config_of(model, name)
    held, key = somewhere(r, said)
    held[key] = junk(r)
    configures(r, world, model, said, name)


@mutates(CHECKPOINTS)
def vocabulary(r, world, model):
    """Other tokens, gaps between their numbers, or numbers that are none."""
    said = config_of(model, "tokenizer.json")
    tokens = said["model"]["vocab"]
    word = r.choice(sorted(tokens))
    tokens[r.choice((word, "new", "\x1b[2J", ""))] = r.choice((tokens.pop(word), 10**9, -1, "x", None, 2**40, 0))
    configures(r, world, model, said, "tokenizer.json")


@mutates(CHECKPOINTS)
def side_file_gone(r, world, model):
    r.choice(sorted(f for f in model.glob("*.json") if f.is_file())).unlink()


@mutates(CHECKPOINTS)
def folder_gone(r, world, model):
    kind = r.choice(("gone", "file", "empty", "loop"))
    shutil.rmtree(model)
    if kind == "file":
        model.write_text("x")
    elif kind == "empty":
        model.mkdir()
    elif kind == "loop":
        model.symlink_to(model)


# --- alignments ------------------------------------------------------------------------------------------------------


def specs(function):
    """A mutation of the spec in an alignment's metadata: called with (generator, spec) of JSON."""

    def change(r, world, file):
        header, data = header_of(file)
        (name,) = header["__metadata__"]
        said = json.loads(header["__metadata__"][name])
        result = function(r, said)
        header["__metadata__"][name] = json.dumps(said) if result is None else result
        write_header(file, header, data)

    ALIGNMENTS[function.__name__] = change
    return change


@specs
def spec_value(r, said):
    held, key = somewhere(r, said)
    held[key] = junk(r)


@specs
def spec_gone(r, said):
    held, key = somewhere(r, said)
    del held[key]


@specs
def spec_text(r, said):
    return r.choice(("", "{", "[]", "null", "3", "[" * DEEP, '{"table": ' * DEEP, "x" * 10_000, json.dumps(said)[:-9]))


@specs
def spec_sizes(r, said):
    part = r.choice((said["table"]["sizes"], said["shapes"]))
    key = r.choice(sorted(part))
    n = r.choice((0, 10**6, 10**12, 2**70, -3))
    part[key] = [n] * len(part[key]) if isinstance(part[key], list) else n


@specs
def spec_patterns(r, said):
    rows = said["table"]["rows"]
    key = r.choice(sorted(rows))
    patterns = ("(" * DEEP, "a " * 50, "(a b) + (a b)", "residual", "_, _, _", "", "x, x'", "10000000, _", "+".join("a" * 3000))
    if r.random() < 0.6:
        rows[key] = r.choice(patterns)
    else:
        rows[r.choice(("{a,b}" * 30, "*." * 200, "<a>.<b>", "{", "{" * DEEP, "<x.*>.weight"))] = rows.pop(key)


@specs
def spec_groups(r, said):
    groups = said["table"]["groups"]
    key = r.choice(sorted(groups))
    groups[key] = r.choice(("held", "permutation", "invertible", "orthogonal", "rotary", "centred in vocab", "x", f"held in {key}", "scaled"))


@specs
def spec_ties(r, said):
    said["ties"] = {r.choice((*said["shapes"], "x")): r.choice((*said["shapes"], "y"))}
