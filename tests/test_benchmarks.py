"""What the benchmark scripts promise on this machine: exact recovery at full size. Slow, but not a test of speed."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["bert", "vit", "gpt2", "resnet"])
def test_full_size_models_come_back_exactly(kind):
    script = ROOT / "scripts" / "benchmarks" / "planted.py"
    done = subprocess.run([sys.executable, script, kind], capture_output=True, text=True, check=True)
    assert " L1 0.0  status EQUAL " in done.stdout, done.stdout


def test_planted_mlps_come_back(tmp_path):
    script = ROOT / "scripts" / "benchmarks" / "planted_mlps.py"
    done = subprocess.run([sys.executable, script, "--pairs", "50"], capture_output=True, text=True, check=True)
    cells = [line.split()[2] for line in done.stdout.splitlines()[1:]]
    assert len(cells) == 9
    assert all(int(cell.split("/")[0]) >= 49 for cell in cells), done.stdout


def test_barriers_of_mlps(tmp_path):
    """The barrier at width 64 is at most 5 % of the plain one, at width 512 at most 0.012."""
    command = [sys.executable, ROOT / "scripts" / "benchmarks" / "barrier.py", "mlp64", "mlp512", "--out", tmp_path]
    done = subprocess.run([*command, "--methods", "permutations"], capture_output=True, text=True, check=True)
    results = json.loads((tmp_path / "barrier.json").read_text())["results"]
    rows = {(r["kind"], r["method"], *r["pair"]): r for r in results}
    assert len(rows) == 2 * 2 * 3
    for (kind, method, *_), row in rows.items():
        assert len(row["loss"]) == len(row["accuracy"]) == 25
        assert abs(row["own"]) <= 1e-6
        if method == "plain":
            assert row["loss_ratio"] == row["error_ratio"] == 1
        elif kind == "mlp64":
            assert row["loss_ratio"] <= 0.05
        else:
            assert row["loss_barrier"] <= 0.012
    report = (tmp_path / "barrier.md").read_text()
    assert all(table in report for table in done.stdout.strip().split("\n\n"))
    assert "failed to train" not in report
    assert (tmp_path / "barrier.png").stat().st_size > 10_000


def test_carried_differences_of_mlps(tmp_path):
    """They beat differences that are not carried over, and the base, in every pair; one base needs no aligning."""
    script, out = ROOT / "scripts" / "benchmarks" / "carried_differences.py", tmp_path / "losses.json"
    command = [sys.executable, script, "mlp512", "--models", tmp_path, "--out", out]
    subprocess.run(command, capture_output=True, text=True, check=True)
    (result,) = json.loads(out.read_text())
    assert result["equal"]
    means = {
        (row, method): [sum(losses) / 2 for losses in pairs]
        for row, methods in result["losses"].items()
        for method, pairs in methods.items()
    }
    for method in ("task_arithmetic", "ties"):
        for row in ("carried by weights", "carried by activations"):
            for other in (("base A", ""), ("not aligned", method), ("subtracted from A", method)):
                pairs = zip(means[row, method], means[other], strict=True)
                assert len(means[other]) == 3
                assert all(carried < plain for carried, plain in pairs), (row, method, other)


def test_resnet18_comes_back_and_keeps_its_function():
    """A plain module with inferred symmetries; this half does not need the rebasin package."""
    script = ROOT / "scripts" / "benchmarks" / "rebasin_package.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    unrelated, planted = (re.split(r"  +", line) for line in done.stdout.splitlines())
    for line in (unrelated, planted):
        change, scale = (float(cell.split()[-1]) for cell in line if cell.startswith("max|"))
        assert change <= 1e-5 * scale, done.stdout
    assert planted[-1] == "then 0.0", done.stdout


def test_incremental_learning_of_three_rotations(tmp_path):
    """Smoke test: all methods run, all numbers are there, and ours forgets less than fine-tuning."""
    script = ROOT / "scripts" / "benchmarks" / "incremental_learning.py"
    command = [sys.executable, script, "--images", "digits", "--tasks", "3", "--seeds", "1", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = {r["method"]: r for r in json.loads((tmp_path / "incremental.json").read_text())["results"]}
    assert list(results)[:6] == ["fine-tune", "EWC", "LwF", "A-GEM", "replay", "ours"]
    assert list(results)[-1] == "joint"
    for method, result in results.items():
        rows = result["accuracies"]
        assert all(len(row) == 3 for row in rows)
        assert len(rows) == (1 if method == "joint" else 3)
        assert result["accuracy"] == pytest.approx(sum(rows[-1]) / 3)
        if method != "joint":
            assert rows[0] == results["fine-tune"]["accuracies"][0]  # all start from the same network
            lost = [max(rows[0][t], rows[1][t]) - rows[2][t] for t in (0, 1)]
            assert result["forgetting"] == pytest.approx(sum(lost) / 2)
    assert results["ours"]["forgetting"] < results["fine-tune"]["forgetting"]
    assert results["joint"]["accuracy"] > 0.8
    assert done.stdout.strip() in (tmp_path / "incremental.md").read_text()
    assert (tmp_path / "incremental.png").stat().st_size > 10_000


def run_sinkhorn_rebasin(out, *arguments):
    """Run the benchmark; return the cells of the tables that it prints."""
    script = ROOT / "scripts" / "benchmarks" / "sinkhorn_rebasin.py"
    command = [sys.executable, script, *map(str, arguments), "--out", out]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("|")]


def test_sinkhorn_rebasin_recovers_planted_permutations(tmp_path):
    """Every pair is recovered within 300 steps, as in the paper."""
    header, _, *rows = run_sinkhorn_rebasin(tmp_path, "planted", "--pairs", 3)
    assert len(rows) == 9
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        assert (cells["exact in 300"], cells["L1"]) == ("100%", "0.00"), row


def test_sinkhorn_rebasin_between_networks_trained_apart(tmp_path):
    """Barriers of the MLP only, with few steps; and the test bed meets its targets."""
    header, _, *rows = run_sinkhorn_rebasin(tmp_path, "barriers", "--kinds", "mlp64", "--steps", 20)
    assert [row[0] for row in rows][:2] == ["plain", "weight matching"]
    assert all(len(row) == len(header) for row in rows)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    header, _, *rows = run_sinkhorn_rebasin(tmp_path, "testbed")
    assert len(rows) == 6
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        assert float(cells["Sinkhorn Mid"]) <= float(cells["target"]), row


def test_memory_of_statistics_does_not_grow():
    """With 16 times the batches, a process takes hardly more MB; the activations alone would take hundreds."""
    script = ROOT / "scripts" / "benchmarks" / "running_statistics.py"
    command = [sys.executable, script, "--batches", "8", "128"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "8 batches" in lines[0]
    rows = {line[:24].strip(): re.findall(r"([\d.]+) s +(\d+) MB", line) for line in lines[1:]}
    assert list(rows) == ["activation statistics", "refit", "REPAIR", "BatchNorm, one pass", "BatchNorm, exact"]
    for operation, ((_, few), (_, many)) in rows.items():
        assert int(many) <= int(few) + 15, (operation, lines)
