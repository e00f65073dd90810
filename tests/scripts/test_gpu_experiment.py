"""scripts/experiments/gpu.py: what fits the time is run, what fails is told, and every part is written at once."""

import json
import subprocess

import pytest
import torch

from scripts.experiments import benchmark, gpu
from scripts.experiments.gpu import REHEARSED, RUNS, Report, Run, measure, parse_args, settings
from tests.helpers import ROOT

FOUND = {"peak_memory_bytes": 2**31, "gradient_bytes": 2**30, "optimizer_bytes": 2**31, "trained_share": 0.25}


def rate(value: float, **more) -> dict:
    return {**FOUND, "tokens_per_second": {"median": value, "min": value, "max": value}, **more}


@pytest.fixture
def report(tmp_path):
    return Report(parse_args(["--rehearse", "--seconds=1000000", f"--output={tmp_path}/gpu"]))


def test_the_table_compares_within_a_shape_and_a_setting(report):
    report.runs = {
        "v2-lite full": rate(100.0, mfu=0.1), "v2-lite esft": rate(250.0, mfu=0.125), "qwen3-30b-a3b esft": rate(10.0),
        "v2-lite full checkpointing": rate(50.0), "v2-lite esft checkpointing": rate(150.0),
        "v2-lite lora": {"error": "OutOfMemoryError: no room"},
    }  # fmt: skip
    lines = report.table().splitlines()
    cells = {row[1]: row[2:-1] for row in ([cell.strip() for cell in line.split("|")] for line in lines)}
    assert cells["v2-lite esft"] == ["250", "12.5%", "2.50", "2.00", "1.00", "2.00", "25.00%"]
    assert cells["v2-lite esft checkpointing"][2] == "3.00" and cells["qwen3-30b-a3b esft"][1:3] == ["-", "-"]
    assert cells["v2-lite lora"][0] == "OutOfMemoryError: no room"


def test_what_does_not_fit_the_time_is_left_out_and_told(tmp_path, monkeypatch):
    for part in ("run_tests", "measure", "profile"):
        monkeypatch.setattr(gpu, part, lambda *_: pytest.fail("it was run"))
    gpu.main(["--rehearse", "--seconds=1", f"--output={tmp_path}/gpu"])
    saved = json.loads((tmp_path / "gpu.json").read_text())
    names = [run.name for run in REHEARSED]
    assert saved["left_out"] == ["tests", *names[:2], "profile", *names[2:]] and not saved["runs"]
    assert f"Left out for lack of time: tests, {names[0]}" in (tmp_path / "gpu.md").read_text()


def test_a_run_that_fails_is_told_and_the_next_one_runs(report, monkeypatch):
    def fail(methods, args):
        if methods == ["full"]:
            raise torch.OutOfMemoryError("no room")
        return {"esft": {**FOUND, "turns": [2.0], "flops_per_token": 1e6, "peak_flops": 64e6}}

    monkeypatch.setattr(benchmark, "measure", fail)
    for method in ("full", "esft"):
        measure(Run("tiny", method, False, 1), report)
    assert "no room" in report.runs["tiny full"]["error"]
    assert report.runs["tiny esft"]["tokens_per_second"]["median"] == 32 and report.runs["tiny esft"]["mfu"] == 0.5


def test_the_settings_are_those_of_the_run(report):
    flags = settings(Run("36m", "lora", True, 1), report.args)
    assert (flags.shape, flags.methods, flags.activation_checkpointing, flags.device) == ("36m", ["lora"], True, "cpu")
    assert not settings(Run("36m", "lora", False, 1), report.args).activation_checkpointing


def test_all_that_is_asked_for_is_planned_and_rehearsed():
    names = {run.name for run in RUNS}
    for method in benchmark.METHODS:
        assert {f"v2-lite {method}", f"v2-lite {method} checkpointing"} <= names
    assert "qwen3-30b-a3b esft" in names and {run.method for run in REHEARSED} == {run.method for run in RUNS}


def test_without_a_gpu_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"torch sees none\. Give --rehearse"):
        gpu.main([])


@pytest.mark.slow
def test_the_rehearsal_ends_with_its_three_files(tmp_path):
    command = ["bash", "scripts/experiments/gpu.sh", "--rehearse", f"--output={tmp_path}/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert set(saved["runs"]) == {run.name for run in REHEARSED} and not saved["left_out"]
    assert not any("error" in found for found in saved["runs"].values()) and " passed" in saved["tests"]
    assert "One step of tiny esft" in (tmp_path / "gpu.md").read_text()
    assert (tmp_path / "gpu_trace.json.gz").stat().st_size > 10_000
