"""One training run: its config and errors, the loss, exact resume, what stays frozen, and two processes as one."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

import esft
import train
from deepseek.files import write_json, write_jsonl
from tests.helpers import (
    EXPERTS,
    ROOT,
    Killed,
    arguments,
    at_step,
    config_of,
    fails,
    kill,
    losses,
    make_model,
    same,
    weights,
)
from training import data
from training.checkpoints import find_damage
from training.config import ALIASES
from training.config import METHODS as KNOWN_METHODS


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """The folder of an unbroken run with KEYS."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    train.main(arguments(files, folder))
    return folder


@pytest.fixture
def start(files, tmp_path):
    """Run the command in this process with KEYS, changed by keywords; `out` is relative to the test's folder."""

    def start(out: str = "out", **changes) -> dict:
        return train.main(arguments(files, tmp_path / out, **changes))

    start.folder = tmp_path
    return start


def trainer_of(config: train.RunConfig, monkeypatch) -> train.ESFTTrainer:
    """The trainer of a run, as it stands before its first step."""
    found = []

    def stop(self, **_):
        found.append(self)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.ESFTTrainer, "train", stop)
        train.run(config)
    return found[0]


def loss_by_hand(model, tokenizer, rows: list[dict]) -> tuple[float, float]:
    """(mean over label tokens, mean over samples of their means), each sample alone and from full logits."""
    sums, counts = [], []
    for row in rows:
        sample = data.encode(row["messages"], tokenizer)
        labels = torch.tensor(sample.labels[1:])
        with torch.no_grad():
            logits = model(torch.tensor([sample.input_ids])).logits[0, :-1]
        sums.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item())
        counts.append((labels != -100).sum().item())
    return sum(sums) / sum(counts), sum(s / c for s, c in zip(sums, counts)) / len(sums)


# ---- config ---------------------------------------------------------------------------------------------------------

PATHS = {"base_model_path": "m", "train_dataset": "d", "output_dir": "o", "method": "full"}


def test_aliases_stand_for_their_keys():
    short = {"batch_size": 3, "steps": 7, "lr": 0.1, "lr_scheduler": "constant", "accumulation_steps": 2, "epochs": 1}
    long = train.read_config(None, {**PATHS, **{ALIASES[key]: value for key, value in short.items()}})
    assert train.read_config(None, {**PATHS, **short}) == long
    assert long.training["max_steps"] == 7 and long.training["per_device_eval_batch_size"] == 3


def test_every_key_of_training_arguments_is_accepted():
    for f in dataclasses.fields(TrainingArguments):
        if f.init and f.default is not dataclasses.MISSING and f.name != "output_dir":
            train.read_config(None, {**PATHS, f.name: f.default})
    assert train.read_config(None, {**PATHS, "use_cpu": True}).device == "cpu"
    assert train.read_config(None, {**PATHS, "save_only_model": False}).save_opt_states
    assert train.read_config(None, {**PATHS, "save_steps": 5}).training["save_strategy"] == "steps"


@pytest.mark.parametrize(
    "given, text",
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat' .did you mean 'learning_rate'"),
        ({"lr": 1.0, "learning_rate": 2.0}, "'lr' and 'learning_rate' are two names of one key"),
        ({"method": "lorra"}, "method=lorra: .*did you mean 'lora'"),
        ({"seq_length": 0}, "seq_length=0"),
        ({"batch_size": 0}, "per_device_train_batch_size=0"),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps=-1"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"num_train_epochs": 0}, "num_train_epochs=0"),
        ({"label_smoothing_factor": 2}, "label_smoothing_factor=2"),
        ({"seq_length": True}, "seq_length=True: expected a whole number"),
        ({"n_train_samples": "many"}, "n_train_samples='many': expected a whole number"),
        ({"lr": "fast"}, "learning_rate='fast': expected a number"),
        ({"steps": 1.5}, "max_steps=1.5: expected a whole number"),
        ({"overwrite": "maybe"}, "overwrite='maybe': expected true or false"),
        ({"output_dir": None}, "--output_dir is missing"),
        ({"method": "esft"}, "method esft needs --expert_config"),
        ({"bf16": True}, "dtype=bfloat16"),
        ({"verify_frozen": True}, "method full freezes nothing"),
    ],
)
def test_a_bad_key_or_value_is_named(given, text):
    with pytest.raises(ValueError, match=text):
        train.read_config(None, {**PATHS, **given})


def test_a_file_is_read_and_the_command_line_wins(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 1e-5\nsteps: 5\nmax_grad_norm: 2e-1\neval_strategy: no\n")
    config = train.read_config(path, {**PATHS, "max_steps": 9})
    assert (config.training["learning_rate"], config.training["max_steps"]) == (1e-5, 9)
    assert config.training["eval_strategy"] == "no"  # which YAML reads as false
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seq_length = 1
    for text, message in (
        ("- a\n", "key: value"),
        ("a: [", "not valid YAML"),
        ("lr: 1\nlearning_rate: 2", "two names"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            train.read_config(path, PATHS)
    with pytest.raises(FileNotFoundError, match="no such file"):
        train.read_config(tmp_path / "no.yaml", PATHS)


@pytest.mark.parametrize("name", ["base", "tiny"])
def test_shipped_configs_parse(name, tmp_path):
    path = ROOT / "configs" / f"{name}.yaml"
    config = train.read_config(path, {**PATHS, "output_dir": str(tmp_path / "o"), "device": "cpu"})
    train.training_arguments(config)
    if name == "base":  # explains every key of ours
        ours = {f.name for f in dataclasses.fields(train.RunConfig)}
        assert ours - yaml.safe_load(path.read_text()).keys() == {
            "base_model_path", "train_dataset", "output_dir", "expert_config", "training", "ep_size",
        }  # fmt: skip
        assert train.read_config(path, PATHS, {"ep_size": "auto"}).ep_size == "auto"  # train_ep.py's default
        args = train.training_arguments(config)
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 32


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_errors_are_one_sentence_and_leave_nothing_behind(files, tmp_path, capsys):
    def data(text: str) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        path = folder / "bad.jsonl"
        path.write_text(text)
        return path

    def row(*turns) -> str:
        return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})

    good, long = (row(("user", "is it?"), ("assistant", "yes " * times)) for times in (1, 60))
    expert = tmp_path / "expert.json"
    dense = tmp_path / "dense"
    small = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **small, **heads)).save_pretrained(dense)
    bare = tmp_path / "bare"
    shutil.copytree(files / "m32", bare, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    for path in files.joinpath("m32").glob("*token*"):
        shutil.copy(path, dense)
    shutil.copy(files / "m32" / "chat_template.jinja", dense)
    cases = [
        ({"train_dataset": tmp_path / "no.jsonl"}, "no such file"),
        ({"train_dataset": data(f"{good}\n{{oops\n")}, r"bad.jsonl:2: not valid JSON"),
        ({"train_dataset": data(good + "\n" + row(("robot", "x"), ("assistant", "y")))}, r"bad.jsonl:2.*role"),
        ({"train_dataset": data(good + "\n" + row(("user", "x"), ("assistant", "")))}, r"bad.jsonl:2"),
        ({"seq_length": 8}, "more than seq_length=8"),
        ({"train_dataset": data("\n".join([good] * 6 + [long])), "validation_fraction": 0}, "sample 7 has"),
        ({"output_dir": expert.parent / "file" / "out"}, "cannot be written"),
        ({"base_model_path": dense}, "dense model"),
        ({"base_model_path": tmp_path / "none"}, "no such folder"),
        ({"base_model_path": bare}, "cannot be loaded|tokenizer"),
        ({"expert_config": tmp_path / "none.json"}, "no such expert config"),
        ({"expert_config": None}, "needs --expert_config"),
        ({"experts": {"9": [1]}}, "names layer 9"),
        ({"experts": {"1": [8]}}, "names expert 8 of layer 1"),
        ({"eval_steps": 2, "validation_fraction": 0}, "needs a validation set"),
        ({"load_best_model_at_end": True, "save_steps": 3}, "no multiple of eval_steps=2"),
        ({"report_to": "nonsense"}, "report_to=nonsense is not installed"),
        ({"max_steps": "[1"}, "not valid YAML"),
    ]
    if not torch.cuda.is_available():
        cases.append(({"device": "cuda"}, "torch sees no GPU"))
    (tmp_path / "file").touch()
    for changes, text in cases:
        if experts := changes.pop("experts", None):
            write_json(expert, {"experts": experts})
            changes["expert_config"] = expert
        message = fails(arguments(files, tmp_path / "out", **changes), capsys)
        assert re.search(text, message), message
        assert not (tmp_path / "out").exists()
    assert "given twice" in fails([*arguments(files, tmp_path / "out"), "max_steps=3"], capsys)
    assert "written key=value" in fails([*arguments(files, tmp_path / "out"), "oops"], capsys)


def test_what_transformers_refuses_late_leaves_no_run_behind(files, tmp_path, capsys):
    for changes in ({"learning_rate": -1}, {"adam_beta1": 2}, {"optim": "lomo"}):
        fails(arguments(files, tmp_path / "out", **changes), capsys)
        assert not list((tmp_path / "out").iterdir())
    train.main(arguments(files, tmp_path / "out"))


def test_a_run_on_other_contents_is_another_run(files, start, capsys):
    config = start.folder / "experts.json"
    shutil.copy(files / "experts.json", config)
    start(expert_config=config)
    write_json(config, {**EXPERTS, "experts": {"1": [1]}})
    message = fails(arguments(files, start.folder / "out", expert_config=config), capsys)
    assert "differs in the content of expert_config)" in message


def test_an_output_folder_that_is_not_this_run_is_refused_untouched(files, start, capsys):
    out = start.folder / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "holds no run of ours" in fails(arguments(files, out), capsys)
    assert "holds no run of ours" in fails(arguments(files, out, overwrite=True), capsys)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


# ---- loss -----------------------------------------------------------------------------------------------------------


def test_first_step_is_the_same_however_the_batch_is_cut(files, start, tiny_tokenizer):
    """SGD with rate 1: the change of the weights is the gradient. All packs of the data are in the batch."""
    rows = data.load_samples(files / "data.jsonl")[:8]
    write_jsonl(start.folder / "few.jsonl", rows)
    keys = {
        "train_dataset": start.folder / "few.jsonl", "validation_fraction": 0, "eval_steps": None, "save_steps": None,
        "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0, "max_steps": 1, "lr_scheduler_type": "constant",
    }  # fmt: skip
    packs = train.load_data(config_of(files, start.folder, **keys), tiny_tokenizer)[0]
    assert len(packs) == 4 and len({len(pack) for pack in packs}) > 1
    by_hand, mean_of_means = loss_by_hand(make_model(), tiny_tokenizer, rows)
    adapters = []
    for batch, accumulation, seq_length in ((1, 4, 48), (2, 2, 48), (4, 1, 48), (3, 2, 48), (1, 8, 33)):
        name = f"{batch}x{accumulation}x{seq_length}"
        cut = {"batch_size": batch, "accumulation_steps": accumulation, "seq_length": seq_length}
        result = start(name, **cut, **keys)
        assert result["train_loss"] == pytest.approx(by_hand, rel=1e-6)
        assert abs(result["train_loss"] - mean_of_means) > 1e-3
        adapters.append(weights(start.folder / name))
    for adapter in adapters[1:]:
        for key, tensor in adapters[0].items():
            torch.testing.assert_close(adapter[key], tensor, rtol=1e-4, atol=1e-6)


def test_where_documents_of_a_pack_see_each_other_each_is_alone(files, start, tiny_tokenizer):
    """gpt_oss, for which transformers builds no mask between packed documents."""
    folder = start.folder / "gpt_oss"
    model = make_model("gpt_oss")
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    with pytest.warns(UserWarning, match="would see each other"):
        start(base_model_path=folder, batch_size=30, validation_fraction=0, eval_steps=0, max_steps=1, save_steps=0)
    total = count = 0
    for sample in data.load_samples(files / "data.jsonl"):
        encoded = data.encode(sample["messages"], tiny_tokenizer)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([encoded.input_ids]), use_cache=False).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(encoded.labels[1:]), reduction="sum").item()
        count += sum(label != data.IGNORE for label in encoded.labels[1:])
    assert losses(start.folder / "out")["loss", 1] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("eval_batch_size", [1, 3, 8])
def test_validation_loss_is_the_mean_over_its_tokens(files, start, tiny_tokenizer, eval_batch_size):
    result = start(eval_batch_size=eval_batch_size, learning_rate=0, max_steps=2)
    rows = data.load_samples(files / "data.jsonl")
    packs = train.load_data(config_of(files, start.folder / "out"), tiny_tokenizer)[1]
    validation = [rows[number - 1] for pack in packs for number in pack.samples]
    assert len(validation) == 6
    by_hand, mean_of_means = loss_by_hand(make_model(), tiny_tokenizer, validation)
    assert result["eval_loss"] == pytest.approx(by_hand, rel=1e-6)
    assert abs(result["eval_loss"] - mean_of_means) > 1e-3


def test_the_head_runs_on_label_positions_only(files, start, monkeypatch):
    trainer = trainer_of(config_of(files, start.folder / "out"), monkeypatch)
    seen = []
    trainer.model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))
    for pack in trainer.train_dataset[:3]:
        inputs = trainer.data_collator([pack])
        labels = (inputs["labels"][:, 1:] != -100).sum().item()
        loss, _ = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
        assert seen.pop() == labels < len(pack)
        ids = {key: inputs[key] for key in ("input_ids", "position_ids")}
        logits = trainer.model(**ids, use_cache=False).logits
        whole = torch.nn.functional.cross_entropy(logits[0, :-1], inputs["labels"][0, 1:])
        torch.testing.assert_close(loss, whole)


def test_a_batch_without_labels_adds_nothing(files, start, monkeypatch):
    trainer = trainer_of(config_of(files, start.folder / "out"), monkeypatch)
    inputs = trainer.data_collator(trainer.train_dataset[:1])
    inputs["labels"].fill_(-100)
    loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=5)
    loss.backward()
    assert loss.item() == 0


def test_attention_is_what_was_asked_for(files, start, capsys):
    for name, used in ((None, "sdpa"), ("eager", "eager")):
        config = config_of(files, start.folder / "out", attn_implementation=name)
        with pytest.MonkeyPatch.context() as patch:
            assert trainer_of(config, patch).model.config._attn_implementation == used
    assert "cannot be loaded" in fails(arguments(files, start.folder / "x", attn_implementation="flesh"), capsys)


def test_label_smoothing_is_for_training_only(start):
    plain, smooth = start("a", max_steps=2), start("b", max_steps=2, label_smoothing_factor=0.2, learning_rate=0)
    still = start("c", max_steps=2, learning_rate=0)
    assert smooth["train_loss"] != plain["train_loss"]
    assert smooth["eval_loss"] == still["eval_loss"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activation_checkpointing_changes_nothing(start, dtype):
    start("a", dtype=dtype, max_steps=3)
    start("b", dtype=dtype, max_steps=3, activation_checkpointing=True)
    assert losses(start.folder / "a") == losses(start.folder / "b")


# ---- resume ---------------------------------------------------------------------------------------------------------

METHODS = {
    "esft fp32": {},
    "esft bf16, all modules": {"base_model_path": "m16", "expert_config": "all.json"},
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "random": {"method": "random"},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_broken_off_goes_on_bit_for_bit(files, start, monkeypatch, name):
    changes = {key: files / value if key != "method" else value for key, value in METHODS[name].items()}
    changes |= {"save_opt_states": True, "max_steps": 7, "save_steps": 3, "logging_steps": 2}
    whole = start("whole", **changes)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        start(**changes)
    staging = start.folder / "out" / ".staging" / "checkpoint-6"  # killed while it wrote
    staging.mkdir(parents=True)
    (staging / "trainer_state.json").write_text("{")
    assert not list((start.folder / "out").glob("*.safetensors"))
    result = start(**changes)
    assert same(start.folder / "whole", start.folder / "out")
    for key in ("steps", "train_loss", "eval_loss"):
        assert result[key] == whole[key]
    assert not (start.folder / "out" / ".staging").exists()


def test_a_run_killed_after_its_last_step_takes_no_other(start, monkeypatch):
    keys = {"save_opt_states": True, "max_steps": 7, "logging_steps": 500}  # in the middle of an epoch
    whole = start("whole", **keys)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.ESFTTrainer, "save_state", kill)
        start(**keys)
    result = start(**keys)
    assert (result["steps"], result["train_loss"]) == (7, whole["train_loss"])
    assert same(start.folder / "whole", start.folder / "out")


@pytest.mark.parametrize("how", ["no state", "adapter cut", "states flipped", "no manifest", "manifest cut"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(start, whole, monkeypatch, how):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        start(save_opt_states=True)
    last = start.folder / "out" / "checkpoint-4"
    names = {"state": "trainer_state.json", "adapter": "adapter.safetensors", "states": "states/rank-0.safetensors"}
    path = last / next((file for name, file in names.items() if name in how.split()), "manifest.json")
    content = path.read_bytes()
    if how.startswith("no"):
        path.unlink()
    elif how.endswith("cut"):
        path.write_bytes(content[:-100])
    else:
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    assert find_damage(last)
    with pytest.warns(UserWarning, match="checkpoint-4 is damaged"):
        start(save_opt_states=True)
    assert same(whole, start.folder / "out")
    assert find_damage(last) is None


def test_a_finished_run_is_left_alone_and_another_is_refused(files, start, capsys):
    first = start()
    out = start.folder / "out"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert start() == first
    assert "nothing to do" in capsys.readouterr().out
    assert "differs in learning_rate, weight_decay)" in fails(
        arguments(files, out, learning_rate=5e-3, weight_decay=0.1), capsys
    )
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    (out / "left").touch()
    fails(arguments(files, out, overwrite=True, train_dataset="no.jsonl"), capsys)
    assert (out / "left").exists()  # nothing goes before all is checked
    again = start(overwrite=True, method="full", max_steps=2)
    assert again["steps"] == 2 and not (out / "left").exists()
    assert {path.name for path in out.glob("*.safetensors")} == {"model.safetensors"}  # nothing of the adapter


def test_without_optimizer_states_a_run_starts_over(start, whole, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        start()
    kept = start.folder / "out" / "checkpoint-4" / "adapter.safetensors"
    with pytest.raises(ValueError, match="broken off, whose checkpoint-4 is a loadable adapter"):
        start()
    assert kept.is_file()
    (start.folder / "out" / "checkpoint-5").mkdir()
    start(overwrite=True)
    assert same(whole, start.folder / "out")
    assert {path.name for path in (start.folder / "out").glob("checkpoint-*")} == {f"checkpoint-{i}" for i in (2, 4, 6)}


def test_a_run_broken_off_before_its_first_checkpoint_starts_over(start, whole, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 1, kill)
        start()
    with pytest.warns(UserWarning, match="starts over"):
        start()
    assert same(whole, start.folder / "out")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits(start, whole, monkeypatch, capsys, number):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        at_step(patch, 3, lambda _: os.kill(os.getpid(), number))
        start(save_opt_states=True, save_steps=4)
    assert stop.value.code == 128 + number and f"{number.name} after step 3" in capsys.readouterr().out
    assert signal.getsignal(number) == before
    assert [path.name for path in (start.folder / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    start(save_opt_states=True, save_steps=4)
    assert same(whole, start.folder / "out")


def test_ctrl_c_twice_stops_at_once(start, monkeypatch):
    def twice(_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_step(patch, 3, twice)
        start(save_opt_states=True, save_steps=4)
    assert not list((start.folder / "out").glob("checkpoint-*"))


def test_a_run_that_moved_is_still_that_run(files, start, whole, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        start(save_opt_states=True)
    (start.folder / "out").rename(start.folder / "moved")
    same_model = f"{files}/m32/../m32"
    start("moved", save_opt_states=True, logging_steps=3, base_model_path=same_model)
    left, right = weights(whole), weights(start.folder / "moved")
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(
    "changes",
    [
        {"adam_beta1": 2.0},
        {"lr_scheduler_kwargs": {"bogus": 1}},
        {"lr_scheduler_type": "cosine_with_min_lr"},
        {"save_steps": 3, "load_best_model_at_end": True},
        {"frozen_dtype": "fp9"},
        {"method": "full", "frozen_dtype": "fp8"},
        {"ignore_data_skip": True},
        {"train_sampling_strategy": "group_by_length"},
    ],
)
def test_what_is_refused_late_removes_nothing(files, start, whole, capsys, changes):
    shutil.copytree(whole, start.folder / "out")
    before = {path: path.stat().st_mtime_ns for path in (start.folder / "out").rglob("*")}
    assert len(fails(arguments(files, start.folder / "out", overwrite=True, **changes), capsys)) > 20
    assert before == {path: path.stat().st_mtime_ns for path in (start.folder / "out").rglob("*")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_runs_on_stored_experts_resume_and_bring_the_best_back(start, monkeypatch, dtype):
    keys = {"frozen_dtype": "int8", "save_opt_states": True, "load_best_model_at_end": True, "verify_frozen": True}
    keys["dtype"] = dtype
    whole = start("whole", **keys)
    assert whole["frozen_verified"] and whole["best_step"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        start(**keys)
    start(**keys)
    assert same(start.folder / "whole", start.folder / "out")


def test_only_esft_trains_a_checkpoint_in_fp8(files, start, capsys):
    folder = start.folder / "fp8"
    shutil.copytree(files / "m32", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    write_json(folder / "config.json", config)
    message = fails(arguments(files, start.folder / "out", method="full", base_model_path=folder), capsys)
    assert "is stored in fp8, which method full cannot train" in message


def test_saved_files_can_be_read_by_others(start, monkeypatch):
    monkeypatch.setattr("deepseek.files.UMASK", 0o022)
    start(max_steps=2, save_opt_states=True, save_steps=2)
    start("full", method="full", max_steps=1)
    for path in [*start.folder.rglob("*.safetensors"), *start.folder.rglob("*.json")]:
        assert path.stat().st_mode & 0o777 == 0o644, path


def test_a_key_may_have_dashes(files, start):
    out = start.folder / "out"
    argv = [f"--{a}" if "=" in a and not a.startswith("--") else a for a in arguments(files, out, max_steps=2)]
    assert any(a.startswith("--max_steps=") for a in argv)
    assert train.main(argv)["steps"] == 2


def test_a_seed_is_a_run(start):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        start(name, seed=seed, max_steps=2)
    a, b, c = (start.folder / name for name in "abc")
    assert same(a, b)
    assert losses(a) != losses(c)


# ---- what is trained ------------------------------------------------------------------------------------------------


def test_bf16_follows_fp32_through_masters(files, start, whole):
    start("b", base_model_path=files / "m16")
    a, b = losses(whole), losses(start.folder / "b")
    assert all(abs(a[key] - b[key]) < 0.03 * abs(a[key]) for key in a if key[0] != "grad_norm")
    base = make_model(dtype=torch.bfloat16)
    start("c", learning_rate=1e-6, base_model_path=files / "m16", save_opt_states=True)
    states = load_file(start.folder / "c" / "checkpoint-6" / "states" / "rank-0.safetensors")
    master = states["model.layers.1.mlp.experts.5.down_proj.master"]
    before = base.model.layers[1].mlp.experts.down_proj[5].float()
    assert (master != before).float().mean() > 0.9  # which bf16 weights could not follow
    assert (master.bfloat16() != before.bfloat16()).float().mean() < 0.1


@pytest.mark.parametrize("method", ["esft", "lora"])
def test_frozen_tensors_are_verified(files, start, monkeypatch, capsys, method):
    assert start("a", method=method, max_steps=2, verify_frozen=True)["frozen_verified"]
    assert "kept their bits" in capsys.readouterr().out
    assert not start("b", method=method, max_steps=1)["frozen_verified"]

    def tamper(trainer):
        param = next(p for name, p in trainer.model.named_parameters() if name.endswith("layers.2.mlp.gate.weight"))
        param.data[0, 0] += 1

    at_step(monkeypatch, 3, tamper)
    message = fails(arguments(files, start.folder / "c", method=method, verify_frozen=True), capsys)
    assert "layers.2.mlp.gate.weight" in message and "1 of" in message
    assert not list((start.folder / "c").glob("*.safetensors"))


def test_frozen_rows_of_trained_experts_are_verified(files, start, monkeypatch):
    trainer = trainer_of(config_of(files, start.folder / "out"), monkeypatch)
    before = train.frozen_hashes(trainer.model)
    experts = trainer.model.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.trained.down_proj += 1
    experts.trained.write_back()
    assert train.frozen_hashes(trainer.model) == before
    experts.down_proj.data[experts.trained.row_of_e[4]] += 1
    after = train.frozen_hashes(trainer.model)
    assert {key for key in before if before[key] != after[key]} == {"model.layers.1.mlp.experts.down_proj"}


def test_random_takes_as_many_other_experts(files, start):
    start(method="random", max_steps=1)
    chosen = esft.ExpertConfig.load(start.folder / "out").experts
    assert {layer: len(ids) for layer, ids in chosen.items()} == {1: 2, 2: 3}
    assert any(set(ids) != set(EXPERTS["experts"][str(layer)]) for layer, ids in chosen.items())


def test_lora_adapts_all_but_head_and_routers_and_loads_in_peft(files, start, monkeypatch):
    peft = pytest.importorskip("peft")
    trainer = trainer_of(config_of(files, start.folder / "a", method="lora"), monkeypatch)
    trained = [name for name, param in trainer.model.named_parameters() if param.requires_grad]
    for part in ("self_attn.q_proj", "layers.0.mlp.gate_proj", "shared_experts.down_proj", "mlp.experts."):
        assert any(part in name for name in trained), part
    assert not [name for name in trained if ".gate." in name or "lm_head" in name or "lora" not in name]
    adapted = [module for module in trainer.model.modules() if hasattr(module, "lora_A")]
    assert {scaling for module in adapted for scaling in module.scaling.values()} == {2.0}

    result = start("b", method="lora", learning_rate=1e-2)
    model = AutoModelForCausalLM.from_pretrained(files / "m32")
    note = json.loads((start.folder / "b" / "base.json").read_text())
    assert note == {"base": esft.base_note(model, esft.router_fingerprint(model))} and note["base"]["router"]
    ids = torch.arange(20)[None]
    base = model(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(model, start.folder / "b")
    assert (model(ids).logits - base).abs().max() > 1e-2
    state = {key: tensor for key, tensor in model.state_dict().items() if "lora" in key}
    assert len(state) == len(trained) == len(weights(start.folder / "b"))
    assert sum(tensor.numel() for tensor in state.values()) == result["trained_parameters"]
    experts = [name for name in state if "layers.1.mlp.experts" in name and "lora_B" in name]
    assert experts and all(state[name].abs().max() > 0 for name in experts)


@pytest.mark.parametrize("method", KNOWN_METHODS)
def test_the_best_model_is_what_stays(start, monkeypatch, method):
    evaluate = train.ESFTTrainer.evaluate

    def ever_worse(self, *args, **kwargs):
        metrics = evaluate(self, *args, **kwargs)
        return {"eval_loss": metrics["eval_loss"] + self.state.global_step}

    monkeypatch.setattr(train.ESFTTrainer, "evaluate", ever_worse)
    result = start(method=method, load_best_model_at_end=True, save_total_limit=1, max_steps=4)
    rows = json.loads((start.folder / "out" / "trainer_state.json").read_text())["log_history"]
    second, last, restored = (row["eval_loss"] for row in rows if "eval_loss" in row)
    assert second == restored == result["eval_loss"] != last
    assert result["best_step"] == 2
    left, right = weights(start.folder / "out"), weights(start.folder / "out" / "checkpoint-2")
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# ---- a step that goes wrong, and what a user sees --------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(files, start, monkeypatch, capsys, tiny_tokenizer):
    keys = {"save_opt_states": True, "save_steps": 1, "batch_size": 1, "accumulation_steps": 3}
    packs, _ = train.load_data(config_of(files, start.folder / "out", **keys), tiny_tokenizer)
    original, seen = train.ESFTTrainer._loss_sum, []

    def broken(self, model, inputs, *args):
        loss, outputs = original(self, model, inputs, *args)
        if self.state.global_step == 2 and model.training and not seen:
            seen.extend(inputs["rows"])
            loss = loss * float("nan")
        return loss, outputs

    monkeypatch.setattr(train.ESFTTrainer, "_loss_sum", broken)
    message = fails(arguments(files, start.folder / "out", **keys), capsys)
    assert "step 3" in message and "nan" in message
    assert f"on rows {', '.join(map(str, sorted(seen)))} of" in message
    assert any(sorted(seen) == sorted(pack.samples) for pack in packs)
    out = start.folder / "out"
    assert find_damage(out / "checkpoint-2") is None
    assert {path.name for path in out.iterdir()} == {"run.json", "checkpoint-1", "checkpoint-2"}


def test_output_is_pleasant(files, start, capsys, recwarn):
    for method in ("esft", "lora", "full"):
        start(method, method=method, disable_tqdm=False, save_opt_states=True)
        shown = capsys.readouterr()
        assert "trained parameters" in shown.out and "samples" in shown.out
        assert re.search(r"6/6 .*loss=.*tokens/s=.*validation=", shown.err)
        assert "Writing" not in shown.err and "arn" not in shown.err.replace("learn", "")
    assert not [str(w.message) for w in recwarn]


def test_tensorboard(start):
    pytest.importorskip("tensorboard")
    start(report_to="tensorboard", max_steps=2)
    assert list((start.folder / "out").rglob("events.out.tfevents.*"))


@pytest.mark.slow
def test_the_command_exits_with_2(files, tmp_path):
    command = [sys.executable, ROOT / "train.py", *arguments(files, tmp_path / "out", learning_rat=1)]
    ended = subprocess.run(command, capture_output=True, text=True)
    *logged, said = ended.stderr.splitlines()
    assert ended.returncode == 2 and said.startswith("error: command line: unknown key 'learning_rat'")
    assert all("kernels-community" in line for line in logged)  # bitsandbytes', where it is installed


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
