"""Every key of TrainingArguments works, is refused at the start, or is reported to have no effect, as the page says."""

import dataclasses
import json
import re

import pytest
import torch
from transformers import TrainingArguments

import train
from scripts.push_adapter import SECRET
from tests.helpers import ROOT, arguments, config_of, fails, losses, tensors_of, trainer_of
from training.config import RunConfig, read_config
from training.keys import ALIASES, NO_EFFECT, REFUSED, SECRETS

PATHS = ["model=m", "data=d", "output_dir=o"]
PAGE = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The rows of the table below a heading of the page."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ") and "`" in line]


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


WORK = [key for row in rows("Keys that work") for key in names(row[1])]
# One run each. A value is not the default, so that it can be seen to arrive.
RUNS = [
    {
        **{"optim": "adamw_torch", "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "weight_decay": 0.1},
        **{"max_grad_norm": 0.5, "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0, "seed": 3, "data_seed": 4},
        **{"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}, "warmup_steps": 0.4},
        **{"learning_rate": 3e-3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
        **{"per_device_eval_batch_size": 3, "max_steps": 4, "torch_empty_cache_steps": 2, "tf32": False},
        **{"ddp_timeout": 600, "run_name": "mine", "report_to": ["tensorboard"], "skip_memory_metrics": False},
        **{"include_num_input_tokens_seen": True, "dataloader_pin_memory": False, "use_cpu": True},
    },
    {
        **{"logging_strategy": "steps", "logging_steps": 4, "logging_first_step": True, "log_level": "error"},
        **{"log_level_replica": "error", "log_on_each_node": False, "eval_strategy": "steps", "eval_steps": 0.5},
        **{"eval_on_start": True, "eval_delay": 1.0, "save_strategy": "steps", "save_steps": 0.5},
        **{
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "greater_is_better": True,
            "save_only_model": False,
            "debug": "underflow_overflow",
        },
        **{"num_train_epochs": 0.5, "max_steps": None, "disable_tqdm": False},
        **{"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
    },
    {
        **{"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 3},
        **{"dataloader_multiprocessing_context": "fork", "full_determinism": True, "save_strategy": "best"},
        **{
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
            "save_steps": None,
        },
        **{"optim": "adagrad", "optim_args": "lr_decay=0.1"},
    },
]
ELSEWHERE = {"output_dir", "resume_from_checkpoint", "hub_token"}  # tested in test_longer_runs.py, test_config.py
TRACKIO = {"project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"}  # a logger we do not install
CHANGES = {  # of the weights: what trains otherwise than the default
    **{"learning_rate": 5e-3, "lr_scheduler_type": "constant", "warmup_steps": 2, "optim": "sgd", "weight_decay": 0.5},
    **{"adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 1e-3, "max_grad_norm": 1e-3, "seed": 3, "data_seed": 4},
    **{"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5, "gradient_accumulation_steps": 2},
    **{"per_device_train_batch_size": 1, "max_steps": 3, "num_train_epochs": 0.5},
}


def text(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict) else ",".join(value) if isinstance(value, list) else str(value)


def test_the_page_lists_every_key_of_transformers_once():
    refused, idle = [names(row[0])[0] for row in rows("Keys that are refused")], rows("Keys without effect")
    listed = [*WORK, *refused, *(key for row in idle for key in names(row[0]))]
    fields = {f.name for f in dataclasses.fields(TrainingArguments)}
    assert len(listed) == len(set(listed)) and fields <= set(listed)
    assert set(listed) - fields == NO_EFFECT.keys() - fields  # of earlier versions, and of the released code
    assert {key: row[2] for key, row in zip(refused, rows("Keys that are refused"))} == {
        key: why for key, (_, why) in REFUSED.items()
    }
    assert {key: row[1] for row in idle for key in names(row[0])} == NO_EFFECT
    assert "transformers 5.23" in PAGE


def test_every_key_that_looks_like_a_secret_is_kept_out_of_files():
    every = {f.name for cls in (TrainingArguments, RunConfig) for f in dataclasses.fields(cls)} | {*ALIASES, *NO_EFFECT}
    found = {key for key in every if SECRET.search(key)}
    assert found and found <= SECRETS.keys()


def test_every_key_that_works_is_in_a_run():
    assert set(WORK) == {key for run in RUNS for key in run} | ELSEWHERE | TRACKIO


@pytest.mark.parametrize("number", range(len(RUNS)))
def test_keys_that_work(files, tmp_path, monkeypatch, capsys, number):
    keys = {key: None if value is None else text(value) for key, value in RUNS[number].items()}
    if "per_device_train_batch_size" in keys:
        keys["batch_size"] = None  # its short name
    args = trainer_of(config_of(files, tmp_path / "probe", **keys), monkeypatch).args
    shown = {**args.to_dict(), "gradient_checkpointing": args.activation_checkpointing}
    shown["include_num_input_tokens_seen"] = args.include_num_input_tokens_seen == "all"
    for key, value in RUNS[number].items():
        if value is not None and key != "debug":
            assert shown[key] == value, key
    train.main(arguments(files, tmp_path / "out", **keys))
    assert "has no effect" not in capsys.readouterr().err
    assert losses(tmp_path / "out") and tensors_of(tmp_path / "out")
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("key", CHANGES)
def test_a_key_of_the_training_changes_the_weights(files, start, key):
    keys = {"max_steps": None if key == "num_train_epochs" else 4, "eval_steps": None, "save_steps": None}
    keys |= {"batch_size": None, "per_device_train_batch_size": 2}
    start("plain", **keys)
    start(**{**keys, key: CHANGES[key]})
    left, right = tensors_of(start.folder / "plain"), tensors_of(start.folder / "out")
    assert any(not torch.equal(left[name], right[name]) for name in left)


def test_noise_on_embeddings_is_the_same_after_an_interruption(killed_and_repeated):
    keys = {"neftune_noise_alpha": 5, "save_opt_states": True}
    killed_and_repeated(**keys)


OTHERS = {  # values of keys that are not plain booleans or texts
    **dict.fromkeys(("fsdp_config", "liger_kernel_config", "accelerator_config"), '{"a":1}'),
    **{"train_sampling_strategy": "sequential", "ddp_backend": "mpi"},
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_does_not_work_is_refused_at_the_start(files, tmp_path, capsys, key):
    allowed, why = REFUSED[key]
    other = OTHERS.get(key, "false" if True in allowed else "true")
    for value in allowed:
        read_config([*PATHS, f"{key}={value}"])
    error = fails(arguments(files, tmp_path / "out", **{key: other}), capsys)
    assert key in error and not (tmp_path / "out").exists()
    assert why in error or key in ("parallelism_config", "liger_kernel_config")  # which take no text at all


@pytest.mark.parametrize("key", NO_EFFECT)
def test_a_key_without_effect_is_reported_and_left_out(capsys, key):
    kept = read_config([*PATHS, f"{key}=true"])
    assert f"note: {key} has no effect here: {NO_EFFECT[key]}" in capsys.readouterr().err
    assert kept == read_config(PATHS) and not capsys.readouterr().err
