"""eval_multigpu.py: equal results for any number of processes, failures that cost one sample, errors in a sentence."""

import json
import os
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV2ForCausalLM

import esft
import eval_multigpu
from benchmarks import TextEvaluator
from evaluation import runner
from evaluation.config import EvalConfig
from tests.helpers import PROMPTS, ROOT, contents, run_eval, stop_after, untimed, write_rows
from utils import run_cli


@pytest.mark.long
def test_any_number_of_processes_writes_the_same(model_dir, eval_file, tmp_path, capsys):
    (one,) = run_eval(model_dir, eval_file, tmp_path / "one.jsonl")
    text = (tmp_path / "one.jsonl").read_text()
    path = tmp_path / "new" / "three.jsonl"
    (three,) = run_eval(model_dir, eval_file, path, "--world_size=3")
    assert path.read_text() == text and untimed(three) == untimed(one)
    assert [json.loads(line)["example"]["prompt"] for line in text.splitlines()] == PROMPTS
    saved = json.loads((tmp_path / "one.summary.json").read_text())
    assert saved == one and saved["n"] == 6 and saved["tokens"] == 24 and saved["truncated"] == 6
    assert saved["failed"] == 0 and saved["groups"].keys() == {"odd", "even"}
    assert saved["ci95"][0] <= saved["mean"] <= saved["ci95"][1]
    assert saved["arguments"]["max_new_tokens"] == 4 and "torch" in saved["environment"]
    printed = capsys.readouterr()
    assert re.search(r"mine +6 +rouge_l +\d", printed.out) and "failed" not in printed.out
    assert re.search(r"evaluating: 100%.* 6/6 .*tokens/s", printed.err)
    assert not list(tmp_path.rglob(".*"))


def test_threads_do_not_depend_on_the_machine(model_dir, eval_file, tmp_path, monkeypatch):
    threads, evaluate = [], runner.evaluate
    monkeypatch.setattr(
        runner, "evaluate", lambda *a, **k: threads.append(torch.get_num_threads()) or evaluate(*a, **k)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_eval(model_dir, eval_file, tmp_path / "out.jsonl")
        assert set(threads) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------ failures


def test_a_sample_that_fails_does_not_stop_the_others(model_dir, tmp_path, watched, capsys):
    prompts = [*PROMPTS, "too long " * 200]
    eval_file = write_rows(tmp_path / "mine.jsonl", ["a", "raise", "c", "d", "e", "f", "g"], prompts)
    (summary,) = run_eval(model_dir, eval_file, tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["example"]["prompt"] for line in lines] == prompts
    assert [i for i, line in enumerate(lines) if "error" in line] == [1, 6]
    assert lines[1]["error"] == "KeyError: 'a bug of the evaluator'" and lines[1]["example"]["raw_prediction"]
    assert re.search(r"prompt has \d+ tokens.* context of 256$", lines[6]["error"])
    assert lines[6]["example"]["raw_prediction"] is None and all(lines[i]["score"] is None for i in (1, 6))
    scores = [line["score"] for line in lines if "error" not in line]
    assert (summary["n"], summary["failed"]) == (7, 2) and summary["mean"] == pytest.approx(20 * sum(scores), abs=1e-3)
    assert "2 failed" in capsys.readouterr().out


def test_what_failed_is_tried_again_after_an_interruption(model_dir, eval_file, tmp_path, monkeypatch, model):
    generate = DeepseekV2ForCausalLM.generate
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2)
        patch.setattr(DeepseekV2ForCausalLM, "generate", out_of_memory(generate, above=0, times=3))
        run_eval(model_dir, eval_file, tmp_path / "out.jsonl")
    (summary,) = run_eval(model_dir, eval_file, tmp_path / "out.jsonl")
    (fresh,) = run_eval(model_dir, eval_file, tmp_path / "fresh.jsonl")
    assert untimed(summary) == untimed(fresh) and fresh["failed"] == 0


def out_of_memory(generate, above: int, times: int = 10**9):
    """`generate` that fails with more than `above` samples, `times` times."""
    failures = iter(range(times))

    def failing(self, input_ids, **options):
        if len(input_ids) > above and next(failures, None) is not None:
            raise torch.OutOfMemoryError("no memory left")
        return generate(self, input_ids=input_ids, **options)

    return failing


def test_a_batch_that_is_too_large_is_answered_one_by_one(model_dir, eval_file, tmp_path, monkeypatch):
    run_eval(model_dir, eval_file, tmp_path / "alone.jsonl", "--eval_batch_size=1")
    monkeypatch.setattr(DeepseekV2ForCausalLM, "generate", out_of_memory(DeepseekV2ForCausalLM.generate, above=1))
    (summary,) = run_eval(model_dir, eval_file, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "alone.jsonl").read_text() and not summary["failed"]


def test_when_every_sample_fails_the_command_does(model_dir, eval_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(DeepseekV2ForCausalLM, "generate", out_of_memory(DeepseekV2ForCausalLM.generate, above=0))
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: run_eval(model_dir, eval_file, tmp_path / "out.jsonl"))
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and not (tmp_path / "out.jsonl").exists()
    assert error == "error: cannot evaluate: every sample of mine failed, the first: OutOfMemoryError: no memory left"
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]  # nothing to go on from


def test_a_gpu_that_has_failed_ends_the_command(model_dir, eval_file, tmp_path, monkeypatch):
    def failing(self, **options):
        raise torch.AcceleratorError("device-side assert triggered")

    monkeypatch.setattr(DeepseekV2ForCausalLM, "generate", failing)
    with pytest.raises(OSError, match=r"GPU failed .*say the words.*device-side assert"):
        run_eval(model_dir, eval_file, tmp_path / "out.jsonl")


# ------------------------------------------------------------------------------------------------ flags


def test_several_datasets_get_a_file_each(model_dir, eval_file, tmp_path, monkeypatch):
    other = tmp_path / "general.jsonl"
    other.write_text(json.dumps({"prompt": "a", "answers": ["b"]}))
    loads = []
    load = esft.load_base_model
    monkeypatch.setattr(esft, "load_base_model", lambda *a, **k: loads.append(a) or load(*a, **k))
    summaries = run_eval(model_dir, f"{eval_file},{other}", tmp_path / "out.jsonl", "--n_samples=3")
    assert [(s["dataset"], s["n"], s["primary"]) for s in summaries] == [
        ("mine", 3, "rouge_l"),
        ("general", 1, "exact_match"),
    ]
    written = {path.name for path in tmp_path.glob("out*")}
    assert written == {f"out.{name}.{kind}" for name in ("mine", "general") for kind in ("jsonl", "summary.json")}
    assert len(loads) == 1


@pytest.mark.parametrize(
    ("gpus", "flags", "sentence"),
    [
        (0, ["--device=cuda"], "needs 1 GPUs and there are 0"),
        (0, ["--device=cuda", "--gpus_per_rank=2"], "needs 2 GPUs and there are 0"),
        (4, ["--device=cuda", "--world_size=3", "--gpus_per_rank=2"], "needs 6 GPUs and there are 4"),
        (0, ["--adapter_dir=nowhere"], "cannot read nowhere: no such file or folder"),
        (0, ["--adapter_dir=testz"], "did you mean 'tests'"),
        (0, ["--adapter_dir=tests"], "expert_cfg.json"),
        (0, ["--adapter_dir=results/models/tiny"], "--base_model_path"),
        (0, ["--eval_dataset=datasets/train/law.jsonl"], "training data"),
        (0, ["--eval_dataset=nothing_known"], "nothing_known"),
        (0, ["--eval_dataset=,"], "Give --eval_dataset or --suite"),
        (0, ["--num_fewshot=0"], "cannot use --num_fewshot: it has an effect only with --suite"),
        (0, ["--eval_dataset=", "--suite=x", "--judge_model=m"], "has an effect only with --eval_dataset"),
        (0, ["--suite=gone.yaml"], "cannot read gone.yaml: no such file or folder"),
        (0, ["--suite=x.yaml", "--num_fewshot=-1"], "--num_fewshot -1: it must be at least 0"),
        (0, ["--world_size=0"], "--world_size 0: it must be at least 1"),
        (0, ["--max_new_tokens=-1"], "--max_new_tokens -1"),
        (0, ["--eval_batch_size=x"], "--eval_batch_size"),
        (0, ["--evaluator=judge"], "cannot score mine: the evaluator judge is none of intent"),
        (0, ["--eval_data=x"], r"unrecognized arguments: --eval_data \(did"),
        (0, ["--output_path=out.json"], r"must end in \.jsonl"),
        (0, ["--with_base"], "--with_base: it has an effect only with --adapter_dir"),
        (0, ["--evaluator=code"], "--allow_code_execution"),
        (0, ["--evaluator=code", "--allow_code_execution"], '"test"'),
        (0, ["--judge_base_url=http://h"], "--judge_base_url: it has an effect only with --judge_model"),
        (0, ["--judge_model=m", "--judge_base_url=h", "--evaluator=law"], "--judge_base_url: give an address"),
        (0, ["--judge_model=m", "--judge_key_env=sk-abc"], "NAME of an environment variable"),
        (
            0,
            ["--judge_model=m", "--judge_base_url=http://h", "--evaluator=law", "--judge_cache=README.md"],
            "cannot write",
        ),
        (0, ["--output_path=README.md/out.jsonl"], "cannot write"),
    ],
)
def test_errors_are_one_sentence_before_the_model(
    monkeypatch, capsys, model_dir, eval_file, tmp_path, gpus, flags, sentence
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(esft, "load_base_model", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: run_eval(model_dir, eval_file, tmp_path / "out.jsonl", *flags))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and re.search(sentence, error)


def test_without_an_output_path_no_other_evaluation_is_overwritten(model_dir, adapter_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        write_rows(tmp_path / f"{name}.jsonl", ["a"] * 2)
    flags = [f"--model={model_dir}", "--device=cpu", "--max_new_tokens=2"]
    for name in ("one", "two", "one"):
        eval_multigpu.main([*flags, f"--eval_dataset={tmp_path / name}.jsonl"])
    model, adapter = Path(model_dir).name, Path(adapter_dir).name
    kept = contents(tmp_path / "results" / "completions", "*")
    assert kept.keys() == {f"{model}.one.jsonl", f"{model}.two.jsonl"}
    shutil.copytree(adapter_dir, tmp_path / "mine" / adapter)
    flags.append(f"--eval_dataset={tmp_path / 'one'}.jsonl")
    eval_multigpu.main([*flags, f"--adapter_dir={adapter_dir}"])
    assert f"{adapter}.one.jsonl" in contents(tmp_path / "results" / "completions", "*")
    with pytest.raises(ValueError, match=rf"{adapter}.one.summary.json is of {adapter_dir}. Give an --output_path"):
        eval_multigpu.main([*flags, f"--adapter_dir={tmp_path / 'mine' / adapter}"])
    summary = tmp_path / "results" / "completions" / f"{model}.one.summary.json"
    for text, sentence in (
        ("[]", "[Mm]ove it away"),
        ("{", "[Mm]ove it away"),
        ('{"arguments": {}}', "Give an --output_path"),
    ):
        summary.write_text(text)
        with pytest.raises(ValueError, match=rf"{model}.one.summary.json.*{sentence}"):
            eval_multigpu.main(flags)
    summary.unlink()
    summary.mkdir()
    with pytest.raises(ValueError, match=r"cannot write .*: it is a folder"):
        eval_multigpu.main(flags)


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit):
        eval_multigpu.parse_args(["--help"])
    text = capsys.readouterr().out
    flags = re.findall(r"^  (--\w+)", text, flags=re.MULTILINE)
    assert set(flags) == {f"--{field.name}" for field in fields(EvalConfig)} | {"--openai_api_key"}
    assert len(flags) == len(set(flags)) and "(default: 512)" in " ".join(text.split())
    assert not re.search(r"\(default:\s+(None|False)?\)", text), "such a default says nothing"


def test_the_key_goes_to_the_environment_alone(model_dir, eval_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "old")  # restored after the test
    run_eval(model_dir, eval_file, tmp_path / "out.jsonl", "--openai_api_key=s3cret")
    printed = capsys.readouterr()
    assert os.environ["OPENAI_API_KEY"] == "s3cret"
    assert printed.err.count("note: openai_api_key has an effect with --judge_model only") == 1
    assert "s3cret" not in printed.out + printed.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]


# ------------------------------------------------------------------------------------------------ base and adapter


def test_an_adapter_for_each_data_set(model_dir, adapter_dir, eval_file, tmp_path, monkeypatch, capsys):
    """Each data set is answered with the adapter in the folder of its name, as in a command of its own."""
    other, folder = write_rows(tmp_path / "other.jsonl", ["x"] * 3), tmp_path / "adapters"
    shutil.copytree(adapter_dir, folder / "mine")
    esft.save_adapter(
        esft.to_esft(DeepseekV2ForCausalLM.from_pretrained(model_dir), {"experts": {"1": [0]}}), folder / "other"
    )
    flags = [f"--model={model_dir}", "--max_new_tokens=4", "--eval_batch_size=2", "--device=cpu"]
    both = [*flags, f"--eval_datasets={eval_file},{other}", f"--adapter_dir={folder}"]
    summaries = eval_multigpu.main([*both, f"--output_dir={tmp_path / 'out'}"])
    assert [summary["arguments"]["adapter_dir"] for summary in summaries] == [
        str(folder / n) for n in ("mine", "other")
    ]
    for name, data in (("mine", eval_file), ("other", other)):
        alone = tmp_path / f"{name}.alone.jsonl"
        eval_multigpu.main(
            [*flags, f"--eval_dataset={data}", f"--adapter_dir={folder / name}", f"--output_path={alone}"]
        )
        assert (tmp_path / "out" / f"{name}.jsonl").read_text() == alone.read_text()
    eval_multigpu.main([*both, f"--output_path={tmp_path / 'one.jsonl'}"])
    assert contents(tmp_path, "one.*.jsonl") == {
        f"one.{name}.jsonl": (tmp_path / "out" / f"{name}.jsonl").read_text() for name in ("mine", "other")
    }
    run_eval(model_dir, other, tmp_path / "base.jsonl")
    assert (tmp_path / "out" / "other.jsonl").read_text() == (tmp_path / "base.jsonl").read_text()
    assert (tmp_path / "out" / "mine.jsonl").read_text() != (tmp_path / "base.jsonl").read_text()

    monkeypatch.setattr(runner, "evaluate", lambda *a, **k: pytest.fail("a model answered"))
    with pytest.raises(ValueError, match="cannot ask suites"):
        eval_multigpu.main([*both, "--suite=mmlu"])
    with pytest.raises(ValueError, match="Give one of them"):
        eval_multigpu.main([*both, "--output_path=a.jsonl", "--output_dir=b"])
    shutil.rmtree(folder / "other")
    with pytest.raises(FileNotFoundError, match="adapters/other: no such"):
        eval_multigpu.main([*both, f"--output_dir={tmp_path / 'new'}"])
    assert not (tmp_path / "new").exists()


def score_by_length(monkeypatch) -> None:
    """Scores that differ between samples and models, which no tiny model gets otherwise."""
    lengths = TextEvaluator("letters", {"letters": lambda text, gold: float(sum(map(ord, text)) % 101)})
    monkeypatch.setattr(eval_multigpu, "get_evaluator", lambda *_: lengths)


def test_base_and_adapter_in_one_call_give_what_two_calls_give(
    model_dir, adapter_dir, eval_file, tmp_path, monkeypatch, capsys
):
    score_by_length(monkeypatch)
    other = write_rows(tmp_path / "other.jsonl", ["x"] * 3)
    files, adapter = f"{eval_file},{other}", f"--adapter_dir={adapter_dir}"
    (tmp_path / "two").mkdir()
    bases = run_eval(model_dir, files, tmp_path / "two" / "b.jsonl")
    alone = run_eval(model_dir, files, tmp_path / "two" / "a.jsonl", adapter)
    capsys.readouterr()
    loads, load = [], esft.load_base_model
    with monkeypatch.context() as patch:
        patch.setattr(esft, "load_base_model", lambda *a, **k: loads.append(a) or load(*a, **k))
        both = run_eval(model_dir, files, tmp_path / "one" / "a.jsonl", adapter, "--with_base")
    assert len(loads) == 1
    printed = capsys.readouterr().out
    separate = contents(tmp_path / "two", "*.jsonl")
    assert separate["a.mine.jsonl"] != separate["b.mine.jsonl"]
    joint = contents(tmp_path / "one", "*.jsonl")
    assert joint == {
        "a.mine.jsonl": separate["a.mine.jsonl"],
        "a.mine.base.jsonl": separate["b.mine.jsonl"],
        "a.other.jsonl": separate["a.other.jsonl"],
        "a.other.base.jsonl": separate["b.other.jsonl"],
    }
    for base, one, summary in zip(bases, alone, both):
        compared = summary.pop("against_base")
        assert untimed(summary) == untimed(one)
        assert (compared["base"], compared["adapter"], compared["n"]) == (base["mean"], one["mean"], base["n"])
        name = f"a.{one['dataset']}"
        assert json.loads((tmp_path / "one" / f"{name}.summary.json").read_text())["against_base"] == compared
        saved = json.loads((tmp_path / "one" / f"{name}.base.summary.json").read_text())
        assert untimed(saved) == untimed(base)
        row = rf"{one['dataset']} +{base['n']} +letters +{base['mean']:.1f} +{one['mean']:.1f} +[+-]"
        (line,) = re.findall(rf"^{row}.*$", printed, flags=re.MULTILINE)
        assert line.endswith(" *") == compared["certain"]
        assert compared["certain"] == (not compared["ci95"][0] <= 0 <= compared["ci95"][1])
    assert printed.count("dataset") == 1 and ("excludes 0" in printed) == (" *\n" in printed)


def test_an_adapter_of_another_base_is_refused_before_the_base_answers(
    model_dir, adapter_dir, eval_file, tmp_path, monkeypatch
):
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    model = DeepseekV2ForCausalLM.from_pretrained(other, dtype="float32")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp.gate." in name:
                parameter.add_(1)
    model.save_pretrained(other)
    monkeypatch.setattr(runner, "evaluate", lambda *a, **k: pytest.fail("the base answered"))
    plain = shutil.copytree(adapter_dir, tmp_path / "plain")  # an older adapter: the routers have to be loaded
    config = json.loads((plain / "expert_cfg.json").read_text())
    del config["base"]["weights"]
    (plain / "expert_cfg.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"cannot use adapter {plain}: .*router"):
        run_eval(str(other), eval_file, tmp_path / "out.jsonl", f"--adapter_dir={plain}", "--with_base")
    with pytest.raises(ValueError, match=f"cannot use adapter {adapter_dir}: .*weights differ"):
        run_eval(str(other), eval_file, tmp_path / "out.jsonl", f"--adapter_dir={adapter_dir}", "--with_base")
    assert not list(tmp_path.glob("*out*"))
