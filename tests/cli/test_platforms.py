"""Systems that are not Linux, as far as their absences can be imitated: no preadv, no fcntl, other encodings."""

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from hf_rebasin.checkpoints import tensor_files
from hf_rebasin.checkpoints.tensor_files import OpenFile
from hf_rebasin.errors import CheckpointError
from hf_rebasin.text import spell_out

LABELS = {0: "Größe", 1: "長さ", 2: "λ"}
ABSENT = """
import os, sys
for name in ("preadv", "pread"):
    delattr(os, name)
sys.modules["fcntl"] = None  # importing it fails
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two models whose labels not every encoding has. Must not be changed."""
    folder = tmp_path_factory.mktemp("platforms")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        labels = {"id2label": LABELS, "label2id": {label: i for i, label in LABELS.items()}}
        config = ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes, **labels)
        ViTForImageClassification(config).save_pretrained(folder / name)
        content = (folder / name / "config.json").read_text("utf-8")
        (folder / name / "config.json").write_text(
            json.dumps(json.loads(content), ensure_ascii=False), encoding="utf-8"
        )
    return folder


def run(folder, *arguments, absent=False, **environment):
    """Run the command line in a process of its own; return its exit status and the bytes that it printed."""
    if absent:
        (folder / "site").mkdir(exist_ok=True)
        (folder / "site" / "sitecustomize.py").write_text(ABSENT)
        environment["PYTHONPATH"] = str(folder / "site")
    command = [sys.executable, "-W", "ignore", "-m", "hf_rebasin", *arguments]
    everything = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    everything["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([everything["PYTHONPATH"], str(ROOT)]))
    done = subprocess.run(command, cwd=folder, env=everything, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


def test_a_merge_without_preadv_and_fcntl_is_the_same(pair):
    absent = "import os; assert not hasattr(os, 'preadv'); import fcntl"
    status, printed = run(pair, "merge", "a", "b", "-o", "usual")
    assert status == 0, printed
    status, printed = run(pair, "merge", "a", "b", "-o", "absent", absent=True)
    assert status == 0, printed
    usual, without = (
        {file.relative_to(pair / name): file.read_bytes() for file in (pair / name).rglob("*") if file.is_file()}
        for name in ("usual", "absent")
    )
    assert {file for file in usual if usual[file] != without[file]} <= {Path("README.md")}  # it names the folder
    environment = os.environ | {"PYTHONPATH": str(pair / "site")}
    done = subprocess.run([sys.executable, "-c", absent], env=environment, capture_output=True, text=True)
    assert "AssertionError" not in done.stderr  # nothing was left to read with
    assert "import of fcntl halted" in done.stderr


class SlowFile:
    """A file whose position another thread may change between a seek and the read that follows."""

    def __init__(self, file):
        self.file = file

    def fileno(self):
        return self.file.fileno()

    def seek(self, offset):
        self.file.seek(offset)
        time.sleep(0.002)

    def readinto(self, buffer):
        return self.file.readinto(buffer[: max(1, len(buffer) // 2)])  # and reads are short


def read_by_threads(file):
    """Read every tenth of a file in a thread of its own, and put the pieces together; None if one cannot be read."""
    pieces = [bytearray(file.size // 10) for _ in range(10)]
    with ThreadPoolExecutor(10) as pool, suppress(CheckpointError):
        list(pool.map(file.fill, map(memoryview, pieces), range(0, file.size, len(pieces[0]))))
        return b"".join(pieces)


def test_threads_share_a_file_without_preadv(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "preadv")
    content = bytes(i // 4 % 251 for i in range(4000))
    (tmp_path / "file").write_bytes(content)
    file = OpenFile(tmp_path / "file")
    assert read_by_threads(file) == content
    file.file = SlowFile(file.file)
    assert read_by_threads(file) == content
    file.lock = nullcontext()
    assert read_by_threads(file) != content  # negative control


def test_tensors_longer_than_a_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "LARGEST_READ", 7)
    tensors = {"a": torch.randn(11, 3), "b": torch.randn(5)}
    save_file(tensors, tmp_path / "model.safetensors")
    for name, part in tensor_files.read_file(tmp_path / "model.safetensors").items():
        assert torch.equal(part.read(), tensors[name])


@pytest.mark.parametrize(
    "encoding",
    ["cp1252", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cp437", "cp932", "ascii", "utf-8"))],
)
def test_output_in_any_encoding(encoding, pair):
    status, printed = run(pair, "compare", "a", "b", PYTHONIOENCODING=encoding)
    assert status == 0, printed
    text = printed.decode("utf-8" if encoding == "ascii" else encoding)  # click takes ASCII for a mistake
    assert "Traceback" not in text
    distance = {"cp1252": "||A - B|| ÷ ||A||", "cp437": "||A - B|| ÷ ||A||"}.get(encoding)
    assert distance is None or distance in text
    status, printed = run(pair, "interpolate", "--help", PYTHONIOENCODING=encoding)
    assert status == 0, printed
    assert ("lambda = 0" if encoding == "cp1252" else "") in printed.decode(errors="replace")


def test_errors_in_any_encoding(pair, tmp_path):
    """A message quotes a label that the encoding lacks; without the handler it would end in a UnicodeEncodeError."""
    with pytest.raises(UnicodeEncodeError):
        LABELS[1].encode("cp1252")
    other = shutil.copytree(pair / "b", tmp_path / "b") / "config.json"
    other.write_text(other.read_text("utf-8").replace(LABELS[1], "幅"), encoding="utf-8")
    status, printed = run(pair, "merge", "a", tmp_path / "b", "-o", "out", PYTHONIOENCODING="cp1252")
    assert status == 1
    assert b"Traceback" not in printed
    assert b"\\u9577" in printed


def test_a_chosen_error_handler_stays(pair):
    status, printed = run(pair, "compare", "a", "b", PYTHONIOENCODING="cp1252:replace")
    assert status == 0, printed
    assert "?A ? B? ÷ ?A?" in printed.decode("cp1252")


def test_files_are_utf8_whatever_the_locale_says(pair):
    """In the C locale, without Python's UTF-8 mode, `open` takes ASCII."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    status, printed = run(pair, "merge", "a", "b", "-o", "merged", "--dtype", "bfloat16", **locale)
    assert status == 0, printed
    config = json.loads((pair / "merged" / "config.json").read_text("utf-8"))
    assert [config["id2label"][str(i)] for i in LABELS] == list(LABELS.values())
    assert config["dtype"] == "bfloat16"
    assert load_file(pair / "merged" / "model.safetensors")
    status, printed = run(pair, "verify", "merged", **locale)
    assert status == 0, printed


def test_every_text_file_names_its_encoding():
    """Without it Windows takes its code page; and a text that is written there gets other ends of lines."""
    wrong = []
    for path in (ROOT / "hf_rebasin").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(call, ast.Call) and not names_encoding(call):
                wrong.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert wrong == []
    assert not names_encoding(call_in("open(path)"))
    assert not names_encoding(call_in("path.read_text()"))
    assert not names_encoding(call_in("path.write_text(text, encoding='utf-8')"))
    assert names_encoding(call_in("path.open('rb')"))


def call_in(text):
    return ast.parse(text).body[0].value


def names_encoding(call):
    """Whether a call that reads or writes text says in which encoding, and when writing with which ends of lines."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    keywords = {keyword.arg for keyword in call.keywords}
    if name == "write_text":
        return keywords >= {"encoding", "newline"}
    if name == "read_text":
        return bool(call.args) or "encoding" in keywords
    opens_text = isinstance(call.func, ast.Name) or (not call.args or isinstance(call.args[0], ast.Constant))
    if name != "open" or not opens_text or ast.unparse(call.func) in ("Checkpoint.open", "webbrowser.open"):
        return True
    modes = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    return "encoding" in keywords or any("b" in str(mode) for mode in modes)


def test_characters_are_spelled_by_their_meaning():
    def encode(text):
        import codecs

        codecs.register_error("spell_out", spell_out)
        return text.encode("ascii", "spell_out").decode()

    assert encode("λ → ½ ‖A − B‖ ≤ 10⁻³") == "lambda -> 1/2 ||A - B|| <= 10-3"
    assert encode("Größe\udc80長") == "Gro\\xdfe\\udc80\\u9577"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("ascii", "spell_out")
