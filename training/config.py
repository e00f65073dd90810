"""The settings of a run: keys in a YAML file and on the command line, read by transformers' HfArgumentParser.

Our own keys are the fields of RunConfig. Every key of transformers' TrainingArguments is accepted beside them, and so
are the short names in ALIASES. A key on the command line wins over the file, and `key=null` takes the file's away. Of a
key that is given twice on the command line, the last value counts. In the file it is refused.

The configs of the released ESFT code are read as they are. NO_EFFECT has its keys that mean nothing here. SECRETS go to
the environment, and no file of a run holds them.
"""

import argparse
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import yaml
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations

from deepseek.files import check_file, suggest, suggest_path, unique_keys
from deepseek.selection import OPTIONS, SETTINGS, STRATEGIES, check_rule
from training import keys
from training.checkpoints import by_row
from training.config_parser import make_parser, take_secret
from training.keys import ALIASES, CHECKPOINTING, DEFAULTS, LORA_SELECTED, NO_EFFECT, ON_EXPERTS, ONLY_FOR, REFUSED
from utils import note

POSITIVE = (
    *("seq_length", "lora_rank", "lora_alpha", "n_train_samples", "global_batch_size", "max_steps", "num_train_epochs"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "dpo_beta"),
)


def _key(default: object, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RunConfig:
    """Our keys of a run; `training` holds the keys that were given of TrainingArguments, and DEFAULTS."""

    _argument_group_name = "keys of this project"

    base_model_path: str = _key(MISSING, "required: the base model: a folder or a hub id; or --model")
    train_dataset: str = _key(MISSING, "required: a name in datasets/train, a file, or a hub id; or --data")
    output_dir: str = _key(MISSING, "required: a new folder, or the folder of the same run, to continue it")
    method: Literal["esft", "dpo", "random", "full", "lora"] = _key(
        "esft", "dpo: esft on preference data; random: as many experts as esft, drawn by seed"
    )
    expert_config: str | None = _key(None, "the experts to train; without it, esft and dpo score and select them first")
    score_function: Literal["token", "gate", "prob", "gradient", "reap"] = _key(
        "token", "the score that selects the experts, without expert_config"
    )
    strategy: str = _key("cumulative", "the rule that selects them: " + ", ".join(STRATEGIES))
    top_p: float | None = _key(None, "select up to this sum of scores; by default 0.2, or 0.1 for gate")
    budget: float | None = _key(None, "share of all routed experts to select, in place of top_p")
    upper_layers: int | None = _key(None, "strategy layers: select in so many uppermost layers; by default half")
    fraction: float | None = _key(None, "strategy fraction: share of each layer's experts")
    top_k: int | None = _key(None, "strategy topk: experts of each layer")
    contrast_scores_dir: str | None = _key(None, "scores on general data, to compare those of the task with")
    contrast: Literal["difference", "ratio"] = _key("difference", "how to compare them")
    dpo_beta: float = _key(0.1, "method dpo: how strongly the policy is held to the base")
    template: Literal["chat", "released"] = _key("chat", "the tokenizer's chat template, or the published ESFT one")
    template_kwargs: str | None = _key(None, 'variables of the chat template, as {"enable_thinking": false}')
    loss_on: Literal["all", "last", "each"] = _key("all", "answers to learn; each: every one in a document of its own")
    special_text: Literal["error", "plain", "token"] = _key("error", "what a special token's name in a message becomes")
    append_end: bool = _key(False, "end answers with the tokenizer's end token where the chat template writes no end")
    seq_length: int = _key(4096, "tokens in a pack of whole samples")
    overlong: Literal["error", "truncate"] = _key("error", "what to do with a sample longer than seq_length")
    n_train_samples: int | None = _key(None, "take only this many samples, drawn by seed")
    streaming: bool = _key(False, "read no more of train_dataset than n_train_samples, for sets larger than the disk")
    validation_dataset: str | None = _key(None, "a validation set of its own, in place of validation_fraction")
    validation_fraction: float = _key(0.02, "share of the samples that is kept for validation")
    dtype: Literal["auto", "float32", "bfloat16"] = _key("auto", "of the weights; auto: as stored")
    device: Literal["auto", "cpu", "cuda"] = _key("auto", "auto: a GPU, if there is one")
    lora_rank: int = _key(8, "method lora: the rank")
    lora_alpha: int = _key(16, "method lora: the scale is alpha / rank")
    lora_experts: Literal["all", "selected"] = _key("all", "method lora: on all layers, or on selected experts alone")
    lora_modules: str | None = _key(None, "lora_experts=selected: other layers, too, as self_attn,shared_experts")
    global_batch_size: int | None = _key(None, "packs in an optimizer step, over all processes and micro batches")
    ep_size: str = _key("1", "processes that share one copy of the experts, or auto: as few as fit on the GPUs")
    placement: Literal["score", "contiguous"] = _key("score", "which process holds which experts: even load, or by id")
    expert_scores_dir: str | None = _key(None, "the scores for placement; by default those beside expert_config")
    shard_dense: bool = _key(False, "share out the frozen weights that are not experts, too (FSDP2)")
    frozen_dtype: Literal["fp8", "int8", "nf4"] | None = _key(None, "quantize the frozen experts to save memory")
    offload_frozen: bool = _key(False, "keep the frozen experts in host memory")
    activation_checkpointing: Literal["auto", "true", "false"] = _key("auto", "auto: true on a GPU that needs it")
    attn_implementation: str | None = _key(None, "e.g. flash_attention_2; by default transformers chooses")
    save_opt_states: bool = _key(False, "keep optimizer states in checkpoints, to resume exactly")
    verify_frozen: bool = _key(False, "prove by hash that every frozen tensor kept its bits")
    overwrite: bool = _key(False, "remove an earlier run in output_dir and start afresh; other files are refused")
    training: dict = field(default_factory=dict, metadata={"help": argparse.SUPPRESS})

    def __post_init__(self):
        check_rule(self.strategy, **{name: getattr(self, name) for name in OPTIONS})
        if complaint := next(_complaints(self), None):
            raise ValueError(f"cannot start this run: {complaint}")

    @property
    def seed(self) -> int:
        return self.training.get("seed", DEFAULTS["seed"])

    @property
    def kind(self) -> str:
        """The method, where LoRA on selected experts is one of its own."""
        return LORA_SELECTED if (self.method, self.lora_experts) == ("lora", "selected") else self.method

    @property
    def timeout(self) -> timedelta:
        """How long a process waits for the others."""
        return timedelta(seconds=self.training.get("ddp_timeout", TrainingArguments.ddp_timeout))


def _complaints(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with a run's settings, beside the type of each."""
    values = {**vars(config), **config.training}
    for key, value in values.items():
        if isinstance(value, (int, float)) and not abs(value) < 2**32:
            yield f"{key}={value} is not a finite number below 2**32"
    if config.seed < 0:
        yield f"seed={config.seed} is below 0"
    for key in POSITIVE:
        value = values.get(key)
        if value is not None and value <= 0 and (key, value) != ("max_steps", -1):
            yield f"{key}={value} is not above 0"
    for key in ("label_smoothing_factor", "validation_fraction"):
        if not 0 <= values.get(key, 0) <= 1:
            yield f"{key}={values[key]} is not between 0 and 1"
    if config.device == "cuda" and not torch.cuda.is_available():
        yield "torch sees no GPU for device=cuda. Use device=cpu, or install a torch with CUDA"
    reports = values.get("report_to") or []
    for name in [reports] if isinstance(reports, str) else reports:
        if name not in ("none", "all", *get_available_reporting_integrations()):
            yield f"report_to={name} is not installed. Give report_to=none or install it"
    if values.get("eval_strategy", "no") != "no" and not (config.validation_fraction or config.validation_dataset):
        yield f"eval_strategy={values['eval_strategy']} needs a validation set. Raise validation_fraction"
    if config.streaming and not config.n_train_samples:
        yield "streaming needs to know how many samples to take. Give n_train_samples"
    if config.expert_scores_dir and not Path(config.expert_scores_dir).exists():
        path = config.expert_scores_dir
        yield f"expert_scores_dir={path} is not there{suggest_path(path)}"
    if config.contrast_scores_dir and not Path(config.contrast_scores_dir).exists():
        path = config.contrast_scores_dir
        yield f"contrast_scores_dir={path} is not there{suggest_path(path)}"
    if config.contrast != "difference" and not config.contrast_scores_dir:
        yield f"contrast={config.contrast} needs scores on general data. Give contrast_scores_dir"
    if config.ep_size != "auto" and not re.fullmatch("0*[1-9][0-9]*", config.ep_size):
        yield f"ep_size={config.ep_size} is neither a number above 0 nor auto"
    if config.global_batch_size and "gradient_accumulation_steps" in config.training:
        yield "global_batch_size sets gradient_accumulation_steps. Give one of them"
    batch = _batch_split(config)
    if batch and batch["gradient_accumulation_steps"] % 1:
        size = batch["per_device_train_batch_size"]
        yield f"global_batch_size={config.global_batch_size} cannot be shared out in batches of {size}. Change it"
    if config.kind not in ON_EXPERTS:
        changed = [key for key in ("shard_dense", "frozen_dtype", "offload_frozen") if values[key]]
        changed += ["ep_size"] * (config.ep_size not in ("1", "auto"))
        if changed:
            others = f"not {config.method}, and for {LORA_SELECTED}"
            yield f"{changed[0]} is for methods esft, dpo and random, {others}. Leave it out"
    if config.method == "dpo" and config.loss_on != "all":
        yield f"loss_on={config.loss_on} is not for method dpo: the loss is on what differs in a pair. Leave it out"
    if config.method == "random" and not config.expert_config:
        yield "method random needs --expert_config. scripts/expert/generate_expert_config.py makes one"
    if config.verify_frozen and config.method == "full":
        yield "verify_frozen has nothing to verify, as method full freezes nothing. Leave it out"
    for key, (allowed, why) in REFUSED.items():
        if values.get(key) is not None and values[key] not in allowed:
            yield f"{key}={values[key]} does not work here: {why}. Leave it out"
    yield from _unmet_needs(config, values)


def _unmet_needs(config: RunConfig, values: dict) -> Iterator[str]:
    """Yield which keys miss another that they need."""
    best = "save_strategy=best" if values.get("save_strategy") == "best" else "load_best_model_at_end"
    if best == "save_strategy=best" or values.get(best):
        if values.get("eval_strategy", "no") == "no":
            yield f"{best} needs evaluations. Give eval_steps"
        if 0 < values.get("max_steps", -1) < values.get("eval_delay", 0):
            yield f"{best} needs evaluations, and eval_delay={values['eval_delay']} leaves none. Lower it"
    for key in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if values.get(key) and not values.get("dataloader_num_workers"):
            yield f"{key} needs dataloader_num_workers above 0"
    options = values.get("activation_checkpointing_kwargs") or {}
    if not isinstance(options, dict):
        yield f"activation_checkpointing_kwargs={options} is not a dict"
    if unknown := sorted(options.keys() - CHECKPOINTING):
        yield f"activation_checkpointing_kwargs has no {unknown[0]!r}{suggest(unknown[0], CHECKPOINTING)}"
    if options.get("offload") and (config.device == "cpu" or not torch.cuda.is_available()):
        yield "offload in activation_checkpointing_kwargs needs a GPU. Leave it out"
    if (path := values.get("resume_from_checkpoint")) not in (None, "false"):
        if not config.save_opt_states:
            yield f"resume_from_checkpoint={path} needs --save_opt_states"
        if config.overwrite:
            yield "resume_from_checkpoint goes on with a run, and overwrite removes it. Give one of them"


def read_config(argv: list[str], defaults: dict | None = None, description: str | None = None) -> RunConfig:
    """Read the words of a command line: `key=value`, `--key=value`, `--key value`, and `--key` for true.

    `defaults` are keys that a command sets where neither its file (--train_config) nor its words do. `--help` prints
    the `description` and all keys.

    Raises:
        ValueError, OSError: an unknown key (the nearest known one is named), a bad value, or no such file.
    """
    defaults = defaults or {}
    parser = make_parser(RunConfig, description, defaults, argv)
    if asked := {"-h", "--help", "--help-all"} & set(argv):
        parser.parse_args([asked.pop()])
    known = {f.name for cls in (TrainingArguments, RunConfig) for f in dataclasses.fields(cls) if f.init}
    known = known - {"training"}
    accepted = known | {"train_config"} | NO_EFFECT.keys() | keys.SECRETS.keys()
    given = _full_names("the command line", _pairs(argv), accepted)
    path = given.pop("train_config", None)
    file = _full_names(path, _yaml_pairs(path), accepted) if path else {}
    if given.get("num_train_epochs") and "max_steps" not in given and file.pop("max_steps", None):
        note(f"num_train_epochs of the command line takes the place of max_steps of {path}")
    one_process = os.environ.get("WORLD_SIZE", "1") == "1"
    if one_process and str(file.get("ep_size")).isdecimal() and int(file.pop("ep_size")) > 1:
        note(f"ep_size of {path} has no effect on one process: torchrun starts several")
    merged = _without_foreign_keys({**defaults, **file, **given})
    words = [word for key, value in merged.items() if value is not None for word in _words(key, value)]
    found = vars(parser.parse_args(words, argparse.Namespace(**dict.fromkeys(known, MISSING))))
    config = _make_config({key: _stored(key, found[key]) for key in merged if found[key] is not MISSING})
    usual = {f.name: f.default for f in dataclasses.fields(RunConfig)}
    if config.expert_config and (unused := [key for key in SETTINGS if getattr(config, key) != usual[key]]):
        what = f"{unused[0]} says how to select experts, and expert_config names them"
        raise ValueError(f"cannot start this run: {what}. Leave one of them out.")
    for key, (other, values) in ONLY_FOR.items():
        value = config.kind if other == "method" else getattr(config, other, config.training.get(other))
        if given.get(key) is not None and not set(values) & {*([value] if isinstance(value, str) else value)}:
            note(f"{key} has no effect: it is for {other} {' and '.join(values)}, and this is {value}")
    return config


def _without_foreign_keys(values: dict[str, object]) -> dict[str, object]:
    """Return the values without NO_EFFECT and SECRETS, and say what they mean here."""
    for key in [key for key in NO_EFFECT if values.get(key) is not None]:
        note(f"{key} has no effect here: {NO_EFFECT[key]}")
    if values.get("wandb_api_key") and "wandb" not in str(values.get("report_to")):
        note("wandb_api_key has an effect with report_to=wandb only: nothing is sent to W&B")
    return {key: value for key, value in values.items() if key not in NO_EFFECT and not take_secret(key, value)}


def _pairs(argv: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yield (key, value) of the words of a command line."""
    words = [f"--{word}" if re.match(r"\w+=", word) else word for word in argv]
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not name.startswith("--"):
            raise ValueError(f"cannot read {name!r}: it is not a setting. Write key=value.")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
        yield name.removeprefix("--").replace("-", "_"), None if value in ("null", "~", "") else value


class _YamlLoader(yaml.SafeLoader):
    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):  # a few lines of these can stand for more than fits into memory
            raise ValueError(f"*{self.peek_event().anchor} stands for another value. Write that value")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        unique_keys((str(key.value), value) for key, value in node.value)
        return super().construct_mapping(node, deep)


def _yaml_pairs(path: str) -> Iterator[tuple[str, object]]:
    check_file(path)
    try:
        yield from (yaml.load(Path(path).read_text(encoding="utf-8"), _YamlLoader) or {}).items()
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: it does not hold `key: value` lines ({error})") from error


def _full_names(source: str, pairs: Iterator[tuple[str, object]], known: set[str]) -> dict[str, object]:
    """Return the values by full key."""
    values, names = {}, {}
    for name, value in pairs:
        key = ALIASES.get(name, name)
        if key not in known:
            raise ValueError(f"cannot read {source}: unknown key {name!r}{suggest(name, known | ALIASES.keys())}")
        if names.setdefault(key, name) != name and source != "the command line":
            raise ValueError(f"cannot read {source}: {names[key]} and {name} are the same key. Give one of them.")
        if name == "warmup_ratio" and not 0 <= float(value or 0) < 1:
            raise ValueError(f"cannot read {source}: warmup_ratio={value} is not a share below 1. Give warmup_steps.")
        values[key] = value
    return values


def _words(key: str, value: object) -> list[str]:
    """Return a setting as words for argparse."""
    if isinstance(value, str) and value.startswith("["):
        value = _parsed(key, value, "a list such as '[a, b]'")
    if isinstance(value, list):
        if key in ("train_dataset", "validation_dataset", "lora_modules"):  # several data sets, as in a:0.7,b:0.3
            return [f"--{key}={','.join(map(str, value))}"]
        return [f"--{key}", *map(str, value)]
    if value is False and key.endswith("_strategy"):  # YAML 1.1 reads no as false
        value = "no"
    text = json.dumps(value, default=str) if isinstance(value, dict) else str(value)
    return [f"--{key}={text.lower() if text in ('True', 'False') else text}"]


def _parsed(key: str, text: str, example: str) -> object:
    try:
        return yaml.load(text, _YamlLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"cannot read {key}={text:.99}: it is not {example}.") from error


def _stored(key: str, value: object) -> object:
    """Return a value as run.json keeps it."""
    if isinstance(value, str) and value.startswith("{"):
        return _parsed(key, value, "a dict such as '{\"key\": 1}'")
    return int(value) if key.endswith("_steps") and isinstance(value, float) and value.is_integer() else value


def _make_config(values: dict[str, object]) -> RunConfig:
    """Make a RunConfig of parsed values, with what follows from them."""
    if values.pop("use_cpu", False):
        values["device"] = "cpu"
    if "save_only_model" in values:
        values.setdefault("save_opt_states", not values.pop("save_only_model"))
    if values.get("resume_from_checkpoint") == "true":  # which is what a run does by itself
        del values["resume_from_checkpoint"]
    training = dict(DEFAULTS)
    if values.get("save_strategy") == "best":
        training["metric_for_best_model"] = "loss"
    for what in ("save", "eval"):  # transformers would take no notice of the steps without the strategy
        if values.get(f"{what}_steps") or (what == "save" and values.get("save_opt_states")):
            training[f"{what}_strategy"] = "steps"
    if "per_device_train_batch_size" in values:
        training["per_device_eval_batch_size"] = values["per_device_train_batch_size"]
    ours = {f.name for f in dataclasses.fields(RunConfig)}
    training |= {key: value for key, value in values.items() if key not in ours}
    return RunConfig(**{key: value for key, value in values.items() if key in ours}, training=training)


def _batch_split(config: RunConfig) -> dict[str, float]:
    """Return the keys that `global_batch_size` sets. An uneven split gives a fraction as the accumulation."""
    if config.global_batch_size is None:
        return {}
    share = config.global_batch_size / int(os.environ.get("WORLD_SIZE", 1))
    size = min(config.training.get("per_device_train_batch_size", 8), max(int(share), 1))
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": share / size}


def training_arguments(config: RunConfig) -> TrainingArguments:
    """Return the TrainingArguments of a run. Under torchrun this needs the process group, so it comes after `join`."""
    batch = {key: int(value) for key, value in _batch_split(config).items()}
    try:
        args = TrainingArguments(
            **{**config.training, **batch},
            output_dir=config.output_dir,
            use_cpu=config.device == "cpu" or not torch.cuda.is_available(),
            save_only_model=not config.save_opt_states,
        )
        optimizer = _try_optimizer(args, by_expert=config.kind in ON_EXPERTS)
        schedule = get_scheduler(
            args.lr_scheduler_type, optimizer, args.get_warmup_steps(100), 100, args.lr_scheduler_kwargs
        )
        for factor in schedule.lr_lambdas if isinstance(schedule, LambdaLR) else ():
            if not all(math.isfinite(factor(step)) for step in range(101)):
                raise ValueError("the learning rate of its schedule is not finite. Change lr_scheduler_kwargs")
    except (TypeError, ValueError, ImportError, LookupError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise ValueError(f"cannot start this run: {error}") from error
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs are for torchrun, never for nn.DataParallel
    return args


def _try_optimizer(args: TrainingArguments, by_expert: bool) -> torch.optim.Optimizer:
    """Return the optimizer of a run after one step on three small experts.

    Raises:
        ValueError, TypeError, ImportError: it has a bad setting, is not installed, or its states cannot be saved.
    """
    experts = torch.nn.Parameter(torch.zeros(3, 64, 64, device=args.device))
    experts.grad = torch.ones_like(experts)
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.ParameterList([experts]))
    if settings.keys() & {"model", "params", "optimizer_dict"}:
        raise ValueError(f"optim={args.optim.value} does not train fused experts")
    optimizer = kind([experts], **settings)
    optimizer.step()
    if by_expert and not args.save_only_model:
        for key, state in optimizer.state[experts].items():
            by_row(key, torch.as_tensor(state), experts)
    return optimizer
