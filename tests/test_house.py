"""The structure of the code: imports go down from room to room, importing is light, exports are documented."""

import ast
import inspect
import re
import subprocess
import sys
from collections import defaultdict
from importlib import import_module

import pytest
from conftest import ROOT

import hf_rebasin

PACKAGE = ROOT / "hf_rebasin"
# Top to bottom. A file may import from its own room and from lower ones. A room is a folder, or one of the few files
# that stand beside them; what is named together is one floor.
ROOMS = (
    "__init__ __main__",
    "cli",
    "interpolation loss report",  # import paths that other packages promised
    "pipeline",
    "publishing",
    "demo",
    "recipes",
    "reports",
    "evaluation",
    "compat",
    "merging",
    "solving",
    "alignment",
    "symmetries",
    "data",
    "modules",
    "tokenizers",
    "checkpoints",
    "registry",
    "errors text",
)
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms.split()}


def files_in(package):
    """Return `{dotted name: file}` of a package; a folder stands for its `__init__`."""
    names = {path: path.relative_to(package).with_suffix("").parts for path in sorted(package.rglob("*.py"))}
    return {".".join(parts): path for path, parts in names.items()}


def imports(name, path, known):
    """Return the files that a file imports from, at any level of nesting."""
    folder = name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        words = node.module.split(".") if node.module else []
        if node.level:
            base = [*folder[: len(folder) - node.level + 1], *words]
        elif words[:1] == ["hf_rebasin"]:
            base = words[1:]
        else:
            continue
        for alias in node.names:
            inside = [*base, alias.name]
            places = (inside, [*inside, "__init__"], base, [*base, "__init__"])
            yield next(place for place in map(".".join, places) if place in known)


def wrong_arrows(package):
    """Return a message for every wrong import of a package."""
    files = files_in(package)
    arrows = defaultdict(set)
    for name, path in files.items():
        room = name.split(".")[0]
        if room not in FLOOR:
            yield f"{name} belongs to no room"
            continue
        for target in imports(name, path, files):
            other = target.split(".")[0]
            if room == "__init__" or target == "__init__":  # the public names, which are imported when they are used
                continue
            if other != room and FLOOR.get(other, -1) <= FLOOR[room]:
                yield f"{name} imports {target}, which does not lie below it"
            arrows[name].add(target)
    yield from (f"{' -> '.join(circle)} is a circle" for circle in circles(arrows))


def circles(arrows):
    """Return one path around every circle that a walk along the arrows meets."""
    done, path = set(), []

    def walk(name):
        if name in path:
            yield [*path[path.index(name) :], name]
        elif name not in done:
            path.append(name)
            for target in sorted(arrows.get(name, ())):
                yield from walk(target)
            path.pop()
            done.add(name)

    for name in sorted(arrows):
        yield from walk(name)


def test_imports_go_down():
    assert list(wrong_arrows(PACKAGE)) == []


def test_rooms_are_folders_and_few_files_stand_beside_them():
    flat = {path.stem for path in PACKAGE.glob("*.py")}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert flat | folders == FLOOR.keys()
    assert len(flat) <= 9


@pytest.mark.parametrize(
    ("file", "text", "seen"),
    [
        (
            "symmetries/spec.py",
            "def f():\n    from ..solving.align import align\n",
            "symmetries.spec imports solving",
        ),
        ("checkpoints/hub.py", "from hf_rebasin.cli.main import app\n", "checkpoints.hub imports cli.main"),
        ("errors.py", "from . import pipeline\n", "errors imports pipeline"),
        ("errors.py", "from .text import columns\n", "errors imports text"),
        ("symmetries/patterns.py", "from .spec import Spec\n", "is a circle"),
        ("utils.py", "", "utils belongs to no room"),
        ("common/tensors.py", "", "common.tensors belongs to no room"),
    ],
)
def test_a_wrong_arrow_would_be_seen(tmp_path, file, text, seen):
    for path in PACKAGE.rglob("*.py"):
        copy = tmp_path / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    (tmp_path / file).parent.mkdir(exist_ok=True)
    with (tmp_path / file).open("a") as changed:
        changed.write(text)
    assert seen in "\n".join(wrong_arrows(tmp_path))


def test_every_folder_says_what_it_is_for():
    """In one sentence, the first of its docstring; CONTRIBUTING.md shows the tree."""
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        first = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())).split("\n")[0]
        assert first.endswith("."), folder
        assert folder.name in contributing


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("hf_rebasin", "torch transformers datasets accelerate scipy pydantic huggingface_hub"),
        ("hf_rebasin.cli.main", "torch transformers datasets accelerate scipy pydantic huggingface_hub"),
        ("hf_rebasin.solving.align", "transformers datasets accelerate"),
        ("hf_rebasin.report", "torch transformers datasets accelerate scipy matplotlib jinja2"),
        ("hf_rebasin.data.batches", "transformers datasets accelerate PIL"),
        ("hf_rebasin.symmetries.patterns", "torch"),
        ("hf_rebasin.symmetries.table", "torch"),
        ("hf_rebasin.symmetries.spec", "torch"),
        *((f"hf_rebasin.{room}", "torch transformers") for room in FLOOR if (PACKAGE / room).is_dir()),
    ],
)
def test_importing_is_light(module, heavy):
    script = f"import sys, {module}; print(*set({heavy.split()!r}) & set(sys.modules))"
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert output.split() == []


@pytest.mark.parametrize("name", hf_rebasin.__all__)
def test_exports_are_documented(name):
    thing = getattr(hf_rebasin, name)
    doc = inspect.getdoc(thing)
    assert doc
    if callable(thing) and not (inspect.isclass(thing) and issubclass(thing, Exception)) and name != "Status":
        assert len(doc) > 80
        if not inspect.isclass(thing):
            assert "Args:" in doc
            assert "Example" in doc
            assert "Raises:" in doc
            for parameter in inspect.signature(thing).parameters.values():
                assert re.search(rf"\b{parameter.name}\b", doc), f"{name} does not say what {parameter.name} is"


def test_every_export_has_a_home():
    for name, home in hf_rebasin._HOME.items():
        assert getattr(import_module(f"hf_rebasin.{home}"), name) is getattr(hf_rebasin, name)
    assert set(hf_rebasin._HOME) == set(hf_rebasin.__all__)
    assert FLOOR.keys().isdisjoint(hf_rebasin.__all__)  # importing a room makes it an attribute of the package
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hf_rebasin.nothing


def test_nothing_names_this_machine():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False).stdout.split()
    pattern = re.compile(r"(?<![\w.])/(work|root|home/\w+|opt)/")
    for name in tracked:
        path = ROOT / name
        if path.is_file() and path != ROOT / "tests" / "test_house.py":
            assert not pattern.search(path.read_text(errors="ignore")), f"{name} has a path of a machine"
