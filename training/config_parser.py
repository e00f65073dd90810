"""The argparse parser of a run's settings, and its --help: our keys first, then those of transformers."""

import argparse
import dataclasses
import os
import re
import textwrap
from collections.abc import Iterable

from transformers import HfArgumentParser, TrainingArguments

from training.keys import ALIASES, DEFAULTS, NO_EFFECT, SECRETS
from training.optimizers import OwnOptimizer


class _Parser(HfArgumentParser):
    def error(self, message: str):
        if "are required: " in message:
            for short, key in (("model", "base_model_path"), ("data", "train_dataset")):
                message = re.sub(rf"--{key}\b", f"--{short} ({key})", message)
            message = re.sub(r"/--[\w-]+", "", message)
        else:
            message = re.sub(r"--(\w+)(/--[\w-]+)?", r"\1", message.removeprefix("argument "))
            message = re.sub(r": invalid (int|float) value: 'true'", " needs a value", message)
        raise ValueError(f"cannot read the settings: {message}")


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Return `--key VALUE`, without a second spelling."""
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        return f"{action.option_strings[0]} {self._format_args(action, action.dest.upper())}"

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


def _epilog(ours: set[str]) -> str:
    """Return the end of --help: short names, keys of transformers, keys without effect, and secrets."""
    others = [f.name for f in dataclasses.fields(TrainingArguments) if f.init and f.name not in ours | NO_EFFECT.keys()]

    def block(names: Iterable[str]) -> str:
        return textwrap.fill(", ".join(names), 112, initial_indent="  ", subsequent_indent="  ")

    return "\n".join(
        [
            "short names:",
            *(f"  {short} = {key}" for short, key in ALIASES.items()),
            "keys of transformers' TrainingArguments (--help-all and docs/settings.md explain them):",
            block(sorted(others)),
            "keys that are accepted and have no effect here (docs/settings.md says why):",
            block(NO_EFFECT),
            "secrets, which no file of the run will hold:",
            *(f"  {key}, or {variable} in the environment" for key, variable in SECRETS.items()),
        ]
    )


def make_parser(config: type, description: str | None, defaults: dict, argv: list[str]) -> HfArgumentParser:
    """Return the parser of TrainingArguments and of our keys, the fields of the dataclass `config`.

    Its --help explains our keys, and with --help-all those of transformers, too.
    """
    ours = {f.name for f in dataclasses.fields(config)}
    parser = _Parser(
        (TrainingArguments, config),
        conflict_handler="resolve",  # two keys are ours, too
        formatter_class=_Help,
        usage="%(prog)s --model MODEL --data DATA --output_dir DIR [--KEY=VALUE | KEY=VALUE ...]",
        description=description,
        epilog=_epilog(ours),
    )
    for action in parser._actions:
        if action.option_strings[0].startswith("--no_") or not (action.dest in ours or "--help-all" in argv):
            action.help = argparse.SUPPRESS
        if action.dest == "optim":
            action.choices = [*action.choices, OwnOptimizer.MUON.value]
    parser._action_groups.sort(key=lambda group: group.title != config._argument_group_name)
    parser.add_argument("--train_config", metavar="FILE", help="a YAML file of keys, such as configs/base.yaml")
    parser.add_argument("--help-all", action="help", help="explain the keys of transformers, too")
    parser.set_defaults(**DEFAULTS, **defaults)
    return parser


def take_secret(key: str, value: str | None) -> bool:
    """Move a secret to the environment, where libraries and child processes find it. Return whether it is one."""
    if key in SECRETS and value:
        os.environ[SECRETS[key]] = str(value)
    return key in SECRETS
