"""Mutations that break a recipe, a model's folder or an alignment: one function each, to be drawn at random.

A mutation of a folder is called with (generator, world, folder or file), and returns False or raises if there is
nothing it can change. A mutation of a recipe is called with (generator, world, mapping), and may return a function
that changes the recipe's bytes. They are in `mutating_recipes`, `mutating_tensors` and `mutating_folders`; this module
holds what these share.
"""

CHECKPOINTS, ALIGNMENTS, RECIPES = {}, {}, {}
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
PATHS = (
    *("..", ".", "../..", "/", "~", "~nobody", "file:///etc/passwd", "https://example.com/x", "a\0b", "nobody/x"),
    *("../outside", "../outside/secret.txt", "/dev/zero", "/proc/self/mem", "a@b@c", "a@main", "-o", "a\nb"),
    *("\x1b[2J", "corpus.txt"),
    *("C:\\x", "//x/y", "x/y/z", "a/../../outside", "$HOME", "`id`", "{a,b}", "**", " ", "ö", "../cli", "__init__"),
    *("os.path", "linear.py", "_private", "hf_rebasin.cli.main", "x" * 10_000, "/" + "x/" * 3000),
)
NUMBERS = (0, -1, 1, 2, 0.5, 10**6, 10**9, 10**12, 2**63, 10**30, -(10**30), 1e308)
OTHERS = (None, True, False, "", [], {}, [[]], [None], {"a": 1}, {"a": {"b": [{}]}}, "no", "1", "NaN", [1] * 1000)
DEEP = 5_000


def junk(r):
    """Return a path, a number or another value that is wrong almost anywhere."""
    return r.choice((r.choice(PATHS), r.choice(NUMBERS), r.choice(OTHERS), float("inf"), float("nan")))


def iter_paths(tree, path=()):
    """Yield the paths of all entries of nested mappings and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from iter_paths(value, (*path, key))


def entry_at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def pick_entry(r, tree):
    """Pick any entry of nested mappings and lists; return (its parent, its key)."""
    *path, key = r.choice(sorted(iter_paths(tree), key=repr))
    return entry_at(tree, path), key


def misspell(r, word):
    i = r.randrange(len(word) + 1)
    return r.choice((word[:i] + word[i + 1 :], word[:i] + "x" + word[i:], word.upper(), f"{word} ", f"{word}\0"))


def mutation_of(*pools):
    """Register a function as a mutation in some pools, under its name."""

    def register(function):
        for pool in pools:
            pool[function.__name__] = function
        return function

    return register


def flip_bytes(r, data, times):
    """Return the data with up to `times` bytes replaced by random ones."""
    data = bytearray(data)
    for _ in range(times):
        data[r.randrange(len(data))] = r.randrange(256)
    return bytes(data)
