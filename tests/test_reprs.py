"""What a notebook shows of an alignment, a solution, a spec or a checkpoint fits on a screen, whatever its size."""

import pytest
import torch
from conftest import other_seed
from torch import nn

from hf_rebasin import Checkpoint, align, infer_spec, spec_for

LONGEST = 1_200


def shown(model):
    """The objects that a session with a model prints."""
    solution = align(model, other_seed(model), starts=1, max_sweeps=1)
    return [solution, solution.alignment, solution.alignment.spec, Checkpoint.open(model)]


def test_reprs_fit_on_a_screen(family):
    for thing in shown(family):
        assert 20 < len(repr(thing)) <= LONGEST
        assert type(thing).__name__ in repr(thing)
        if hasattr(thing, "_repr_html_"):
            assert thing._repr_html_().startswith("<p>")


def test_names_without_anything_in_common_are_cut():
    names = [f"{letter * 60}_{i}" for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")]
    net = nn.Sequential()
    for name in names:
        net.add_module(name, nn.Linear(4, 4))
        net.add_module(f"act_{name}", nn.ReLU())
    spec = infer_spec(net, torch.zeros(1, 4))
    assert len(spec.symmetries) > 20
    assert len(repr(spec)) <= LONGEST
    assert f"and {len(spec.symmetries) - 8} more" in repr(spec)


def test_what_a_repr_says(bert):
    said = repr(spec_for(bert))
    assert said.splitlines()[0] == f"Spec({spec_for(bert)})"
    assert any(line.split() == ["ff.*", "permutation", "size", "20", "×", "2"] for line in said.splitlines())
    solution = align(bert, bert)
    assert repr(solution).startswith(f"Solution({solution.status.value})")
    assert "0 of" in repr(solution.alignment)


def test_a_repr_of_all_parts_would_be_too_long(bert):
    spec = spec_for(bert)
    assert len(repr([vars(tensor) for tensor in spec.tensors])) > LONGEST
    with pytest.raises(AssertionError):
        assert len(repr(spec.tensors)) <= LONGEST
