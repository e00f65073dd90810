"""Read what a run left in its folder, for the table of scripts/pipeline.py and the page of scripts/report.py.

    read_run(folder) -> Run: its trained models (Trained), their scores and answers (Evaluation), its commands

A folder of train.py holds one trained model. A folder of pipeline.py holds several, and how they and the base answer.
A file that is missing leaves its field empty.
"""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from deepseek.adapters import is_adapter, is_for_peft
from deepseek.files import list_checkpoints, named, read_json, read_jsonl, suggest_path
from deepseek.selection import SETTINGS, settings_beside_a_config
from esft import TOP_P, ExpertConfig, ExpertScores
from evaluation.frontier import METHODS, RULES, SELECTS
from evaluation.journal import answers_beside
from evaluation.results import compare
from utils import ROOT


@dataclass
class Trained:
    """One folder of train.py. `results` is empty if the run is not finished."""

    label: str
    folder: Path
    settings: dict  # the resolved config, and the training arguments beside it
    results: dict
    environment: dict
    data: str  # SHA-256 of the training data, or its name
    history: list[dict]  # the Trainer's log
    experts: ExpertConfig | None
    scores: ExpertScores | None
    function: str  # the score function that experts are selected by, up to `top_p`
    top_p: float

    @property
    def share(self) -> float | None:
        """Return the trained parameters as a fraction of all."""
        return self.results["trained_parameters"] / self.results["parameters"] if self.results else None

    def curve(self, key: str) -> list[tuple[int, float]]:
        """Return (step, value) for "loss" or "eval_loss". The last value of a step counts; NaN is left out."""
        points = {entry["step"]: entry[key] for entry in self.history if key in entry}
        return sorted((step, value) for step, value in points.items() if math.isfinite(value))

    @property
    def command(self) -> list[str]:
        """Return the command that gives these settings again, in the repository's root."""
        folder, paths = self.folder.resolve(), ("base_model_path", "train_dataset", "expert_config", "output_dir")
        settings = self.settings | {"output_dir": folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder}
        flags = (f"--{key}={settings[key]}" for key in paths if settings.get(key))
        expand = settings.get("expand_experts") or {}
        used = settings_beside_a_config(bool(expand), bool(settings.get("reselect_steps")))
        selected = {*SETTINGS} - used if settings.get("expert_config") else set()
        left_out = {*paths, *selected}  # a config says what was selected, and with how many to start
        keys = {key: value for key, value in self.settings.items() if key not in left_out and value is not None}
        if expand and selected:
            keys["expand_experts"] = {key: value for key, value in expand.items() if key != "start"}
        world = self.results.get("world_size") or 1
        on_experts = self.settings["method"] in ("esft", "dpo", "random") or settings.get("lora_experts") == "selected"
        script = "train_ep.py" if world > 1 and on_experts else "train.py"
        start = ["torchrun", f"--nproc-per-node={world}", script] if world > 1 else ["python", script]
        return [*start, *flags, *(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in keys.items())]


@dataclass
class Evaluation:
    """What eval_multigpu.py wrote of one model on one data set: the summary, and a line per answer."""

    summary: dict
    answers: list[dict]


@dataclass
class Run:
    """A folder of pipeline.py or train.py. `evaluations` are by data set, then by label, the base first."""

    name: str
    folder: Path
    base: str  # the label of the base model
    trained: list[Trained] = field(default_factory=list)
    evaluations: dict[str, dict[str, Evaluation]] = field(default_factory=dict)
    stages: list[list[str]] = field(default_factory=list)  # the pipeline's commands, without "python"
    arguments: dict = field(default_factory=dict)  # the pipeline's
    cwd: str = ""  # where the commands run as they are written; "" is the repository's root
    notes: list[str] = field(default_factory=list)  # what does not agree

    @property
    def command(self) -> list[str]:
        """Return the pipeline's command."""
        given = {key: value for key, value in self.arguments.items() if value is not None and value is not False}
        overrides = given.pop("overrides", [])
        flags = (f"--{key}" if value is True else f"--{key}={value}" for key, value in given.items())
        return ["python", os.path.relpath(ROOT / "scripts" / "pipeline.py", self.cwd or ROOT), *flags, *overrides]

    def change(self, dataset: str, label: str) -> dict | None:
        """Return how a model changed against the base of this run, as `compare` does; None without a base.

        It is the evaluation's own comparison if there is one. Else it is that of the answers, or of the means alone:
        the tasks of a suite have weights of their own, and two models may have answered different questions.
        """
        base, now = self.evaluations[dataset].get(self.base), self.evaluations[dataset][label]
        if base is None or None in (base.summary["mean"], now.summary["mean"]):
            return None
        if now.summary.get("against_base"):
            return now.summary["against_base"]
        if same_questions(base.answers, now.answers) and "unit" not in now.summary:
            return compare(base.answers, now.answers)
        return {"difference": now.summary["mean"] - base.summary["mean"], "ci95": None, "certain": False}


def same_questions(a: list[dict], b: list[dict]) -> bool:
    """Return whether two files answer the same questions in the same order."""
    return bool(a) and [x["example"]["prompt"] for x in a] == [x["example"]["prompt"] for x in b]


def read_run(folder: Path, name: str = "", prefix: str = "") -> Run:
    """Read a folder of pipeline.py or train.py. A model's label is `prefix` and its method, or `name` for train.py.

    Raises:
        ValueError: there is no run in the folder, or a file is damaged.
    """
    run = Run(name or folder.resolve().name, folder, f"{prefix}base")
    if (folder / "run.json").is_file():
        _read_training(run)
    else:
        _read_pipeline(run, prefix)
    if not run.trained and not run.evaluations:
        what = f"no run.json, checkpoints or completions in it{suggest_path(folder)}"
        raise ValueError(f"cannot read {folder}: {what}. Give the folder of a run.")
    return run


def _read_training(run: Run) -> None:
    """Read a folder of train.py, and its evaluations: those in it, and older ones in results/completions."""
    run.trained = [read_trained(run.folder, run.name)]
    older = Path("results/completions").glob(f"{run.folder.resolve().name}.*.summary.json")
    for path in [*sorted(older), *sorted(run.folder.glob("completions/*.summary.json"))]:
        evaluation = read_evaluation(path)
        arguments = evaluation.summary["arguments"]
        model = Path(arguments["adapter_dir"] or arguments["base_model_path"])
        if path.parent.parent == run.folder or model.resolve() == run.folder.resolve():
            label = run.base if path.name.endswith(".base.summary.json") else run.name
            run.evaluations.setdefault(evaluation.summary["dataset"], {})[label] = evaluation


def _read_pipeline(run: Run, prefix: str) -> None:
    """Read a folder of pipeline.py: its models, and its data sets in the order in which they were asked for."""
    folder, table, scores = run.folder, {"rows": []}, None
    if (folder / "table.json").is_file():
        table = read_json(folder / "table.json", "rows", "arguments")
        run.arguments, run.cwd = table["arguments"], table.get("cwd", run.cwd)
    if (folder / "stages.json").is_file():
        run.stages = list(read_json(folder / "stages.json").values())
    if (folder / "expert_scores" / "summary.json").is_file():
        scores = ExpertScores.load(folder / "expert_scores")
    selected = {}  # flags of generate_expert_config.py by method
    for words in run.stages:
        given = dict(word.removeprefix("--").partition("=")[::2] for word in words[1:])
        if words[0].endswith("generate_expert_config.py"):
            selected[Path(given["output_path"]).stem] = given
    methods = {path.parent.name for path in folder.glob("checkpoints/*/run.json")}
    found = [(path.name.split(".")[0], read_evaluation(path)) for path in folder.glob("completions/*.summary.json")]
    order = ["base", *run.arguments.get("methods", "").split(","), *METHODS, *sorted(methods | {m for m, _ in found})]
    for method in sorted(methods, key=order.index):
        function = SELECTS.get(method, RULES["esft-token"])["score_function"]
        top_p = float(selected.get(method, {}).get("top_p", TOP_P[function]))
        run.trained.append(read_trained(folder / "checkpoints" / method, prefix + method, scores, function, top_p))
    told = {(row["method"], name): score["mean"] for row in table["rows"] for name, score in row["scores"].items()}
    asked = found[0][1].summary["arguments"]["eval_dataset"].split(",") if found else []
    by_name = {Path(name).stem: {} for name in asked}
    for method, evaluation in sorted(found, key=lambda pair: order.index(pair[0])):
        name, mean = evaluation.summary["dataset"], evaluation.summary["mean"]
        by_name.setdefault(name, {})[prefix + method] = evaluation
        if told.get((method, name), mean) != mean:
            run.notes.append(f"table.json says {told[method, name]} for {method} on {name}: it is out of date.")
    run.evaluations = {name: by_label for name, by_label in by_name.items() if by_label}


def read_trained(
    folder: Path, label: str, scores: ExpertScores | None = None, function: str = "token", top_p: float = TOP_P["token"]
) -> Trained:
    """Read a folder of train.py. The losses of an unfinished run are those of its last checkpoint."""
    note = read_json(folder / "run.json", "config", "environment")
    settings = note["config"] | note["config"]["training"]
    del settings["training"]
    for source in (settings.get("expert_scores_dir"), folder / "expert_scores"):  # the latter train.py made itself
        if scores is None and source and Path(source).exists():
            scores, function = ExpertScores.load(source), settings.get("score_function", function)
            top_p = settings.get("top_p") or TOP_P[function]
    states = [place / "trainer_state.json" for place in (*list_checkpoints(folder), folder)]
    history = []
    for path in [path for path in states if path.is_file()][-1:]:
        with named(path):
            history = [{**entry, "step": int(entry["step"])} for entry in read_json(path, "log_history")["log_history"]]
    return Trained(
        label=label,
        folder=folder,
        settings=settings,
        results=note.get("results") or {},
        environment=note["environment"],
        data=note.get("inputs", {}).get("train_dataset", settings["train_dataset"]),
        history=history,
        experts=ExpertConfig.load(folder) if is_adapter(folder) and not is_for_peft(folder) else None,
        scores=scores,
        function=function,
        top_p=top_p,
    )


def read_evaluation(path: Path) -> Evaluation:
    """Read a summary of eval_multigpu.py, and the answers beside it, if they are there."""
    answers = answers_beside(path)
    summary = read_json(path, "dataset", "primary", "n", "mean", "ci95", "groups", "arguments")
    lines = read_jsonl(answers) if answers.is_file() else []
    with named(answers):
        for line in lines:
            _ = line["example"]["prompt"], line["score"]
    return Evaluation(summary, lines)
