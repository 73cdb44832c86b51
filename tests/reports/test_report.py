"""Reports: the page, the JSON and the plots, and how a browser shows the page."""

import json
import math
import os
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

import browser
import pytest
from PIL import Image

from hf_rebasin.errors import OptionError
from hf_rebasin.evaluation.barrier import Curve
from hf_rebasin.report import (
    Exactness,
    Likeness,
    Line,
    Moved,
    Pair,
    Report,
    Row,
    verdict_on,
    verdict_over,
    with_excess,
)
from hf_rebasin.reports.charts import STYLES, assign_styles, domain_ticks, in_percent, tick_labels, ticks
from hf_rebasin.reports.page import format_column, format_scientific
from hf_rebasin.text import shorten_path, shorten_paths

NAN, INF = math.nan, math.inf
FF_MOVED = Moved(family="ff.*", group="permutation", count=4, size=256, moved=3)


# --- examples --------------------------------------------------------------------------------------------------------


def hill(name, role, height, middle, points=25):
    """A loss from 0.08 to 0.09 with a hill on the way, and an accuracy from 97 % down to `middle` and up again."""
    at = tuple(i / (points - 1) for i in range(points))
    bump = [math.sin(math.pi * t) ** 2 for t in at]
    loss = tuple(0.08 + 0.01 * t + height * b for t, b in zip(at, bump, strict=True))
    accuracy = tuple(0.972 + 0.004 * t - (0.974 - middle) * b for t, b in zip(at, bump, strict=True))
    return Line(name, role, at=at, loss=loss, metrics={"accuracy": accuracy})


def vit(fixed="me/vit-seed-0", moving="me/vit-seed-1", architecture=""):
    """A pair with all measurements."""
    ends = (Row(fixed, loss=0.08, metrics={"accuracy": 0.972}), Row(moving, loss=0.09, metrics={"accuracy": 0.976}))
    given = [
        ("plain average", "plain", "nothing", True, 4.58, 0.17, 0.1),
        ("aligned average", "aligned", "nothing", False, 1.33, 0.738, 17.3),
        ("aligned + refit", "refit", "unlabelled inputs", False, 0.035, 0.961, 19.8),
        ("refit of the plain average", "control", "unlabelled inputs", True, 0.3, 0.9, 2.5),
    ]
    rows = [
        Row(
            name,
            consumed,
            control=control,
            loss=0.085 + height,
            metrics={"accuracy": middle},
            barrier=height,
            seconds=seconds,
        )
        for name, _, consumed, control, height, middle, seconds in given
    ]
    depth = {"residual": 1, "head.*": 4, "qk.*": 4, "ov.*": 4, "ff.*": 4}
    return Pair(
        fixed,
        moving,
        ends,
        with_excess(ends, rows),
        lines=tuple(hill(name, role, height, middle) for name, role, _, _, height, middle, _ in given),
        likeness=tuple(
            Likeness(family, tuple((family.replace("*", str(i)), 0.1 + 0.02 * i, 0.7 - 0.05 * i) for i in range(n)))
            for family, n in depth.items()
        ),
        moved=(Moved(family="residual", group="centred", count=1, size=64, moved=1), FF_MOVED),
        exactness=Exactness(
            difference=1.9e-5, before=0.0903, after=0.0903, dtype="float32", keys=True, shapes=True, dtypes=True
        ),
        seconds={"align": 17.3, "refit": 2.5, "measure": 31.2},
        status="converged",
        notes=("The residual stream is rotated.",),
        architecture=architecture,
    )


def whole(*pairs):
    return Report(
        "ViT on digits",
        pairs or (vit(),),
        recipe="models: [me/vit-seed-0, me/vit-seed-1]\n",
        data="500 held-out digits",
        versions={"torch": "2.13.0", "hf_rebasin": "0.1.0"},
        command="hf-rebasin merge recipe.yaml -o merged",
        created="2026-03-14",
        notes=("BatchNorm statistics are recomputed.",),
    )


def bare():
    """A merge without data: it is known what was moved, and not how good the merge is."""
    return Report("No data", (Pair("me/a", "me/b", moved=(FF_MOVED,)),))


NASTY = '<script>alert("x")</script>'
LONG = "an-organisation-whose-name-goes-on-and-on/" + "x" * 90


def hard():
    """Names with markup, names that are too long, and numbers that are not finite."""
    rows = [
        Row("plain average", control=True, loss=0.3, note=NASTY + "y" * 80),
        Row("aligned", loss=0.35),
        Row("refit", "labels", loss=INF),
    ]
    ends = (Row(LONG, loss=0.1), Row(NASTY, loss=0.1, metrics={NASTY: NAN}))
    lines = (
        Line("plain average", "plain", at=(0, 0.2, 0.5, 0.8, 1), loss=(0.1, 0.2, INF, NAN, 0.1)),
        Line(NASTY, "plain", at=(0, 0.5, 1), loss=(0.1, 0.35, 0.1)),
        Line("$x_1$", "unheard of", at=(0, 0.5, 1), loss=(0.1, 0.05, 0.1)),
    )
    likeness = (Likeness("residual", (("a", NAN, 0.4),)), Likeness("none", ()))
    pair = Pair(
        LONG, NASTY, ends, with_excess(ends, rows), lines=lines, likeness=likeness, notes=(NASTY,), architecture=NASTY
    )
    return Report(NASTY, (pair,), recipe=NASTY, data=NASTY, versions={NASTY: NASTY}, command=NASTY, notes=(NASTY,))


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_a_line_rises_above_its_chord():
    line = Line("", "plain", at=(0, 0.25, 1), loss=(1.0, 3.0, 2.0))
    assert line.rises == (0, 1.75, 0)
    assert line.barrier == 1.75
    assert line.area == pytest.approx(0.5 * 0.25 * 1.75 + 0.5 * 0.75 * 1.75)
    assert line.middle == 3.0
    dip = Line("", "plain", at=(0, 0.5, 1), loss=(1.0, 0.0, 1.0))
    assert (dip.barrier, dip.area) == (0, -0.5)


def test_a_line_is_a_curve():
    losses = [random.Random(seed).uniform(0, 5) for seed in range(25)]
    at = tuple(i / 24 for i in range(25))
    line = Line("", "plain", at=at, loss=tuple(losses))
    assert isinstance(line, Curve)
    assert line.barrier == pytest.approx(Curve(at, tuple(losses)).barrier, abs=1e-12)


@pytest.mark.parametrize(
    ("at", "loss", "message"),
    [
        ((0, 0.5), (1, 1), "ascend from 0 to 1, but is 0, 0.5"),
        ((0, 0.7, 0.3, 1), (1, 1, 1, 1), "ascend"),
        ((0, 1), (1, 1, 1), "loss has 3 values at 2 points"),
    ],
)
def test_invalid_lines_are_refused(at, loss, message):
    with pytest.raises(OptionError, match=message):
        Line("a", "plain", at=at, loss=loss)
    with pytest.raises(OptionError, match=message):
        Curve(at, loss)


def test_a_barrier_is_not_finite_where_a_loss_is_not():
    assert Line("", "plain", at=(0, 0.5, 1), loss=(0.0, INF, 0.0)).barrier == INF
    assert math.isnan(Line("", "plain", at=(0, 0.3, 0.5, 1), loss=(0.0, 5.0, NAN, 0.0)).barrier)


def test_excess_and_ratio():
    plain, aligned = with_excess(
        (Row("a", loss=1), Row("b", loss=2)), (Row("p", control=True, loss=3.5), Row("m", loss=2))
    )
    assert (plain.excess, plain.ratio, aligned.excess, aligned.ratio) == (2.0, 1.0, 0.5, 0.25)
    (alone,) = with_excess((Row("a", loss=1),), (Row("m", loss=2),))
    assert (alone.excess, alone.ratio) == (1.0, None)
    assert with_excess((), (Row("m", loss=2),)) == (Row("m", loss=2),)
    no_hill = with_excess((Row("a", loss=1),), (Row("p", control=True, loss=0.9), Row("m", loss=2)))
    assert [row.ratio for row in no_hill] == [None, None]


def test_numbers_in_columns():
    assert format_column([0.1, None, -0.25, NAN, INF, -INF], 3) == ["0.100", "–", "−0.250", "NaN", "∞", "−∞"]
    assert format_column([4.5, 0.0012], 3) == ["4.5000", "0.0012"]
    assert format_column([1234.5, 1e-12], 3) == ["1,234.500", "0.000"]
    assert format_column([1e30], 3) == ["1.00e+30"]
    assert format_column([0.172], 3, percent=True) == ["17.2\u2009%"]
    assert [format_scientific(v) for v in (1.9e-5, 0.0, 0.09, None)] == ["1.9 × 10⁻⁵", "0", "0.09", "–"]


def test_ticks_are_round_few_and_around():
    draw = random.Random(0)
    for _ in range(2000):
        low, span, most = draw.uniform(-10, 10), 10 ** draw.uniform(-6, 6), draw.choice([4, 6])
        places = ticks(low, low + span, most)
        assert places[0] <= low + 1e-6 * span
        assert places[-1] >= low + span * (1 - 1e-6)
        assert 2 <= len(places) <= most + 2
        assert len(set(tick_labels(places))) == len(places)
    assert domain_ticks([4.7, 0.1, NAN, INF]) == [0, 1, 2, 3, 4, 5]
    assert tick_labels([0, 0.2, 0.4], percent=True) == ["0\u2009%", "20\u2009%", "40\u2009%"]
    assert domain_ticks([]) == domain_ticks([0, 1])


def test_metrics_in_per_cent():
    assert in_percent("top_1_accuracy", [0.5, NAN])
    assert not in_percent("accuracy", [97.2])
    assert not in_percent("bleu", [0.5])


def test_styles_differ():
    lines = [hill(str(i), "plain", 1, 0.5) for i in range(4)] + [hill("a", "aligned", 1, 0.5)]
    assert assign_styles(lines)[0] == "plain"
    assert len({(STYLES[style].light, STYLES[style].dash) for style in assign_styles(lines)}) == len(lines)
    assert len({style.dash for style in STYLES.values()}) == len(STYLES)


# --- the verdict -----------------------------------------------------------------------------------------------------


def rows(**excess):
    """Rows by short names, as if both ends had a loss of 0."""
    kinds = {
        "plain": Row("plain average", control=True),
        "aligned": Row("aligned average"),
        "refit": Row("aligned + refit", "unlabelled inputs"),
        "control": Row("refit of the plain average", "unlabelled inputs", control=True),
        "tuned": Row("fine-tuned plain average", "labels", control=True),
        "learned": Row("learned", "labels"),
    }
    return with_excess([Row("a", loss=0.0)], [replace(kinds[name], loss=value) for name, value in excess.items()])


@pytest.mark.parametrize(
    ("measured", "kind", "text"),
    [
        (rows(), "unmeasured", r"^Nothing was measured"),
        (
            rows(plain=0.42, aligned=0.2, refit=0.05, control=0.13),
            "better",
            r"^Aligned \+ refit is best: excess 0\.05, 12 % of .*'s; the refit .* average \(control\) reaches 31 %\.",
        ),
        (
            rows(plain=4.0, aligned=1.0),
            "better",
            r"^Aligned average is best: excess 1, 25 % of the plain average's\.$",
        ),
        (rows(plain=0.3, aligned=-0.1), "better", r"excess -0\.1, .* no higher than the mean of the ends\.$"),
        (
            rows(plain=0.3, refit=0.2, control=0.1),
            "control",
            r"^A control does better: refit of .* has .* 0\.1, aligned \+ refit, the best merge beside it, 0\.2\.$",
        ),
        (rows(plain=0.3, aligned=0.4), "control", r"^A control does better: .* Aligning by itself did not help\.$"),
        (rows(plain=0.3, aligned=0.3), "control", r"^A control does as well: plain average has excess 0\.3"),
        (
            rows(plain=0.3, aligned=0.2, tuned=0.1),
            "control",
            r"^A control does better: fine-tuned plain average, using labels, has",
        ),
        (
            rows(plain=0.3, aligned=0.4, refit=0.1, control=0.2),
            "better",
            r"^Aligned \+ refit is best.* Aligning by itself did not help: aligned .* 0\.4, plain average 0\.3\.$",
        ),
        (
            rows(plain=0.4, aligned=0.1, refit=0.3, control=0.2),
            "better",
            r"^Aligned average is best.* With unlabelled inputs aligning did not help: aligned \+ refit has .* 0\.3",
        ),
        (rows(plain=0.4, learned=0.1), "unchecked", r"There is no control that used labels, too: what aligning adds"),
        (rows(aligned=0.1), "unchecked", r"There is no control: what aligning adds is not known\.$"),
        (rows(plain=0.4), "unchecked", r"^Nothing but controls was measured\.$"),
        (rows(plain=0.4, aligned=NAN), "control", r"^No aligned merge has a finite loss\. No finite loss: aligned"),
        (rows(plain=INF, aligned=0.1), "better", r"^Aligned average is best: excess 0\.1.* No finite loss: plain"),
        (rows(plain=NAN, aligned=NAN), "unchecked", r"^No aligned merge has a finite loss"),
    ],
)
def test_verdicts(measured, kind, text):
    verdict = verdict_on(measured)
    assert verdict.kind == kind, verdict
    assert re.search(text, verdict.text), verdict


def test_verdicts_on_many_pairs():
    good = Pair("a", "b", rows=rows(plain=1, aligned=0.3))
    better = Pair("a", "c", rows=rows(plain=1, aligned=0.1))
    bad = Pair("a", "d", rows=rows(plain=1, aligned=2))
    empty = Pair("a", "e")
    assert verdict_over([good]) == good.verdict
    assert verdict_over([]).kind == verdict_over([empty, empty]).kind == "unmeasured"
    both = verdict_over([good, better])
    assert both.kind == "better"
    assert both.text == "In all 2 pairs a merge beats every control, with 10 % to 30 % of the plain average's excess."
    mixed = verdict_over([good, bad, empty])
    assert mixed.kind == "control"
    assert "In 1 of 3 pairs a control does as well or better: a and d." in mixed.text
    assert "nothing was measured: a and e" in mixed.text


# --- JSON, names and files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [whole, bare, hard])
def test_json_and_back(make):
    text = make().to_json()
    plain = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    again = Report.from_json(text)
    assert json.loads(again.to_json()) == plain
    assert list(plain) == sorted(plain)
    if make is whole:
        assert again == make()
        line = plain["pairs"][0]["lines"][0]
        assert set(line) == {"name", "role", "at", "loss", "metrics", "barrier", "area", "middle"}
        assert line["barrier"] == pytest.approx(4.58)
        assert line["middle"] == line["loss"][12]
        assert plain["verdict"]["kind"] == "better"
    if make is hard:
        line = again.pairs[0].lines[0]
        assert plain["pairs"][0]["lines"][0]["loss"][2:4] == [None, None]
        assert math.isnan(line.loss[2])
        assert math.isnan(again.pairs[0].rows[2].excess)
        assert again.pairs[0].rows[1].seconds is None
        assert math.isnan(line.barrier)


def test_what_is_not_a_report_is_refused():
    with pytest.raises(OptionError, match=r"not the JSON of a report: pairs.0.moving: Field required"):
        Report.from_json('{"title": "a", "pairs": [{"fixed": "a"}]}')
    with pytest.raises(OptionError, match="this is not JSON"):
        Report.from_json("{")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/srv/models/vit/seed-0", "vit/seed-0"),
        ("/srv/my models/vit/seed 0/", "vit/seed 0"),
        ("~/vit", "vit"),
        (r"C:\Users\me\models\vit", "models/vit"),
        ("me/vit-seed-0@main", "me/vit-seed-0@main"),
        ("demo/vit/seed-0", "demo/vit/seed-0"),
        ("../vit", "../vit"),
    ],
)
def test_names_without_their_folders(name, shown):
    assert shorten_path(name) == shown


def test_texts_without_absolute_paths():
    text = "merge /srv/a/b/c ~/x/y/z -o=/srv/out 'file:///srv/q/r' 3/4 of https://hub.test/a/b </b> org/name ./here/it"
    shown = "merge b/c y/z -o=srv/out 'q/r' 3/4 of https://hub.test/a/b </b> org/name ./here/it"
    assert shorten_paths(text) == shorten_paths(shown) == shown


def test_no_absolute_path_is_published(tmp_path):
    pair = replace(bare().pairs[0], fixed="/srv/secret place/vit/seed-0", moving="/Users/secret/vit/seed-1")
    note = "aligned /srv/secret place/vit/seed-0 and file:///srv/secret/cache/x"
    report = replace(
        whole(pair, pair), recipe="models: [/Users/secret/vit/seed-1]", notes=(note,), command="x /secret/a/b"
    )
    paths = report.save(tmp_path / "r.html")
    assert len(paths) == 2
    for path in paths:
        assert "secret" not in path.read_text()
        assert "aligned vit/seed-0 and cache/x" in path.read_text()


def test_files_of_a_report(tmp_path):
    lines = (Line("plain average", "plain", at=(0, 0.5, 1), loss=(0.1, 1, 0.1)),)
    pairs = [Pair("demo/seed-0", "me/seed-1", lines=lines, architecture=kind) for kind in ("MLP 64", "ViT", "ViT")]
    paths = whole(*pairs).save(tmp_path / "out" / "x.html")
    names = ["x-mlp-64-seed-0-seed-1.png", "x-vit-seed-0-seed-1.png", "x-vit-seed-0-seed-1-3.png", "x.json", "x.html"]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    before = [path.read_bytes() for path in paths]
    whole(*pairs).save(tmp_path / "out" / "x.html")
    assert [path.read_bytes() for path in paths] == before
    with pytest.raises(OptionError, match=r"'x\.pdf' does not end in \.html"):
        whole().save(tmp_path / "x.pdf")


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    bare().save(tmp_path / "x.html")
    before = (tmp_path / "x.html").read_bytes()

    def full(*_):
        raise OSError("no room")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no room"):
        whole().save(tmp_path / "x.html")
    assert (tmp_path / "x.html").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.html", "x.json"]


def test_plots(tmp_path):
    path, *_ = whole().save(tmp_path / "x.html")
    image = Image.open(path).convert("RGB")
    colours = {colour: count for count, colour in image.getcolors(1 << 20)}
    assert image.getpixel((0, 0)) == (255, 255, 255)
    for role in ("plain", "aligned", "refit", "control"):
        assert colours.get(tuple(bytes.fromhex(STYLES[role].light[1:])), 0) > 200, role
    assert tuple(bytes.fromhex(STYLES["other"].light[1:])) not in colours
    alone, *_ = hard().save(tmp_path / "y.html")  # losses that are not finite, no metrics, mathematics in names
    assert Image.open(alone).width < image.width


# --- the page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags, texts of tables, and everything that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.tables, self.fetched, self.text, self.open = [], [], 0, [], "", []
        self.feed(text)
        style = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
        self.fetched += [url for css in style for url in re.findall(r"@import[^;]*|url\([^)]*\)", css)]

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        self.open.append(tag)
        self.fetched += [given[name] for name in ("src", "srcset", "data", "poster", "action") if given.get(name)]
        if tag in ("link", "use", "image", "base") and given.get("href", "data:") != "data:,":
            self.fetched.append(given["href"])
        self.tables += tag == "table"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
            if {"td", "th"} & set(self.open):
                self.rows[-1][-1] += data

    def ids(self):
        return [given["id"] for _, given in self.tags if "id" in given]

    def row(self, start):
        return next(
            [" ".join(cell.split()) for cell in row] for row in self.rows if row and row[0].strip().startswith(start)
        )


def test_the_contents_of_the_page():
    page = Page(whole().html())
    assert "Aligned + refit is best: excess 0.035, 0.8 % of the plain average's" in page.text
    assert page.row("model") == ["model", "loss", "excess", "÷ plain", "barrier", "accuracy", "seconds"]
    assert page.row("plain average control")[1:] == ["4.665", "4.580", "100.0 %", "4.580", "17.0 %", "0.1"]
    assert page.row("aligned + refit best")[3] == "0.8 %"
    assert page.row("me/vit-seed-0") == ["me/vit-seed-0", "0.080", "–", "–", "–", "97.2 %", "–"]
    assert page.row("ff.*")[1:] == ["permutation", "256", "3 of 4"]
    assert "1.9 × 10⁻⁵" in page.text
    for words in ("500 held-out digits", "2026-03-14", "recipe.yaml -o merged", "converged", "2.13.0", "51.0 s"):
        assert words in page.text
    assert sum(tag == "caption" for tag, _ in page.tags) == page.tables
    charts = [given for tag, given in page.tags if tag == "svg" and given.get("role") == "img"]
    assert len(charts) == 2 + 5
    assert all("aria-labelledby" in given or "aria-label" in given for given in charts)


def test_a_control_that_wins_comes_first():
    ends = (Row("a", loss=0.0), Row("b", loss=0.0))
    lost = Pair("a", "b", ends, rows(plain=0.3, aligned=0.4))
    html = whole(lost).html()
    page = Page(html)
    assert html.index("A control does better") < html.index("<main>")
    assert "verdict control" in html
    assert page.row("plain average")[0] == "plain average control best"
    assert "best" not in page.row("aligned average")[0].split()
    assert "verdict control" not in whole().html()


def test_what_is_not_there_is_not_shown():
    page = Page(bare().html())
    assert "Nothing was measured" in page.text
    assert page.row("ff.*")
    assert page.tables == 1
    assert not {"summary", "again", "notes"} & set(page.ids())
    assert not [tag for tag, _ in page.tags if tag == "path"]
    assert "Nothing was measured" in Page(Report("empty").html()).text


def test_many_pairs():
    page = Page(whole(*(vit(f"{kind}-0", f"{kind}-{i}", kind) for kind in ("mlp", "vit") for i in (1, 2))).html())
    anchors = {given["href"] for tag, given in page.tags if tag == "a" and given["href"].startswith("#")}
    assert anchors == {f"#pair-{i}" for i in range(1, 5)}
    assert {anchor[1:] for anchor in anchors} <= set(page.ids())
    assert len(page.ids()) == len(set(page.ids()))
    assert [given for tag, given in page.tags if tag == "details"] == [
        {"class": "pair", "id": f"pair-{i}"} for i in range(1, 5)
    ]
    assert page.row("vit-0 and vit-2")[1:6] == ["4.580", "0.035", "0.8 %", "17.0 %", "96.1 %"]
    few = Page(whole(vit(), vit("a", "b")).html())
    assert all("open" in given for tag, given in few.tags if tag == "details")


def test_names_are_escaped():
    html = hard().html()
    page = Page(html)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert NASTY not in html
    assert NASTY in page.text
    assert page.row("refit")[1:4] == ["∞", "∞", "∞"]


@pytest.mark.parametrize("make", [whole, bare, hard, lambda: whole(*[vit()] * 4)])
def test_the_page_needs_nothing_else(make):
    page = Page(make().html())
    assert page.fetched == []
    policy = next(given["content"] for tag, given in page.tags if given.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    for fetching in (
        '<img src="https://a.b/c">',
        "<style>a{b:url(x)}</style>",
        '<link rel="stylesheet" href="x.css">',
    ):
        assert Page(fetching).fetched


# --- in a browser ----------------------------------------------------------------------------------------------------

CONTRASTS = """(() => {
  const channels = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) {
    const c = channels(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; }
    return [255, 255, 255]; };
  const found = [];
  for (const e of document.body.querySelectorAll('*')) {
    const own = [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim());
    if (!own || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), svg = e.ownerSVGElement;
    const [a, b] = [light(channels(svg ? style.fill : style.color)), light(behind(svg ? svg.parentElement : e))];
    found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.textContent.trim().slice(0, 40)]);
  }
  return found.sort((a, b) => a[0] - b[0]);
})()"""
CURVES = """[...document.querySelectorAll('.chart .curve')].map(e => getComputedStyle(e).stroke)"""
COLLISIONS = """(() => {
  const hit = [];
  for (const svg of document.querySelectorAll('svg.chart')) {
    const boxes = [...svg.querySelectorAll(':scope > text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    for (const [i, [s, a]] of boxes.entries()) for (const [t, b] of boxes.slice(i + 1))
      if (a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom) hit.push([s, t]);
  }
  return hit;
})()"""
WIDTH = "document.documentElement.scrollWidth"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    program = browser.find_browser()
    if program is None:
        needed = os.environ.get("HF_REBASIN_NEEDS_BROWSER")
        (pytest.fail if needed else pytest.skip)(f"no browser here: none of {', '.join(browser.NAMES)} on the path")
    opened = browser.Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


LIGHT, DARK = ("light", (253, 253, 252)), ("dark", (20, 23, 26))


@pytest.mark.parametrize(
    ("make", "scheme", "paper", "width"),
    [
        (whole, *LIGHT, 1200),
        (whole, *DARK, 390),
        (hard, *LIGHT, 390),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((hard, *DARK, 1200), (whole, *LIGHT, 390))),
    ],
)
def test_in_a_browser(chromium, tmp_path, make, scheme, paper, width):
    path = tmp_path / "x.html"
    path.write_text(make().html())
    chromium.open(path, width, scheme)
    assert chromium.value("getComputedStyle(document.body).backgroundColor") == f"rgb{paper}"
    assert chromium.value(WIDTH) == width, "the page is wider than the window"
    assert chromium.requests == [path.as_uri()]
    assert chromium.complaints == []
    least, where = chromium.value(CONTRASTS)[0]
    assert least >= 4.5, where
    assert chromium.value(COLLISIONS) == []
    image = Image.open(BytesIO(chromium.screenshot(width, 600))).convert("RGB")
    assert image.getpixel((2, 590)) == paper
    assert len(image.getcolors(1 << 20)) > 50
    if make is whole:
        sections = chromium.value("[...document.querySelectorAll('section')].map(e => e.id || e.className)")
        parts = ["curves", "rows", "likeness", "moved", "exactness", "seconds", "notes"]
        assert sections == ["verdict", "pair-1", *parts, "notes", "again", "reading"]
        roles = {tuple(bytes.fromhex(getattr(STYLES[role], scheme)[1:])) for role in ("plain", "aligned")}
        assert roles <= {tuple(map(int, re.findall(r"\d+", stroke))) for stroke in chromium.value(CURVES)}


def test_a_browser_would_notice_what_is_wrong(chromium, tmp_path):
    html = whole().html()
    bad = html.replace("Content-Security-Policy", "nothing").replace("--muted: #555d67", "--muted: #999")
    bad = bad.replace(
        "</main>", '<img src="http://elsewhere.test/x.png"><p style="width: 900px; max-width: none">!</p></main>'
    )
    bad = bad.replace('x="0" y="14">loss', 'x="0" y="36">loss')
    (tmp_path / "bad.html").write_text(bad)
    chromium.open(tmp_path / "bad.html", 390)
    assert "http://elsewhere.test/x.png" in chromium.requests
    assert chromium.value(WIDTH) > 390
    assert chromium.value(CONTRASTS)[0][0] < 4.5
    assert chromium.value(COLLISIONS)
    (tmp_path / "kept.html").write_text(html.replace("</main>", '<img src="http://elsewhere.test/x.png"></main>'))
    chromium.open(tmp_path / "kept.html", 390)
    assert chromium.requests == [(tmp_path / "kept.html").as_uri()], "the policy did not hold it back"
    assert chromium.complaints


def test_names_are_replaced_in_one_pass():
    pair = Pair("x/bert", "bert")
    shown = Report("x/bert and bert", (pair,)).renamed({"x/bert": "bert", "bert": "bert (2)"})
    assert (shown.title, shown.pairs[0].fixed, shown.pairs[0].moving) == ("bert and bert (2)", "bert", "bert (2)")
