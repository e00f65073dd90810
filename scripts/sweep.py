"""The grid of scripts/pipeline.py --sweep: candidates, a third of the training, what is dominated, the rest, a table.

A candidate is a method, a share of the model's parameters and a learning rate. Its strengths cost no training: the
evaluation moves the base towards it by each of them. A candidate survives the first third if one of its strengths is on
the frontier of all. Every stage is a command of this project, and runs once (`Stages` of the pipeline).
"""

import argparse
import dataclasses
import math
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from deepseek.files import read_json, write_json, write_jsonl, write_text
from deepseek.loading import empty_model
from evaluation.figures import save_figure
from evaluation.frontier import SELECTS, Point, draw_frontier, frontier, recommend
from scripts.stages import Commands, Plan, Stages, data_config, flags, mean_of, training_command
from utils import PYTHON, ROOT, counted, environment, flag_words, markdown_table, note, split_names

ADAPTED, ADAPTED_SHARE = "lora-selected", 0.25  # the experts that LoRA adapts hold a quarter of the parameters
DEFAULTS = {"shares": [0.07, 0.25], "rates": [1.0, 2.0], "strengths": [0.5, 0.7, 0.85, 1.0], "max_loss": 2.0}
LEAST_KNOWN = 20.0  # percent of the general questions that the base has to know
FEW = 30  # samples
GENERAL = "general"  # what is asked by default


@dataclass(frozen=True)
class Candidate:
    """A training of the grid. `share` is that of all parameters, `budget` that of the experts, `rank` that of LoRA.

    With both it is LoRA on these experts.
    """

    method: str
    rate: float
    share: float = 1.0
    budget: float = 0.0
    rank: int = 0

    @property
    def selection(self) -> str:
        share = max(self.share, ADAPTED_SHARE) if self.method == ADAPTED else self.share
        return f"{self.method}-{100 * share:g}".replace(".", "_")

    @property
    def name(self) -> str:
        what, rank = self.selection if self.budget else self.method, f"-r{self.rank}" if self.rank else ""
        return f"{what}{rank}-lr{self.rate:g}".replace(".", "_")

    @property
    def words(self) -> list[str]:
        rank = [f"lora_rank={self.rank}", f"lora_alpha={2 * self.rank}"] if self.rank else []
        return [f"learning_rate={self.rate:g}", *rank]


# ---- before the first stage -----------------------------------------------------------------------------------------


def numbers(most: float) -> Callable[[str], list[float]]:
    """Return a converter of a flag: numbers between commas, each above 0 and at most `most`, in ascending order."""

    def convert(text: str) -> list[float]:
        try:
            found = sorted({float(part) for part in text.split(",")})
        except ValueError:
            found = [math.nan]
        if not all(0 < number <= most for number in found):
            raise argparse.ArgumentTypeError(f"{text!r:.60} is not a list of numbers above 0 and at most {most:g}")
        return found

    return convert


def add_sweep_flags(parser: argparse.ArgumentParser) -> None:
    """Add --sweep and what goes with it."""
    add, usual = parser.add_argument_group("sweep").add_argument, DEFAULTS
    shown = {name: ",".join(f"{number:g}" for number in usual[name]) for name in ("shares", "rates", "strengths")}
    add("--sweep", action="store_true", help="look for the best point between learning and forgetting, see above "
        "(default of --methods: esft-token,esft-gradient-global)")  # fmt: skip
    add("--shares", type=numbers(1), metavar="S[,S]", help="shares of the model's parameters to train; LoRA takes the "
        f"rank that comes nearest (default: {shown['shares']})")  # fmt: skip
    add("--rates", type=numbers(1e6), metavar="X[,X]", help="factors of each method's learning_rate (default: "
        f"{shown['rates']})")  # fmt: skip
    add("--strengths", type=numbers(2), metavar="A[,A]", help="how far to go from the base to what was trained "
        f"(default: {shown['strengths']})")  # fmt: skip
    add("--max_loss", type=float, metavar="POINTS", help="what the recommended point may lose of general skills "
        f"(default: {usual['max_loss']:g})")  # fmt: skip


def check_sweep_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in what is not given. End the command where a flag has no effect."""
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None and args.sweep:
            setattr(args, name, default)
        elif getattr(args, name) is not None and not args.sweep:
            parser.error(f"--{name} has an effect only with --sweep")
    if args.sweep and args.no_merge:
        parser.error("--no_merge has no effect with --sweep: nothing is merged")
    if args.sweep and not 0 <= args.max_loss < math.inf:
        parser.error(f"--max_loss {args.max_loss:g} is not a number of points from 0")
    if args.sweep and args.eval_dataset and len(split_names(args.eval_dataset)) != 2:
        parser.error("--sweep takes two data sets: --eval_dataset=TASK,GENERAL")
    if args.methods is None:
        args.methods = "esft-token,esft-gradient-global" if args.sweep else "esft-token"


def plan_grid(args: argparse.Namespace, plans: dict[str, Plan]) -> list[Candidate]:
    """Return the candidates.

    Raises:
        ValueError: a share that the routed experts do not have, or too few steps for a third of them.
    """
    from training.methods import budget_of, rank_of  # slow; --help can do without

    grid = []
    for method, plan in plans.items():
        steps, rate = plan.arguments.max_steps, plan.arguments.learning_rate
        if 0 < steps < 3:
            raise ValueError(f"cannot train a third of max_steps={steps}. Give at least 3.")
        for share in [1.0] if method == "full" else args.shares:
            size = {"share": share}
            if method == "lora":
                size["rank"] = rank_of(empty_model(args.base_model_path), share)
            elif method == ADAPTED:
                model = empty_model(args.base_model_path)
                size["budget"] = min(1, budget_of(model, max(share, ADAPTED_SHARE)))
                size["rank"] = rank_of(model, share, size["budget"])
            elif method != "full":
                model, shared = empty_model(args.base_model_path), "train_shared_experts" in plan.rule
                size["budget"] = budget_of(model, share, shared)
                if size["budget"] > 1:
                    most = f"the routed experts have {1 / budget_of(model, 1):.1%} of the parameters"
                    raise ValueError(f"cannot select a share of {share:g}: {most}. Lower --shares.")
                if size["budget"] <= 0:
                    raise ValueError(
                        f"cannot train a share of {share:g}: the shared experts have more. Raise --shares."
                    )
            grid += [Candidate(method, float(f"{rate * factor:.6g}"), **size) for factor in args.rates]
    return list({candidate.name: candidate for candidate in grid}.values())  # two shares may have one rank


def questions(args: argparse.Namespace, folder: Path, plans: dict[str, Plan]) -> tuple[str, str]:
    """Return the data sets of the task and of general skills. Without --eval_dataset, write the held-out samples.

    Raises:
        ValueError: no held-out sample is one question and one answer.
    """
    from training.data import held_out_questions

    if args.eval_dataset:
        task, general = split_names(args.eval_dataset)
        return task, general
    rows, _ = held_out_questions(dataclasses.asdict(data_config(plans)))
    if not rows:
        cause = f"{args.train_dataset} holds out no sample that is one question and one answer"
        raise ValueError(f"cannot sweep: {cause}. Give --eval_dataset=TASK,GENERAL.")
    few = "; so few say little, and a larger validation_fraction holds out more" * (len(rows) < FEW)
    note(f"the task is judged by {counted(len(rows), 'sample')} that training holds out{few}")
    note(
        f"what is forgotten is judged by datasets/eval/{GENERAL}.jsonl. Its simple questions say little of a large "
        "model: better give --eval_dataset=TASK,GENERAL with questions of what it must not lose"
    )
    path = folder / "held_out" / f"{Path(args.train_dataset).stem}.jsonl"
    write_jsonl(path, rows)
    return str(path), GENERAL


# ---- the stages -----------------------------------------------------------------------------------------------------


def survivors(tried: dict[Candidate, list[Point]], base: Point) -> list[Candidate]:
    """Return the candidates with a point on the frontier that learns more than the base."""
    best = frontier([base, *(point for curve in tried.values() for point in curve)])
    best = {point.name for point in best if point.task > base.task}
    return [candidate for candidate in tried if candidate.name in best]


class Sweep:
    """Runs the stages of a grid in a folder. `asked` are the data sets of the task and of general skills."""

    def __init__(
        self, args: argparse.Namespace, folder: Path, stages: Stages, plans: dict[str, Plan], asked: tuple[str, str]
    ):
        self.args, self.folder, self.stages, self.plans, self.asked = args, folder, stages, plans, asked
        self.commands = Commands(args, stages, folder, data_config(plans))

    def run(self, grid: list[Candidate]) -> Point:
        """Train the grid, prune it, train the rest, write what came out, and return the recommended point."""
        self.select(grid)
        base = self.base()
        tried = {c: self.measure(c, "thirds", f"{n} of {len(grid)}") for n, c in enumerate(grid, 1)}
        left = survivors(tried, base)
        print(
            f"\n{len(left)} of {counted(len(grid), 'candidate')} go on: {', '.join(c.name for c in left)}", flush=True
        )
        done = {c: self.measure(c, "checkpoints", f"{n} of {len(left)}") for n, c in enumerate(left, 1)}
        points = [point for curve in done.values() for point in curve]
        taken = recommend(points, base, self.args.max_loss)
        self.write(base, tried, points, taken)
        if taken != base:
            self.tell_next(next(c for c in done if c.name == taken.name), taken)
        return taken

    def select(self, grid: list[Candidate]) -> None:
        """Score the experts, and select those of each candidate."""
        rules = {
            self.config_of(c): {**SELECTS[c.method], "budget": f"{c.budget:.6g}"} for c in grid if c.method in SELECTS
        }
        self.commands.score_and_select(rules)

    def config_of(self, candidate: Candidate) -> Path | None:
        return self.folder / "expert_configs" / f"{candidate.selection}.json" if candidate.budget else None

    def training(self, candidate: Candidate, third: bool = False) -> tuple[str, dict]:
        """Return the script and the flags that train a candidate."""
        plan = self.plans[candidate.method]
        words, config = [*plan.words, *candidate.words], self.config_of(candidate)
        if third:
            steps, epochs = plan.arguments.max_steps, plan.arguments.num_train_epochs
            words.append(f"max_steps={steps // 3}" if steps > 0 else f"num_train_epochs={epochs / 3:.6g}")
        return self.commands.training(words, config)

    def measure(self, candidate: Candidate, stage: str, place: str) -> list[Point]:
        """Train a candidate, and return its point at each strength. `stage` is "thirds" or "checkpoints"."""
        third, output = stage == "thirds", self.folder / stage / candidate.name
        print(f"\n[{place}] {candidate.name}, {'a third' if third else 'all'} of the training", flush=True)
        script, options = self.training(candidate, third)
        self.stages.run(output / "trainer_state.json", script, **options, output_dir=output)
        results = read_json(output / "run.json", "results")["results"]
        share = results["trained_parameters"] / results["parameters"]
        found = self.answers(f"{stage}-{candidate.name}", output)
        return [Point(candidate.name, strength, task, general, share) for strength, task, general in found]

    def base(self) -> Point:
        """Return what the base scores. Raise ValueError if it knows so little that it has nothing to forget."""
        ((_, task, general),) = self.answers("base", None)
        if general < LEAST_KNOWN:
            raise ValueError(
                f"cannot tell what is forgotten: the base scores {general:.1f} on {self.asked[1]}. Give "
                "--eval_dataset=TASK,GENERAL with general questions that it knows."
            )
        return Point("base", 0.0, task, general)

    def answers(self, name: str, model: Path | None) -> list[tuple[float, float, float]]:
        """Evaluate the base, or a trained model at each strength. Return (strength, task, general), in percent."""
        output, names = self.folder / "completions" / f"{name}.jsonl", [Path(data).stem for data in self.asked]
        if not model:
            summaries = [output.with_suffix(f".{data}.summary.json") for data in names]
            self.commands.evaluate(summaries[-1], output, self.asked)
            return [(0.0, *map(mean_of, summaries))]
        curve, strengths = output.with_suffix("") / "curve.json", ",".join(f"{s:g}" for s in self.args.strengths)
        strengths = f"0,{strengths}" if len(self.args.strengths) == 1 else strengths  # one strength is not a curve
        about = {"adapter_dir": model, "base_answers": output.parent, "strength": strengths}
        self.commands.evaluate(curve, output, self.asked, **about)
        points = read_json(curve, "points")["points"]
        return [(p["strength"], *(p["mean"][data] for data in names)) for p in points if p["strength"]]

    # ---- what came out ----------------------------------------------------------------------------------------------

    def write(self, base: Point, tried: dict[Candidate, list[Point]], points: list[Point], taken: Point) -> None:
        """Write sweep.md, sweep.json and sweep.png, and print the table."""
        task, general = (Path(name).stem for name in self.asked)
        text = format_sweep(base, [point for curve in tried.values() for point in curve], points, taken, task, general)
        loss = f"loses at most {self.args.max_loss:g} points of {general}"
        if taken == base:
            text += f"\n\nNothing learns and {loss}. Lower --rates, or raise --max_loss."
        else:
            text += f"\n\nRecommended: {taken.name} at strength {taken.strength:g}. It learns most of what {loss}."
        write_text(self.folder / "sweep.md", f"{text}\n")
        rows = {"points": [base, *points], "thirds": [point for curve in tried.values() for point in curve]}
        rows = {key: [dataclasses.asdict(point) for point in found] for key, found in rows.items()}
        facts = {"recommended": dataclasses.asdict(taken), "arguments": vars(self.args), "environment": environment()}
        write_json(self.folder / "sweep.json", {**rows, **facts})
        print(f"\n{text}\n\nAll of it is in {self.folder}")
        if find_spec("matplotlib"):
            labels = "What is learned, and what is kept", f"{general} (%)", f"{task} (%)"
            save_figure(draw_frontier(points, base, taken, *labels), self.folder / "sweep.png")
        else:
            note(f"no picture without matplotlib: {PYTHON} -m pip install -c constraints.txt matplotlib")

    def tell_next(self, candidate: Candidate, taken: Point) -> None:
        """Print the command that trains a candidate again, and the one that merges it at its strength."""
        script, options = self.training(candidate)
        print("train it:", training_command(script, **options))
        paths = {"adapter_dir": self.folder / "checkpoints" / candidate.name, "strength": f"{taken.strength:g}"}
        merge = flag_words(**flags(self.args, "base_model_path"), **paths, output_dir=self.folder / "merged")
        print("or merge it:", shlex.join([PYTHON, os.path.relpath(ROOT / "scripts/merge_adapter.py"), *merge]))


def format_sweep(base: Point, thirds: list[Point], points: list[Point], taken: Point, task: str, general: str) -> str:
    """Return the table of what was trained to the end, the recommended point bold, and that of what was pruned."""
    best = frontier([base, *points])

    def cells(point: Point) -> list[str]:
        share = f"{point.share:.1%}" if point.share else "-"
        return [point.name, share, f"{point.strength:g}", f"{point.task:.1f}", f"{point.general:.1f}"]

    lines = []
    for point in (base, *points):
        mark = "**" * (point == taken)
        lines.append([*(f"{mark}{cell}{mark}" for cell in cells(point)), "yes" if point in best else ""])
    heads = ["trained", "share", "strength", task, general]
    text = markdown_table([*heads, "on the frontier"], lines)
    names = {point.name for point in points}
    if pruned := [cells(point) for point in thirds if point.name not in names]:
        text += f"\n\nDominated after a third of the training:\n\n{markdown_table(heads, pruned)}"
    return text
