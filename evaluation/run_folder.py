"""Runs as plain data, for scripts/report.py: folder -> `read_run` -> `Run`, with a `Trained` per folder of train.py.

What a folder lacks is empty or None; what is damaged is a ValueError that names the file. Labels tell the models apart
in every table and chart: the method, or name/method where the page shows several runs.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from deepseek.files import read_jsonl, suggest_path
from esft import CONFIG_NAME, TOP_P, ExpertConfig, ExpertScores


@dataclass
class Trained:
    """One folder of train.py. `results` is empty where the run was not finished."""

    label: str
    method: str  # train.py's
    folder: Path
    settings: dict  # the resolved config, with the keys of `training` beside the others
    results: dict
    environment: dict
    data: str  # SHA-256 of the training data, or its name
    history: list[dict]  # the Trainer's log, an entry per logged step
    experts: ExpertConfig | None
    scores: ExpertScores | None
    function: str  # the score that experts are selected by, up to top_p
    top_p: float

    @property
    def share(self) -> float | None:
        """Of the model's parameters, how many are trained."""
        part, whole = self.results.get("trained_parameters"), self.results.get("parameters")
        return part / whole if part and whole else None

    @property
    def score_LE(self) -> dict[int, dict[int, float]] | None:
        """Layer -> expert -> score of `function`, where it is known."""
        return self.scores.by_function.get(self.function) if self.scores else None


@dataclass
class Run:
    """One RUN of the command line: summaries and answers by data set, then by label, the base's first."""

    name: str
    folder: Path
    trained: list[Trained] = field(default_factory=list)
    summaries: dict[str, dict[str, dict]] = field(default_factory=dict)
    answers: dict[str, dict[str, list[dict]]] = field(default_factory=dict)
    stages: list[list[str]] = field(default_factory=list)  # commands, without "python"
    arguments: dict = field(default_factory=dict)  # the pipeline's
    base: str = "base"  # its label
    notes: list[str] = field(default_factory=list)  # what does not agree


def read_run(folder: Path, name: str, alone: bool) -> Run:
    """Read a folder of the pipeline or of train.py; labels are the methods where it is `alone`, else name/method.

    Raises:
        ValueError, FileNotFoundError: no such folder, no run in it, or a file that is not what its name says.
    """
    if not folder.is_dir():
        where = suggest_path(folder)
        raise FileNotFoundError(f"{folder}: no such folder{where}; give a run of pipeline.py or train.py")
    if (folder / "run.json").is_file():
        return with_evaluations(Run(name, folder, [read_trained(folder, name, name)], base=f"base of {name}"))
    try:
        return read_pipeline(folder, name, "" if alone else f"{name}/")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: table.json or stages.json is not what pipeline.py writes ({error!r})") from error


def with_evaluations(run: Run) -> Run:
    """A folder of train.py, with what eval_multigpu.py wrote of it where no --output_path was given."""
    for path in sorted(Path("results/completions").glob(f"{run.folder.resolve().name}.*.summary.json")):
        summary = read_summary(path)
        arguments = summary.get("arguments") or {}
        of = arguments.get("adapter_dir") or arguments.get("base_model_path")
        if of and Path(of).resolve() == run.folder.resolve():
            label = run.base if path.name.endswith(".base.summary.json") else run.name
            run.summaries.setdefault(summary["dataset"], {})[label] = summary
            lines = path.with_name(path.name.replace(".summary.json", ".jsonl"))
            if lines.is_file() and (answers := read_answers(lines)):
                run.answers.setdefault(summary["dataset"], {})[label] = answers
    return run


def read_pipeline(folder: Path, name: str, prefix: str) -> Run:
    """Read a folder of the pipeline; a label is `prefix` and the method."""
    methods = [path.parent.name for path in folder.glob("checkpoints/*/run.json")]
    summaries = {path: read_summary(path) for path in folder.glob("completions/*.summary.json")}
    if not methods and not summaries:
        raise ValueError(
            f"{folder} is no run: no run.json is in it or in checkpoints/<method>/, nor a summary in completions/; "
            "give a folder of scripts/pipeline.py or train.py"
        )
    table, stages = (
        read_json(folder / file) if (folder / file).is_file() else {} for file in ("table.json", "stages.json")
    )
    run = Run(name, folder, base=f"{prefix}base", arguments=dict(table.get("arguments", {})))
    run.stages = [list(command) for command in stages.values()]
    asked = str(run.arguments.get("methods", "")).replace(" ", "").split(",")
    rank = {method: number for number, method in enumerate(dict.fromkeys(["base", *asked, *TRAINING]))}

    def by_method(method: str) -> tuple:
        return rank.get(method, 99), method

    def by_dataset(path: Path) -> tuple:
        summary = summaries[path]
        order = [Path(d).stem for d in str((summary.get("arguments") or {}).get("eval_dataset", "")).split(",")]
        dataset = summary["dataset"]
        return order.index(dataset) if dataset in order else 99, dataset, by_method(path.name.split(".")[0]), path

    at = folder / "expert_scores"
    scores = ExpertScores.load(at) if (at / "summary.json").is_file() else None
    run.trained = [
        read_trained(folder / "checkpoints" / method, prefix + method, method, scores, run.arguments)
        for method in sorted(methods, key=by_method)
    ]
    in_table = {row["method"]: row["scores"] for row in table.get("rows", [])}
    for path in sorted(summaries, key=by_dataset):
        summary, method = summaries[path], path.name.split(".")[0]
        dataset = summary["dataset"]
        run.summaries.setdefault(dataset, {})[prefix + method] = summary
        told = in_table.get(method, {}).get(dataset, summary)["mean"]
        if told != summary["mean"]:
            run.notes.append(f"table.json has {told} for {method} on {dataset}: another evaluation than the one shown.")
        lines = path.with_name(path.name.replace(".summary.json", ".jsonl"))
        if lines.is_file() and (answers := read_answers(lines)):
            run.answers.setdefault(dataset, {})[prefix + method] = answers
    return run


def read_trained(
    folder: Path, label: str, method: str, scores: ExpertScores | None = None, arguments: dict | None = None
) -> Trained:
    """Read a folder of train.py; `method` and `arguments` are the pipeline's. Where training was not finished, the
    losses are those of its last checkpoint."""
    note = read_json(folder / "run.json")
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda p: (len(p.parent.name), p.parent.name))
    states += [path for path in [folder / "trainer_state.json"] if path.is_file()]
    function = TRAINING.get(method, ("token",))[0] or "token"
    try:
        settings = {**note["config"], **note["config"]["training"]}
        del settings["training"]
        results = dict(note.get("results") or {})
        if not all(isinstance(value, int | float | None) for value in results.values()):
            raise TypeError("a result that is no number")
        source = settings.get("expert_scores_dir")
        if scores is None and source and Path(source).exists():
            scores = ExpertScores.load(source)
        return Trained(
            label=label,
            method=settings["method"],
            folder=folder,
            settings=settings,
            results=results,
            environment=dict(note.get("environment") or {}),
            data=(note.get("inputs") or {}).get("train_dataset") or settings["train_dataset"],
            history=[dict(entry) for entry in read_json(states[-1])["log_history"]] if states else [],
            experts=ExpertConfig.load(folder) if (folder / CONFIG_NAME).is_file() else None,
            scores=scores,
            function=function,
            top_p=(arguments or {}).get(f"top_p_{function}") or TOP_P[function],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: its run.json or trainer_state.json is not train.py's ({error!r})") from error


def read_json(path: Path) -> dict:
    """The JSON object in a file; ValueError, with the file's name, where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); make it again, or move it away") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object; make it again, or move it away")
    return value


def read_summary(path: Path) -> dict:
    """A summary of eval_multigpu.py, checked as far as it is shown: mean and interval may be None."""
    summary = {"primary": "score", "groups": {}, **read_json(path)}
    mean, ci95, against_base = summary.get("mean", ""), summary.get("ci95", ""), summary.get("against_base") or {}
    figures = [] if ci95 is None else ci95 if isinstance(ci95, list) and len(ci95) == 2 else [""]
    if not (
        isinstance(summary.get("dataset"), str)
        and isinstance(summary.get("n"), int)
        and isinstance(summary["groups"], dict)
        and (mean is None or all(isinstance(figure, int | float) for figure in [mean, *figures]))
        and (not against_base or {"difference", "ci95", "certain"} <= against_base.keys())
    ):
        raise ValueError(f"{path}: not a summary of eval_multigpu.py; make it again, or move it away")
    return summary


def read_answers(path: Path) -> list[dict]:
    """The lines of eval_multigpu.py, checked as far as they are shown."""
    lines = read_jsonl(path)
    for number, line in enumerate(lines, 1):
        example, score = line.get("example"), line.get("score")
        if not (isinstance(example, dict) and "prompt" in example and isinstance(score, int | float | None)):
            raise ValueError(f"{path}: line {number} is not one of eval_multigpu.py; make it again, or move it away")
    return lines


def pipeline_command(run: Run) -> list[str]:
    """The command of the pipeline, of its arguments in table.json."""
    flags = {k: v for k, v in run.arguments.items() if v is not None and v is not False and k != "overrides"}
    given = (f"--{k}" if v is True else f"--{k}={v}" for k, v in flags.items())
    return ["python", "scripts/pipeline.py", *given, *run.arguments.get("overrides", [])]


def train_command(t: Trained) -> list[str]:
    """The command that gives the settings of a run: paths as flags, every other key as key=value."""
    paths = ("base_model_path", "train_dataset", "expert_config", "output_dir")
    flags = (f"--{key}={t.settings[key]}" for key in paths if t.settings.get(key))
    keys = {key: value for key, value in t.settings.items() if key not in paths and value is not None}
    world = t.results.get("world_size") or 1
    script = "train_ep.py" if world > 1 and t.method in ("esft", "random") else "train.py"
    start = ["torchrun", f"--nproc-per-node={world}", script] if world > 1 else ["python", script]
    return [*start, *flags, *(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in keys.items())]


TRAINING = {  # method -> (score function that selects, train.py's method)
    "esft-token": ("token", "esft"),
    "esft-gate": ("gate", "esft"),
    "random": ("token", "random"),
    "lora": (None, "lora"),
    "full": (None, "full"),
}
