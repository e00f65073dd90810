"""The pipeline: stages run once, the table says what the files say, and the whole of it ends in a merged model."""

import json
from pathlib import Path

import pytest

from scripts import pipeline


def write_run(folder: Path, method: str, task: float, general: float) -> None:
    folder = Path(folder)
    (folder / "completions").mkdir(parents=True, exist_ok=True)
    for name, mean in (("intent", task), ("general", general)):
        summary = {"mean": mean, "ci95": [mean - 1, mean + 1], "n": 10, "primary": "exact_match", "more": 1}
        (folder / "completions" / f"{method}.{name}.summary.json").write_text(json.dumps(summary))
    if method != "base":
        run = folder / "checkpoints" / method
        run.mkdir(parents=True)
        results = {"steps": 5, "trained_parameters": 7, "parameters": 100, "step_seconds": 0.5}
        results |= {"peak_memory_bytes": 2**30, "saved_bytes": 2**20}
        run.joinpath("run.json").write_text(json.dumps({"config": {"training": {}}, "results": results}))


def test_the_table_says_what_the_files_say(tmp_path):
    write_run(tmp_path, "base", 0.0, 90.0)
    write_run(tmp_path, "esft-token", 76.0, 87.0)
    write_run(tmp_path, "full", 80.0, 70.0)
    rows = pipeline.table_rows(tmp_path, ["esft-token", "full"], ["intent", "general"])
    text = pipeline.table(rows)
    assert "| esft-token | 76.0 [75.0, 77.0] | 87.0 [86.0, 88.0] | 7.0% | 0.50 | 1,024 MiB | 1.00 MiB |" in text
    assert "| base | 0.0 [-1.0, 1.0] | 90.0 [89.0, 91.0] | - | - | - | - |" in text
    compared = pipeline.against_full(rows)
    assert (
        "esft-token: 95% of full fine-tuning's intent score; general -3.0 where full fine-tuning has -20.0" in compared
    )


def test_a_stage_runs_once_and_again_when_its_command_changes(tmp_path, monkeypatch):
    ran = []

    def run(command, **_):
        ran.append(command[1:])
        (tmp_path / "out").write_text("x")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(pipeline.subprocess, "run", run)
    for value in (1, 1, 2):
        pipeline.Stages(tmp_path).run(tmp_path / "out", "tool.py", flag=value, none=None, off=False, on=True)
    assert ran == [["tool.py", "--flag=1", "--on"], ["tool.py", "--flag=2", "--on"]]
    (tmp_path / "out").unlink()
    pipeline.Stages(tmp_path).run(tmp_path / "out", "tool.py", flag=2, on=True)
    assert len(ran) == 3


def test_what_was_made_of_an_output_is_stale_when_that_is_made_again(tmp_path, monkeypatch):
    ran = []

    def run(command, **_):
        ran.append(command[1])
        if len(ran) == 4:
            return type("Done", (), {"returncode": 2})
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(pipeline.subprocess, "run", run)
    config, model, answers = (tmp_path / name for name in ("config.json", "run", "answers.jsonl"))
    model.mkdir()
    for path in (config, model / "state.json", answers):
        path.touch()

    def stages(top_p: float) -> None:
        stages = pipeline.Stages(tmp_path)
        stages.run(config, "select.py", top_p=top_p)
        stages.run(model / "state.json", "train.py", config=config)
        stages.run(answers, "eval.py", adapter_dir=model)

    stages(0.2)
    stages(0.2)
    assert ran == ["select.py", "train.py", "eval.py"]
    with pytest.raises(SystemExit):  # the selection itself fails, or the machine does
        stages(0.5)
    stages(0.5)
    assert ran[3:] == ["select.py", "select.py", "train.py", "eval.py"]


def test_a_stage_that_fails_stops_the_pipeline_with_its_code(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.subprocess, "run", lambda *_, **__: type("Done", (), {"returncode": 2}))
    with pytest.raises(SystemExit) as stop:
        pipeline.Stages(tmp_path).run(tmp_path / "out", "tool.py")
    assert stop.value.code == 2 and not (tmp_path / "stages.json").exists()


@pytest.mark.parametrize("flags", [["--methods=esft-tokens"], ["--train_dataset=no_such"], ["esft-tokn:lr=1"]])
def test_what_is_wrong_is_refused_before_anything_runs(flags, tmp_path):
    with pytest.raises(ValueError, match=r"esft-token|no_such"):
        pipeline.main(["--model=m", "--data=intent", f"--output_dir={tmp_path / 'out'}", *flags])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_whole_pipeline(tiny_model_dir, tmp_path, capfd):
    rows = [
        {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "it is"}]}
        for i in range(40)
    ]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "seen.jsonl").write_text(json.dumps({"prompt": "1", "answers": ["it is"]}))
    flags = [
        f"--model={tiny_model_dir}",
        f"--data={tmp_path / 'task.jsonl'}",
        f"--eval_dataset={tmp_path / 'seen.jsonl'}",
    ]
    flags += [f"--output_dir={tmp_path / 'out'}", "--methods=esft-token,esft-gate,random,lora,full", "--seq_length=128"]
    flags += ["--train_config=configs/tiny.yaml", "--max_new_tokens=4", "--n_sample_tokens=256"]
    flags += ["max_steps=2", "full:learning_rate=1e-4"]
    pipeline.main(flags)
    out = capfd.readouterr().out
    assert all(f"| {method} |" in out for method in ("base", "esft-token", "esft-gate", "random", "lora", "full"))
    for name in ("table.md", "table.json", "losses.png", "expert_scores.png", "merged/config.json"):
        assert (tmp_path / "out" / name).is_file()
    run = json.loads((tmp_path / "out" / "checkpoints" / "full" / "run.json").read_text())
    assert run["config"]["training"]["learning_rate"] == 1e-4
    pipeline.main(flags)
    assert "$ python" not in capfd.readouterr().out  # all was there
