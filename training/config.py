"""The settings of a run: keys in a YAML file and on the command line, read by transformers' HfArgumentParser.

Our own keys are the fields of RunConfig. Every key of transformers' TrainingArguments is accepted beside them, and so
are the short names in ALIASES. A key on the command line wins over the file, and `key=null` takes the file's away. Of a
key that is given twice on the command line, the last value counts. In the file it is refused.

The configs of the released ESFT code are read as they are. NO_EFFECT has its keys that mean nothing here. SECRETS go to
the environment, and no file of a run holds them.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from deepseek.files import check_file, suggest, unique_keys
from deepseek.optimizer_rows import by_row, parts_of
from deepseek.selection import SETTINGS, settings_beside_a_config
from training import keys
from training.config_parser import make_parser, take_secret
from training.keys import ALIASES, DEFAULTS, NO_EFFECT, ON_EXPERTS, ONLY_FOR, SCHEDULE_FREE
from training.optimizers import OwnOptimizer, optimizer_class
from training.run_config import RunConfig, batch_split
from utils import note


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
    found = vars(parser.parse_args(words))
    config = _make_config({key: _stored(key, found[key]) for key, value in merged.items() if value is not None})
    used = settings_beside_a_config(bool(config.expand_experts), bool(config.reselect_steps))
    unused = [key for key in SETTINGS if getattr(config, key) != getattr(RunConfig, key) and key not in used]
    if config.expand_experts and "start" in config.expand_experts:
        unused.append("start of expand_experts")
    if config.expert_config and unused:
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
        if name == "warmup_ratio" and not _is_share(value):
            raise ValueError(f"cannot read {source}: warmup_ratio={value} is not a share below 1. Give warmup_steps.")
        values[key] = value
    return values


def _is_share(value: object) -> bool:
    try:
        return 0 <= float(value or 0) < 1
    except (TypeError, ValueError):
        return False


def _words(key: str, value: object) -> list[str]:
    """Return a setting as words for argparse."""
    if isinstance(value, str) and value.startswith("["):
        value = _parsed(key, value, "a list such as '[a, b]'")
    if isinstance(value, list):
        if key.endswith("_dataset") or key == "lora_modules":  # several data sets, as in a:0.7,b:0.3
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


def training_arguments(config: RunConfig) -> TrainingArguments:
    """Return the TrainingArguments of a run. Under torchrun this needs the process group, so it comes after `join`."""
    changed = {key: int(value) for key, value in batch_split(config).items()}
    if own := config.training.get("optim") == OwnOptimizer.MUON.value:
        changed["optim"] = "adamw_torch"
    try:
        args = TrainingArguments(
            **{**config.training, **changed},
            output_dir=config.output_dir,
            use_cpu=config.device == "cpu" or not torch.cuda.is_available(),
            save_only_model=not config.save_opt_states,
        )
        splits = config.save_opt_states or config.reselect_steps is not None
        args.optim = OwnOptimizer.MUON if own else args.optim
        optimizer = _try_optimizer(args, by_expert=config.kind in ON_EXPERTS and splits)
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
    kind, settings = optimizer_class(args, torch.nn.ParameterList([experts]))
    optimizer = kind([experts], **settings)
    if args.optim.value in SCHEDULE_FREE:
        optimizer.train()
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
        optimizer.step()
    if by_expert:
        for key, state in parts_of(optimizer.state[experts]).items():
            by_row(key, state, experts)
    return optimizer
