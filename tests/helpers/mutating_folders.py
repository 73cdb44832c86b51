"""Mutations of a model's folder: its index, links, configuration and tokenizer."""

import json
import os
import shutil
from pathlib import Path

from mutating import CHECKPOINTS, DEEP, PATHS, junk, mutation_of, pick_entry
from mutating_tensors import pick_weights

INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def find_index(model):
    return next(model / name for name in INDEX if (model / name).is_file())


@mutation_of(CHECKPOINTS)
def index_place(r, world, model):
    file = find_index(model)
    index = json.loads(file.read_text())
    places = index["weight_map"]
    other = r.choice(
        (
            *("../outside/model/model.safetensors", str(world.outside / "model" / "model.safetensors"), "../a/x"),
            *("~/x", "/dev/zero", "nobody.safetensors", ".", "..", "", "config.json", "a\0b", "x" * 300, file.name),
            *("sub/x.safetensors", "..\\x"),
        )
    )
    for key in places if r.random() < 0.3 else [r.choice(sorted(places))]:
        places[key] = other
    file.write_text(json.dumps(index))


@mutation_of(CHECKPOINTS)
def index_says(r, world, model):
    file = find_index(model)
    index = json.loads(file.read_text())
    parent, key = pick_entry(r, index)
    if r.random() < 0.5:
        index["weight_map"] = parent = dict(index["weight_map"])
        key = r.choice((*PATHS, "more"))
    parent[key] = junk(r)
    file.write_text(json.dumps(index))


@mutation_of(CHECKPOINTS)
def json_text(r, world, model):
    """Replace the bytes of any JSON file of the model."""
    file = r.choice(sorted(f for f in model.glob("*.json") if f.is_file()))
    text = file.read_bytes()
    texts = (b"", b"{", b"[]", b"null", b"3", b"[" * DEEP, b'{"a":' * DEEP, b"\xff", b"\0", text[:-2], text * 2)
    more = (r.randbytes(99), text.decode().encode("utf-16"), b"\xef\xbb\xbf" + text)
    more += (b"{" + b'"a": 1, ' * 9 + text[1:], b'{"a": ' + b"9" * 5000 + b"}")
    file.write_bytes(r.choice((*texts, *more)))


@mutation_of(CHECKPOINTS)
def index_of_its_own(r, world, model):
    """Add an index to a folder that has none."""
    name = r.choice(INDEX)
    if r.random() < 0.7:
        for file in model.glob("*.safetensors"):
            file.rename(model / "kept.safetensors")
    place = r.choice(("kept.safetensors", "../b/model.safetensors"))
    (model / name).write_text(json.dumps({"weight_map": {"x": place}}))


@mutation_of(CHECKPOINTS)
def weights_elsewhere(r, world, model):
    """Replace a file of weights by a link, or by something that is not a file."""
    file = pick_weights(r, model)
    kept = file.rename(world.outside / f"kept{file.suffix}")
    target = r.choice(
        (
            *(kept, world.outside / "model" / "model.safetensors", world.outside / "secret.txt", world.outside),
            *map(Path, ("/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/mem")),
            *(world.outside / "nobody", file, "fifo", "folder", "gone"),
        )
    )
    if target == "fifo":
        os.mkfifo(file)
    elif target == "folder":
        file.mkdir()
    elif target != "gone":
        file.symlink_to(target)


@mutation_of(CHECKPOINTS)
def side_file_elsewhere(r, world, model):
    """Replace a file that a merge copies by a link to a file of somebody else."""
    kinds = ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja", "vocab.txt", "x.model")
    file = model / r.choice((*kinds, "notes.txt", "LICENSE", "layers.py"))
    targets = ("secret.txt", "config.json", ".", "/dev/zero", "nobody")
    file.unlink(missing_ok=True)
    target = world.outside / r.choice(targets)
    file.symlink_to(target if r.random() < 0.5 else os.path.relpath(target, model))


@mutation_of(CHECKPOINTS)
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


@mutation_of(CHECKPOINTS)
def links_of_a_cache(r, world, model):
    """Lay the model out like the Hub's cache, as links to blobs beside the snapshots; harmless."""
    blobs, snapshot = world.outside / "hub" / "blobs", world.outside / "hub" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in sorted(model.iterdir()):
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    model.rmdir()
    model.symlink_to(snapshot)


@mutation_of(CHECKPOINTS)
def odd_files(r, world, model):
    """Add a file with an odd name that does not belong to the model."""
    odd = ("x\n.model", "\x1b[2J.model", "tokenizer" + "x" * 200, "-rf.model", "vocab.*", "config.json.tokenizer")
    name = r.choice(odd)
    (model / name).write_text("x")


# --- configurations and tokenizers -----------------------------------------------------------------------------------


SIZES = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
]
TYPES = "gpt2 llama resnet t5 mixtral clip qwen2 timm_backbone biogpt encoder-decoder vit sentence-transformers"
TYPES = [*TYPES.split(), *["albert", "whisper", "rag", "auto", "layoutlmv2", "mamba", "swin", "__class__"], "bert\n"]
OTHER = (
    "num_labels id2label label2id dtype torch_dtype architectures model_type attn_implementation quantization_config"
)
OTHER = [
    *OTHER.split(),
    *["_attn_implementation", "text_config", "rope_scaling", "pruned_heads", "tie_word_embeddings"],
]


def read_config(model, name="config.json"):
    if not (model / name).is_file():  # an earlier mutation made it a link to an endless file
        raise OSError(name)
    return json.loads((model / name).read_text())


def write_config(model, config, name="config.json"):
    (model / name).write_text(json.dumps(config))


@mutation_of(CHECKPOINTS)
def config_value(r, world, model):
    config = read_config(model)
    parent, key = pick_entry(r, config)
    parent[key] = junk(r)
    write_config(model, config)


@mutation_of(CHECKPOINTS)
def config_more(r, world, model):
    config = read_config(model)
    config[r.choice((*OTHER, *PATHS, "__class__", "self", "to_dict", "name_or_path", "_name_or_path"))] = junk(r)
    write_config(model, config)


@mutation_of(CHECKPOINTS)
def config_gone(r, world, model):
    config = read_config(model)
    del config[r.choice(sorted(config))]
    write_config(model, config)


@mutation_of(CHECKPOINTS)
def huge_sizes(r, world, model):
    config = read_config(model)
    for key in r.sample((*SIZES, "num_labels", "type_vocab_size"), r.choice((1, 1, 2, 8))):
        config[key] = r.choice((10**5, 10**9, 10**12, 2**62, 10**30, 0, -1, 7))
    write_config(model, config)


@mutation_of(CHECKPOINTS)
def another_type(r, world, model):
    config = read_config(model)
    config["model_type"] = r.choice((*TYPES, *PATHS))
    if r.random() < 0.5:
        del config["architectures"]
    if r.random() < 0.3:
        config["num_hidden_layers"] = r.choice((10**6, 10**9))
    write_config(model, config)


@mutation_of(CHECKPOINTS)
def own_code(r, world, model):
    """Add code that transformers would run if it were trusted."""
    config = read_config(model)
    module = r.choice(("modeling_evil", "evil", "../outside/evil", "org/repo--modeling_evil"))
    model_class, tokenizer = f"{module}.Model", [f"{module}.Tokenizer", None]
    config |= {
        "auto_map": {"AutoConfig": f"{module}.Config", "AutoModel": model_class, "AutoTokenizer": tokenizer},
        "trust_remote_code": True,
        "custom_pipelines": {"x": {"impl": f"{module}.Model"}},
        "model_type": r.choice(("bert", "evil")),
        "architectures": [r.choice(("Model", "BertForMaskedLM"))],
        "_attn_implementation": r.choice(("eager", "org/kernel", "evil")),
    }
    for folder in (model, world.outside):
        for name in ("modeling_evil.py", "evil.py"):
            code = f"import os\nos.system({world.payload()!r})\nclass Model: pass\nConfig = Tokenizer = Model\n"
            (folder / name).write_text(code)
    write_config(model, config)
    if r.random() < 0.5:
        tokens = read_config(model, "tokenizer_config.json")
        tokens |= {"auto_map": config["auto_map"], "tokenizer_class": "Tokenizer", "trust_remote_code": True}
        write_config(model, tokens, "tokenizer_config.json")


@mutation_of(CHECKPOINTS)
def tokenizer_value(r, world, model):
    name = r.choice(("tokenizer.json", "tokenizer_config.json"))
    config = read_config(model, name)
    parent, key = pick_entry(r, config)
    parent[key] = junk(r)
    write_config(model, config, name)


@mutation_of(CHECKPOINTS)
def vocabulary(r, world, model):
    """Change a token, or its id to one that leaves a gap or is not a number."""
    config = read_config(model, "tokenizer.json")
    tokens = config["model"]["vocab"]
    word = r.choice(sorted(tokens))
    tokens[r.choice((word, "new", "\x1b[2J", ""))] = r.choice((tokens.pop(word), 10**9, -1, "x", None, 2**40, 0))
    write_config(model, config, "tokenizer.json")


@mutation_of(CHECKPOINTS)
def side_file_gone(r, world, model):
    r.choice(sorted(f for f in model.glob("*.json") if f.is_file())).unlink()


@mutation_of(CHECKPOINTS)
def folder_gone(r, world, model):
    kind = r.choice(("gone", "file", "empty", "loop"))
    shutil.rmtree(model)
    if kind == "file":
        model.write_text("x")
    elif kind == "empty":
        model.mkdir()
    elif kind == "loop":
        model.symlink_to(model)
