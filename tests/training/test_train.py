"""The command as a user sees it: what it prints, what it writes, and how it ends."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import esft
import eval_multigpu
import train
from deepseek.files import write_json, write_jsonl
from deepseek.process_groups import Ranks
from scripts.expert import generate_expert_config
from tests.helpers import EXPERTS, ROOT, Killed, arguments, at_step, config_of, fails, kill, losses, same
from training import data, first_selection, plan
from training.checkpoints import find_damage
from training.trainer import ESFTTrainer
from utils import PYTHON


def test_output_is_pleasant(files, start, capsys, recwarn):
    for method in ("esft", "lora", "full"):
        start(method, method=method, disable_tqdm=False, save_opt_states=True)
        shown = capsys.readouterr()
        assert "trained parameters" in shown.out and "samples" in shown.out
        assert re.search(r"6/6 .*loss=.*tokens/s=.*validation=", shown.err)
        assert "Writing" not in shown.err and "arn" not in shown.err.replace("learn", "")
    assert not [str(w.message) for w in recwarn]


def test_the_last_line_is_a_command_that_evaluates_the_run(start, capsys, monkeypatch):
    monkeypatch.chdir(start.folder)
    start("my run", max_steps=1)
    python, script, *flags = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: "))
    assert python == PYTHON and Path(script).resolve() == ROOT / "eval_multigpu.py"
    eval_multigpu.main([*flags, "--max_new_tokens=2"])
    assert list(start.folder.glob("my run/completions/*.summary.json"))
    monkeypatch.setenv("ESFT_STAGE", "1")  # the pipeline evaluates by itself
    start("a stage", max_steps=1)
    assert "next:" not in capsys.readouterr().out


def test_no_command_is_told_that_would_be_refused(files, start, capsys, monkeypatch):
    """Nothing is held out, or only what is not one question and one answer."""
    turns = [{"role": role, "content": "is it so?"} for role in ("user", "assistant", "user", "assistant")]
    write_jsonl(start.folder / "turns.jsonl", [{"messages": turns}] * 6)
    runs = {"none": {"validation_fraction": 0}, "turns": {"train_dataset": start.folder / "turns.jsonl"}}
    for name, keys in runs.items():
        start(name, max_steps=1, eval_steps=None, **keys)
        printed = capsys.readouterr().out
        assert "next:" not in printed and "eval_multigpu.py" in printed and "one question and one answer" in printed
        with pytest.raises(ValueError, match="held out no sample that is one question"):
            eval_multigpu.main([f"--model={start.folder / name}"])


def test_few_steps_are_told(start, capsys, monkeypatch):
    start("short", max_steps=-1, epochs=1, warmup_steps=0)
    out = capsys.readouterr().out
    assert re.search(r"only \d optimizer steps? \(\d+ packs?, \d+ per step, 1 epochs\) at a learning rate of", out)
    assert "Raise epochs, lower seq_length or batch_size" in out and "warmup" not in out
    start("asked", max_steps=3, warmup_steps=3)
    out = capsys.readouterr().out
    assert "only 3 optimizer steps (max_steps=3)" in out and "the warmup takes the whole run" in out
    monkeypatch.setattr(plan, "FEW_STEPS", 3)
    start("enough", max_steps=3, warmup_steps=1)
    assert not re.search("optimizer step|warmup", capsys.readouterr().out)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(files, start, monkeypatch, capsys, tiny_tokenizer):
    keys = {"save_opt_states": True, "save_steps": 1, "batch_size": 1, "accumulation_steps": 3}
    packs, _ = data.load_data(tiny_tokenizer, config_of(files, start.folder / "out", **keys), Ranks())
    original, seen = ESFTTrainer._loss_sum, []

    def broken(self, model, inputs, *args):
        loss = original(self, model, inputs, *args)
        if self.state.global_step == 2 and model.training and not seen:
            seen.extend(inputs["rows"])
            loss = loss * float("nan")
        return loss

    monkeypatch.setattr(ESFTTrainer, "_loss_sum", broken)
    message = fails(arguments(files, start.folder / "out", **keys), capsys)
    assert "step 3" in message and "nan" in message
    assert f"on rows {', '.join(map(str, sorted(seen)))} of" in message
    assert any(sorted(seen) == sorted(pack.samples) for pack in packs)
    out = start.folder / "out"
    assert find_damage(out / "checkpoint-2") is None
    assert {path.name for path in out.iterdir()} == {"run.json", "checkpoint-1", "checkpoint-2"}


def test_saved_files_can_be_read_by_others(start, monkeypatch):
    monkeypatch.setattr("deepseek.files.UMASK", 0o022)
    start(max_steps=2, save_opt_states=True, save_steps=2)
    start("full", method="full", max_steps=1)
    for path in [*start.folder.rglob("*.safetensors"), *start.folder.rglob("*.json")]:
        assert path.stat().st_mode & 0o777 == 0o644, path


@pytest.mark.parametrize("flags", [{"temperature": 0.6, "top_p": 0.95}, {"length_penalty": 2.0}])
def test_a_generation_config_with_flags_without_effect_is_saved_as_it_is(flags, files, start):
    """transformers loads it, but does not save it once Trainer has set its special tokens."""
    shutil.copytree(files / "m32", start.folder / "base")
    path = start.folder / "base" / "generation_config.json"
    write_json(path, {**json.loads(path.read_text()), **flags, "eos_token_id": 5})
    start("full", base_model_path=start.folder / "base", method="full", max_steps=1)
    saved = json.loads((start.folder / "full" / "generation_config.json").read_text())
    assert saved.items() >= flags.items() and saved["eos_token_id"] != 5


def test_a_saved_model_stops_at_what_training_taught(files, start):
    """A base whose tokenizer ends texts with one token, and whose chat template ends answers with another."""
    base = shutil.copytree(files / "m32", start.folder / "base")
    tokenizer = esft.load_tokenizer(base)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + ('<pad>' if m['role'] == 'assistant' else '\n') }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer.save_pretrained(base)
    rows = [{"prompt": "a", "completion": "b"}] * 8
    write_jsonl(start.folder / "d.jsonl", rows)
    keys = {"base_model_path": base, "train_dataset": start.folder / "d.jsonl", "template": "chat", "max_steps": 1}
    start("full", method="full", **keys)
    saved = json.loads((start.folder / "full" / "generation_config.json").read_text())
    assert set(saved["eos_token_id"]) == {tokenizer.pad_token_id, tokenizer.eos_token_id}
    start("adapter", **keys)
    assert json.loads((start.folder / "adapter" / "run.json").read_text())["end_token_ids"] == saved["eos_token_id"]


def test_a_seed_is_a_run(start):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        start(name, seed=seed, max_steps=2)
    a, b, c = (start.folder / name for name in "abc")
    assert same(a, b)
    assert losses(a) != losses(c)


def test_tensorboard(start):
    pytest.importorskip("tensorboard")
    start(report_to="tensorboard", max_steps=2)
    assert list((start.folder / "out").rglob("events.out.tfevents.*"))


@pytest.mark.slow
def test_the_command_exits_with_2(files, tmp_path):
    command = [sys.executable, ROOT / "train.py", *arguments(files, tmp_path / "out", learning_rat=1)]
    ended = subprocess.run(command, capture_output=True, text=True)
    (said,) = ended.stderr.splitlines()
    assert ended.returncode == 2 and said.startswith("error: cannot read the command line: unknown key 'learning_rat'")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["esft", "lora", "full"])
def test_two_processes_train_as_one(files, start, method):
    """Data parallel on gloo: the losses of one process on the same global batch, and one writer."""
    keys = {"method": method, "batch_size": 1, "global_batch_size": 4, "max_steps": 12}  # more than an epoch
    start("one", **keys)
    argv = arguments(files, start.folder / "two", **keys, verify_frozen=method != "full")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", ROOT / "train.py", *argv]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    one, two = losses(start.folder / "one"), losses(start.folder / "two")
    assert one.keys() == two.keys()
    assert all(two[key] == pytest.approx(one[key], abs=1e-5) for key in one)
    assert ended.stdout.count("trained parameters") == 1


def test_without_an_expert_config_esft_scores_and_selects_first(files, start, monkeypatch):
    ran = []

    def run_command(words):
        flags = dict(word.removeprefix("--").split("=", 1) for word in words[1:])
        ran.append((words[0].rpartition("/")[2], flags))
        if "output_path" in flags:
            write_json(Path(flags["output_path"]), EXPERTS)

    monkeypatch.setattr("training.first_selection.run_command", run_command)
    keys = {"expert_config": None, "save_opt_states": True}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 4, kill)
        start(**keys)
    assert [script for script, _ in ran] == ["get_expert_scores.py", "generate_expert_config.py"]
    out, wanted = start.folder / "out", {"seq_length": "48", "template": "chat", "overlong": "error", "seed": "0"}
    wanted |= {"validation_fraction": "0.2"}
    assert wanted.items() <= ran[0][1].items() and ran[0][1]["eval_dataset"] == str(files / "data.jsonl")
    assert ran[0][1]["output_dir"] == ran[1][1]["expert_scores_dir"] == str(out / "expert_scores")
    start(**keys)
    assert len(ran) == 2  # what is there already is not scored again
    assert esft.ExpertConfig.load(out).experts == {1: (3, 5), 2: (0, 6, 2)}
    start(**keys)
    start(**keys, overwrite=True)
    assert len(ran) == 4 and (out / "expert_configs" / "selected.json").is_file()


@pytest.mark.parametrize(
    ("keys", "scored", "selected"),
    [
        ({}, "token", {"strategy": "cumulative"}),
        ({"top_p": 0.4, "score_function": "gate"}, "gate", {"top_p": "0.4", "strategy": "cumulative"}),
        (
            {"score_function": "gradient", "strategy": "global", "budget": 0.07},
            "gradient",
            {"strategy": "global", "budget": "0.07"},
        ),
        ({"strategy": "random", "seed": 5}, "token", {"strategy": "random", "seed": "5"}),
        ({"strategy": "topk", "top_k": 2}, "token", {"strategy": "topk", "top_k": "2"}),
        ({"train_shared_experts": True}, "token", {"strategy": "cumulative", "train_shared_experts": "true"}),
    ],
)
def test_a_run_selects_by_the_rule_of_its_keys(keys, scored, selected, files, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr("training.first_selection.run_command", ran.append)
    config = config_of(files, tmp_path / "out", expert_config=None, **keys)
    first_selection.score_and_select(config)
    score, select = (dict(word.removeprefix("--").split("=", 1) for word in words[1:]) for words in ran)
    paths = ("expert_scores_dir", "output_path", "eval_dataset")
    assert score["scores"] == select["score_function"] == scored
    assert {key: value for key, value in select.items() if key not in (*paths, "score_function")} == selected
    flags = [f"--{key}={value}" for key, value in select.items()]
    assert generate_expert_config.parse_args(flags).score_function == scored


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"expert_config": None, "strategy": "globl"}, "cannot select by 'globl' (did you mean 'global'?)"),
        ({"expert_config": None, "strategy": "gradient"}, "it is a score (score_function=gradient)"),
        ({"expert_config": None, "score_function": "grad"}, "score_function"),
        ({"expert_config": None, "budget": 0.1, "top_p": 0.2}, "top_p and budget both say how many"),
        ({"expert_config": None, "top_p": 0}, "top_p is 0"),
        ({"expert_config": None, "contrast_scores_dir": "nowhere"}, "contrast_scores_dir=nowhere is not there"),
        (
            {"expert_config": None, "contrast": "ratio"},
            "contrast=ratio needs scores on general data. Give contrast_scores_dir",
        ),
        ({"budget": 0.1}, "budget says how to select experts, and expert_config names them"),
        ({"train_shared_experts": True}, "train_shared_experts says how to select experts, and expert_config"),
        (
            {"expert_config": None, "train_shared_experts": True, "method": "lora", "lora_experts": "selected"},
            "train_shared_experts is not for lora with lora_experts=selected. Give lora_modules=shared_experts",
        ),
    ],
)
def test_a_wrong_rule_is_refused_before_anything_is_read(keys, why, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_data", lambda *_: pytest.fail("data were read"))
    assert why in fails(arguments(files, tmp_path / "out", **keys), capsys)
    assert not (tmp_path / "out").exists()


def test_a_selection_that_fails_ends_the_run(files, tmp_path, monkeypatch, capsys):
    def run_command(words):
        raise SystemExit(2)

    monkeypatch.setattr("training.first_selection.run_command", run_command)
    message = fails(arguments(files, tmp_path / "out", expert_config=None), capsys)
    assert "cannot choose the experts: get_expert_scores.py ended with exit code 2" in message


@pytest.mark.slow
def test_the_short_form_is_the_long_one(files, tmp_path, start):
    def command(script: str, *words: object) -> None:
        ended = subprocess.run([sys.executable, ROOT / script, *words], capture_output=True, text=True, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr

    model, data_file, short, scores = files / "m32", files / "data.jsonl", tmp_path / "short", tmp_path / "scores"
    command("train.py", "--model", model, "--data", data_file, "--output_dir", short, "--seq_length", "48", "steps=2")
    flags = (f"--model={model}", f"--eval_dataset={data_file}", "--seq_length=48", f"--output_dir={scores}")
    command("scripts/expert/get_expert_scores.py", *flags)
    flags = (f"--expert_scores_dir={scores}", f"--output_path={tmp_path / 'long.json'}")
    command("scripts/expert/generate_expert_config.py", *flags)
    assert (short / "expert_configs" / "selected.json").read_bytes() == (tmp_path / "long.json").read_bytes()
    defaults = {"batch_size": 8, "validation_fraction": 0.02, "learning_rate": 5e-5}
    start("long", expert_config=tmp_path / "long.json", max_steps=2, **defaults, eval_steps=None, save_steps=None)
    assert same(short, start.folder / "long")
