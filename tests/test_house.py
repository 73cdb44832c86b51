"""The shape of the code: imports go down, importing is light, what is exported is documented."""

import ast
import inspect
import re
import subprocess
import sys
from importlib import import_module

import pytest
from conftest import ROOT

import hf_rebasin

PACKAGE = ROOT / "hf_rebasin"
# Top to bottom. A module may import from lower floors only; those of one floor do not know each other.
FLOORS = (
    {"__init__", "__main__"},
    {"cli"},
    {"verbs"},
    {"showing", "options"},
    {"demo", "coordinate_descent", "interpolation", "rebasin_net", "loss"},
    {"carrying_out", "digits"},
    {"publishing"},
    {"card", "verifying"},
    {"making"},
    {"recording"},
    {"judging", "planning"},
    {"running"},
    {"api"},
    {"line"},
    {"comparing", "evaluating", "recalibrating", "recipe", "modules", "incremental"},
    {"mergekit"},
    {"report"},
    {"page"},
    {"charts"},
    {"outcome"},
    {"verdict"},
    {"measurements"},
    {"data"},
    {"imaging", "tokenising", "labelling"},
    {"rows"},
    {"solvers"},
    {"canonical", "descent", "activations", "similarity"},
    {"checking", "solving", "pairing", "merging"},
    {"merge_methods"},
    {"layers"},
    {"hearing", "divergence"},
    {"objective"},
    {"units"},
    {"relaxed_alignment"},
    {"artefacts"},
    {"alignment", "limits"},
    {"gauge"},
    {"groups"},
    {"elements"},
    {"relaxing"},
    {"orders"},
    {"describing"},
    {"binding"},
    {"infer"},
    {"spec", "sizes"},
    {"table"},
    {"axes"},
    {"specs"},
    {"provenance"},
    {"usage", "licences"},
    {"checkpoint"},
    {"classes", "hub"},
    {"folder", "refusing"},
    {"files"},
    {"varying"},
    {"lazy", "text", "yaml_reading", "registry", "knobs", "inputs"}
    | {"sinkhorn_operator", "processes", "computing", "affine"},
    {"errors"},
)


def floor(room):
    return next((i for i, rooms in enumerate(FLOORS) if room in rooms), None)


def imports(path):
    """The rooms of the package a file imports from, wherever in the file."""
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = [*base, *(node.module.split(".") if node.module else [])]
            yield from [target[0]] if target else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_rebasin"):
            yield from (node.module.split(".")[1:2] or [alias.name for alias in node.names])


FILES = sorted(path for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    parts = path.relative_to(PACKAGE).parts
    room = parts[0].removesuffix(".py")
    assert floor(room) is not None, f"{room} has no floor"
    for target in imports(path):
        inside = target == room and path.name != "__init__.py" and len(parts) > 1
        if room == "__init__" or target == "__init__":
            continue
        assert floor(target) > floor(room) or (inside and target in ("groups", "infer")), (
            f"{path.name} imports {target}"
        )


def test_inference_has_floors_of_its_own():
    order = (
        *("inference", "larger", "linear", "norms", "sides", "tracing", "aten", "views", "lookups", "rules"),
        *("nesting", "record", "unification", "naming", "writing", "__init__"),
    )
    assert {path.stem for path in (PACKAGE / "infer").glob("*.py")} == set(order)
    for place, name in enumerate(order):
        for node in ast.walk(ast.parse((PACKAGE / "infer" / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                for target in [node.module] if node.module else [alias.name for alias in node.names]:
                    assert order.index(target) > place, f"{name} imports {target}"


def test_the_list_of_floors_is_whole():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms == set().union(*FLOORS)
    house = (ROOT / "CONTRIBUTING.md").read_text()
    assert all(room in house for room in rooms if not room.startswith("__"))


def test_the_wrong_direction_would_be_seen(tmp_path, monkeypatch):
    wrong = tmp_path / "spec.py"
    wrong.write_text(
        "def f():\n    from .api import align\n    from hf_rebasin.cli import app\n    from . import demo\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert set(imports(wrong)) == {"api", "cli", "demo"}
    assert all(floor(target) < floor("spec") for target in imports(wrong))


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("hf_rebasin", "torch transformers datasets accelerate scipy pydantic huggingface_hub"),
        ("hf_rebasin.cli", "torch transformers datasets accelerate scipy pydantic huggingface_hub"),
        ("hf_rebasin.api", "transformers datasets accelerate"),
        ("hf_rebasin.report", "torch transformers datasets accelerate scipy matplotlib jinja2"),
        ("hf_rebasin.data", "transformers datasets accelerate PIL"),
        ("hf_rebasin.axes", "torch"),
        ("hf_rebasin.table", "torch"),
        ("hf_rebasin.spec", "torch"),
    ],
)
def test_importing_is_light(module, heavy):
    script = f"import sys, {module}; print(*set({heavy.split()!r}) & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert said.split() == []


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
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hf_rebasin.nothing


def test_nothing_names_this_machine():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False).stdout.split()
    pattern = re.compile(r"(?<![\w.])/(work|root|home/\w+|opt)/")
    for name in tracked:
        path = ROOT / name
        if path.is_file() and path != ROOT / "tests" / "test_house.py":
            assert not pattern.search(path.read_text(errors="ignore")), f"{name} has a path of a machine"
