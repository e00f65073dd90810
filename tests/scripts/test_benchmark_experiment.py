"""scripts/experiments/benchmark.py as people run it: the table, the JSON, and one sentence where it cannot run."""

import importlib.util
import json
import os
import subprocess
import sys

import psutil
import pytest
import torch

from scripts.experiments.benchmark import main, measure, memory_needed, parse_args
from tests.helpers import ROOT

GPU = torch.cuda.is_available()
RAM = psutil.virtual_memory().total / 2**30  # GiB


def benchmark(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/experiments/benchmark.py", "--device=cpu", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(output, report) of one short run. Its stderr has the rounds, and no word of a library."""
    path = tmp_path_factory.mktemp("benchmark") / "tiny.json"
    size = ["--batch_size=2", "--seq_length=16", "--steps=1", "--rounds=2", "--threads=1"]
    lora = ["lora"] if importlib.util.find_spec("peft") else []
    methods = ["--methods", "full", "experts", "lora_selected", "esft", "floor", *lora]
    done = benchmark("--shape=tiny", *size, *methods, f"--output_path={path}")
    assert done.returncode == 0, done.stderr
    assert [line[:8] for line in done.stderr.splitlines()] == ["  round "] * 2
    return done.stdout, json.loads(path.read_text())


def test_lora_is_a_method_too():
    pytest.importorskip("peft")
    args = parse_args(["--shape=tiny", "--device=cpu"])
    assert memory_needed("floor", args) < memory_needed("lora", args) < memory_needed("full", args)
    assert memory_needed("lora_selected", args) < memory_needed("lora", args)


@pytest.mark.slow
def test_the_table_has_a_line_per_method(finished):
    stdout, report = finished
    lines = stdout.splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("| method "))
    for column in ("tokens/s", "MFU", "of full", "of floor", "peak MiB", "before", "gradients", "optimizer", "trained"):
        assert f" {column} " in lines[header]
    assert [line.split()[1] for line in lines[header + 2 :][: len(report["methods"])]] == list(report["methods"])
    assert "RouterCapture adds" in stdout


@pytest.mark.slow
def test_the_report_is_complete_and_adds_up(finished):
    _, report = finished
    assert report["environment"]["torch"] and report["seed"] == 0 and report["side_by_side"] is True
    assert report["arguments"]["n_trained"] == 10 and report["model"]["n_routed_experts"] == 64
    methods = report["methods"]
    full, experts, esft, floor = (methods[name] for name in ("full", "experts", "esft", "floor"))
    for result in methods.values():
        assert len(result["rounds"]) == 2 and result["peak_memory_bytes"] >= result["memory_before_bytes"] > 0
        ratio = result["ratio_to_full"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    assert full["ratio_to_full"]["median"] == 1 and full["trained_share"] == 1
    assert full["optimizer_bytes"] == 2 * full["gradient_bytes"] == 8 * full["parameters"]
    assert esft["gradient_bytes"] * 64 == experts["gradient_bytes"] * 10  # all else is frozen in both
    assert floor["trained_parameters"] == floor["gradient_bytes"] == floor["optimizer_bytes"] == 0
    assert len({result["parameters"] for result in methods.values()}) == 1  # without LoRA's own
    assert 0 < esft["routed_share"] < 1 and report["capture_ratio"]["median"] > 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--n_trained=65"], "it has 64"),
        pytest.param(["--shape=v2-lite"], "needs 117.0 GiB", marks=pytest.mark.skipif(RAM > 117, reason="it fits")),
    ],
)
@pytest.mark.filterwarnings("ignore:full fine-tuning in bfloat16")
def test_it_refuses(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        main(["--shape=tiny", "--device=cpu", *flags])


class Dies:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (9,)


@pytest.mark.slow
def test_errors_of_a_process_are_raised_here():
    args = parse_args(["--shape=tiny", "--device=cpu", "--n_trained=65", "--threads=1", "--seq_length=8"])
    with pytest.raises(ValueError, match="it has 64"):
        measure(["esft"], args)
    args.seed = Dies()
    with pytest.raises(ValueError, match="cannot measure esft: its process died"):
        measure(["esft"], args)


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--shape=37m", "invalid choice: '37m'"),
        ("--methods=estf", "invalid choice: 'estf'"),
        ("--steps=0", "not a whole number above 0"),
        pytest.param("--device=cuda", "invalid choice: 'cuda'", marks=pytest.mark.skipif(GPU, reason="there is a GPU")),
    ],
)
def test_wrong_flags_exit_with_2(flag, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        main([flag])
    assert stop.value.code == 2 and sentence in capsys.readouterr().err
