"""What can be refused is refused before a command works for long, and nothing is half-written."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from esft import ExpertScores
from scripts import estimate_memory, pipeline, report
from scripts.expert import compare_scores, generate_expert_config, get_expert_scores, preview_config, routing_drift
from tests.helpers import refused
from utils import ROOT

TINY = ROOT / "results" / "models" / "tiny"


@pytest.fixture
def scores(tmp_path):
    """A folder of scores of tiny's shape: 3 of them are selected in each layer."""
    rows = [[0.4, 0.3, 0.2, 0.1, *[0.0] * 60]] * 4
    scores = ExpertScores({"token": {layer: dict(enumerate(row)) for layer, row in enumerate(rows, 1)}})
    scores.save(tmp_path / "scores" / "summary.json")
    return tmp_path / "scores"


def forbid(monkeypatch, module, *names):
    for name in names:
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))


def test_a_report_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "page.html").mkdir()
    forbid(monkeypatch, report, "page")
    refused(capsys, report.main, [tmp_path, f"--output={tmp_path / 'page.html'}"], "cannot write", "it is a folder")


@pytest.mark.parametrize("name", ["fits.md", "fits.json"])
def test_a_table_that_cannot_be_written(name, tmp_path, monkeypatch, capsys):
    (tmp_path / name).mkdir()
    forbid(monkeypatch, estimate_memory, "make_table")
    refused(capsys, estimate_memory.main, ["--table", f"--output={tmp_path / 'fits'}"], name, "it is a folder")


@pytest.mark.parametrize("experts", [{"9": [0]}, {"1": [64]}])
def test_experts_that_a_model_does_not_have(experts, tmp_path, monkeypatch, capsys):
    (tmp_path / "experts.json").write_text(json.dumps({"experts": experts}))
    monkeypatch.setattr(estimate_memory.Estimator, "estimate", lambda *_: pytest.fail("estimate was called"))
    argv = [f"--base_model_path={TINY}", f"--expert_config={tmp_path / 'experts.json'}", "--gpu_gb=24"]
    refused(capsys, estimate_memory.main, argv, "names expert")
    refused(capsys, estimate_memory.main, [argv[0], "--experts_per_layer=65", argv[2]], "names expert 64")


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--top_p", "0.1", "0.2", "5"], "top_p is 5"),
        (["--top_p", "0.1", "0"], "top_p is 0"),
        (["--top_p", "nan"], "top_p is nan"),
        (["--budget_gb=-3"], "budget_gb"),
        (["--budget_gb=nan"], "budget_gb"),
    ],
)
def test_a_sweep_with_a_wrong_value(flags, why, scores, monkeypatch, capsys):
    forbid(monkeypatch, preview_config, "preview")
    argv = [f"--expert_scores_dir={scores}", f"--base_model_path={TINY}", *flags]
    refused(capsys, preview_config.main, argv, why)


def test_no_config_is_written_unless_all_can_be(scores, tmp_path, capsys):
    for task in ("law", "intent"):
        shutil.copytree(scores, tmp_path / "all" / task)
    (tmp_path / "configs" / "intent.json").mkdir(parents=True)
    argv = [
        f"--expert_scores_dir={tmp_path / 'all'}",
        "--eval_datasets=law,intent",
        f"--output_dir={tmp_path / 'configs'}",
    ]
    refused(capsys, generate_expert_config.main, argv, "intent.json", "it is a folder")
    assert not (tmp_path / "configs" / "law.json").exists()


def test_scores_whose_packs_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "packs.safetensors").mkdir()
    forbid(monkeypatch, get_expert_scores, "sample_packs", "count_packs")
    argv = ["--eval_dataset=law", f"--base_model_path={TINY}", f"--output_dir={tmp_path}"]
    refused(capsys, get_expert_scores.main, argv, "packs.safetensors", "it is a folder")


def test_drift_of_a_damaged_model_or_into_a_folder(tmp_path, monkeypatch, capsys):
    other = shutil.copytree(TINY, tmp_path / "other")
    forbid(monkeypatch, routing_drift, "load_on", "sample_packs")
    argv = [f"--base_model_path={TINY}", f"--adapter_dir={other}", "--eval_dataset=law", f"--output_dir={tmp_path}"]
    (tmp_path / "drift.png").mkdir()
    refused(capsys, routing_drift.main, argv, "drift.png", "it is a folder")
    (tmp_path / "drift.png").rmdir()
    path = other / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refused(capsys, routing_drift.main, argv, "damaged or truncated")


def test_a_picture_that_cannot_be_written(scores, tmp_path, monkeypatch, capsys):
    (tmp_path / "picture.png").mkdir()
    forbid(monkeypatch, compare_scores, "stability", "compare")
    argv = ["--expert_scores_dir", scores, f"--output_path={tmp_path / 'picture.png'}"]
    refused(capsys, compare_scores.main, argv, "picture.png", "it is a folder")


def dense(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "first_k_dense_replace": 99}))


def cut(base):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def renamed(base):
    tensors = load_file(base / "model.safetensors")
    save_file({f"x.{key}": tensor for key, tensor in tensors.items()}, base / "model.safetensors", {"format": "pt"})


PIPELINES = {
    "a dense model": (dense, [], "dense model"),
    "a damaged model": (cut, [], "damaged or truncated"),
    "a model that full training damages late": (cut, ["--methods=full"], "damaged or truncated"),
    "attention that is not there": (None, ["attn_implementation=nonsense"], "attn_implementation"),
    "an ep_size that does not divide": (None, ["esft-token:ep_size=2"], "it does not divide the 1 processes"),
    "a validation sample that is too long": (None, ["--seq_length=16"], "seq_length=16"),
}


@pytest.mark.parametrize("how", PIPELINES)
def test_a_pipeline_that_a_later_stage_would_stop(how, tmp_path, monkeypatch, capsys):
    spoil, flags, why = PIPELINES[how]
    base = shutil.copytree(TINY, tmp_path / "base")
    if spoil:
        spoil(base)
    forbid(monkeypatch, pipeline, "run_stages")
    argv = [f"--base_model_path={base}", "--train_dataset=law", f"--output_dir={tmp_path / 'out'}", *flags]
    refused(capsys, pipeline.main, [*argv, "--train_config=configs/tiny.yaml"], why)
    assert not (tmp_path / "out").exists()


def test_a_pipeline_does_not_replace_a_file_of_the_user(tmp_path, monkeypatch, capsys):
    (tmp_path / "out" / "merged").mkdir(parents=True)
    (tmp_path / "out" / "merged" / "notes.txt").write_text("mine")
    forbid(monkeypatch, pipeline, "run_stages", "write_results")
    argv = [f"--base_model_path={TINY}", "--train_dataset=law", f"--output_dir={tmp_path / 'out'}"]
    refused(capsys, pipeline.main, [*argv, "--train_config=configs/tiny.yaml"], "merged", "exists already")
