"""Side files: everything of a model goes along except known leftovers; what is overwritten is a model's."""

import ast
import hashlib
import inspect
import json
import os
import re
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from conftest import HUB, same_tensors
from huggingface_hub import HfApi, snapshot_download
from transformers import utils
from transformers.integrations.mistral.constants import TEKKEN_VOCAB_FILE

from hf_rebasin import Checkpoint, merge
from hf_rebasin.checkpoints import folder as folders
from hf_rebasin.checkpoints import side_files
from hf_rebasin.checkpoints.folder import MARKER, list_side_files, list_tokenizer_files, tokenizer_folder
from hf_rebasin.errors import CheckpointError, TargetExistsError


@pytest.fixture
def folder(bert, tmp_path):
    return Checkpoint.open(bert).save(tmp_path / "model")


def write_files(folder, names, content="the content of {}"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content.format(name))


def relative_names(folder):
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def push_folder(folder, repo):
    HfApi().create_repo(repo, exist_ok=True)
    HfApi().upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=[])
    return repo


def classes_ending(end):
    """Yield the classes of transformers with such names that can be imported here."""
    for name in dir(transformers):
        if name.endswith(end):
            with suppress(ImportError):
                owner = getattr(transformers, name)
                if inspect.ismethod(getattr(owner, "from_pretrained", None)):
                    yield owner


@cache
def named_by_tokenizers():
    """Return all files that tokenizer classes name, read from their code: not all can be imported."""
    names = set()
    for file in Path(transformers.__file__).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if "VOCAB_FILES_NAMES" not in text:
            continue
        assigned = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assign)]
        values = {
            target.id: node.value for node in assigned for target in node.targets if isinstance(target, ast.Name)
        }
        entries = values["VOCAB_FILES_NAMES"].values if "VOCAB_FILES_NAMES" in values else ()
        names |= {ast.literal_eval(values[entry.id] if isinstance(entry, ast.Name) else entry) for entry in entries}
    for owner in classes_ending("Tokenizer"):
        names |= set(getattr(owner, "vocab_files_names", {}).values())
    assert len(names) > 20
    return names | {TEKKEN_VOCAB_FILE}


def named_by_processors():
    """Return the files that processors read by default, and those that all of transformers agree on."""
    names = {value for key, value in vars(utils).items() if re.fullmatch(r"[A-Z_]+_NAME", key) and "." in str(value)}
    names -= {utils.WEIGHTS_NAME, utils.WEIGHTS_INDEX_NAME, utils.SAFE_WEIGHTS_NAME, utils.SAFE_WEIGHTS_INDEX_NAME}
    names -= {utils.MODEL_CARD_NAME}
    names = {name for name in names if not name.startswith(("adapter", "pytorch", "flax", "tf_"))}
    for owner in classes_ending("Processor"):
        for parameter in inspect.signature(owner.from_pretrained).parameters.values():
            if isinstance(parameter.default, str) and re.search(r"\.\w+$", parameter.default):
                names.add(parameter.default)
    assert names >= {"preprocessor_config.json", "processor_config.json", "speaker_embeddings_path.json"}
    return names


TEXTS = (
    *("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "labels.txt", "alphabet.json", "model_head.pkl"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/tool.jinja", "params.json"),
    *("1_Pooling/config.json", "question_encoder_tokenizer/vocab.txt", "generator_tokenizer/merges.txt"),
    *("language_model/5gram.bin", "language_model/attrs.json", "speaker_embeddings/v2/voice_coarse.npy"),
)
MODULES = (
    *("qtiny_generation_utils.py", "modeling_x.py", "optimizer.py", "layers/__init__.py", "layers/norms/rms.py"),
    *("handler.py", "layers/kernel.cu"),
)
LEFTOVERS = (
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "x.lock"),
    *("training_args.bin", "trainer_state.json", "all_results.json", "eval_results.json", "trainer_log.jsonl"),
    *("checkpoint-5/config.json", "checkpoint-5/model.safetensors", "global_step5/mp_rank_00.pt", "zero_to_fp32.py"),
    *("runs/now/events.out.tfevents.1", "events.out.tfevents.2", "wandb/run.json", "logs/x.txt", "train.log"),
    *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5"),
    *("flax_model.msgpack", "model.fp16.safetensors", "rust_model.ot", "model.onnx", "weights.npz", "model.ckpt"),
    *("model.Q4_K_M.gguf", "onnx/model.onnx", "onnx/config.json", "openvino/openvino_model.bin", "model.tflite"),
    *("original/params.json", "original/consolidated.00.pth", "consolidated.safetensors", "adapter_model.bin"),
    *("README.md", "README_de.md", "assets/picture.png", "loss.png", ".gitattributes", ".gitignore", ".git/config"),
    *(".cache/huggingface/x.json", ".DS_Store", "__pycache__/modeling_x.cpython-311.pyc", ".x.partial", "y.partial"),
    *("rebasin.json", "recipe.yaml", "SHA256SUMS", "report.json", "report-1.png", "alignment.safetensors"),
    *("rebasin/alignment.safetensors", "rebasin/report.json", "rebasin/report.png", "mergekit_config.yml"),
)


def test_every_file_of_a_tokenizer_or_processor_goes_along(bert, tmp_path):
    """All that any class of the installed transformers names, byte for byte, from a folder and from the Hub."""
    names = {*named_by_tokenizers(), *named_by_processors(), *TEXTS, *MODULES} - {"config.json"}
    a, b = (Checkpoint.open(bert).save(tmp_path / name) for name in "ab")
    write_files(a, names)
    write_files(b, names, "another")
    repo = push_folder(a, "org/side-files")
    for i, models in enumerate(([a, b], [repo, b])):
        out = merge(models, assume=("vocabulary", "config")).save(tmp_path / f"out-{i}")
        assert {name for name in names if (out / name).read_text() != f"the content of {name}"} == set()
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=out, check=True, capture_output=True)
        listed = {line.split("  ")[1] for line in (out / "SHA256SUMS").read_text().splitlines()}
        assert listed == relative_names(out) - {"SHA256SUMS"}


def test_leftovers_stay_and_nothing_is_said_of_them(folder, tmp_path, caplog):
    """A folder, the Hub and a repository that another client fetched whole give the same side files."""
    before = relative_names(folder) - {"model.safetensors", "SHA256SUMS"}
    write_files(folder, LEFTOVERS)
    write_files(folder, ["1_Pooling/config.json"])
    expected = sorted({*before, "1_Pooling/config.json"})
    assert [file.relative_to(folder).as_posix() for file in list_side_files(folder)] == expected
    repo = push_folder(folder, "org/leftovers")
    fetched = Checkpoint.open(repo).folder
    kept = {*expected, "model.safetensors", "README.md"}
    assert relative_names(fetched) - kept <= {"pytorch_model.bin.index.json"}, "of two formats, both indices are read"
    assert [file.relative_to(fetched).as_posix() for file in list_side_files(fetched)] == expected
    snapshot_download(repo)
    assert [file.relative_to(fetched).as_posix() for file in list_side_files(fetched)] == expected
    assert not caplog.records


@pytest.mark.parametrize("name", LEFTOVERS)
def test_a_leftover_has_a_near_relative_that_goes_along(name):
    """A negative control: each is told by its own name or place, not because everything stays."""
    relative = f"model_parts/of_{Path(name).name.lstrip('.').partition('.')[0]}.py"
    assert folders.select_side_files({name: 1, relative: 1, "config.json": 1}, [])[0] == ["config.json", relative]


def test_what_is_large_or_strange_is_said_and_stays(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(side_files, "LARGE", 1000)
    write_files(folder, ["corpus.tsv", *(f"data/{i}.json" for i in range(30))], "x" * 1001)
    (folder / "corpus.tsv").write_text("x" * 1001)
    write_files(folder, ["vocab.txt", "tokenizer.json", "language_model/5gram.bin"], "y" * 2000)
    write_files(folder, ["voice.pt", "codec/model.safetensors", "codec/config.json", "small/notes.txt"])
    repo = push_folder(folder, "org/large")
    for i, source in enumerate((folder, repo)):
        caplog.clear()
        out = merge([source, source]).save(tmp_path / f"out-{i}")
        assert relative_names(out) & {"vocab.txt", "tokenizer.json", "language_model/5gram.bin"}
        assert "small/notes.txt" in relative_names(out)
        assert not relative_names(out) & {"corpus.tsv", "data/1.json", "voice.pt", "codec/config.json"}
        said = {record.getMessage() for record in caplog.records}
        assert len(said) == 1, said
        (line,) = said
        for part in ("codec (has weights of its own)", "voice.pt (is of another format)", "corpus.tsv (has 1.0 kB)"):
            assert part in line
        assert "data (has 30.0 kB)" in line
    monkeypatch.setattr(side_files, "LARGE", 10**6)
    caplog.clear()
    assert "corpus.tsv" in relative_names(merge([folder, folder]).save(tmp_path / "all"))


def test_the_same_files_are_selected_from_sizes_as_from_a_folder(folder):
    """The rule sees names and sizes alone, so that it can be asked before anything is fetched."""
    write_files(folder, [*TEXTS, *MODULES, *LEFTOVERS, "codec/model.safetensors", "codec/notes.txt"])
    sizes = {name: (folder / name).stat().st_size for name in relative_names(folder)}
    selected, _ = folders.select_side_files(sizes, [])
    assert [folder / name for name in selected] == list_side_files(folder)
    assert {*TEXTS, *MODULES} <= set(selected)


def test_no_file_of_a_tokenizer_is_taken_for_weights_or_a_leftover():
    names = named_by_tokenizers()
    assert names <= side_files.tokenizer_names()
    assert not [name for name in names if side_files.holds_weights(name) or side_files.is_leftover(name)]
    assert all(side_files.is_known_side_file(name) for name in names)


@pytest.mark.parametrize("name", sorted(side_files.tokenizer_names()))
def test_a_tokenizer_is_known_by_any_of_its_files(tmp_path, name):
    assert tokenizer_folder(tmp_path) is None
    (tmp_path / name).write_text("{}")
    assert list_tokenizer_files(tmp_path) == {name}
    extras = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "normalizer.json")
    assert (tokenizer_folder(tmp_path) is None) == (name in extras)


def test_looking_up_the_names_of_tokenizer_files_is_cheap():
    """Nothing of transformers is imported for it."""
    script = (
        "import sys; from hf_rebasin.checkpoints.side_files import tokenizer_names\n"
        "assert 'source.spm' in tokenizer_names() and 'tekken.json' in tokenizer_names()\n"
        "print([name for name in sys.modules if name.startswith(('transformers', 'torch'))])"
    )
    done = subprocess.run([os.sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- links -----------------------------------------------------------------------------------------------------------


def test_folders_that_are_links_out_of_the_model_are_refused_and_circles_end(folder, tmp_path):
    outside = tmp_path / "mine"
    write_files(outside, ["secret.txt"])
    (folder / "voices").symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"voices is a link to .*mine, outside .* or remove it"):
        Checkpoint.open(folder)
    (folder / "voices").rename(folder / "runs")  # a leftover, which is not looked into
    write_files(folder, ["parts/a.txt"])
    (folder / "parts" / "again").symlink_to(folder / "parts")
    out = merge([folder, folder]).save(tmp_path / "out")
    assert (out / "parts" / "a.txt").is_file()
    assert not (out / "runs").exists()
    assert not (out / "parts" / "again").exists()


# --- overwriting -----------------------------------------------------------------------------------------------------


def test_a_model_with_any_files_is_overwritten_and_foreign_files_are_not(folder, bert, tmp_path):
    write_files(folder, ["notes.txt", "layers/norms.py", "source.spm", "1_Pooling/config.json"])
    out = merge([folder, folder]).save(tmp_path / "out")
    merge([folder, folder]).save(out, overwrite=True)
    assert (out / "layers/norms.py").read_text() == "the content of layers/norms.py"
    for name in ("mine.txt", "layers/mine.py", "data/mine.csv"):
        write_files(out, [name])
        with pytest.raises(TargetExistsError, match=rf"do not belong to a model \({name}\)"):
            Checkpoint.open(bert).save(out, overwrite=True)
        (out / name).unlink()
    (out / "data").rmdir()
    (out / "notes.txt").write_text("changed since")
    with pytest.raises(TargetExistsError, match=r"do not belong to a model \(notes.txt\)"):
        Checkpoint.open(bert).save(out, overwrite=True)
    (out / "notes.txt").unlink()
    (out / "source.spm").write_text("changed since, but a tokenizer's")
    Checkpoint.open(bert).save(out, overwrite=True)
    assert not (out / "layers").exists()


def test_checksums_that_cannot_be_read_make_nothing_a_models(folder, bert):
    write_files(folder, ["notes.txt"])
    digest = hashlib.sha256((folder / "notes.txt").read_bytes()).hexdigest()
    for name, content in (("SHA256SUMS", b"\xff"), ("rebasin.json", b"{"), ("rebasin.json", b'{"outputs": 3}')):
        (folder / name).write_bytes(content)
        with pytest.raises(TargetExistsError, match=r"\(notes.txt\)"):
            Checkpoint.open(bert).save(folder, overwrite=True)
        (folder / name).unlink()
    (folder / "rebasin.json").write_text(json.dumps({"outputs": {"notes.txt": digest}}))
    Checkpoint.open(bert).save(folder, overwrite=True)


@pytest.mark.parametrize("place", [".out.partial", ".out.old"])
def test_what_a_killed_run_left_is_removed_whatever_its_names(bert, tmp_path, place):
    write_files(tmp_path / place, [MARKER, "layers/norms.py", "notes.txt", "2_Dense/model.safetensors"])
    out = Checkpoint.open(bert).save(tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert same_tensors(out, bert)
    write_files(tmp_path / place, ["notes.txt"])
    with pytest.raises(TargetExistsError, match=r"\(notes.txt\)"):
        Checkpoint.open(bert).save(out, overwrite=True)
    assert (tmp_path / place / "notes.txt").is_file(), "nobody says that it is ours"


def test_a_folder_is_known_as_ours_at_every_moment(folder, tmp_path, monkeypatch):
    """Stopped before any of its changes to the file system, a run leaves what the next one removes or puts back."""
    write_files(folder, ["notes.txt", "layers/norms.py"])
    out = merge([folder, folder]).save(tmp_path / "out")
    before = {name: (out / name).read_bytes() for name in relative_names(out)}
    stopped_after, moments = 0, 0

    class Killed(BaseException):
        pass

    def stopping(act):
        def once(*arguments, **options):
            nonlocal moments
            moments += 1
            if moments > stopped_after:
                raise Killed
            return act(*arguments, **options)

        return once

    while True:
        moments = 0
        with monkeypatch.context() as patch:
            for owner, name in ((Path, "rename"), (Path, "unlink"), (Path, "rmdir"), (folders.shutil, "rmtree")):
                patch.setattr(owner, name, stopping(getattr(owner, name)))
            try:
                merge([folder, folder]).save(out, overwrite=True)
                finished = True
            except Killed:
                finished = False
        if not out.exists():
            (tmp_path / ".out.old").rename(out)
        assert {name: (out / name).read_bytes() for name in relative_names(out)} == before
        merge([folder, folder]).save(out, overwrite=True)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "out"]
        if finished:
            break
        stopped_after += 1
    assert stopped_after > 5


# --- sub-folders that modules.json names -----------------------------------------------------------------------------


def write_modules(folder, *paths):
    modules = [{"idx": i, "name": str(i), "path": path, "type": "x"} for i, path in enumerate(("", *paths))]
    (folder / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is not a list of modules"),
        ('[{"path": 3}]', "is not a list of modules"),
        ("[1]", "is not a list of modules"),
        ('[{"path": "../x"}]', "points outside its folder"),
        ('[{"path": "/etc"}]', "points outside its folder"),
        (r'[{"path": "a\u0000b"}]', "names impossible folders"),
        (r'[{"path": "a\\..\\..\\b"}]', "names impossible folders"),  # outside on Windows
    ],
)
def test_modules_that_cannot_be_read_are_said(folder, content, problem):
    (folder / "modules.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"modules.json {problem}"):
        Checkpoint.open(folder)


def test_modules_without_files_are_there_in_the_end(folder, tmp_path):
    """A normalisation has an empty folder, which the Hub does not even store."""
    write_modules(folder, "1_Pooling", "2_Normalize")
    write_files(folder, ["1_Pooling/config.json"])
    out = merge([folder, folder]).save(tmp_path / "out")
    assert (out / "2_Normalize").is_dir()
    merge([folder, folder]).save(out, overwrite=True)
    (out / "3_Other").mkdir()
    with pytest.raises(TargetExistsError, match=r"\(3_Other\)"):
        merge([folder, folder]).save(out, overwrite=True)


def test_a_model_whose_weights_are_all_in_modules_says_where(folder):
    (folder / "0_Transformer").mkdir()
    (folder / "model.safetensors").rename(folder / "0_Transformer" / "model.safetensors")
    write_modules(folder, "0_Transformer")
    with pytest.raises(CheckpointError, match=r"they are in 0_Transformer, which modules.json names; merge .*itself"):
        Checkpoint.open(folder)
    assert Checkpoint.open(folder / "0_Transformer").parts


def test_weights_of_modules_come_from_the_hub_with_the_small_files(folder):
    write_modules(folder, "2_Dense")
    (folder / "2_Dense").mkdir()
    torch.save({"linear.weight": torch.ones(2, 3)}, folder / "2_Dense" / "pytorch_model.bin")
    write_files(folder, ["2_Dense/config.json", "2_Dense/model.onnx", "2_Dense/onnx/model.onnx"])
    repo = push_folder(folder, "org/modules")
    for values in (False, True):
        checkpoint = Checkpoint.open(repo, values=values)
        assert torch.equal(checkpoint.submodels["2_Dense"].tensors["linear.weight"], torch.ones(2, 3))
        assert (checkpoint.folder / "model.safetensors").exists() == values
    assert {name for name in relative_names(checkpoint.folder) if "onnx" in name} == set()
    assert HUB.requests


def test_warnings_are_shown_without_any_setting_up(folder, tmp_path):
    (folder / "voice.pt").write_text("x")
    script = f"from hf_rebasin import merge; merge([{str(folder)!r}] * 2).save({str(tmp_path / 'out')!r})"
    done = subprocess.run(
        [os.sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stderr.strip().splitlines()[-1].startswith(f"{folder}: left behind: voice.pt (is of another format)")


def test_a_pickled_classifier_goes_along_and_is_said(folder, tmp_path, caplog):
    """The head of a SetFit model, which scikit-learn fitted to the outputs of the first model alone."""
    (folder / "model_head.pkl").write_bytes(b"a classifier")
    out = merge([folder, folder]).save(tmp_path / "out")
    assert (out / "model_head.pkl").read_bytes() == b"a classifier"
    (note,) = [message for message in caplog.messages if "pickled" in message]
    assert "model_head.pkl" in note
