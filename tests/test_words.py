"""Habits of language that a machine can keep: one meaning per name, docstrings that stand alone, no banned words."""

import ast
import io
import re
import tokenize
from collections import defaultdict

import pytest
from conftest import ROOT

PACKAGE = ROOT / "hf_rebasin"
FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
# The files of these folders have the same names by contract: they are told apart by the file.
PLUGINS = ("symmetries/specs/", "alignment/groups/", "solving/solvers/", "merging/methods/", "cli/commands/")
COMPARISONS = "longer|more|less|better|worse|larger|smaller|nearer|higher|lower|such|need|further"
# What a reader stumbles over, and what to write instead.
BANNED = {
    r"\bknobs?\b": "parameter (of merge methods) or option (of solvers and the command line)",
    r"\bhangs? (on|off)\b": "depends on",
    r"\bothers for other\b": "vary by",
    r"\bthat of the (first|second|other)\b": "the first model's",
    rf"(?<![Tt]here )\b(is|are) no (?!({COMPARISONS})\b)[a-z]+": "is not a, are not",
}
VAGUE = {"said", "found", "one", "what", "those", "that", "here", "there"}
OPENINGS = r"(The same\b|Of (a|an|the|what)\b|That (of|the)\b|Those (of|that)\b)"


def words_in(path):
    """(line, text) of the docstrings, comments and other strings of a file."""
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(io.StringIO(file.read()).readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING):
                yield token.start[0], token.string


def wrong_words(text):
    """The words from the list that a text has, each with what to write instead."""
    for pattern, better in BANNED.items():
        for match in re.finditer(pattern, text):
            yield f"{match[0]!r} -> {better}"


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_word_is_from_the_list(path):
    found = [f"{path.name}:{line}: {wrong}" for line, text in words_in(path) for wrong in wrong_words(text)]
    assert found == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/glossary.md"])
def test_no_word_of_the_documents_is_from_the_list(name):
    assert [*wrong_words((ROOT / name).read_text())] == []


def vague_variables(tree):
    """The variables and parameters of a module whose name stands for anything: the noun of the thing says more."""
    classes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    fields = {id(line.target) for node in classes for line in node.body if isinstance(line, ast.AnnAssign)}
    for node in ast.walk(tree):
        if id(node) in fields:
            continue
        name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else None
        if name in VAGUE:
            yield f"line {node.lineno}: {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_variables_are_named_after_the_thing(path):
    assert [*vague_variables(ast.parse(path.read_text()))] == []


def public(tree):
    """The functions and classes of a module that are for others."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def bad_opening(doc):
    """What is wrong with the first line of a docstring: it is read alone, in a hover."""
    if not doc:
        return "there is none"
    first = doc.split("\n")[0].strip()
    if not first.endswith((".", ":", "?")) and len(doc.split("\n")) > 1 and doc.split("\n")[1].strip():
        return f"it goes on in the next line: {first!r}"
    if not first.endswith((".", ":", "?")) and "`" not in first:
        return f"it is not a sentence: {first!r}"
    if re.match(OPENINGS, first):
        return f"it does not stand alone: {first!r}"
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_stand_alone(path):
    tree = ast.parse(path.read_text())
    found = [("the module", bad_opening(ast.get_docstring(tree)))]
    if not str(path.relative_to(PACKAGE)).startswith("symmetries/specs/"):
        found += [(node.name, bad_opening(ast.get_docstring(node))) for node in public(tree)]
    assert [f"{name}: {wrong}" for name, wrong in found if wrong] == []


def test_no_public_name_is_defined_twice():
    places = defaultdict(list)
    for path in FILES:
        name = str(path.relative_to(PACKAGE))
        for node in ast.parse(path.read_text()).body if not name.startswith(PLUGINS) else ():
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                places[node.name].append(name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in (target for target in targets if isinstance(target, ast.Name)):
                    places[target.id].append(name)
    twice = {name: files for name, files in places.items() if len(files) > 1}
    assert {name: files for name, files in twice.items() if not name.startswith("_") and name != "logger"} == {}


@pytest.mark.parametrize(
    "text",
    ["the knobs of a solver", "what hangs on data", "others for other tensors", "that of the first", "it is no model"],
)
def test_a_word_from_the_list_would_be_seen(text):
    assert [*wrong_words(text)]


def test_a_vague_variable_would_be_seen():
    assert [*vague_variables(ast.parse("def f(what):\n    return [one for one in what]"))]


@pytest.mark.parametrize("doc", ["", "The same of a checkpoint.", "Of the commit.", "Goes on\nin the next line."])
def test_a_docstring_that_does_not_stand_alone_would_be_seen(doc):
    assert bad_opening(doc)


def test_what_is_right_is_not_seen():
    assert not [*wrong_words("it is no longer there, and is no better than before; a knocked one")]
    assert bad_opening("Return the spec of a checkpoint.\n\nArgs: none.") is None
