"""The pattern language."""

import pytest

from hf_rebasin.errors import PatternError
from hf_rebasin.symmetries.patterns import (
    Leaf,
    Product,
    Sum,
    compile_key,
    expand_braces,
    fill_stars,
    format_pattern,
    parse_pattern,
)


def test_patterns_parse_to_trees():
    assert parse_pattern("") == ()
    assert parse_pattern("_, 3, r'") == (Leaf(None), Leaf(None, "", 3), Leaf("r", "'"))
    assert parse_pattern("(h (a + b'))") == (Product((Leaf("h"), Sum((Leaf("a"), Leaf("b", "'"))))),)
    assert parse_pattern("(h q) + (h k~)") == (
        Sum((Product((Leaf("h"), Leaf("q"))), Product((Leaf("h"), Leaf("k", "~"))))),
    )
    assert parse_pattern("(a + b c)") == (Sum((Leaf("a"), Product((Leaf("b"), Leaf("c"))))),), (
        "a product binds tighter"
    )
    assert parse_pattern("mid0.*.3.x") == (Leaf("mid0.*.3.x"),)


@pytest.mark.parametrize(
    "text", ["", "_, 3, r'", "(h (a + b'))", "(h q) + (h k'), r~", "(kv.0 group.0 turn.0 pair.0)"]
)
def test_format_is_the_inverse_of_parse(text):
    assert format_pattern(parse_pattern(text)) == text
    assert parse_pattern(format_pattern(parse_pattern(text))) == parse_pattern(text)


@pytest.mark.parametrize(
    ("text", "at", "says"),
    [
        ("a b", 2, "parentheses"),
        ("(a b", 4, "expected ')'"),
        ("a,", 2, "expected an axis"),
        ("A", 0, "not a name"),
        ("a''", 0, "not a name"),
        ("a + ", 4, "expected an axis"),
        ("()", 1, "expected an axis"),
        ("_'", 0, "not a name"),
    ],
)
def test_errors_point_at_the_place(text, at, says):
    with pytest.raises(PatternError, match=says.replace("(", "\\(").replace(")", "\\)")) as caught:
        parse_pattern(text)
    assert str(caught.value).endswith(f"\n  {text}\n  {' ' * at}^")


def test_what_stands_for_too_much_is_refused():
    for text, says in (("(" * 99, "more than 50 nested parentheses"), ("(" + "(a + b) " * 11 + ")", "2048 blocks")):
        with pytest.raises(PatternError, match=says):
            parse_pattern(text)
    for text in ("{a,b}" * 11, "{a}" * 99):
        with pytest.raises(PatternError, match="more than 50 braces, or more than 1000 keys"):
            expand_braces(text)
    for text in ("a.**", "<a>*", "*<a>"):
        with pytest.raises(PatternError, match="two wildcards side by side"):
            compile_key(text)


def test_braces_expand_from_left_to_right():
    assert expand_braces("a.{b,c}.{d,e}") == ["a.b.d", "a.b.e", "a.c.d", "a.c.e"]
    assert expand_braces("plain") == ["plain"]


def test_keys_catch_digits_and_axes():
    key = compile_key("h.*.experts.<expert.*>.w.weight")
    assert key.match("h.3.experts.12.w.weight") == (("3",), (12,))
    assert key.match("h.x.experts.12.w.weight") is None
    assert key.match("h.3.experts.12.wXweight") is None, "a dot is a dot"
    assert key.axes == ("expert.*",)
    assert key.bound(("3",)) == "h.3.experts.<expert.3>.w.weight"


def test_scope_takes_the_first_stars():
    assert fill_stars("a.*", ("3", "5")) == "a.3"
    assert fill_stars("a.*.*", ("3", "5")) == "a.3.5"
    with pytest.raises(ValueError, match="has 2 stars, but its key only 1"):
        fill_stars("a.*.*", ("3",))
