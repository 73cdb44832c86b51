"""Merges made by the command line are the bytes that they were when these digests were recorded.

The digests hold on every machine. All values of the inputs are whole numbers divided by 256:

- "linear" is an elementwise sum in float64, rounded to float32 once. Its exact values are whole numbers divided by
  6 · 256, and a fraction with the factor 3 in its denominator is much further from the midpoint of two float32 numbers
  than an error of float64 reaches; the others are float32 numbers themselves.
- "permuted" is matched by similarities that are sums of products of such numbers. These are exact in any order of
  summation, so the assignment, whose alternatives are well separated, is the same everywhere, and so is the mean.

config.json also depends on the version of transformers, which scripts/constraints.txt pins. A change that is meant to
alter these files records new digests with `python tests/helpers/outputs.py FOLDER linear permuted`.
"""

import pytest
from outputs import COMMANDS, make_inputs, write_output

DIGESTS = {
    "linear/config.json": "6f7a86de85ca9336101d704acf6286f60f974045ab8c004bb4c290db0ffbe164",
    "linear/model.safetensors": "7690dcf689cecb2dd8f58acb680d6021980e79f74a76cd4e76f30f2ea831e80a",
    "linear/recipe.yaml": "b165f92cf477d1eff78546932a637e9792ca11de3b8015b0ae7da2d5e6b6bafa",
    "permuted/config.json": "8b97a6f7fe0ed26b1d2dfe35bfeceb9cd0be9e393efc3f372a3c4c011cd79399",
    "permuted/model.safetensors": "33c4068d249ed4c2bdf39126292ec70625ee30fb28499b789b66e6c98253ecc1",
    "permuted/recipe.yaml": "b97d09b892d998e782818a647405fd750684de609858441b6e80a6ba20cd4c8c",
}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    make_inputs(folder, ("vit", "resnet"))
    return folder


@pytest.mark.parametrize("name", ["linear", "permuted"])
def test_outputs_are_the_recorded_bytes(name, inputs):
    digests = write_output(inputs, name, COMMANDS[name])
    expected = {file: digest for file, digest in DIGESTS.items() if file.startswith(f"{name}/")}
    assert {file: digests[file] for file in expected} == expected


def test_another_weight_gives_other_bytes(inputs):
    """Negative control: of the three files, only the configuration does not depend on the weights."""
    digests = write_output(inputs, "control", COMMANDS["linear"].replace("[1,2,3]", "[1,2,4]"))
    same = {
        file
        for file in ("config.json", "model.safetensors", "recipe.yaml")
        if digests[f"control/{file}"] == DIGESTS[f"linear/{file}"]
    }
    assert same == {"config.json"}
