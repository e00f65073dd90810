"""The flags of eval_multigpu.py, with their defaults and their help, and what a folder of train.py adds to them."""

import json
import math
import re
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from deepseek.files import list_checkpoints, parse_json, read_json, suggest_path, write_jsonl
from deepseek.strength import check_strength
from training.data import TemplateSettings, eval_file_of, held_out_questions
from utils import AUTO_DTYPE, ROOT, note, split_names

KNOWN = ("mmlu", "gsm8k", "humaneval", "hellaswag", "arc_challenge", "triviaqa", "ifeval", "ceval-valid")  # the paper's
TINY = ROOT / "results" / "models" / "tiny"
COUNTS = (
    "world_size", "gpus_per_rank", "max_new_tokens", "eval_batch_size", "n_samples", "judge_parallel",
    "suite_max_new_tokens", "timeout",
)  # fmt: skip
FEW = 20  # samples; a mean of fewer says little
NEEDS = {  # flag -> flags that have no effect without it
    "eval_dataset": ("max_new_tokens", "template", "evaluator", "judge_model"),
    "suite": ("task_dir", "num_fewshot", "suite_max_new_tokens", "apply_chat_template"),
    "judge_model": ("judge_base_url",),
    "adapter_dir": ("with_base", "base_answers", "strength", "choose_strength"),
    "choose_strength": ("max_loss",),
}
STRENGTHS = "0.5,0.6,0.7,0.8,0.9,1"  # those to choose from


def _flag(default: object, text: str, metavar: str | None = None, *aliases: str) -> object:
    metadata = {"help": text, "aliases": list(aliases)}
    return field(default=default, metadata={**metadata, "metavar": metavar} if metavar else metadata)


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate, and how."""

    base_model_path: str = _flag(
        MISSING,
        "folder or hub id of the base model; a folder of train.py knows its base and its task",
        "MODEL",
        "--model",
    )
    adapter_dir: str | None = _flag(
        None, "folder of an adapter to put on the base, or of one adapter for each data set, in folders of their names",
        "DIR",
    )  # fmt: skip
    with_base: bool = _flag(False, "answer without the adapter too, and print what it changed with 95 %% intervals")
    base_answers: str | None = _flag(
        None,
        "folder of an earlier evaluation: with --with_base, or in a curve of strengths, the base's answers are taken "
        "from it where model, questions and settings are the same",
        "DIR",
    )
    strength: str = _flag(
        "1",
        "how much of the adapter's change to make, 0 to 2: base + strength x (tuned - base); several give a curve. "
        "Then --adapter_dir or --model may be a whole fine-tuned model",
        "S[,S]",
    )
    choose_strength: bool = _flag(
        False,
        "take the strength that gains most on the first data set, which should be a validation set, and keeps the last "
        "one, general skills; a run is asked the samples that it held out",
    )
    max_loss: float = _flag(1.0, "points of general skills that --choose_strength may lose", "POINTS")
    eval_dataset: str = _flag(
        "", "names in datasets/eval, paths (.jsonl, .json, .parquet) or hub ids", "NAME[,NAME]", "--eval_datasets"
    )
    with_general: bool = _flag(
        False, "ask the general skills, datasets/eval/general.jsonl, too; a run on results/models/tiny always does"
    )
    suite: str = _flag("", f"names that lm-eval knows ({', '.join(KNOWN)}, ...) or task files (.yaml)", "NAME[,NAME]")
    output_path: str | None = _flag(
        None,
        "the answers (.jsonl); without it completions/<data set>.jsonl in the folder of a run, or "
        "results/completions/<adapter or model>.<data set>.jsonl",
        "FILE",
    )
    output_dir: str | None = _flag(None, "folder of the answers, <data set>.jsonl, in place of --output_path", "DIR")
    world_size: int = _flag(
        1,
        "processes, each with a whole model; on the CPU each has one thread, so give as many as there are cores; "
        "results do not change",
        "N",
    )
    gpus_per_rank: int = _flag(1, "GPUs over which each process spreads its model", "N")
    timeout: int = _flag(7200, "seconds after which one of several processes that does not answer ends all", "SECONDS")
    max_new_tokens: int = _flag(512, "longest answer, in tokens", "N")
    eval_batch_size: int = _flag(16, "samples per batch and process", "N")
    n_samples: int | None = _flag(None, "draw this many samples of each data set, and of each task of a suite", "N")
    template: Literal["chat", "released"] = _flag(
        "chat", "how prompts are rendered: the tokenizer's chat template, or that of the published checkpoints"
    )
    template_kwargs: str | None = _flag(None, 'variables of the chat template, as {"enable_thinking": false}', "JSON")
    keep_reasoning: bool = _flag(False, "score what a model thinks before its answer, too (<think>, channels)")
    evaluator: str | None = _flag(
        None,
        "metrics for every data set: intent, summary, law, translation, general, math or code; without it those that "
        "rows name, else those of the data set's name, else ROUGE-L, chrF and BLEU",
        "NAME",
    )
    allow_code_execution: bool = _flag(
        False, "run the programs that the model writes; this is not a sandbox, see evaluation/code_runner.py"
    )
    judge_model: str | None = _flag(None, "model that grades summary, law and translation", "NAME")
    judge_base_url: str | None = _flag(
        None, "an OpenAI-compatible endpoint, without /chat/completions; without it OpenAI's", "URL"
    )
    judge_key_env: str = _flag("OPENAI_API_KEY", "environment variable that holds the judge's key", "NAME")
    judge_cache: str = _flag("results/completions/judge_cache", "folder that keeps the judge's replies", "DIR")
    judge_parallel: int = _flag(8, "calls to the judge at a time", "N")
    task_dir: str | None = _flag(None, "folder of your own task files for --suite", "DIR")
    num_fewshot: int | None = _flag(None, "few-shot examples of a suite, where its tasks do not fix them", "N")
    suite_max_new_tokens: int | None = _flag(None, "longest answer to a suite, in tokens; else the task's own", "N")
    apply_chat_template: bool = _flag(False, "ask suites through the tokenizer's chat template")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _flag("auto", f"type of the weights; auto: {AUTO_DTYPE}")
    device: Literal["auto", "cpu", "cuda"] = _flag("auto", "where to run; auto: the GPUs if there are any")
    seed: int = _flag(0, "seed of --n_samples and of the bootstrap intervals", "N")

    @property
    def template_settings(self) -> TemplateSettings:
        return TemplateSettings(self.template, parse_json(self.template_kwargs or "{}", "--template_kwargs", 1))

    @property
    def strengths(self) -> list[float]:
        """Return the strengths to evaluate at. Raise ValueError for what is not a number from 0 to 2."""
        names = split_names(STRENGTHS if self.choose_strength and self.strength == "1" else self.strength)
        try:
            found = [float(name) for name in names]
        except ValueError:
            found = []
        if not found:
            raise ValueError(f"cannot use --strength {self.strength!r}: it is not a list of numbers, as in 0.5,0.7,1.")
        for strength in found:
            check_strength(strength)
        return found

    @property
    def is_curve(self) -> bool:
        return len(self.strengths) > 1 or self.choose_strength

    @property
    def datasets(self) -> list[str]:
        return split_names(self.eval_dataset)

    @property
    def suites(self) -> list[str]:
        return split_names(self.suite)

    def check(self) -> None:
        """Raise ValueError for values out of range, for flags that contradict and for files that are missing."""
        for name, least in {**dict.fromkeys(COUNTS, 1), "num_fewshot": 0}.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"cannot evaluate with --{name} {value}: it must be at least {least}.")
        if not self.strengths or not 0 <= self.max_loss < math.inf:
            raise ValueError(f"cannot use --max_loss {self.max_loss}: it is not a number of points from 0.")
        if self.choose_strength and len(self.datasets) + len(self.suites) < 2:
            cause = "that needs a data set on which it gains, and one of general skills"
            raise ValueError(f"cannot choose a strength: {cause}. Give --eval_dataset=VALIDATION,GENERAL.")
        if self.output_path and Path(self.output_path).suffix != ".jsonl":
            raise ValueError(f"cannot write --output_path {self.output_path}: it must end in .jsonl.")
        if self.output_path and self.output_dir:
            raise ValueError("cannot write to --output_path and --output_dir. Give one of them.")
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.judge_key_env):  # not shown: it may be the key itself
            cause = "it is not the NAME of an environment variable (capitals, digits, _)"
            raise ValueError(f"cannot use --judge_key_env: {cause}. Give a name, and not the key itself.")
        default = {flag.name: flag.default for flag in fields(self)}
        for needed, names in NEEDS.items():
            unused = [name for name in names if getattr(self, name) != default[name]]
            if unused and not getattr(self, needed):
                raise ValueError(f"cannot use --{unused[0]}: it has an effect only with --{needed}. Give that, too.")
        if self.base_answers and self.suites:
            note("--base_answers has no effect on suites: the base is asked them again")
        if self.base_answers and not (self.with_base or self.is_curve):
            raise ValueError("cannot use --base_answers: no base is asked. Give --with_base, or several strengths.")
        for path in [self.adapter_dir, self.base_answers, self.task_dir, *filter(is_task_file, self.suites)]:
            if path and not Path(path).exists():
                raise ValueError(f"cannot read {path}: no such file or folder{suggest_path(path)}")


def is_task_file(suite: str) -> bool:
    """Return whether a suite is given by the path of a task's YAML file, and not by a name."""
    return suite.endswith((".yaml", ".yml"))


# ------------------------------------------------------------------------------------------------ the folder of a run


def fill_from_run(config: EvalConfig) -> EvalConfig:
    """Fill in what a folder of train.py knows: its base, its adapter and, where no data are asked for, its task.

    The general skills are asked, too, where that is wanted, or where the base is the tiny model, which was taught them.
    """
    folder, found, general = Path(config.base_model_path), {}, config.with_general
    if (folder / "run.json").is_file():
        told = read_json(folder / "run.json", "config")
        run = told["config"]
        if not told.get("results") and not config.adapter_dir:
            flag = "--model" if run["method"] == "full" else "--adapter_dir"
            hint = "".join(f", or give {flag}={path}" for path in list_checkpoints(folder)[-1:])
            raise ValueError(f"cannot evaluate {folder}: its run did not finish. Go on with it{hint}.")
        if run["method"] != "full" or config.strength != "1" or config.choose_strength or config.with_base:
            base = run["base_model_path"]
            if base.count("/") != 1 and not Path(base).exists():  # so it is not a hub id, either
                how = f"--base_model_path=BASE --adapter_dir={folder}"
                raise ValueError(f"cannot find base model {base}, which {folder / 'run.json'} names. Give {how}.")
            found |= {"base_model_path": run["base_model_path"], "adapter_dir": config.adapter_dir or str(folder)}
        if not config.datasets and not config.suites:
            found["eval_dataset"] = _eval_dataset_of(run, folder, config.choose_strength)
            if Path(run["base_model_path"]).resolve() == TINY and not general:
                note("general skills are asked too: did training keep them? --eval_dataset names the data sets itself")
                general = True
    config = _with_template_of_run(replace(config, **found))
    if general and "general" not in config.datasets:
        return replace(config, eval_dataset=",".join([*config.datasets, "general"]))
    return config


def _with_template_of_run(config: EvalConfig) -> EvalConfig:
    """Take the template from the run that made the model or the adapter. A checkpoint's run is the folder above it."""
    folder, usual = Path(config.adapter_dir or config.base_model_path), EvalConfig.template
    path = next((path for path in (folder / "run.json", folder.parent / "run.json") if path.is_file()), None)
    if path is None or (config.suites and not config.datasets):
        return config
    run, found = read_json(path, "config")["config"], {}
    if config.template == usual and run["template"] != usual:
        found["template"] = run["template"]
    if config.template_kwargs is None and run.get("template_kwargs"):
        found["template_kwargs"] = json.dumps(run["template_kwargs"])
    if found:
        note(f"{', '.join(f'{key}={value}' for key, value in found.items())}, as in {path}")
    return replace(config, **found)


def _eval_dataset_of(run: dict, folder: Path, held_out: bool) -> str:
    """Return the eval file beside the training data, as datasets/eval/law.jsonl for datasets/train/law.jsonl.

    Without one, or with `held_out`, write the samples that the run held out for validation to held_out.jsonl in its
    folder. Where there is an eval file they get its name, held_out/law.jsonl, and so the metric of the task.
    """
    if (found := eval_file_of(run["train_dataset"])) and not held_out:
        return found
    rows, kept = held_out_questions(run)
    if not rows:
        raise ValueError(
            f"cannot evaluate {folder}: it held out no sample that is one question and one answer. Give --eval_dataset."
        )
    some = "" if len(rows) == kept else f" of {kept}, those with one question and one answer"
    note(f"evaluating on the samples that training kept for validation ({len(rows)}{some})")
    if len(rows) < FEW:
        note("so few samples say little: give --eval_dataset, or train with a larger validation_fraction")
    path = folder / "held_out" / f"{Path(found).stem}.jsonl" if found else folder / "held_out.jsonl"
    write_jsonl(path, rows)
    return str(path)
