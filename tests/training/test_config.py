"""The settings of a run: files, command lines, short names, and what is wrong with them."""

import dataclasses
import enum
import os
import re

import pytest
import yaml
from transformers import TrainingArguments

from tests.helpers import ROOT
from training import run_config
from training.config import ALIASES, NO_EFFECT, RunConfig, read_config, training_arguments
from training.keys import SECRETS

PATHS = ["base_model_path=m", "train_dataset=d", "output_dir=o"]
FULL = [*PATHS, "method=full"]


def test_short_names_stand_for_their_keys():
    short = {"batch_size": 3, "steps": 7, "lr": 0.1, "lr_scheduler": "constant", "accumulation_steps": 2, "epochs": 1}
    long = read_config([*FULL, *(f"{ALIASES[key]}={value}" for key, value in short.items())])
    assert read_config([*FULL, *(f"{key}={value}" for key, value in short.items())]) == long
    assert long.training["max_steps"] == 7 and long.training["per_device_eval_batch_size"] == 3


@pytest.mark.parametrize(
    "words",
    [
        ["save_opt_states=true", "max_steps=5"],
        ["--save_opt_states=true", "--max_steps=5"],
        ["--save_opt_states", "--max_steps", "5"],
        ["--save-opt-states", "max_steps=5"],
        ["--steps", "5", "--save_opt_states"],
    ],
)
def test_a_setting_can_be_written_in_several_ways(words):
    config = read_config(["--model", "m", "--data=d", "--output_dir", "o", *words])
    assert (config.base_model_path, config.train_dataset, config.output_dir) == ("m", "d", "o")
    assert config.save_opt_states is True and config.training["max_steps"] == 5


def test_the_last_value_of_a_key_counts():
    config = read_config(["model=m", "data=d", "--output_dir=a", "output_dir=b", "lr=1.0", "learning_rate=2.0"])
    assert (config.output_dir, config.training["learning_rate"]) == ("b", 2.0)


def test_every_key_of_training_arguments_is_accepted():
    for f in dataclasses.fields(TrainingArguments):
        if f.init and f.default not in (dataclasses.MISSING, None, "") and f.name != "output_dir":
            value = f.default.value if isinstance(f.default, enum.Enum) else f.default
            read_config([*FULL, f"{f.name}={value}"])
    assert read_config([*FULL, "use_cpu=true"]).device == "cpu"
    assert read_config([*FULL, "save_only_model=false"]).save_opt_states
    assert read_config([*FULL, "save_steps=5"]).training["save_strategy"] == "steps"
    assert read_config([*FULL, 'lr_scheduler_kwargs={"a": 1}']).training["lr_scheduler_kwargs"] == {"a": 1}


@pytest.mark.parametrize(
    "words, text",
    [
        ("learning_rat=1", "cannot read the command line: unknown key 'learning_rat' .did you mean 'learning_rate'"),
        ("training=1", "unknown key 'training'"),
        ("oops", "'oops': it is not a setting. Write key=value"),
        ("method=lorra", "method: invalid choice: 'lorra'"),
        ("frozen_dtype=fp9", "frozen_dtype: invalid choice: 'fp9'"),
        ("seq_length=0", "seq_length=0 is not above 0"),
        ("batch_size=0", "per_device_train_batch_size=0"),
        ("gradient_accumulation_steps=-1", "gradient_accumulation_steps=-1"),
        ("max_steps=0", "max_steps=0"),
        ("num_train_epochs=0", "num_train_epochs=0"),
        ("label_smoothing_factor=2", "label_smoothing_factor=2"),
        ("validation_fraction=1.5", "validation_fraction=1.5 is not between 0 and 1"),
        ("ep_size=0", "ep_size=0 is neither"),
        ("ep_size=few", "ep_size=few is neither"),
        ("seq_length=true", "seq_length needs a value"),
        ("n_train_samples=many", "n_train_samples: invalid int value: 'many'"),
        ("lr=fast", "learning_rate: invalid float value: 'fast'"),
        ("steps=1.5", "max_steps: invalid int value: '1.5'"),
        ("overwrite=maybe", "overwrite: Truthy value expected: got maybe"),
        ("output_dir=null", "required: --output_dir"),
        ("model=null base_model_path=null output_dir=null", r"required: --model \(base_model_path\), --output_dir$"),
        ("--batch_size", "per_device_train_batch_size needs a value$"),
        ("method=random", "method random needs --expert_config"),
        ("bf16=true", "dtype=bfloat16"),
        ("verify_frozen=true", "method full freezes nothing"),
        ("ep_size=2", "ep_size is for methods esft, dpo, random and lora with lora_experts=selected, not full"),
        ("frozen_dtype=fp8", "frozen_dtype is for methods esft, dpo, random and lora"),
        ("global_batch_size=4 accumulation_steps=2", "Give one of them"),
        (
            "ignore_data_skip=true",
            "ignore_data_skip=True does not work here: a run goes on with the batch after the checkpoint",
        ),
        ("train_sampling_strategy=group_by_length", "does not work here: the seed gives the order"),
        ("fsdp=true", "does not work here: the experts are shared out by ep_size"),
        *((f"warmup_ratio={x}", f"warmup_ratio={x} is not a share below 1. Give warmup_steps") for x in (3, "abc")),
        ("load_best_model_at_end=true", "load_best_model_at_end needs evaluations"),
        ("save_strategy=best", "save_strategy=best needs evaluations"),
        ("save_strategy=best eval_steps=1 eval_delay=10 max_steps=9", "eval_delay=10.0 leaves none"),
        ("dataloader_persistent_workers=true", "needs dataloader_num_workers"),
        ("dataloader_multiprocessing_context=spawn", "needs dataloader_num_workers"),
        ('activation_checkpointing_kwargs={"offlod":1}', "has no 'offlod' .did you mean 'offload'"),
        (
            "activation_checkpointing_kwargs={offload:true",
            "activation_checkpointing_kwargs={offload:true: it is not a dict",
        ),
    ],
)
def test_a_bad_key_or_value_is_named(words, text):
    own = {word.partition("=")[0] for word in words.split()}
    with pytest.raises(ValueError, match=text):
        read_config([*(word for word in FULL if word.partition("=")[0] not in own), *words.split()])


def test_a_file_is_read_and_the_command_line_wins(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 1e-5\nsteps: 5\nmax_grad_norm: 2e-1\neval_strategy: no\nfrozen_dtype: fp8\n")
    config = read_config([*PATHS, f"--train_config={path}", "--max_steps=9", "frozen_dtype=null"])
    assert (config.training["learning_rate"], config.training["max_steps"]) == (1e-5, 9)
    assert config.training["eval_strategy"] == "no"  # which YAML reads as false
    assert config.frozen_dtype is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seq_length = 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("- a\n", "key: value` lines"),
        ("a: [", "c.yaml: it does not hold `key: value` lines"),
        ("sed: 1", "c.yaml: unknown key 'sed' .did you mean 'seed'"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config([*FULL, f"--train_config={path}"])


def test_the_names_that_recipes_use_stand_for_todays_keys(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "warmup_ratio: 0.03\nevaluation_strategy: steps\ngradient_checkpointing_kwargs: {use_reentrant: true}"
    )
    training = read_config([*FULL, f"--train_config={path}"]).training
    assert (training["warmup_steps"], training["eval_strategy"]) == (0.03, "steps")
    assert training["activation_checkpointing_kwargs"] == {"use_reentrant": True}
    args = training_arguments(read_config([*FULL, "warmup_ratio=0.03", "device=cpu"]))
    assert args.get_warmup_steps(1000) == 30
    path.write_text("warmup_ratio: 0.03\nwarmup_steps: 0")
    with pytest.raises(ValueError, match="warmup_ratio and warmup_steps are the same key"):
        read_config([*FULL, f"--train_config={path}"])


def test_a_missing_file_is_named(tmp_path):
    (tmp_path / "now.yaml").touch()
    with pytest.raises(FileNotFoundError, match=r"^cannot read .*no\.yaml: no such file .did you mean 'now.yaml'"):
        read_config([*FULL, f"--train_config={tmp_path / 'no.yaml'}"])


@pytest.mark.parametrize(
    "words, length",
    [
        (["epochs=2"], (-1, 2)),
        (["num_train_epochs=2"], (-1, 2)),
        (["epochs=2", "steps=7"], (7, 2)),
        (["epochs=null"], (5, 3)),
        ([], (5, 3)),
    ],
)
def test_epochs_of_the_command_line_win_over_steps_of_the_file(words, length, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("steps: 5")
    training = read_config([*FULL, f"--train_config={path}", *words]).training
    assert (training.get("max_steps", -1), training.get("num_train_epochs", 3)) == length
    assert ("max_steps of" in capsys.readouterr().err) == (length == (-1, 2))


@pytest.mark.parametrize("name", ["base", "tiny"])
def test_shipped_configs_parse(name, tmp_path):
    path = ROOT / "configs" / f"{name}.yaml"
    words = [*PATHS[:2], f"output_dir={tmp_path}", "device=cpu", f"train_config={path}"]
    assert training_arguments(read_config(words)).learning_rate > 0


def test_the_base_config_explains_every_key_of_ours():
    path = ROOT / "configs" / "base.yaml"
    ours = {f.name for f in dataclasses.fields(RunConfig)} - {"training"}
    paths = {"base_model_path", "train_dataset", "output_dir", "expert_config", "ep_size"}
    assert ours - yaml.safe_load(path.read_text()).keys() == paths
    config = read_config([*PATHS, f"train_config={path}", "device=cpu"], {"ep_size": "auto"})  # as train_ep.py does
    args = training_arguments(config)
    assert config.ep_size == "auto" and args.per_device_train_batch_size * args.gradient_accumulation_steps == 32


@pytest.mark.parametrize("words", [["lora_rank=4"], ["expert_config=e.json", "method=lora"]])
def test_a_setting_without_effect_is_told(capsys, words):
    read_config([*PATHS, *words])
    assert f"note: {words[0].partition('=')[0]} has no effect" in capsys.readouterr().err
    read_config([*PATHS, "method=lora", "lora_rank=4"])
    assert not capsys.readouterr().err


RELEASED = """
seed: 5934875
seq_length: 4096
per_device_batch_size: 1
n_device: 8
optim: adamw_torch_fused
steps: 500
learning_rate: 0.00001
weight_decay: 0.1
warmup_steps: 0
logging_steps: 10
adam_beta1: 0.9
adam_beta2: 0.95
random_concat_ratio: 0.2
eval_steps: 100
save_steps: 100
gradient_checkpointing: true
gradient_accumulation_steps: 16
max_grad_norm: 1.0
ep_size: 2
"""  # every key of the released configs/base.yaml


def test_the_released_config_is_read(tmp_path, capsys, monkeypatch):
    path = tmp_path / "base.yaml"
    path.write_text(RELEASED)
    words = [*PATHS, f"--train_config={path}"]
    config = read_config(words)
    lines = sorted(capsys.readouterr().err.splitlines())
    assert [line.split(" has no effect")[0] for line in lines] == [
        f"note: ep_size of {path}",
        "note: n_device",
        "note: random_concat_ratio",
    ]
    assert (config.activation_checkpointing, config.ep_size, config.seq_length) == ("true", "1", 4096)
    expected = {"max_steps": 500, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 16, "seed": 5934875}
    expected |= {"eval_strategy": "steps", "save_strategy": "steps", "optim": "adamw_torch_fused", "adam_beta2": 0.95}
    assert expected.items() <= config.training.items()
    assert not {"n_device", "random_concat_ratio"} & {**vars(config), **config.training}.keys()
    training_arguments(dataclasses.replace(config, device="cpu"))
    assert read_config([*words, "n_device=4", "random_concat_ratio=0"]) == config

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert read_config(words).ep_size == "2"
    monkeypatch.setenv("RANK", "1")
    capsys.readouterr()
    assert read_config([*words, "ep_size=3"]).ep_size == "3" and not capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert read_config([*words, "ep_size=3"]).ep_size == "3"  # who asks for it is told why not


@pytest.mark.parametrize("key, variable", SECRETS.items())
@pytest.mark.parametrize("place", ["command line", "file"])
def test_a_secret_goes_to_the_environment_alone(key, variable, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(variable, "old")  # restored after the test
    monkeypatch.setattr(run_config, "get_available_reporting_integrations", lambda: ["wandb"])
    path = tmp_path / "c.yaml"
    path.write_text(f"{key}: s3cret\n" if place == "file" else "")
    config = read_config([*PATHS, f"train_config={path}", *([f"--{key}=s3cret"] if place == "command line" else [])])
    assert os.environ[variable] == "s3cret" and "s3cret" not in str(config)
    err = capsys.readouterr().err
    assert "s3cret" not in err and len(err.splitlines()) == (key == "wandb_api_key")
    read_config([*PATHS, f"{key}=s3cret", "report_to=wandb"])
    assert not capsys.readouterr().err
    read_config([*PATHS, f"{key}=null"])
    assert os.environ[variable] == "s3cret" and not capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--help", "--help-all"])
def test_help_lists_every_key(capsys, flag):
    with pytest.raises(SystemExit) as stop:
        read_config([flag], {"ep_size": "auto"}, "What it does.")
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "What it does." in shown and "lr = learning_rate" in shown
    for cls in (RunConfig, TrainingArguments):
        for f in dataclasses.fields(cls):
            assert not f.init or re.search(rf"\b{f.name}\b", shown) or f.name == "training", f.name
    for key in (*NO_EFFECT, *SECRETS):
        assert re.search(rf"\b{key}\b", shown)
    assert "(default: auto)" in shown.partition("--ep_size")[2][:300]
    assert shown.index("--base_model_path") < shown.index("adam_beta1")
    assert ("The initial learning rate" in shown) == (flag == "--help-all")
    assert "--save-opt-states" not in shown and "--no_" not in shown
    assert flag == "--help-all" or len(shown.splitlines()) < 210


def test_a_list_of_data_sets_is_one_name(tmp_path):
    (tmp_path / "c.yaml").write_text("train_dataset: ['a:0.7', 'b:0.3']\nvalidation_dataset: [c, d]\n")
    config = read_config(["base_model_path=m", "output_dir=o", "method=full", f"train_config={tmp_path / 'c.yaml'}"])
    assert (config.train_dataset, config.validation_dataset) == ("a:0.7,b:0.3", "c,d")


def test_a_score_beside_a_config_is_for_runs_that_go_on_selecting():
    words = [*PATHS, "expert_config=experts.json", "score_function=gate"]
    for more in ["reselect_steps=2"], ["expand_experts={to: 0.5, by: 0.1, when: 2}"]:
        config = read_config([*words, *more])
        assert config.score_function == "gate"
    with pytest.raises(ValueError, match="score_function says how to select experts, and expert_config names them"):
        read_config(words)
    with pytest.raises(ValueError, match="strategy says how to select experts"):
        read_config([*words, "reselect_steps=2", "strategy=global"])
