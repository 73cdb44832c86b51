"""Shared by the tests of publishing: tiny models and digits, the command line, and the contents of repositories."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

import datasets
import numpy as np
import torch
from conftest import HUB, ROOT
from huggingface_hub import HfApi
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification
from transformers import ViTImageProcessor as Processor

from hf_rebasin.cli.main import main

LABELS = {"id2label": {i: str(i) for i in range(4)}, "label2id": {str(i): i for i in range(4)}}
CARD = "---\nlicense: {}\n---\n\nA model.\n"


def run_cli(*arguments):
    """Run the command line in this process; return (exit status, standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["hf-rebasin", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
    return status, out.getvalue(), err.getvalue()


def run_ok(*arguments):
    """Run the command line, assert that it succeeds, and return its standard output."""
    status, out, err = run_cli(*arguments)
    assert status == 0, out + err
    return out


def expect_refusal(*arguments):
    """Run the command line, assert that it fails with one error line, and return that line."""
    status, out, err = run_cli(*arguments)
    assert status == 1, out + err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: "), err
    assert "Traceback" not in out + err
    return last


def run_fresh(script, folder, *arguments, **environment):
    """Run a script in a process of its own with empty caches; return its standard output."""
    own = {"HF_HOME": str(folder / "fresh"), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **own},
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def vit(seed, **other):
    torch.manual_seed(seed)
    small = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_attention_heads": 2}
    config = ViTConfig(**small, num_hidden_layers=1, intermediate_size=24, initializer_range=0.3, **LABELS, **other)
    return ViTForImageClassification(config).eval()


def resnet(seed):
    torch.manual_seed(seed)
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], **LABELS)
    return ResNetForImageClassification(config).eval()


def processor():
    return Processor(do_resize=False, image_mean=[0.5], image_std=[0.5])


def save_parts(folder, *parts, licence=None):
    """Save models, processors and tokenizers to a folder, with a card if a licence is given; return it."""
    for part in parts:
        part.save_pretrained(folder)
    if licence is not None:
        (folder / "README.md").write_text(CARD.format(licence))
    return folder


def push_parts(repository, *parts, licence="mit", **options):
    """Push models, processors and tokenizers to the Hub with a model card; return the commit."""
    for part in parts:
        part.push_to_hub(repository, **options)
    upload = HfApi().upload_file
    upload(path_or_fileobj=CARD.format(licence).encode(), path_in_repo="README.md", repo_id=repository)
    return HUB.repo(repository).resolve("main")


def digits(seed, rows):
    """Noisy images of four classes, told apart by which quarter is bright."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 4, rows).tolist()
    images = draw.integers(0, 120, (rows, 8, 8)).astype("uint8")
    for image, label in zip(images, labels, strict=True):
        image[4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 120
    kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list("0123")))
    return datasets.Dataset.from_dict({"image": [*map(Image.fromarray, images)], "label": labels}, features=kinds)


def push_digits(repository):
    datasets.disable_progress_bars()
    for split, rows in (("train", 48), ("test", 40)):
        digits(rows, rows).push_to_hub(repository, split=split)
    return repository


def write_digits(folder):
    datasets.disable_progress_bars()
    folder.mkdir(parents=True)
    for split, rows in (("train", 48), ("test", 40)):
        digits(rows, rows).to_parquet(folder / f"{split}.parquet")
    return folder


def repository_files(repository, revision="main"):
    """Return {file: bytes} of a repository."""
    return {name: HUB.content(repository, name, revision) for name in HUB.repo(repository).files(revision)[1]}


def commit_titles(repository, revision="main"):
    """Return the commit titles of a branch, latest first."""
    return [commit.title for commit in HfApi().list_repo_commits(repository, revision=revision)]


def folder_contents(folder):
    """Return {file: bytes} of a folder."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def flip_bit(file):
    """Flip a bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
