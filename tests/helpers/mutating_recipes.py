"""Mutations of recipes: of the mapping, and of the bytes; `Raw` values are put into the YAML as they are."""

import json
from contextlib import suppress

import yaml
from mutating import CHECKPOINTS, DEEP, PATHS, RECIPES, at, flipped, junk, misspelt, mutates, somewhere

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
        value = value(r, world) if callable(value) else value
        if key not in ("starts", "max_sweeps"):  # how much work is done is asked for, and no mistake
            held[key] = value

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
    "!!python/object:hf_rebasin.recipes.recipe.Recipe {}",
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
        odd = (*PATHS, "__class__", "model_extra", "self", Raw("? [a]\n: 1\n#"), Raw("1"), Raw("~"))
        held[r.choice(odd)] = 1


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
    others = (b"", b"\0", r.randbytes(1000), b"\x80\x04N.", b"[1]", b"a", b"---")
    return lambda text: r.choice((*others, b"\xff\xfe" + text))


@mutates(RECIPES)
def another_encoding(r, world, said):
    kind = r.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-le"))
    return lambda text: text.decode("utf-8", "replace").encode(kind, "replace")


@mutates(RECIPES)
def odd_bytes(r, world, said):
    odd = (b"\xe9", b"\xff", b"\xed\xa0\x80", b"\0", b"\x1b", b"\xe2\x80\xa8")
    return lambda text: text.replace(b"a", r.choice(odd), 1)


@mutates(RECIPES)
def large_text(r, world, said):
    texts = (b"x" * 3_000_000, b"# " + b"x" * 3_000_000, b"k: [" + b"1, " * 300_000 + b"1]")
    long = (*texts, b"- " * 200_000, b"- " * 40_000, b"[" * 10**6)
    return lambda text: text + b"\n" + r.choice(long)


@mutates(RECIPES)
def several_documents(r, world, said):
    return lambda text: text + b"\n---\n" + text


@mutates(RECIPES)
def weights_that_break(r, world, said):
    """A good recipe of a broken model."""
    name = r.choice(sorted(CHECKPOINTS))
    CHECKPOINTS[name](r, world, world.work / r.choice("ab"))
