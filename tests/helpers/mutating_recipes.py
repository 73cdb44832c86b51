"""Mutations of recipes, as mappings and as bytes; `Raw` values are written into the YAML verbatim."""

import json
from contextlib import suppress

import yaml
from mutating import CHECKPOINTS, DEEP, PATHS, RECIPES, entry_at, flip_bytes, junk, misspell, mutation_of, pick_entry

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
    """A piece of YAML to be written verbatim."""


def make_recipe_text(r, world, mutations):
    """Return the bytes of a recipe after mutations of its mapping, then of its text."""
    recipe, raw, changes = json.loads(json.dumps(r.choice(GOOD))), {}, []
    for mutation in mutations:
        with suppress(Exception):  # nothing is left that it could change
            change = mutation(r, world, recipe)
            changes += [change] if callable(change) else []

    def mark_raw(value):
        if isinstance(value, Raw):
            raw[f"RAW-{len(raw)}-WAR"] = value
            return list(raw)[-1]
        if isinstance(value, dict):
            return {mark_raw(key): mark_raw(entry) for key, entry in value.items()}
        return [mark_raw(entry) for entry in value] if isinstance(value, list) else value

    text = yaml.dump(mark_raw(recipe), Dumper=_Flat, sort_keys=False, allow_unicode=True)
    for mark, value in raw.items():
        text = text.replace(mark, value)
    data = text.encode("utf-8", "surrogatepass")
    for change in changes:
        data = change(data)
    return data


class _Flat(yaml.SafeDumper):
    """A dumper that writes no aliases."""

    def ignore_aliases(self, data):
        return True


def put_one_of(*values):
    """Return a mutation that puts one of the values in place of any entry."""

    def change(r, world, recipe):
        parent, key = pick_entry(r, recipe)
        value = r.choice(values)
        value = value(r, world) if callable(value) else value
        if key not in ("starts", "max_sweeps"):  # asking for a lot of work is not a mistake
            parent[key] = value

    return change


def register_raw(name, *texts):
    """Register a mutation that puts one of some pieces of YAML in place of any entry."""
    RECIPES[name] = put_one_of(*map(Raw, texts))


RECIPES["wrong type"] = put_one_of(lambda r, world: junk(r))
RECIPES["path"] = put_one_of(lambda r, world: r.choice(PATHS))
RECIPES["absolute path"] = put_one_of(
    lambda r, world: str(r.choice((world.outside, world.outside / "model", world.root)))
)
RECIPES["deep nesting"] = put_one_of(
    Raw("[" * DEEP + "]" * DEEP), Raw("{a: " * 200 + "1" + "}" * 200), Raw("[" * 60 + "]" * 60)
)
register_raw(
    "huge number", "9" * 5000, "1e999", "0x" + "f" * 5000, "-" + "9" * 30, ":".join(["59"] * 500), "0b" + "1" * 9999
)
register_raw("not a number", ".nan", ".inf", "-.inf", "2001-99-99", "2024-01-01", "12:30:45", "!!int x", "!!int ''")
register_raw(
    "not a value", "!!float x", "!!bool x", "!!timestamp x", "!!binary '*'", "!!set {a}", "!!omap [a]", "!!null x"
)
register_raw("unresolved", "*nobody", "&a", "&a *a", "<<", "? a", "!", "!<x>", "%YAML 9", "@", "`", "\t", "- - -", "=")
register_raw("recursive alias", "&r [*r]", "&r {a: *r}", "&r [[*r], *r]", "&r {*r : 1}", "&r {<<: *r}")
register_raw(
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


def make_bomb(levels, of="[{}]", each=9):
    """Return a billion-laughs bomb: each level repeats the previous one `each` times."""
    lists = ["&l0 " + of.format(", ".join(["lol"] * each))]
    lists += [f"&l{i} " + of.format(", ".join([f"*l{i - 1}"] * each)) for i in range(1, levels)]
    return Raw("[" + ", ".join(lists) + "]")


def make_merge_key_bomb(levels):
    levels = [f"- &m{i} {{<<: [*m{i - 1}, *m{i - 1}, *m{i - 1}], k{i}: 1}}" for i in range(1, levels)]
    return Raw("[&m0 {a: 1}, " + ", ".join(level[2:] for level in levels) + "]")


RECIPES["bomb"] = put_one_of(
    make_bomb(9), make_bomb(30), make_bomb(300, each=2), make_merge_key_bomb(20), make_bomb(4)
)
RECIPES["aliases"] = put_one_of(Raw("&x [0.5, 0.5]"), Raw("[&y a, *y]"), Raw("{<<: {seed: 1}}"), make_bomb(2, each=3))


@mutation_of(RECIPES)
def misspelt_key(r, world, recipe):
    parent, key = pick_entry(r, recipe)
    if isinstance(key, str):
        parent[misspell(r, key)] = parent.pop(key)


@mutation_of(RECIPES)
def odd_key(r, world, recipe):
    parent = entry_at(recipe, r.choice([(), ("align",), ("parameters",), ("models", 0)]))
    if isinstance(parent, dict):
        odd = (*PATHS, "__class__", "model_extra", "self", Raw("? [a]\n: 1\n#"), Raw("1"), Raw("~"))
        parent[r.choice(odd)] = 1


@mutation_of(RECIPES)
def missing_key(r, world, recipe):
    parent, key = pick_entry(r, recipe)
    del parent[key]


@mutation_of(RECIPES)
def names(r, world, recipe):
    """Names of methods and solvers that are paths, parts of the package, or unknown."""
    recipe["merge_method"] = r.choice([*PATHS, "lerpp", "linear ", "Linear", "linear\0"])
    if r.random() < 0.5:
        recipe["align"] = {"solver": r.choice([*PATHS, "weight", "os", "weight_matching\n"])}


@mutation_of(RECIPES)
def models(r, world, recipe):
    others = ["a", "b", *PATHS, str(world.outside / "model"), "../outside/model", "b@", "@", "a/", "./a", "corpus.txt"]
    recipe["models"] = [r.choice(others) for _ in range(r.choice((0, 1, 2, 2, 2, 3, 500)))]


@mutation_of(RECIPES)
def data(r, world, recipe):
    """Data that do not exist, are not a dataset, or belong to somebody else."""
    recipe[r.choice(("data", "evaluate"))] = DATA | {
        r.choice(("dataset", "files", "split", "column", "labels", "name", "revision", "samples")): junk(r)
    }


@mutation_of(RECIPES)
def repeated_key(r, world, recipe):
    return lambda text: text + b"\n" + r.choice((b"models: [a]", b"align: false", b"align: {seed: 0, seed: 1}"))


@mutation_of(RECIPES)
def cut_text(r, world, recipe):
    return lambda text: text[: r.randrange(len(text) + 1)]


@mutation_of(RECIPES)
def flipped_text(r, world, recipe):
    return lambda text: flip_bytes(r, text, r.choice((1, 3, 20)))


@mutation_of(RECIPES)
def binary_text(r, world, recipe):
    others = (b"", b"\0", r.randbytes(1000), b"\x80\x04N.", b"[1]", b"a", b"---")
    return lambda text: r.choice((*others, b"\xff\xfe" + text))


@mutation_of(RECIPES)
def another_encoding(r, world, recipe):
    kind = r.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-le"))
    return lambda text: text.decode("utf-8", "replace").encode(kind, "replace")


@mutation_of(RECIPES)
def odd_bytes(r, world, recipe):
    odd = (b"\xe9", b"\xff", b"\xed\xa0\x80", b"\0", b"\x1b", b"\xe2\x80\xa8")
    return lambda text: text.replace(b"a", r.choice(odd), 1)


@mutation_of(RECIPES)
def large_text(r, world, recipe):
    texts = (b"x" * 3_000_000, b"# " + b"x" * 3_000_000, b"k: [" + b"1, " * 300_000 + b"1]")
    long = (*texts, b"- " * 200_000, b"- " * 40_000, b"[" * 10**6)
    return lambda text: text + b"\n" + r.choice(long)


@mutation_of(RECIPES)
def several_documents(r, world, recipe):
    return lambda text: text + b"\n---\n" + text


@mutation_of(RECIPES)
def weights_that_break(r, world, recipe):
    """A good recipe with a broken model."""
    name = r.choice(sorted(CHECKPOINTS))
    CHECKPOINTS[name](r, world, world.work / r.choice("ab"))
