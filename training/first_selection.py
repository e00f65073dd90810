"""Score the experts and select some, for a run of method esft or dpo that names none (`train.py --model M --data D`).

Two commands of the project do it, by the keys of the run, each in a process of its own that gives its memory back:

    <output_dir>/expert_scores/summary.json    scripts/expert/get_expert_scores.py
    <output_dir>/expert_configs/selected.json  scripts/expert/generate_expert_config.py
"""

import json
from pathlib import Path

import esft
from deepseek.selection import SETTINGS
from training.config import RunConfig
from utils import flag_words, run_command

DATA_KEYS = ("seq_length", "overlong", "template", "template_kwargs", "loss_on", "special_text", "append_end")
DATA_KEYS += ("streaming", "n_train_samples")
SELECTION_FOLDERS = ("expert_scores", "expert_configs")  # in an output folder


def selected_experts(output_dir: str) -> Path:
    """Return the path of the expert config that `score_and_select` writes."""
    return Path(output_dir).absolute() / SELECTION_FOLDERS[1] / "selected.json"


def find_scores(config: RunConfig) -> Path | None:
    """Return the expert scores that were given, or those where the README's commands put them, if there are any."""
    if config.expert_scores_dir:
        return Path(config.expert_scores_dir)
    made = Path(config.expert_config)
    folder = made.parent.parent / "expert_scores"
    folders = (folder / made.stem, folder)
    return next((path for path in folders if any((path / name).is_file() for name in esft.SCORE_FILES)), None)


def data_flags(config: RunConfig) -> dict[str, object]:
    """Return the flags of get_expert_scores.py by which it takes and encodes samples as the run does."""
    kwargs = json.dumps(config.template_kwargs) if config.template_kwargs else None
    return {key: getattr(config, key) for key in DATA_KEYS} | {"template_kwargs": kwargs}


def selection_stages(config: RunConfig) -> list[tuple[Path, str, dict[str, object]]]:
    """Return (output, script, flags) of the two commands that choose the experts of a run."""
    scores, path = Path(config.output_dir) / SELECTION_FOLDERS[0], selected_experts(config.output_dir)
    of_run = data_flags(config) | {key: getattr(config, key) for key in ("dtype", "device", "seed")}
    of_run |= {"scores": config.score_function}
    of_run |= {} if config.validation_dataset else {"validation_fraction": config.validation_fraction}
    of_run |= {key: "true" for key in ("streaming", "append_end") if getattr(config, key)}
    rule = {key: getattr(config, key) for key in SETTINGS if getattr(config, key) is not None}
    if rule.pop("train_shared_experts"):
        rule["train_shared_experts"] = "true"
    if "start" in (config.expand_experts or {}):
        rule["budget"] = config.expand_experts["start"]
    if not config.contrast_scores_dir:
        del rule["contrast"]
    if config.strategy == "random":
        rule["seed"] = config.seed
    of_run |= {"base_model_path": config.base_model_path, "output_dir": scores, "eval_dataset": config.train_dataset}
    rule |= {"expert_scores_dir": scores, "output_path": path, "eval_dataset": config.train_dataset}
    return [
        (scores / "summary.json", "scripts/expert/get_expert_scores.py", of_run),
        (path, "scripts/expert/generate_expert_config.py", rule),
    ]


def score_and_select(config: RunConfig) -> None:
    """Write the expert config of a run: scores on its training data, selected as its keys say."""
    for _, script, flags in selection_stages(config):
        try:
            run_command([script, *flag_words(**flags)])
        except SystemExit as stop:  # the command has printed its error
            name, code = Path(script).name, stop.code
            raise ChildProcessError(f"cannot choose the experts: {name} ended with exit code {code}") from stop
