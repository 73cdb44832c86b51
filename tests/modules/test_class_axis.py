"""Which axis of the outputs has the classes: second, as CrossEntropyLoss reads them, or last, as in transformers.

Most tests compare a net whose classes are second with its twin, which computes the same and puts them last.
"""

import logging
import math

import pytest
import torch
from conftest import FIRST, TINY
from nets import draw_normal
from torch import nn
from torch.nn import functional

from hf_rebasin import Checkpoint, evaluate, merge
from hf_rebasin.errors import OptionError
from hf_rebasin.modules.divergence import Divergence
from hf_rebasin.modules.forward import attended_outputs, class_axis
from hf_rebasin.modules.layerwise import find_steps
from hf_rebasin.solving.activations import _activation_gradients

CLASSES, LENGTH = 4, 7


class Tagger(nn.Module):
    """A convolutional net with scores of classes at every position, and perhaps a loss."""

    def __init__(self, classes=CLASSES, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Conv1d(3, 6, 3, padding=1), nn.Conv1d(6, classes, 1)
        self.double().eval()

    def forward(self, x, labels=None):
        scores = self.head(self.body(x).relu())
        return scores if labels is None else (functional.cross_entropy(scores, labels), scores)


class Twin(Tagger):
    """A tagger whose outputs have their classes on the last axis."""

    def forward(self, x, labels=None):
        outputs = super().forward(x, labels)
        return outputs.mT if labels is None else (outputs[0], outputs[1].mT)


class Wrong(Tagger):
    """Says that its classes are last, where its positions are."""

    class_axis = -1


def batches(count=3, length=LENGTH, classes=CLASSES, labelled=True):
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        labels = {"labels": torch.randint(classes, (5, length), generator=generator)} if labelled else {}
        yield {"x": draw_normal(5, 3, length, seed=seed), **labels}


def linear_head(*shape):
    """A module whose last layer makes as many features as the classes, 4."""
    return nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 4))


SHAPES = {
    "classes": (nn.Linear(3, 4), (2, 4), None, 1),
    "labels for all but the second": (nn.Identity(), (2, 4, 7), (2, 7), 1),
    "labels for all but the last": (nn.Identity(), (2, 7, 4), (2, 7), 2),
    "labels that fit both, a convolution": (Tagger(7), (2, 7, 7), (2, 7), 1),
    "labels that fit both, a linear layer": (linear_head(), (2, 4, 4), (2, 4), 2),
    "a convolution": (Tagger(), (2, 4, 7), None, 1),
    "a linear layer, last": (linear_head(), (2, 7, 4), None, 2),
    "a linear layer, second": (linear_head(), (2, 4, 7), None, 1),
    "as long as a hidden layer is wide": (linear_head(), (2, 9, 4), None, 2),
    "labels against the layer": (linear_head(), (2, 7, 4), (2, 4), 1),
    "an image": (nn.Conv2d(3, 4, 1), (2, 4, 8, 8), None, 1),
    "an image with classes last": (linear_head(), (2, 8, 8, 4), None, 3),
    "nothing tells": (nn.Identity(), (2, 4, 7), None, 1),
    "transformers, tokens": (TINY[FIRST["bert"]], (2, 4, 7), (2, 7), 2),
    "transformers, images": (TINY[FIRST["resnet"]], (2, 4, 8, 8), None, 1),
}


@pytest.mark.parametrize("case", SHAPES)
def test_the_axis(case):
    module, shape, labels, axis = SHAPES[case]
    assert class_axis(module, torch.zeros(shape), None if labels is None else torch.zeros(labels)) == axis


def test_a_module_says_its_axis():
    module = nn.Sequential(nn.Conv1d(3, 4, 1))
    scores, labels = torch.zeros(2, 4, 7), torch.zeros(2, 7)
    assert class_axis(module, scores, labels) == 1
    module.class_axis = 2
    assert class_axis(module, scores, labels) == 2
    assert class_axis(module, scores[:, :, 0]) == 1  # there is no choice
    module.class_axis = -2
    assert class_axis(module, scores) == 1
    for wrong in (0, 3, -3, "last"):
        module.class_axis = wrong
        with pytest.raises(OptionError, match=r"class_axis of Sequential is .*\(2, 4, 7\)"):
            class_axis(module, scores)


def test_the_log_says_what_was_taken(caplog):
    class Bare(nn.Module):
        pass

    with caplog.at_level(logging.INFO):
        for _ in range(3):
            class_axis(Bare(), torch.zeros(2, 4, 7))
    (record,) = caplog.records  # once
    assert record.levelname == "WARNING"
    assert "classes of outputs [2, 4, 7] are taken to be axis 1" in record.message
    assert "set class_axis of the module" in record.message
    with caplog.at_level(logging.INFO):
        class_axis(Bare(), torch.zeros(2, 4, 7), torch.zeros(2, 4))
    assert caplog.records[-1].levelname == "INFO"
    assert "axis 2, by the shape of the labels" in caplog.records[-1].message


@pytest.mark.parametrize("length", [LENGTH, CLASSES], ids=["other lengths", "as many positions as classes"])
def test_accuracy(length):
    net, twin, data = Tagger(), Twin(), list(batches(length=length))
    twin.class_axis = -1
    right = torch.cat([(net(batch["x"]).argmax(1) == batch["labels"]).flatten() for batch in data])
    for model in (net, twin):
        scores = evaluate(model, data)
        assert scores.metrics["accuracy"] == right.double().mean().item()
        assert scores.samples == right.numel()
    wrong = evaluate(Wrong(), data).metrics  # negative control: without a fitting axis there is no accuracy
    assert wrong.get("accuracy") != right.double().mean().item()


def mean_divergence(make, weights=(0.25, 0.75)):
    module_keys = {key: key for key in Tagger().state_dict()}
    ends = [dict(Tagger(seed=seed).state_dict()) for seed in (1, 2)]
    (batch,) = batches(1, labelled=False)
    return Divergence(make(), module_keys, ends).per_sample(dict(Tagger(seed=3).state_dict()), weights, batch)


def test_divergence():
    (batch,) = batches(1, labelled=False)
    a, b, y = (Tagger(seed=seed)(batch["x"]).softmax(1) for seed in (1, 2, 3))
    mean = 0.25 * a + 0.75 * b
    expected = (mean * (mean / y).log()).sum(1)
    assert expected.shape == (5, LENGTH)
    for make in (Tagger, Twin):
        torch.testing.assert_close(mean_divergence(make), expected.flatten())
    assert len(mean_divergence(Wrong)) == 5 * CLASSES  # negative control: softmax over positions


def test_positions_that_a_mask_leaves_out():
    mask = torch.ones(5, LENGTH)
    mask[:, 4:] = 0
    (batch,) = batches(1, labelled=False)
    net, twin = Tagger(), Twin()
    ours, theirs = (attended_outputs(m, m(batch["x"]), {"attention_mask": mask})[0] for m in (net, twin))
    assert ours.shape == (20, CLASSES)
    assert torch.equal(ours, theirs)
    assert attended_outputs(Wrong(), net(batch["x"]), {"attention_mask": mask})[0].shape == (5, CLASSES, LENGTH)


class Scores(nn.Module):
    """Gives the first of two classes the probability p at each of three positions."""

    def __init__(self, p, axis=1):
        super().__init__()
        self.scores = nn.Parameter(torch.tensor([math.log(p / (1 - p)), 0.0], dtype=torch.float64))
        self.class_axis = axis

    def forward(self, x):
        return self.scores[:, None].expand(len(x), 2, 3)


def test_distilling():
    """As in the docstring of `distil`, 0.3 is the mean of 0.2 and 0.4."""

    def distilled(axis):
        models = [Scores(p, axis) for p in (0.2, 0.4)]
        merged = merge(models, "distil", data=[torch.zeros(3, 1)] * 2, steps=400, rate=0.02)
        return merged.tensors["scores"].softmax(0)[0].item()

    assert distilled(1) == pytest.approx(0.3, abs=1e-4)
    assert distilled(-1) != pytest.approx(0.3, abs=5e-3)  # negative control: over positions there is nothing to learn


def test_only_a_layer_with_classes_last_is_refitted_by_kl():
    """A linear layer over the positions may be the last one, too; its outputs are no logits of classes."""

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv1d(3, CLASSES, 1), nn.Linear(LENGTH, LENGTH)

        def forward(self, x, labels=None):
            scores = self.head(self.body(x))
            return scores if labels is None else (functional.cross_entropy(scores, labels), scores)

    (batch,) = batches(1)
    mixer = Mixer().double()
    assert [step.gives_logits for step in find_steps(mixer, batch)] == [False, False]
    mixer.class_axis = -1
    assert [step.gives_logits for step in find_steps(mixer, batch)] == [False, True]


def test_sensitivity_is_that_of_centred_scores():
    (batch,) = batches(1, labelled=False)

    def gradient(net):
        x = batch["x"].clone().requires_grad_()
        return _activation_gradients({"x": [x]}, attended_outputs(net, net(x), batch))["x"][0]

    torch.testing.assert_close(gradient(Tagger()), gradient(Twin()))
    assert not torch.allclose(gradient(Tagger()), gradient(Wrong()))


def test_a_copy_keeps_the_axis_that_a_module_says():
    assert Checkpoint.open(Scores(0.5, axis=-1)).model().class_axis == -1
