"""Licences: those declared in cards, and those of merges."""

import pytest

from hf_rebasin.checkpoints.licences import Licence, UnreadableLicence, find_licence, merged_licence
from hf_rebasin.errors import OptionError

MIT, APACHE = Licence("mit"), Licence("apache-2.0")
GEMMA, OWN = Licence("other", "gemma-terms", "https://x.y/terms"), Licence("other", "own-terms")


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n# A model", MIT),
        ("---\nlicense: Apache-2.0\ntags: [a]\n---\n", APACHE),
        ("---\nlicense: [mit]\n---\n", MIT),
        ("---\nlicense: other\nlicense_name: gemma-terms\nlicense_link: https://x.y/terms\n---\n", GEMMA),
        ("---\ntags: [a]\n---\n", None),
        ("---\n---\n", None),
        ("# No metadata, license: mit", None),
        ("", None),
        ("---\nlicense: [mit\n---\n", "no YAML"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "['mit', 'apache-2.0']"),
        ("---\nlicense: 2\n---\n", "license: 2"),
        ("---\nlicense: see the file\n---\n", "see the file"),
        ("---\n- a list\n---\n", "dict"),
        (b"---\nlicense: m\xff\n---\n", "utf-8"),
    ],
)
def test_what_a_card_says(card, licence, tmp_path):
    (tmp_path / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    declared = find_licence(tmp_path)
    if isinstance(licence, str):
        assert isinstance(declared, UnreadableLicence)
        assert licence in declared.why
    else:
        assert declared == licence


def test_no_card_says_nothing(tmp_path):
    assert find_licence(tmp_path) is None
    assert find_licence(tmp_path, {"a": MIT, "b": MIT}) == MIT, "what it was made of does"
    assert find_licence(tmp_path, {"a": MIT, "b": APACHE}) is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert find_licence(tmp_path, {"a": MIT, "b": MIT}) == APACHE


@pytest.mark.parametrize(
    ("models", "licence"),
    [
        ({"a": MIT, "b": MIT}, MIT),
        ({"a": GEMMA, "b": Licence("other", "gemma-terms")}, GEMMA),
        ({"a": MIT, "b": Licence("mit", "MIT")}, MIT),
        ({"a": MIT, "b": APACHE}, None),
        ({"a": MIT, "b": None}, None),
        ({"a": None, "b": None}, None),
        ({"a": GEMMA, "b": OWN}, None),
        ({"a": Licence("other"), "b": Licence("other")}, None),
        ({"a": Licence("unknown"), "b": Licence("unknown")}, None),
        ({"a": MIT, "b": UnreadableLicence("no YAML")}, None),
    ],
)
def test_what_a_merge_has(models, licence):
    outcome = merged_licence(models)
    assert outcome.licence == licence
    assert outcome.refused == (licence is None)
    assert not outcome.named
    if outcome.refused:
        assert all(
            f"{name}: {'none said' if declared is None else declared}" in outcome.text
            for name, declared in models.items()
        )
        assert "until you name one" in outcome.text


def test_what_the_publisher_names_stands_beside_what_the_models_say():
    outcome = merged_licence({"a": MIT, "b": None}, "Apache-2.0")
    assert outcome.text == "inputs: a: mit, b: none said; named by the publisher: apache-2.0"
    assert (outcome.licence, outcome.named, outcome.refused) == (APACHE, True, False)
    assert merged_licence({"a": MIT}, OWN).licence == OWN
    for wrong in ("", "my own", "MIT License", "other", "unknown", "a/b"):
        with pytest.raises(OptionError, match="licence"):
            merged_licence({"a": MIT}, wrong)
