"""Set up the tests: a local Hub instead of the real one, one thread, TINY models of every table."""

import gc
import itertools
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random

from minihub import MiniHub

HUB = MiniHub().start()
CACHE = tempfile.TemporaryDirectory(prefix="hf-rebasin-tests-", ignore_cleanup_errors=True)
os.environ.update(  # read when huggingface_hub is imported
    HF_ENDPOINT=HUB.url,
    HF_TOKEN=HUB.token,
    HF_HOME=CACHE.name,
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_UPDATE_CHECK="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_XET="1",
    DISABLE_SAFETENSORS_CONVERSION="1",
    OMP_NUM_THREADS="1",
    TRANSFORMERS_VERBOSITY="error",
)

import pytest
import torch
import transformers

from hf_rebasin import Alignment, Checkpoint, Solution, Status, infer_spec, spec_for
from hf_rebasin.alignment.exactness import tiny_models
from hf_rebasin.alignment.gauge import find_gauges, gauge_vectors
from hf_rebasin.errors import CheckpointError

torch.set_num_threads(1)
transformers.logging.disable_progress_bar()

pytest_plugins = ["assessed"]  # fixtures that several rooms use

TINY = dict(tiny_models())
ROOT = Path(__file__).parent.parent
FIRST = {name.split("-")[0]: name for name in reversed(TINY)}  # one model per table


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # torch, transformers and the tests stay alive; scanning them repeatedly takes a tenth of the time


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


@pytest.fixture(params=list(TINY))
def tiny(request):
    """Every TINY model, in float64, with all its values random. Must not be changed."""
    return TINY[request.param]


ONE_OF_EACH = [name if name in FIRST.values() else pytest.param(name, marks=pytest.mark.slow) for name in TINY]


@pytest.fixture(params=ONE_OF_EACH)
def sample(request):
    """One TINY model per table, with --slow all of them: for what depends on groups rather than on classes."""
    return TINY[request.param]


@pytest.fixture(params=list(FIRST.values()), ids=list(FIRST))
def family(request):
    """One TINY model per table."""
    return TINY[request.param]


@pytest.fixture
def bert():
    return TINY["bert-1-BertForMaskedLM"]


@pytest.fixture
def resnet():
    return TINY[FIRST["resnet"]]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def moved_copy(model, seed=0, groups="permutation"):
    """Return (the model in other coordinates, the alignment that moved it)."""
    spec = spec_for(model)
    spec = spec.restricted() if groups == "permutation" else spec
    alignment = Alignment.random(spec, torch.Generator().manual_seed(seed))
    return alignment.apply(model), alignment


@dataclass(frozen=True)
class RandomSolver:
    """A solver that moves a model at random, but into the other's gauge: laws of merging hold for any alignment."""

    def solve(self, problem):
        norms = find_gauges(problem.spec)
        gains = {"gauge": gauge_vectors(norms, problem.fixed), "origin": gauge_vectors(norms, problem.moving)}
        moved = replace(Alignment.random(problem.spec, problem.generator), **gains)
        return Solution(moved, 0.0, (0.0,), Status.CONVERGED)


def other_seed(model, seed=1000):
    """Return a model of the same class and configuration with other random weights."""
    torch.manual_seed(seed)
    return type(model)(model.config).to(model.dtype).eval()


def run_script(text, folder, processes=1):
    """Run a script on a folder, in several processes by accelerate; it can import the modules of the tests."""
    script = folder / "script.py"
    script.write_text(text)
    launch = [sys.executable]
    if processes > 1:  # --multi_gpu starts gloo processes if there are no GPUs
        launch += ["-m", "accelerate.commands.launch", "--num_machines=1", "--mixed_precision=no"]
        launch += ["--dynamo_backend=no", "--multi_gpu", f"--num_processes={processes}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # with the folders of the tests
    subprocess.run([*launch, str(script), str(folder)], check=True, env=environment)


def same_tensors(a, b):
    """Whether two models, checkpoints or folders hold the same bytes under the same disk keys."""
    a, b = Checkpoint.open(a).tensors, Checkpoint.open(b).tensors
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def distance(a, b):
    """Return the largest ‖a - b‖ / max(‖a‖, 1) of all tensors of two models or folders with the same disk keys."""
    a, b = Checkpoint.open(a).tensors, Checkpoint.open(b).tensors
    assert a.keys() == b.keys()
    return max(((a[k].double() - b[k].double()).norm() / a[k].double().norm().clamp_min(1)).item() for k in a)


def store_ties_like(model, like):
    """Return a model with its tied tensors stored separately where another model's are."""
    checkpoint = Checkpoint.open(model)
    apart = Checkpoint.open(like).tensors.keys() - checkpoint.tensors.keys()
    return checkpoint.apart({key: checkpoint.ties[key] for key in apart})


ALL_OR_SOME = pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])


def sample_cases(cases, everything, models):
    """Return as many of the wrong tables `(row, ...)` as there is time for, at least one per row; or all of them.

    Trying one takes time in proportion to the model's tensors. For most tables, all cases are affordable; for tables
    with rows for every block of a large network, only with --slow.
    """
    affordable = 10_000 // max(len(Checkpoint.open(model).tensors) for model in models)
    if everything or len(cases) <= affordable:
        return list(cases)
    rows = {}
    for case in sorted(cases, key=str):
        rows.setdefault(case[0], []).append(case)
    for group in rows.values():
        Random(0).shuffle(group)
    interleaved = [case for turn in itertools.zip_longest(*rows.values()) for case in turn if case is not None]
    return interleaved[: max(affordable, len(rows))]


@cache
def infer_or_skip(model):
    """Infer the spec of a model; skip the test if its modules fuse tensors of the disk, so that it cannot run.

    Cached, as tests do not change models: tracing takes longer than most of what is done with the spec.
    """
    checkpoint = Checkpoint.open(model)
    try:
        checkpoint.skeleton()
    except CheckpointError as error:
        pytest.skip(str(error))
    return infer_spec(checkpoint)
