"""The configuration of a run, from YAML and the command line."""

import argparse
import dataclasses
import os
import re
import types
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from deepseek.files import suggest, suggest_path
from deepseek.frozen import DTYPES as FROZEN_DTYPES

METHODS = ("esft", "random", "full", "lora")


ALIASES = {
    "batch_size": "per_device_train_batch_size",
    "per_device_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "accumulation_steps": "gradient_accumulation_steps",
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "gradient_checkpointing": "activation_checkpointing",
}


DEFAULTS = {
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "seed": 0,
    "use_cache": True,  # only what a saved model's config says: training itself never uses the cache
    "logging_nan_inf_filter": False,  # we stop at such a loss
}


NEEDED = {  # keys of transformers that would break the loss, the order of the data, or the checkpoints
    "average_tokens_across_devices": True,
    "save_on_each_node": False,
    "auto_find_batch_size": False,
    "dataloader_drop_last": False,
    "ignore_data_skip": False,
    "train_sampling_strategy": "random",
    "fsdp": None,
    "deepspeed": None,
    "ddp_backend": None,
}


COUNTS = (
    "seq_length",
    "lora_rank",
    "lora_alpha",
    "n_train_samples",
    "global_batch_size",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class RunConfig:
    """The keys of a run that are ours; `training` holds those of transformers' TrainingArguments."""

    base_model_path: str
    train_dataset: str
    output_dir: str
    method: str = "esft"
    expert_config: str | None = None
    template: str = "chat"
    seq_length: int = 4096
    overlong: str = "error"
    n_train_samples: int | None = None
    validation_fraction: float = 0.02
    dtype: str = "auto"
    device: str = "auto"
    lora_rank: int = 8
    lora_alpha: int = 16
    global_batch_size: int | None = None
    ep_size: int | str = 1
    placement: str = "score"
    expert_scores_dir: str | None = None
    shard_dense: bool = False
    frozen_dtype: str | None = None
    offload_frozen: bool = False
    activation_checkpointing: bool | str | None = "auto"
    attn_implementation: str | None = None
    save_opt_states: bool = False
    verify_frozen: bool = False
    overwrite: bool = False
    training: dict = field(default_factory=dict)

    def __post_init__(self):
        _check_kinds(RunConfig, vars(self))
        _check_kinds(TrainingArguments, self.training)
        for key, known in {
            "method": METHODS,
            "template": ("chat", "released"),
            "overlong": ("error", "truncate"),
            "dtype": ("auto", "float32", "bfloat16"),
            "device": ("auto", "cpu", "cuda"),
            "placement": ("score", "contiguous"),
            "frozen_dtype": (None, *FROZEN_DTYPES),
        }.items():
            value = getattr(self, key)
            if value not in known:
                known = [one for one in known if one]
                raise ValueError(f"{key}={value}: it is one of {', '.join(known)}{suggest(value, known)}")
        values = {**vars(self), **self.training}
        for key in COUNTS:
            if (value := values.get(key)) is not None and value < 1:
                raise ValueError(f"{key}={value}: expected a whole number above 0")
        if (steps := values.get("max_steps", -1)) < 1 and steps != -1:
            raise ValueError(f"max_steps={steps}: expected a whole number above 0, or -1 to go by num_train_epochs")
        if (epochs := values.get("num_train_epochs", 1)) <= 0:
            raise ValueError(f"num_train_epochs={epochs}: expected a number above 0")
        if not 0 <= (smoothing := values.get("label_smoothing_factor", 0)) <= 1:
            raise ValueError(f"label_smoothing_factor={smoothing}: expected a number from 0 to 1")
        if self.activation_checkpointing not in (True, False, None, "auto"):
            raise ValueError(f"activation_checkpointing={self.activation_checkpointing}: it is true, false or auto")
        if self.ep_size != "auto" and (isinstance(self.ep_size, str) or self.ep_size < 1):
            raise ValueError(f"ep_size={self.ep_size}: expected a whole number above 0, or auto")
        if self.global_batch_size is not None and "gradient_accumulation_steps" in self.training:
            raise ValueError("global_batch_size sets gradient_accumulation_steps: give one of them")
        if self.method not in ("esft", "random"):
            if self.ep_size not in (1, "auto") or self.shard_dense:
                raise ValueError(
                    f"method {self.method} trains what ep_size and shard_dense would split: leave them out"
                )
            if self.frozen_dtype or self.offload_frozen:
                raise ValueError(f"frozen_dtype and offload_frozen are for methods esft and random, not {self.method}")
        if self.method in ("esft", "random") and not self.expert_config:
            raise ValueError(
                f"method {self.method} needs --expert_config; scripts/expert/generate_expert_config.py makes one"
            )
        if self.verify_frozen and self.method == "full":
            raise ValueError("verify_frozen: method full freezes nothing that could be verified; leave it out")
        for key, needed in NEEDED.items():
            if self.training.get(key, needed) != needed:
                raise ValueError(f"{key}={self.training[key]}: this trainer needs {needed or 'none'}; leave it out")
        if self.training.get("fp16") or self.training.get("bf16"):
            raise ValueError("bf16 and fp16 (autocast) would round the routers: set dtype=bfloat16, with fp32 masters")

    @property
    def seed(self) -> int:
        return self.training.get("seed", DEFAULTS["seed"])


def _check_kinds(owner: type, values: dict[str, object]) -> None:
    """Refuse a value that is not of the plain type its dataclass field has (others are left to the field's owner)."""
    for f in dataclasses.fields(owner):
        kinds = set(f.type.__args__) if isinstance(f.type, types.UnionType) else {f.type}
        kind = type(values.get(f.name))
        fits = kind in kinds or (kind is int and float in kinds)
        if f.name in values and kinds <= {*KINDS, type(None)} and not fits:
            expected = " or ".join(text for known, text in KINDS.items() if known in kinds)
            raise ValueError(f"{f.name}={values[f.name]!r}: expected {expected}")


def read_config(path: str | Path | None, given: dict[str, object], defaults: dict | None = None) -> RunConfig:
    """Merge `defaults`, a YAML file and the keys given on the command line; the last named wins.

    Raises:
        ValueError, FileNotFoundError: no such file, no mapping in it, an unknown key (the nearest known is named), a
            key given twice under two names, or a value that does not fit.
    """
    values: dict[str, object] = {}
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--train_config {path}: no such file{suggest_path(path)}")
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"--train_config {path}: not valid YAML ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"--train_config {path}: expected `key: value` lines")
    ours = {f.name for f in dataclasses.fields(RunConfig)} - {"training"}
    theirs = {f.name for f in dataclasses.fields(TrainingArguments) if f.init} - ours
    merged: dict[str, object] = dict(defaults or {})
    for source, pairs in ((str(path), values), ("command line", given)):
        seen: dict[str, str] = {}
        for written, value in pairs.items():
            key = ALIASES.get(written, written)
            if key not in ours | theirs:
                known = ours | theirs | ALIASES.keys()
                raise ValueError(f"{source}: unknown key {written!r}{suggest(written, known)}")
            if key in seen:
                raise ValueError(f"{source}: {seen[key]!r} and {written!r} are two names of one key; give one")
            seen[key] = written
            # YAML 1.1 reads 1e-5 as text and no as false; a person means the number and the word
            merged[key] = "no" if value is False and key.endswith("_strategy") else _number(value)
    for key in ("base_model_path", "train_dataset", "output_dir"):
        if not merged.get(key):
            raise ValueError(f"--{key} is missing")
    if merged.pop("use_cpu", False):
        merged["device"] = "cpu"
    if "save_only_model" in merged:
        merged.setdefault("save_opt_states", not merged.pop("save_only_model"))
    training = dict(DEFAULTS)
    for what in ("save", "eval"):  # transformers would take no notice of the steps without the strategy
        if merged.get(f"{what}_steps") or (what == "save" and merged.get("save_opt_states")):
            training[f"{what}_strategy"] = "steps"
    if "per_device_train_batch_size" in merged:
        training["per_device_eval_batch_size"] = merged["per_device_train_batch_size"]
    training |= {key: value for key, value in merged.items() if key in theirs}
    return RunConfig(**{key: value for key, value in merged.items() if key in ours}, training=training)


def _number(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value):
        return float(value)
    return value


def _batch_split(config: RunConfig) -> dict[str, int]:
    """What `global_batch_size` (packs per optimizer step) makes of the batch of a process and of the accumulation."""
    if config.global_batch_size is None:
        return {}
    processes = int(os.environ.get("WORLD_SIZE", 1))
    share = config.global_batch_size / processes
    size = min(config.training.get("per_device_train_batch_size", 8), max(int(share), 1))
    if share % size:
        raise ValueError(
            f"global_batch_size={config.global_batch_size} cannot be shared out evenly to {processes} processes in "
            f"batches of {size}: change it, per_device_train_batch_size or the number of processes"
        )
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": int(share) // size}


def training_arguments(config: RunConfig) -> TrainingArguments:
    """TrainingArguments of a run; under torchrun this joins the process group.

    Raises:
        ValueError: a value that transformers refuses, no GPU for device=cuda, or a tracker that is not installed.
    """
    cuda = torch.cuda.is_available()
    saved, evaluated = (config.training.get(key) for key in ("save_steps", "eval_steps"))
    whole = type(saved) is int and type(evaluated) is int
    if config.training.get("load_best_model_at_end") and whole and saved % evaluated:
        raise ValueError(
            f"save_steps={saved} is no multiple of eval_steps={evaluated}, so that the best model may not be among "
            "those saved: change one of them, or give load_best_model_at_end=false"
        )
    if config.device == "cuda" and not cuda:
        raise ValueError("device=cuda: torch sees no GPU here; give device=cpu or mend the installation")
    try:
        args = TrainingArguments(
            **{**config.training, **_batch_split(config)},
            output_dir=config.output_dir,
            use_cpu=config.device == "cpu" or not cuda,
            save_only_model=not config.save_opt_states,
        )
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(f"the training arguments do not fit: {error}") from error
    for name in args.report_to:
        if name in get_available_reporting_integrations():  # imports them all: not without need
            continue
        raise ValueError(
            f"report_to={name} is not installed here: give report_to=none, or install it with -c constraints.txt"
        )
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs are torchrun's business; never nn.DataParallel
    return args


def _without_dashes(word: str, parser: argparse.ArgumentParser) -> str:
    """`--max_steps=5`, as transformers' own scripts have it, is `max_steps=5`."""
    key = word.partition("=")[0].removeprefix("--")
    known = {f.name for cls in (RunConfig, TrainingArguments) for f in dataclasses.fields(cls)} | ALIASES.keys()
    is_key = word.startswith("--") and "=" in word and key in known and f"--{key}" not in parser._option_string_actions
    return word.removeprefix("--") if is_key else word
