"""Mutations of tensor files (their bytes, headers, values and pickles), and of alignments, which are such files."""

import io
import json
import os
import pickle
import zipfile

import torch
from mutating import ALIGNMENTS, CHECKPOINTS, DEEP, PATHS, flip_bytes, junk, mutation_of, pick_entry
from safetensors.torch import load_file, save_file


def pick_weights(r, model):
    """Return one of a model's files of weights that are still files; or the file that is given."""
    if model.is_file():
        return model
    return r.choice(sorted(f for f in model.iterdir() if f.is_file() and f.suffix in (".safetensors", ".bin")))


def read_header(file):
    """Read (header, data) of a safetensors file."""
    data = file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def write_header(file, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def tensor_names(header):
    return sorted(key for key in header if key != "__metadata__")


def header_mutation(function):
    """Register a mutation of a tensor's entry in a header, a function of (generator, header, key)."""

    def change(r, world, model):
        file = pick_weights(r, model)
        if file.suffix != ".safetensors":
            return False
        header, data = read_header(file)
        result = function(r, header, r.choice(tensor_names(header)))
        write_header(file, header if result is None else result, data)
        return None

    for pool in (CHECKPOINTS, ALIGNMENTS):
        pool[function.__name__] = change
    return change


@mutation_of(CHECKPOINTS, ALIGNMENTS)
def cut(r, world, model):
    file = pick_weights(r, model)
    os.truncate(file, r.choice((0, 1, 7, 8, 9, file.stat().st_size - 1, r.randrange(file.stat().st_size))))


@mutation_of(CHECKPOINTS, ALIGNMENTS)
def longer(r, world, model):
    with pick_weights(r, model).open("ab") as file:
        file.write(r.randbytes(r.choice((1, 8, 4096))))


@mutation_of(CHECKPOINTS, ALIGNMENTS)
def random_bytes(r, world, model):
    pick_weights(r, model).write_bytes(r.randbytes(r.choice((0, 1, 8, 100, 5000))))


@mutation_of(CHECKPOINTS, ALIGNMENTS)
def flipped_bytes(r, world, model):
    file = pick_weights(r, model)
    file.write_bytes(flip_bytes(r, file.read_bytes(), r.choice((1, 3, 50))))


@mutation_of(CHECKPOINTS, ALIGNMENTS)
def flipped_header(r, world, model):
    file = pick_weights(r, model)
    data = file.read_bytes()
    n = min(2000, len(data))
    file.write_bytes(flip_bytes(r, data[:n], r.choice((1, 3, 10))) + data[n:])


@mutation_of(CHECKPOINTS, ALIGNMENTS)
def header_length(r, world, model):
    file = pick_weights(r, model)
    data = file.read_bytes()
    n = r.choice((0, 1, 2, len(data) - 8, len(data) - 7, len(data), 10**8, 10**8 + 1, 2**32, 2**63, 2**64 - 1))
    file.write_bytes(n.to_bytes(8, "little") + data[8:])


@header_mutation
def header_text(r, header, key):
    text = json.dumps(header)
    return r.choice(
        (
            *(b"", b"{", b"[]", b"null", b"1", b'"x"', b"[" * DEEP, b'{"a":' * DEEP, b"\xff\xfe", b"{}", b"\0" * 64),
            *(text.encode("utf-16"), text.encode() + b"x", b" " + text.encode()),
            json.dumps(list(header.items())).encode(),
            *(text.replace(key, "\ud800").encode("utf-8", "surrogatepass"), text.replace("0", "1e999", 1).encode()),
        )
    )


@header_mutation
def repeated_name(r, header, key):
    again = json.dumps({key: header[key] | r.choice(({}, {"dtype": "I32"}, {"shape": [1]}))})
    return (json.dumps(header)[:-1] + "," + again[1:]).encode()


@header_mutation
def offsets(r, header, key):
    first, last = header[key]["data_offsets"]
    step = r.choice((-8, -4, 4, 8, 10**6, 10**12, 2**63))
    header[key]["data_offsets"] = r.choice(
        (
            *([first + step, last + step], [first, last + step], [last, first], [first], [], [first, last, last]),
            *([float(first), float(last)], [str(first), str(last)], [-1, 3], [0, 0], [True, last], {"0": 1}),
            *([None, None], None),
        )
    )


@header_mutation
def overlapping(r, header, key):
    other = r.choice(tensor_names(header))
    header[key]["data_offsets"] = header[other]["data_offsets"]


@header_mutation
def shape(r, header, key):
    shape = header[key]["shape"]
    header[key]["shape"] = r.choice(
        (
            *(
                [*reversed(shape)],
                [*shape, 1],
                [1, *shape],
                [n + 1 for n in shape],
                [-n for n in shape],
                [2**32, 2**32],
            ),
            *([float(n) for n in shape], [True, *shape], [2**63, 0], [0, 10**12], "x", None, {}, [[n] for n in shape]),
            *([10**30], [], [1] * 70 + shape, [1] * 3000),
        )
    )


@header_mutation
def dtype(r, header, key):
    others = ("F64", "F16", "BF16", "I32", "U32", "BOOL", "F8_E4M3", "C64", "f32", "", None, [], {})
    header[key]["dtype"] = r.choice(others)


@header_mutation
def entry(r, header, key):
    header[key] = r.choice((None, [], 3, "x", {}, {"dtype": "F32"}, header[key] | {"more": [1]}))


@header_mutation
def metadata(r, header, key):
    header["__metadata__"] = r.choice((None, 3, [], {"format": "tf"}, {"format": 3}, {"x": "y" * 10_000}, {}))


@header_mutation
def another_name(r, header, key):
    odd = ("__class__", "__metadata__.x", "a..b", ".", key + "\n", key.upper(), key + ".9" * 500, "*", "<x>")
    new = r.choice((*PATHS, *odd))
    header[new if r.random() < 0.7 else key.replace("0", r.choice(("9", "-1", "99999999999", "x")))] = header.pop(key)


@header_mutation
def exchanged(r, header, key):
    other = r.choice(tensor_names(header))
    header[key], header[other] = header[other], header[key]


@header_mutation
def quantised(r, header, key):
    header[key.removesuffix(".weight") + r.choice((".qweight", ".SCB", ".weight_scale", ".absmax"))] = header.pop(key)


def tensor_mutation(function):
    """Register a mutation of the tensors of a file, a function of (generator, tensors, key)."""

    def change(r, world, model):
        file = pick_weights(r, model)
        pickled = file.suffix == ".bin"
        header = {} if pickled else read_header(file)[0].get("__metadata__")
        tensors = torch.load(file, weights_only=True) if pickled else load_file(file)
        function(r, tensors, r.choice(sorted(tensors)))
        torch.save(tensors, file) if pickled else save_file(tensors, file, header)

    for pool in (CHECKPOINTS, ALIGNMENTS):
        pool[function.__name__] = change
    return change


@tensor_mutation
def broken_values(r, tensors, key):
    bad = r.choice((float("nan"), float("inf"), -float("inf"), 3e38, 0.0, -1))
    whole = not tensors[key].is_floating_point()
    tensors[key].reshape(-1)[: r.choice((1, 10**6))] = r.choice((-1, 10**9)) if whole else bad


@tensor_mutation
def tensor_gone(r, tensors, key):
    del tensors[key]


@tensor_mutation
def tensor_more(r, tensors, key):
    tensors[r.choice(("more", key + "x", "x." + key, key.replace("0", "1")))] = tensors[key].clone()


@tensor_mutation
def tensor_cut(r, tensors, key):
    tensors[key] = tensors[key][..., : r.randrange(2)].clone()


@tensor_mutation
def tensor_type(r, tensors, key):
    tensors[key] = tensors[key].to(r.choice((torch.int8, torch.bool, torch.float8_e5m2, torch.float64, torch.int64)))


# --- pickles ---------------------------------------------------------------------------------------------------------


class Payload:
    """An object that calls a function when it is unpickled without protection."""

    def __init__(self, call, *arguments):
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


def make_payload(r, world):
    code = f"import os; os.environ['HF_REBASIN_FUZZ_CANARY'] = '1'; open({str(world.canary)!r}, 'w')"
    return r.choice((Payload(os.system, world.payload()), Payload(exec, code), Payload(eval, f"exec({code!r})")))


@mutation_of(CHECKPOINTS)
def pickled_code(r, world, model):
    """Put code into a file of weights."""
    file = pick_weights(r, model)
    value = r.choice(
        ({"x": make_payload(r, world)}, make_payload(r, world), {"x": torch.ones(1), "y": [make_payload(r, world)]})
    )
    form = r.choice(("zip", "legacy", "bare"))
    if form == "bare":
        file.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, file, _use_new_zipfile_serialization=form == "zip")


@mutation_of(CHECKPOINTS)
def code_beside(r, world, model):
    """Add files of code that nothing should load."""
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"):
        if not (model / name).exists():
            torch.save(make_payload(r, world), model / name)
    for name in ("__init__.py", "setup.py", "sitecustomize.py", "modeling_bert.py", "tokenization_x.py"):
        (model / name).write_text(f"import os\nos.system({world.payload()!r})\n")


@mutation_of(CHECKPOINTS)
def pickled_others(r, world, model):
    """Pickle something other than tensors by name, or tensors that are not what they seem."""
    file = pick_weights(r, model)
    if file.suffix != ".bin":
        return False
    state = torch.load(file, weights_only=True)
    key = r.choice(sorted(state))
    kinds = "list value key nested expanded sparse meta legacy deflated turned parameter"
    kind = r.choice(kinds.split())
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
        _deflate(file, r.choice((0, 300_000_000)))
    return None


def _deflate(file, zeros):
    """Compress the records of an archive; if `zeros` is given, replace the first storage by so many zeros."""
    out = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, bytes(zeros) if zeros and "/data/0" in record.filename else old.read(record))
    file.write_bytes(out.getvalue())


# --- alignments ------------------------------------------------------------------------------------------------------


def spec_mutation(function):
    """Register a mutation of the spec in an alignment's metadata, a function of (generator, spec as JSON)."""

    def change(r, world, file):
        header, data = read_header(file)
        (name,) = header["__metadata__"]
        spec = json.loads(header["__metadata__"][name])
        result = function(r, spec)
        header["__metadata__"][name] = json.dumps(spec) if result is None else result
        write_header(file, header, data)

    ALIGNMENTS[function.__name__] = change
    return change


@spec_mutation
def spec_value(r, spec):
    parent, key = pick_entry(r, spec)
    parent[key] = junk(r)


@spec_mutation
def spec_gone(r, spec):
    parent, key = pick_entry(r, spec)
    del parent[key]


@spec_mutation
def spec_text(r, spec):
    return r.choice(("", "{", "[]", "null", "3", "[" * DEEP, '{"table": ' * DEEP, "x" * 10_000, json.dumps(spec)[:-9]))


@spec_mutation
def spec_sizes(r, spec):
    part = r.choice((spec["table"]["sizes"], spec["shapes"]))
    key = r.choice(sorted(part))
    n = r.choice((0, 10**6, 10**12, 2**70, -3))
    part[key] = [n] * len(part[key]) if isinstance(part[key], list) else n


@spec_mutation
def spec_patterns(r, spec):
    rows = spec["table"]["rows"]
    key = r.choice(sorted(rows))
    patterns = ("(" * DEEP, "a " * 50, "(a b) + (a b)", "residual", "_, _, _", "", "x, x'", "10000000, _")
    patterns += ("+".join("a" * 3000), "(" + "(a + b) " * 30 + ")")
    if r.random() < 0.6:
        rows[key] = r.choice(patterns)
    else:
        rows[r.choice(("{a,b}" * 30, "*." * 200, "<a>.<b>", "{", "{" * DEEP, "<x.*>.weight"))] = rows.pop(key)


@spec_mutation
def spec_groups(r, spec):
    groups = spec["table"]["groups"]
    key = r.choice(sorted(groups))
    kinds = ("held", "permutation", "invertible", "orthogonal", "rotary", "centred in vocab", "x", "scaled")
    groups[key] = r.choice((*kinds, f"held in {key}"))


@spec_mutation
def spec_ties(r, spec):
    spec["ties"] = {r.choice((*spec["shapes"], "x")): r.choice((*spec["shapes"], "y"))}
