"""What scripts/pipeline.py, its sweep and scripts/find_lr.py share: stages that run once, and their commands."""

import argparse
import dataclasses
import difflib
import os
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from deepseek.files import read_json, write_json
from evaluation.journal import answers_beside
from utils import PYTHON, ROOT, flag_words, run_command, torchrun

if TYPE_CHECKING:
    from training.config import RunConfig, TrainingArguments


class Plan(NamedTuple):
    """What a method trains: the words for train.py, what they mean, and the flags that select its experts."""

    words: list[str]
    config: "RunConfig"
    arguments: "TrainingArguments"
    rule: dict[str, object]


def data_config(plans: dict[str, Plan]) -> "RunConfig":
    """Return a config by which all methods read data: their data settings are the same."""
    return next(iter(plans.values())).config


def parse_with_keys(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse flags, and keys of train.py as `key=value`, `--key=value` or `--key value`, with - or _ in their names."""
    words = sys.argv[1:] if argv is None else [*argv]
    flags = {option.removeprefix("--") for option in parser._option_string_actions}
    others = [word for word in words if word.startswith("--") and word[2:].partition("=")[0] not in flags]
    if others:
        from training.config import RunConfig, TrainingArguments, keys  # slow

        names = {field.name for kind in (RunConfig, TrainingArguments) for field in dataclasses.fields(kind)}
        names = {*names, *keys.ALIASES, *keys.NO_EFFECT, *keys.SECRETS} - flags
        for word in others:
            name, equals, value = word[2:].partition("=")
            name, at = name.replace("-", "_"), words.index(word)
            if not names.intersection(difflib.get_close_matches(name.rpartition(":")[2], names | flags, n=1)):
                continue
            if not equals:
                has_value = at + 1 < len(words) and not words[at + 1].startswith("--")
                value = words.pop(at + 1) if has_value else "true"
            words[at] = f"{name}={value}"
    return parser.parse_intermixed_args(words)


class Stages:
    """Run commands once each. `stages.json` keeps the command of every finished output.

    Two commands are the same if their flags differ only in order. The order of keys counts: of one key, the last wins.
    When a command runs again, the outputs of the commands that read its output are out of date, and run again, too.
    """

    def __init__(self, folder: Path, lock: int | None = None, **owners: str):
        """Raise ValueError if a finished training has other values of the flags `owners`: their data would be mixed."""
        self.note, self.lock = folder / "stages.json", lock
        self.done: dict[str, list[str]] = read_json(self.note) if self.note.is_file() else {}
        for words in self.done.values():
            given = dict(word.removeprefix("--").partition("=")[::2] for word in words)
            for name, value in owners.items() if "train_dataset" in given else ():
                if given[name] != value:
                    had = f"--{name}={given[name]}"
                    raise ValueError(f"cannot use {folder}: its stages have {had}. Give another --output_dir.")

    def run(self, output: Path, script: str, *, processes: int = 1, keys: tuple = (), **flags: object) -> None:
        """Run `python script --flag=value ... key=value ...`, unless this very command has made `output` already."""
        words = [*flag_words(**flags), *keys]
        command = [*torchrun(processes), os.path.relpath(ROOT / script), *words]
        shown = shlex.join([PYTHON, *command])
        if output.exists() and in_order(self.done.get(str(output), [])) == in_order(command):
            print(f"[done] {shown}", flush=True)
            return
        print(f"\n$ {shown}", flush=True)
        made = {str(output), str(output.parent)}
        self.done = {k: old for k, old in self.done.items() if not made & {word.partition("=")[2] for word in old}}
        if self.note.is_file():
            write_json(self.note, self.done)
        start = time.perf_counter()
        run_command([script, *words], processes=processes, lock=self.lock, env={"ESFT_STAGE": "1"})
        print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)
        self.done[str(output)] = command
        write_json(self.note, self.done)


def in_order(words: list[str]) -> list[str]:
    """Return the words of a command with its flags sorted, behind all other words."""
    return sorted(words, key=lambda word: word if word.startswith("--") else "")


def flags(args: argparse.Namespace, names: str) -> dict[str, object]:
    """Return the flags of these names."""
    return {name: getattr(args, name) for name in names.split()}


class Commands:
    """Runs the stages of a folder. `config` is that of any method, as all read data in the same way."""

    def __init__(self, args: argparse.Namespace, stages: Stages, folder: Path, config: "RunConfig"):
        from training.first_selection import data_flags  # slow; --help can do without

        self.args, self.stages, self.folder, self.config = args, stages, folder, config
        self.data = data_flags(config)

    def score_and_select(self, rules: dict[Path, dict[str, object]]) -> None:
        """Score the experts by what `rules`, flags of generate_expert_config.py, need, and write each config."""
        scored = {"expert_scores": self.args.train_dataset} if rules else {}
        if any("contrast" in rule for rule in rules.values()):
            scored["general_scores"] = self.args.contrast_dataset
        functions = {rule["score_function"] for rule in rules.values()} - {"token", "gate"}
        where = "base_model_path n_sample_tokens seq_length world_size gpus_per_rank template seed dtype"
        settings = flags(self.args, where) | {"scores": ",".join(sorted(functions)) or None}
        settings |= {"streaming": self.config.streaming}
        settings |= {key: value for key, value in self.data.items() if value != getattr(type(self.config), key)}
        for name, dataset in scored.items():
            output = self.folder / name
            paths = {"eval_dataset": dataset, "output_dir": output}
            self.stages.run(output / "summary.json", "scripts/expert/get_expert_scores.py", **paths, **settings)
            settings["n_train_samples"] = None  # of the training data, and not of general data
        for path, rule in rules.items():
            paths = {"expert_scores_dir": self.folder / "expert_scores", "output_path": path}
            paths |= {"contrast_scores_dir": self.folder / "general_scores"} if "contrast" in rule else {}
            drawn = {"seed": self.args.seed} if rule.get("strategy") == "random" else {}
            self.stages.run(path, "scripts/expert/generate_expert_config.py", **paths, **rule, **drawn)

    def evaluate(self, made: Path, output: Path, datasets: Iterable[str], **model: object) -> None:
        """Ask the base the questions of data sets, or what the flags `model` name. `made` is the last file written."""
        asked = {"eval_dataset": ",".join(datasets), "base_model_path": self.args.base_model_path, **model}
        asked |= {"output_path": output, "n_samples": self.args.n_eval_samples}
        asked |= flags(self.args, "world_size gpus_per_rank template max_new_tokens eval_batch_size seed dtype")
        self.stages.run(made, "eval_multigpu.py", **asked, template_kwargs=self.data["template_kwargs"])

    def training(self, keys: list[str], expert_config: Path | None) -> tuple[str, dict]:
        """Return the script that trains with these keys, and its options for `Stages.run`."""
        script = "train_ep.py" if expert_config and self.args.nproc_per_node > 1 else "train.py"
        paths = flags(self.args, "base_model_path train_dataset train_config") | {"expert_config": expert_config}
        return script, {"processes": self.args.nproc_per_node, "keys": keys, **paths}


def mean_of(summary: Path) -> float:
    """Return the mean score of an evaluation, in percent. Raise ValueError if no answer has a score."""
    if (mean := read_json(summary, "mean")["mean"]) is None:
        raise ValueError(f"cannot go on: no answer in {answers_beside(summary)} has a score. See there why.")
    return mean


def training_command(script: str, processes: int, keys: list[str], **paths) -> str:
    """Return the command that trains into the usual folder, with these paths as far as they are given."""
    words = flag_words(**paths, output_dir=f"results/checkpoints/{Path(paths['train_dataset']).stem}")
    return shlex.join([PYTHON, *torchrun(processes), os.path.relpath(ROOT / script), *words, *keys])
