"""The pipeline: stages run once, the table says what the files say, and the whole of it ends in a merged model."""

import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from deepseek.files import read_json, write_json
from evaluation.run_folder import read_run
from scripts import pipeline
from scripts.expert import get_expert_scores
from scripts.stages import Plan, Stages
from tests.helpers import make_model
from training.data import template_settings
from utils import ROOT, flag_words


def write_run(folder: Path, method: str, task: float, general: float) -> None:
    """Write what the stages leave of one method."""
    for name, mean in (("intent", task), ("general", general)):
        summary = {"dataset": name, "primary": "exact_match", "n": 10, "mean": mean, "ci95": [mean - 1, mean + 1]}
        summary |= {"groups": {}, "arguments": {"eval_dataset": "intent,general"}}
        write_json(folder / "completions" / f"{method}.{name}.summary.json", summary)
    if method != "base":
        results = {"steps": 5, "trained_parameters": 7, "parameters": 100, "step_seconds": 0.5}
        results |= {"peak_memory_bytes": 2**30, "saved_bytes": 2**20}
        config = {"train_dataset": "intent", "training": {"learning_rate": 1e-3}}
        note = {"config": config, "environment": {}, "results": results}
        write_json(folder / "checkpoints" / method / "run.json", note)


def test_the_table_holds_what_the_stages_wrote(tmp_path):
    write_run(tmp_path, "base", 0.0, 90.0)
    write_run(tmp_path, "esft-token", 76.0, 87.0)
    write_run(tmp_path, "full", 80.0, 70.0)
    rows = pipeline.table_rows(read_run(tmp_path), ["esft-token", "full"], ["intent", "general"])
    text = pipeline.format_table(rows)
    assert "| esft-token | 76.0 [75.0, 77.0] | 87.0 [86.0, 88.0] | 7.0% | 0.50 | 1.00 GiB | 1.00 MiB |" in text
    assert "| base | 0.0 [-1.0, 1.0] | 90.0 [89.0, 91.0] | - | - | - | - |" in text
    assert pipeline.against_full(rows) == (
        "esft-token: 95% of full fine-tuning's intent score; general -3.0 where full fine-tuning (learning rate 0.001, "
        "5 steps) has -20.0"
    )
    assert pipeline.against_full(rows[:2]) == ""


def test_a_run_knows_by_which_score_and_how_far_each_method_selects(tmp_path):
    methods = ("esft-gradient", "esft-token", "full")
    for method in methods:
        write_run(tmp_path, method, 70.0, 90.0)
    words = ["scripts/expert/generate_expert_config.py", "--output_path=out/expert_configs/esft-token.json"]
    write_json(tmp_path / "stages.json", {"a": [*words, "--top_p=0.35"], "b": ["train.py", "--output_dir=out"]})
    trained = {model.label: model for model in read_run(tmp_path).trained}
    assert [trained[name].function for name in methods[:2]] == ["gradient", "token"]
    assert trained["esft-token"].top_p == 0.35 and trained["esft-gradient"].top_p == 0.2


def test_a_stage_runs_once_and_again_when_its_command_changes(tmp_path, monkeypatch):
    ran = []

    def run_command(words, **_):
        ran.append(words)
        (tmp_path / "out").write_text("x")

    monkeypatch.setattr("scripts.stages.run_command", run_command)
    for value in (1, 1, 2):
        Stages(tmp_path).run(tmp_path / "out", "tool.py", flag=value, none=None, off=False, on=True)
    assert ran == [["tool.py", "--flag=1", "--on"], ["tool.py", "--flag=2", "--on"]]
    Stages(tmp_path).run(tmp_path / "out", "tool.py", on=True, flag=2)  # the place of a flag says nothing
    assert len(ran) == 2
    (tmp_path / "out").unlink()
    Stages(tmp_path).run(tmp_path / "out", "tool.py", flag=2, on=True)
    assert len(ran) == 3
    for keys in (["a=1", "a=2"], ["a=2", "a=1"]):  # the last one counts
        Stages(tmp_path).run(tmp_path / "out", "tool.py", flag=2, on=True, keys=keys)
    assert len(ran) == 5


def test_what_was_made_of_an_output_is_stale_when_that_is_made_again(tmp_path, monkeypatch):
    ran = []

    def run_command(words, **_):
        ran.append(words[0])
        if len(ran) == 4:
            raise SystemExit(2)

    monkeypatch.setattr("scripts.stages.run_command", run_command)
    config, model, answers = (tmp_path / name for name in ("config.json", "run", "answers.jsonl"))
    model.mkdir()
    for path in (config, model / "state.json", answers):
        path.touch()

    def stages(top_p: float) -> None:
        stages = Stages(tmp_path)
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


@pytest.mark.parametrize("name", ["train_dataset", "base_model_path"])
def test_the_folder_of_another_task_or_model_is_refused(name, tmp_path):
    owners = {"train_dataset": "law", "base_model_path": "m"}
    trained = ["train.py", "--base_model_path=m", "--train_dataset=law", "method=full"]
    asked = ["eval_multigpu.py", f"--base_model_path={tmp_path}/checkpoints/full", "--eval_dataset=general"]
    write_json(tmp_path / "stages.json", {"a": trained, "b": asked})
    Stages(tmp_path, **owners)
    message = rf"cannot use .*: its stages have --{name}={owners[name]}\. Give another --output_dir"
    with pytest.raises(ValueError, match=message):
        Stages(tmp_path, **owners | {name: "other"})


@pytest.mark.parametrize("script, code", [("exit(2)", 2), ("import os; os.abort()", 128 + signal.SIGABRT)])
def test_a_stage_that_fails_stops_the_pipeline_with_its_code(script, code, tmp_path):
    (tmp_path / "tool.py").write_text(script)
    with pytest.raises(SystemExit) as stop:
        Stages(tmp_path).run(tmp_path / "out", str(tmp_path / "tool.py"))
    assert stop.value.code == code and not (tmp_path / "stages.json").exists()


def run_pipeline(folder: Path, output: Connection) -> None:
    """A pipeline whose only stage takes its time to end when it is told to."""
    os.dup2(output.fileno(), 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # however the tests were started
    pipeline.run_stages = lambda args, stages, *_: stages.run(folder / "out", str(folder / "stage.py"))
    model = f"--model={ROOT}/results/models/tiny"
    pipeline.run_cli(lambda: pipeline.main([model, "--data=intent", f"--output_dir={folder}"]))


STAGE = """
import pathlib, signal, sys, time

def stop(*_):
    time.sleep(0.5)
    pathlib.Path(sys.argv[0]).with_name("ended").touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, stop)
print("at work", flush=True)
time.sleep(60)
"""


@pytest.fixture
def at_work(tmp_path):
    """A pipeline in `tmp_path` whose stage has begun, and what it prints."""
    (tmp_path / "stage.py").write_text(STAGE)
    context = multiprocessing.get_context("forkserver")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=run_pipeline, args=(tmp_path, writer))
    process.start()
    writer.close()
    with open(os.dup(reader.fileno())) as printed:
        while printed.readline() not in ("at work\n", ""):
            pass
        yield process, printed
    process.kill()
    process.join()


@pytest.mark.long
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stage_ends_before_a_pipeline_that_is_stopped(number, code, at_work, tmp_path):
    process, _ = at_work
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == code
    assert (tmp_path / "ended").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("killed", [False, True], ids=["a pipeline", "a stage left behind"])
def test_a_folder_has_one_pipeline_at_a_time(killed, at_work, tmp_path, capsys):
    process, printed = at_work
    (stage,) = psutil.Process(process.pid).children()
    if killed:
        process.kill()
        process.join()
    with pytest.raises(SystemExit) as stop:
        pipeline.run_cli(lambda: pipeline.locked(tmp_path).__enter__())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "another run is at work there" in error and error.count("\n") == 1
    stage.terminate()
    printed.read()  # to its end: the stage is gone
    process.join()
    with pipeline.locked(tmp_path):
        pass


WRONG = {
    "method": (["--methods=esft-tokens"], "did you mean 'esft-token'"),
    "data set": (["--train_dataset=no_such"], "no_such"),
    "method of a key": (["esft-tokn:lr=1"], "did you mean 'esft-token'"),
    "no key": (["fast"], "unknown key 'fast'"),
    "unknown key": (["esft-token:learning_rat=1"], "did you mean 'learning_rate'"),
    "value": (["max_steps=0"], "max_steps=0"),
    "value by transformers": (["lr_scheduler_type=linaer"], "linaer"),
    "keys that do not fit": (["--methods=full", "--train_config=configs/tiny.yaml", "save_steps=40"], "but found 40"),
    "a flag here": (["full:seq_length=8"], "a flag sets seq_length"),
    "data of one method": (["esft-token:loss_on=last"], "for all methods. Give loss_on=last"),
    "config": (["--train_config=no_such.yaml"], "no_such.yaml"),
    "top_p": (["--methods=esft-gate", "esft-gate:top_p=1.5"], "top_p is 1.5"),
    "top_p and budget": (["esft-token:top_p=0.2", "esft-token:budget=0.1"], "top_p and budget both say how many"),
    "upper_layers of another rule": (["upper_layers=2"], "not upper_layers"),
    "amount of no rule": (["--methods=full,esft-token", "full:budget=0.1"], "no experts are selected there"),
    "no general data": (["--methods=esft-fisher"], "esft-fisher: it needs general data. Give --contrast_dataset"),
    "needless general data": (["--contrast_dataset=law"], "no method compares the task with it"),
    "training rows": (["--train_dataset={tmp}/rows.jsonl"], "rows.jsonl:1"),
    "evaluation rows": (["--eval_dataset={tmp}/rows.jsonl"], "rows.jsonl:1"),
    "same names": (["--eval_dataset=law,{tmp}/law.jsonl"], "two have one name"),
    "no peft": (["--methods=lora"], "cannot import peft"),
    "no shared experts": (["--methods=esft-token-shared", "--model={tmp}/unshared"], "experts: this model has none"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_refused_before_anything_runs(what, tmp_path, monkeypatch):
    flags, message = WRONG[what]
    (tmp_path / "rows.jsonl").write_text('{"question": "?"}')
    (tmp_path / "law.jsonl").write_text('{"prompt": "?", "answers": ["!"]}')
    monkeypatch.setattr("scripts.stages.run_command", lambda *_, **__: pytest.fail("a stage ran"))
    if what == "no shared experts":
        base = shutil.copytree(ROOT / "results" / "models" / "tiny", tmp_path / "unshared")
        make_model("olmoe", vocab_size=read_json(base / "config.json")["vocab_size"]).save_pretrained(base)
    if what == "no peft":
        monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        flags = [flag.format(tmp=tmp_path) for flag in flags]
        pipeline.main(["--model=results/models/tiny", "--data=intent", f"--output_dir={tmp_path / 'out'}", *flags])
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_a_chat_template_is_told_before_anything_runs(tmp_path, monkeypatch):
    """In a sentence that names the setting as this command takes it."""
    shutil.copytree(ROOT / "results" / "models" / "tiny", tmp_path / "model")
    for path in tmp_path.glob("model/chat_template*"):
        path.unlink()
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    write_json(tmp_path / "model" / "tokenizer_config.json", settings)
    monkeypatch.setattr("scripts.stages.run_command", lambda *_, **__: (_ for _ in ()).throw(SystemExit("a stage ran")))
    words = [f"--model={tmp_path / 'model'}", "--data=intent", f"--output_dir={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match=r"the tokenizer has none\. Give template=released") as error:
        pipeline.main(words)
    (told,) = re.findall(r"Give (\S+),", str(error.value))
    for setting in (told, f"--{told}"):
        with pytest.raises(SystemExit, match="a stage ran"):
            pipeline.main([*words, setting])


def test_a_key_for_one_method_wins_and_training_can_be_resumed():
    flags = [
        "--model=results/models/tiny",
        "--data=intent",
        "--train_config=configs/tiny.yaml",
        "full:learning_rate=1e-3",
        "lr=2e-3",
    ]
    args = pipeline.parse_args([*flags, "full:save_opt_states=false"])
    plans = pipeline.plan_training(args, ["esft-token", "full"])
    keys = {method: plan.words for method, plan in plans.items()}
    assert {"method=esft", "learning_rate=2e-3", "save_opt_states=true"} <= set(keys["esft-token"])
    assert {"method=full", "learning_rate=1e-3", "save_opt_states=false"} <= set(keys["full"])
    assert len(keys["full"]) == len({key.partition("=")[0] for key in keys["full"]})


def test_a_key_may_have_dashes_and_a_flag_may_not_be_misspelled(capsys):
    flags = ["--model=results/models/tiny", "--data=intent"]
    keys = ["learning_rate=1e-3", "full:lr=2e-3", "top_p=0.1", "use_cache=true", "hub_token=x", "eval_steps=5"]
    found = pipeline.parse_args([*flags, *(f"--{key}" for key in keys), "--max_new_tokens=5"])
    assert found == pipeline.parse_args([*flags, *keys, "max_new_tokens=5"]) and found.overrides == keys
    words = [
        "--learning-rate",
        "1e-3",
        "--save_opt_states",
        "--full:lr",
        "2e-3",
        "--save-steps=5",
        "--max_new_tokens",
        "5",
        "--append_end",
    ]
    keys = ["learning_rate=1e-3", "save_opt_states=true", "full:lr=2e-3", "save_steps=5", "append_end=true"]
    assert pipeline.parse_args([*flags, *words]) == pipeline.parse_args([*flags, *keys, "max_new_tokens=5"])
    for word, told in {"--methds=full": "'--methods'", "--sedd=1": "'--seed'", "--xyzzy=1": "--xyzzy"}.items():
        with pytest.raises(SystemExit):
            pipeline.parse_args([*flags, word])
        assert f"unrecognized arguments: {word.partition('=')[0]}" in (error := capsys.readouterr().err)
        assert told in error
    for word in ("--learning_rat=1", "--full:learning_rat=1", "--learning-rat=1"):
        with pytest.raises(ValueError, match="did you mean 'learning_rate'"):
            pipeline.plan_training(pipeline.parse_args([*flags, word]), ["full"])


def test_a_key_of_a_method_that_is_not_run_is_told(capsys):
    words = ["--model=results/models/tiny", "--data=intent", "lr=2e-3", "full:lr=1e-3", "lora:lora_rank=4"]
    pipeline.keys_by_method(pipeline.parse_args(words), ["esft-token", "full"])
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("note: ") and "--methods" in told and told.endswith(": lora:lora_rank=4")
    pipeline.keys_by_method(pipeline.parse_args(words), ["full", "lora"])
    assert not capsys.readouterr().err


def test_scoring_streams_where_training_does(tmp_path):
    asked = {}

    class Stages:
        def run(self, output, script, **flags):
            asked[script] = flags

    (tmp_path / "keys.yaml").write_text("streaming: true\nn_train_samples: 5\n")
    words = ["--base_model_path=results/models/tiny", "--train_dataset=intent", "--template=released"]
    by_file, by_word = [f"--train_config={tmp_path / 'keys.yaml'}"], ["streaming=true", "n_train_samples=5"]
    for more, streams in ([], False), (by_word, True), (by_file, True):
        args = pipeline.parse_args([*words, *more])
        pipeline.run_stages(args, Stages(), tmp_path, pipeline.plan_training(args, ["esft-token"]), [])
        assert asked["scripts/expert/get_expert_scores.py"]["streaming"] is streams


DATA_KEYS = {
    "overlong": "truncate",
    "loss_on": "last",
    "special_text": "plain",
    "append_end": "true",
    "template_kwargs": '{"enable_thinking": false}',
    "n_train_samples": "5",
    "streaming": "true",
}


def stages_of(folder: Path, *more: str) -> tuple[Plan, list[tuple[str, dict]]]:
    """Return the plan of esft-token, and the script and the flags of every stage."""
    asked = []

    class Stages:
        def run(self, output, script, **flags):
            asked.append((script, flags))

    args = pipeline.parse_args(
        ["--model=results/models/tiny", "--data=intent", "--no_merge", "--seq_length=128", *more]
    )
    plans = pipeline.plan_training(args, args.methods.split(","))
    pipeline.run_stages(args, Stages(), folder, plans, ["intent", "general"])
    return plans["esft-token"], asked


@pytest.mark.parametrize("where", ["words", "file"])
def test_experts_are_scored_on_the_data_as_training_reads_it(where, tmp_path):
    """General data are encoded in the same way. How many samples training takes says nothing about them."""
    words = [f"{key}={value}" for key, value in DATA_KEYS.items()]
    if where == "file":
        (tmp_path / "keys.yaml").write_text("\n".join(f"{key}: {value}" for key, value in DATA_KEYS.items()))
        words = [f"--train_config={tmp_path / 'keys.yaml'}"]
    more = ["--methods=esft-token,esft-fisher", "--contrast_dataset=law"]
    plan, asked = stages_of(tmp_path, *words, *more)
    scored = [flag_words(**flags) for script, flags in asked if script.endswith("get_expert_scores.py")]
    task, general = (get_expert_scores.sample_settings(get_expert_scores.parse_args(words)) for words in scored)
    for settings in (task, general):
        assert settings.template == template_settings(plan.config)
        found = {key: getattr(settings, key) for key in ("seq_length", "overlong", "streaming", "seed")}
        assert found == {key: getattr(plan.config, key) for key in found}
    assert (task.n_train_samples, general.n_train_samples) == (5, None)
    told = {word.partition("=")[0].removeprefix("--") for word in scored[0]}
    assert DATA_KEYS.keys() <= told


def test_the_base_and_what_is_tuned_are_asked_alike(tmp_path):
    _, asked = stages_of(tmp_path, "--methods=esft-token,full", f"template_kwargs={DATA_KEYS['template_kwargs']}")
    kwargs = [flags["template_kwargs"] for script, flags in asked if script == "eval_multigpu.py"]
    assert kwargs == [DATA_KEYS["template_kwargs"]] * 3


def test_keys_that_are_not_given_are_not_printed(tmp_path):
    """So a stage of an earlier version is not run again."""
    _, asked = stages_of(tmp_path)
    (scored,) = (flag_words(**flags) for script, flags in asked if script.endswith("get_expert_scores.py"))
    assert scored[2:] == [
        "--base_model_path=results/models/tiny", "--n_sample_tokens=131072", "--seq_length=128", "--world_size=1",
        "--gpus_per_rank=1", "--template=chat", "--seed=0", "--dtype=auto",
    ]  # fmt: skip
    (base, _) = (flag_words(**flags) for script, flags in asked if script == "eval_multigpu.py")
    assert [word.partition("=")[0] for word in base] == [
        "--eval_dataset", "--base_model_path", "--output_path", "--world_size", "--gpus_per_rank", "--template",
        "--max_new_tokens", "--eval_batch_size", "--seed", "--dtype",
    ]  # fmt: skip


def test_each_method_has_its_rule_and_its_amount(tmp_path):
    asked = []

    class Stages:
        def run(self, output, script, **flags):
            asked.append((script.rpartition("/")[2], flags))

    words = ["--base_model_path=results/models/tiny", "--train_dataset=intent", "--template=released", "--no_merge"]
    words += ["--contrast_dataset=law", "esft-gradient-global:budget=0.31", "lora-selected:top_p=0.5", "top_p=0.3"]
    methods = ["esft-token", "esft-gradient-global", "esft-token-shared", "esft-fisher", "random"]
    methods += ["lora-selected", "lora"]
    args = pipeline.parse_args(words)
    pipeline.run_stages(args, Stages(), tmp_path, pipeline.plan_training(args, methods), [])
    scored = [flags for script, flags in asked if script == "get_expert_scores.py"]
    assert [flags["eval_dataset"] for flags in scored] == ["intent", "law"]
    assert {flags["scores"] for flags in scored} == {"gradient"}
    rules = {flags["output_path"].stem: flags for script, flags in asked if script == "generate_expert_config.py"}
    assert list(rules) == methods[:-1]
    amounts = {name: {key: flags[key] for key in ("top_p", "budget") if key in flags} for name, flags in rules.items()}
    own = {"esft-gradient-global": {"budget": "0.31"}, "lora-selected": {"top_p": "0.5"}}
    assert amounts == {name: own.get(name, {"top_p": "0.3"}) for name in rules}
    assert rules["esft-gradient-global"]["strategy"] == "global" and rules["random"]["seed"] == 0
    assert {name for name, flags in rules.items() if flags.get("train_shared_experts")} == {"esft-token-shared"}
    assert rules["esft-fisher"]["contrast_scores_dir"] == tmp_path / "general_scores"
    trained = {flags["output_dir"].name: flags for script, flags in asked if script == "train.py"}
    assert list(trained) == methods and trained["lora"]["expert_config"] is None
    assert all(trained[name]["expert_config"] == rules[name]["output_path"] for name in rules)
    assert not any(word.startswith(("top_p", "budget")) for flags in trained.values() for word in flags["keys"])
    assert "lora_experts=selected" in trained["lora-selected"]["keys"]


@pytest.mark.parametrize("key", ["wandb_api_key", "full:wandb_api_key"])
def test_a_secret_reaches_the_stages_by_the_environment_alone(key, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "old")  # restored after the test
    args = pipeline.parse_args(["--model=results/models/tiny", "--data=intent", f"{key}=s3cret", "lr=2e-3"])
    plans = pipeline.plan_training(args, ["esft-token", "full"])
    assert os.environ["WANDB_API_KEY"] == "s3cret" and "s3cret" not in f"{args} {plans}"
    assert args.overrides == ["lr=2e-3"]


@pytest.mark.slow
def test_the_whole_pipeline_in_another_folder(tiny_model_dir, tmp_path, capfd, monkeypatch):
    """Relative paths are those of the folder in which it is started, and so are the commands that it prints."""
    monkeypatch.chdir(tmp_path)
    for module in ("pipeline", "stages"):  # the Python of these tests may be given below another folder
        monkeypatch.setattr(f"scripts.{module}.PYTHON", sys.executable)
    shutil.copytree(tiny_model_dir, "model")
    rows = [
        {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "it is"}]}
        for i in range(40)
    ]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "seen.jsonl").write_text(json.dumps({"prompt": "1", "answers": ["it is"]}))
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, rows[:4])))
    flags = ["--model=model", "--data=task.jsonl", "--eval_dataset=seen.jsonl", "--output_dir=out", "--seq_length=128"]
    flags += ["--methods=esft-token,esft-gate,random,lora,full", f"--train_config={ROOT}/configs/tiny.yaml"]
    flags += ["--max_new_tokens=4", "--n_sample_tokens=256", "max_steps=2", "full:learning_rate=1e-4"]
    flags += ["validation_dataset=held.jsonl"]
    pipeline.main(flags)
    out = capfd.readouterr().out
    assert all(f"| {method} |" in out for method in ("base", "esft-token", "esft-gate", "random", "lora", "full"))
    for name in ("table.md", "table.json", "losses.png", "expert_scores.png", "merged/config.json"):
        assert (tmp_path / "out" / name).is_file()
    run = json.loads((tmp_path / "out" / "checkpoints" / "full" / "run.json").read_text())
    assert run["config"]["training"]["learning_rate"] == 1e-4
    pipeline.main(flags)
    assert f"$ {sys.executable}" in out
    again = capfd.readouterr().out
    assert f"$ {sys.executable}" not in again  # all was there
    ((_, next_command),) = re.findall(r"(next): (.*) makes a page of it", again)
    subprocess.run(shlex.split(next_command), check=True)
    assert (tmp_path / "out" / "report.html").is_file()
    run = read_run(Path("out"))
    assert run.cwd == str(tmp_path) and all(Path(words[0]).is_file() for words in run.stages)
    stages = [shlex.split(line.removeprefix("[done] ")) for line in again.splitlines() if line.startswith("[done]")]
    assert [words[1:] for words in stages] == run.stages
    subprocess.run([sys.executable, *run.command[1:]], check=True)
    for model in (run.trained[0], run.trained[-1]):
        subprocess.run([sys.executable, *model.command[1:]], cwd=ROOT, check=True)
    told = capfd.readouterr().out
    assert told.count("nothing to do") == 2 and told.count("[done]") == len(stages)
    for words in (stages[0], stages[-1]):
        subprocess.run(words, check=True)
