"""What may be wrong with a recipe, a model's folder or an alignment: one function each, drawn by a generator.

A mutation of a folder is called with (generator, world, folder or file) and returns False, or raises, where there is
nothing that it could change. One of a recipe is called with (generator, world, mapping), and may return a function
that changes its bytes. They are in `mutating_recipes`, `mutating_tensors` and `mutating_folders`; here is what these
share.
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


def flipped(r, data, times):
    data = bytearray(data)
    for _ in range(times):
        data[r.randrange(len(data))] = r.randrange(256)
    return bytes(data)
