"""Compare methods and rules of selection by what they learn and what they forget, on results/models/tiny, as tables.

    python scripts/experiments/frontier.py --parts=a,b,c --output=results/tables/frontier

    a  the paper's rule, two others and LoRA at four shares of the parameters, and full fine-tuning
    b  all other rules at 7 %, random experts, and the experts with the shared experts at half the rate
    c  the rows of (a) on the tasks that are not in --tasks, with the first seed
    d  the other rules at the other shares (nearly as long as all the rest)
    e  LoRA on selected experts: those that hold a quarter of the parameters, at a rank that trains the share
    f  what a run can do while it trains, at 7 %: replay, distillation, a pull to the base, other experts, routers, Muon

A method is not one point: its learning rate decides what it forgets, and base + strength x (tuned - base) costs no
training. So every training is evaluated at four strengths, and every method is taken at its best rate and strength:
those that learn most on questions that are not the test's and lose at most two points of the general skills there. The
rate is found with the first seed, for each method and share, from three; the strength for each task as well. All seeds
are then judged on the test questions. Random experts take the rate of the paper's rule, and the experts with the shared
ones half of it. LoRA takes the rank that trains as many parameters.

A finished run has a file in --work_dir. The same command continues, also on another day with more parts or seeds, and
gives the same tables. A run is made again when its data, base or versions change. After a change of the code, remove
the folder. Brackets are 95 % t intervals over seeds.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.experts import moe_layers
from deepseek.files import check_output, write_json, write_text
from deepseek.loading import empty_model
from evaluation.figures import check_picture, save_figure
from evaluation.frontier import RULES, Point, draw_frontier, kept_at, learned_at, recommend
from scripts.experiments.frontier_runs import MAX_LOSS, RECIPES, FrontierLab, Trial
from scripts.experiments.paper_results import half_width, interval
from scripts.experiments.paper_runs import TASKS, TINY
from training.methods import budget_of, rank_of
from utils import ROOT, command_parser, locked, markdown_table, positive, run_cli, seed_number

SHARES = (0.025, 0.07, 0.15, 0.25)
PAPER, SHARED, ADAPTED = "esft-token", "esft-token-shared", "lora-selected"
ADAPTED_SHARE = 0.25  # of the parameters, in the experts that LoRA adapts
CORE = (PAPER, "esft-gradient-global", "esft-contrast", "lora")
OTHERS = (*(rule for rule in RULES if rule not in CORE), SHARED)
LIKE = {"random": 1.0, SHARED: 0.5}  # row -> its rate, of the paper's rule's at the same share
RATES = {"full": ("2.5e-4", "5e-4", "1e-3"), "lora": ("5e-4", "1e-3", "2e-3"), "": ("1e-3", "2e-3", "4e-3")}
RATES[ADAPTED], RATES["muon"] = RATES[""], ("8e-3", "1.6e-2", "3.2e-2")
LOSS = 1.0  # points of general skills, at which rows are compared; a question is 0.64 points
SMALL, RATES_OF_SMALL = 0.03, ("2e-3", "4e-3", "8e-3")  # few experts take a larger rate


@dataclass(frozen=True)
class Row:
    """What is compared: a rule of RULES or another method, and its share of all parameters (0 for full)."""

    name: str
    share: float = 0.0

    @property
    def label(self) -> str:
        return f"{self.name} {self.share:.1%}".replace(".0%", "%") if self.share else self.name

    @property
    def rates(self) -> tuple[str, ...]:
        if self.name not in RATES and self.share < SMALL:
            return RATES_OF_SMALL
        return RATES.get(self.name, RATES[""])


NAMES = [*CORE, "full", *OTHERS, ADAPTED, *RECIPES]
PARTS: dict[str, tuple[str, list[Row]]] = {
    "a": ("The paper's rule, two others, LoRA and full", [*(Row(n, s) for n in CORE for s in SHARES), Row("full")]),
    "b": ("All rules at 7 %", [Row(PAPER, 0.07), *(Row(name, 0.07) for name in OTHERS)]),
    "c": ("Other tasks, one seed", [*(Row(n, s) for n in CORE for s in SHARES), Row("full")]),
    "d": ("The other rules at the other shares",
          [Row(name, s) for name in (PAPER, *OTHERS) for s in SHARES if s != 0.07]),
    "e": ("LoRA on selected experts", [Row(name, s) for name in (PAPER, "lora", ADAPTED) for s in SHARES[:3]]),
    "f": ("What a run can do while it trains, at 7 %", [Row(PAPER, 0.07), *(Row(name, 0.07) for name in RECIPES)]),
}  # fmt: skip


class Study:
    """Finds each row's rate and strengths, and then what it learns and keeps, seed by seed."""

    def __init__(self, args: argparse.Namespace, lab: FrontierLab):
        self.args, self.lab, self.first = args, lab, args.seeds[0]
        self.rate_of: dict[Row, str] = {}
        self.size_of: dict[Row, dict] = {}

    def trial(self, row: Row, task: str, seed: int, rate: str = "") -> Trial:
        """Return a training of a row, at its best rate if no other is given."""
        method = {"lora": "lora", ADAPTED: "lora", "full": "full", "base": "base"}.get(row.name, "esft")
        rule = PAPER if row.name in (SHARED, ADAPTED, *RECIPES) else row.name if method == "esft" else ""
        rate = "" if method == "base" else rate or self.rate_of[row]
        return Trial(task, method, seed, learning_rate=rate, shared=row.name == SHARED, row=row.name, rule=rule,
                     share=row.share, validated=seed == self.first, **self.size(row))  # fmt: skip

    def size(self, row: Row) -> dict:
        if row not in self.size_of:
            size = {}
            if row.name == ADAPTED:
                size = adapted_size(row.share)
            elif row.name == "lora":
                size = {"rank": rank_of(empty_model(ROOT / TINY), row.share)}
            elif row.share:
                size = {"budget": budget_of(empty_model(ROOT / TINY), row.share)}
            self.size_of[row] = size
        return self.size_of[row]

    # ---- what is run ------------------------------------------------------------------------------------------------

    def run(self, rows: list[Row], others: list[Row]) -> None:
        """Make all results: rates first. `others` are the rows on the tasks that are not in --tasks."""
        rows = list(dict.fromkeys([*rows, *(Row(PAPER, row.share) for row in rows if row.share)]))  # all are compared
        needed = list(dict.fromkeys([*rows, *others]))
        tasks = [*self.args.tasks, *(self.other_tasks() if others else [])]
        self.lab.make((self.trial(Row("base"), task, self.first) for task in tasks), "base")
        tried = [row for row in needed if row.name not in LIKE]
        self.lab.make(
            (
                self.trial(row, task, self.first, rate)
                for row in tried
                for rate in row.rates
                for task in self.args.tasks
            ),
            "rates",
        )
        for row in sorted(needed, key=lambda row: row.name in LIKE):
            self.rate_of[row] = self.best_rate(row)
        wanted = [self.trial(row, task, seed) for seed in self.args.seeds for task in self.args.tasks for row in rows]
        wanted += [self.trial(row, task, self.first) for task in self.other_tasks() for row in others]
        self.lab.make(wanted, "runs")

    def other_tasks(self) -> list[str]:
        return [task for task in TASKS if task not in self.args.tasks]

    def best_rate(self, row: Row) -> str:
        """Return the rate that learns most at the best strength, on the validation questions. The lower one of equals.

        A row of LIKE has a fixed part of the rate of the paper's rule.
        """
        if row.name in LIKE:
            rate, factor = self.rate_of[Row(PAPER, row.share)], LIKE[row.name]
            return rate if factor == 1 else f"{factor * float(rate):g}"

        def learned(rate: str) -> float:
            trials = [self.trial(row, task, self.first, rate) for task in self.args.tasks]
            return statistics.fmean(self.chosen(trial).task for trial in trials)

        return max(row.rates, key=lambda rate: (learned(rate), -float(rate)))

    def chosen(self, trial: Trial) -> Point:
        """Return the point of a validated trial that is taken, as the validation questions see it."""
        base, *curve = self.lab.points(trial, "validation")
        return recommend(curve, base, MAX_LOSS)

    # ---- what came out ----------------------------------------------------------------------------------------------

    def strength(self, row: Row, task: str) -> float:
        return self.chosen(self.trial(row, task, self.first)).strength

    def curve(self, row: Row, task: str, seed: int) -> list[Point]:
        """Return a row's test scores at each strength, from the base on."""
        return self.lab.points(self.trial(row, task, seed), "test")

    def taken(self, row: Row, task: str, seed: int) -> Point:
        """Return a row's test scores at the strength taken."""
        strength = self.strength(row, task)
        return next(point for point in self.curve(row, task, seed) if point.strength == strength)

    def mean(self, value: Callable[[str, int], float]) -> list[float]:
        """Return a value of (task, seed) for each seed, averaged over --tasks."""
        return [statistics.fmean(value(task, seed) for task in self.args.tasks) for seed in self.args.seeds]

    def learned(self, row: Row) -> list[float]:
        return self.mean(lambda task, seed: self.taken(row, task, seed).task)

    def kept(self, row: Row) -> list[float]:
        return self.mean(lambda task, seed: self.taken(row, task, seed).general)

    def kept_like(self, row: Row, other: Row) -> list[float]:
        """Return what a row keeps where it has learned as much as `other` has; -inf in a seed where it never has."""
        return self.mean(lambda task, seed: kept_at(self.curve(row, task, seed), self.taken(other, task, seed).task))

    def learned_within(self, row: Row) -> list[float]:
        """Return the most that a row learns at any strength where it loses at most LOSS points of general skills."""

        def learned(task: str, seed: int) -> float:
            base, *_ = curve = self.curve(row, task, seed)
            return learned_at(curve, base.general - LOSS)

        return self.mean(learned)

    def cost(self, row: Row, tasks: list[str], seeds: list[int]) -> dict:
        """Return the share that a row trains, its gradients and optimizer states in MiB, and seconds per step."""
        told = [self.lab.result(self.trial(row, task, seed))["trained"] for task in tasks for seed in seeds]
        held = [(one["gradient_bytes"] + one["optimizer_bytes"]) / 2**20 for one in told]
        return {
            "trained": statistics.fmean(one["trained_parameters"] / one["parameters"] for one in told),
            "held_mib": statistics.fmean(held),
            "step_seconds": statistics.median(one["step_seconds"] for one in told),
        }

    def validated(self, row: Row) -> float:
        """Return what a row learns on the validation questions, at the strengths taken."""
        points = [self.chosen(self.trial(row, task, self.first)) for task in self.args.tasks]
        return statistics.fmean(point.task for point in points)


def adapted_size(share: float) -> dict:
    """Return the budget and the rank at which LoRA on selected experts trains a share of the parameters."""
    model = empty_model(ROOT / TINY)
    config, budget = model.config, budget_of(model, ADAPTED_SHARE)
    experts = round(budget * sum(layer.num_experts for layer in moe_layers(model).values()))
    of_rank_1 = experts * 3 * (config.hidden_size + config.moe_intermediate_size)  # three projections, A and B each
    return {"budget": budget, "rank": round(share * sum(p.numel() for p in model.parameters()) / of_rank_1)}


# ---- tables: each function returns Markdown, and rows for the JSON ---------------------------------------------------

Table = tuple[str, list[dict]]


def scores_table(study: Study, rows: list[Row], tasks: list[str], seeds: list[int]) -> Table:
    """Return a line per row: rate and strengths, the score on each task, the general skills, and what it takes."""
    base = [study.taken(Row("base"), task, study.first) for task in tasks]
    cells = [*(f"{point.task:.1f}" for point in base), f"{statistics.fmean(p.task for p in base):.1f}"]
    lines, found = [["base", "-", "-", *cells, f"{base[0].general:.1f}", "-", "-", "-"]], []
    for row in rows:
        points = {task: [study.taken(row, task, seed) for seed in seeds] for task in tasks}
        by_task = {task: [point.task for point in own] for task, own in points.items()}
        average = [statistics.fmean(by_task[task][i] for task in tasks) for i in range(len(seeds))]
        general = [statistics.fmean(points[task][i].general for task in tasks) for i in range(len(seeds))]
        strengths = {task: study.strength(row, task) for task in tasks}
        shown = " ".join(f"{strength:g}" for strength in strengths.values())
        scores = [interval(values) for values in (*by_task.values(), average, general)]
        cost = study.cost(row, tasks, seeds)
        takes = [f"{cost['trained']:.1%}", f"{cost['held_mib']:.1f} MiB", f"{cost['step_seconds']:.2f}"]
        lines.append([row.label, study.rate_of[row], shown, *scores, *takes])
        curves = {task: [[vars(p) for p in study.curve(row, task, seed)] for seed in seeds] for task in tasks}
        values = {"tasks": by_task, "average": average, "general": general, "strength": strengths, "curves": curves}
        found.append({"name": row.name, "share": row.share, "learning_rate": study.rate_of[row], **values, **cost})
    heads = ["row", "rate", "strength", *tasks, "average", "general", "trained", "gradients, states", "step (s)"]
    return markdown_table(heads, lines), found


def comparison(study: Study, pairs: list[tuple[Row, Row]]) -> Table:
    """Return a line per pair: what one learns and keeps more than the other, and whether it dominates."""
    lines, found = [], []
    for one, other in pairs:
        learned, kept = study.learned(other), study.kept(other)
        by = {
            "learns": differences(study.learned(one), learned),
            "keeps": differences(study.kept(one), kept),
            "learns_at_equal_loss": differences(study.learned_within(one), study.learned_within(other)),
            "keeps_at_equal_learning": differences(study.kept_like(one, other), kept),
        }
        shown = [interval(values, "+.1f") if min(values) > float("-inf") else "-" for values in by.values()]
        said = verdict(by["learns"], by["keeps"])
        lines.append([one.label, other.label, *shown, said])
        values = {what: None if cell == "-" else by[what] for what, cell in zip(by, shown)}
        found.append({"one": one.label, "other": other.label, **values, "verdict": said})
    heads = ["learns more by", "keeps more by", "learns more at equal loss by", "keeps more at equal learning by"]
    return markdown_table(["one", "other", *heads, "verdict"], lines), found


def differences(ones: list[float], others: list[float]) -> list[float]:
    return [one - other for one, other in zip(ones, others, strict=True)]


def verdict(learns: list[float], keeps: list[float]) -> str:
    """Return whether the first of a pair dominates: one difference is certainly above 0, and the other not below."""
    if len(learns) < 2:
        return "one seed"
    for sign, word in (1, "dominates"), (-1, "is dominated"):
        means = [sign * statistics.fmean(values) for values in (learns, keeps)]
        certain = [mean > half_width(values) for mean, values in zip(means, (learns, keeps))]
        if any(certain) and min(means) >= 0:
            return word
    return "neither"


def best_rows(study: Study, rows: list[Row]) -> list[Row]:
    """Return the share of each method that learns most on the validation questions. The smaller one of equals."""
    names = dict.fromkeys(row.name for row in rows)
    own = {name: [row for row in rows if row.name == name] for name in names}
    return [max(among, key=lambda row: (study.validated(row), -row.share)) for among in own.values()]


def pairs_of(study: Study, rows: list[Row]) -> list[tuple[Row, Row]]:
    """Return each row with the paper's rule at its share, and then each method at its best share with each other."""
    same = [(row, Row(PAPER, row.share)) for row in rows if row.share and row.name != PAPER]
    best = best_rows(study, rows)
    among = [(a, b) for i, a in enumerate(best) for b in best[i + 1 :]]
    return list({frozenset(pair): pair for pair in [*among, *same]}.values())


def mean_curve(study: Study, row: Row) -> list[Point]:
    """Return a row's points at all strengths but 0 (the base: its only one), averaged over --tasks and seeds."""
    first = 0 if row.name == "base" else 1
    curves = [study.curve(row, task, seed)[first:] for task in study.args.tasks for seed in study.args.seeds]
    averages = [
        (statistics.fmean(point.task for point in points), statistics.fmean(point.general for point in points))
        for points in zip(*curves)
    ]
    return [Point(row.label, point.strength, *mean, row.share) for point, mean in zip(curves[0], averages)]


NOTE = """Each row is at its best rate (found with the first seed, on all of these tasks together) and strength (with
the first seed, for each task): those that learn most on validation questions and lose at most 2 points of the general
skills there. Scores are those on the test questions; brackets are 95 % t intervals over seeds. The time of a step is a
median, and two runs shared the machine: compare times by benchmark.py.

The differences are in points, seed by seed, averaged over the tasks. "At equal loss" compares what both learn at most
where they lose at most 1 point of the general skills; here the test questions choose the strength, for both. "At equal
learning" follows the first row's curve over strengths to where it has learned as much as the other; "-" where it does
not get there in some seed. One dominates the other if it is certainly better in learning or in keeping (the interval is
above 0), and on average not worse in the other."""


# ---- the command ----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--parts", default="a,b,c", metavar="LIST", help="parts, separated by commas (default: %(default)s)")
    add("--tasks", nargs="+", choices=TASKS, default=["law", "summary"], metavar="TASK", help="tasks with all seeds, "
        "on which rates are found (default: law summary)")  # fmt: skip
    add("--seeds", type=seed_number, nargs="+", default=[0, 1, 2], metavar="N", help="the first finds rates and "
        "strengths (default: 0 1 2)")  # fmt: skip
    add("--shares", type=float, nargs="+", choices=SHARES, default=list(SHARES), metavar="S", help="of the parameters "
        f"(default: {' '.join(map(str, SHARES))})")  # fmt: skip
    add("--methods", nargs="+", choices=NAMES, metavar="NAME", help="only these (default: all of "
        f"the parts; {', '.join(NAMES)})")  # fmt: skip
    add("--steps", type=positive, default=450, metavar="N", help="optimizer steps of a run (default: %(default)s)")
    add("--jobs", type=positive, default=2, metavar="N", help="runs at a time, with one thread each (default: 2)")
    add("--work_dir", default="results/runs/frontier", metavar="DIR", help="finished runs (default: %(default)s)")
    add("--output", metavar="STEM", help="write STEM_a.md, .json and .svg, ... (default: print only)")
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    if unknown := set(args.parts) - PARTS.keys():
        raise ValueError(f"cannot run part {min(unknown)!r}. Give some of {', '.join(PARTS)} in --parts.")
    return args


def rows_of(part: str, args: argparse.Namespace) -> list[Row]:
    """Return the rows of a part that the flags leave."""
    rows = [row for row in PARTS[part][1] if row.share in (0, *args.shares)]
    return [row for row in rows if row.name in (args.methods or [row.name])]


def main(argv: list[str] | None = None) -> dict[str, str]:
    """Run the parts, and return the tables of each."""
    args = parse_args(argv)
    check_output(args.work_dir, folder=True)
    if args.output:
        check_picture(f"{args.output}_a.svg")
    if empty := [part for part in args.parts if not rows_of(part, args)]:
        raise ValueError(f"cannot run part {empty[0]}: --methods and --shares leave nothing of it.")
    with locked(args.work_dir):
        study, tables = Study(args, FrontierLab(args)), {}
        rows = {part: rows_of(part, args) for part in args.parts}
        study.run([row for part in args.parts if part != "c" for row in rows[part]], rows.get("c", []))
        for part in args.parts:
            study.lab.used.clear()
            tables[part] = write_part(study, part, rows[part])
    return tables


def write_part(study: Study, part: str, rows: list[Row]) -> str:
    """Print and write the tables and the picture of a part. Return the tables."""
    args, seeds = study.args, study.args.seeds[: 1 if part == "c" else None]
    tasks = study.other_tasks() if part == "c" else args.tasks
    text, found = scores_table(study, rows, tasks, seeds)
    told = {"rows": found}
    if part != "c":
        compared, told["pairs"] = comparison(study, pairs_of(study, rows))
        text += f"\n\n{compared}"
    print(f"\n{PARTS[part][0]}\n\n{text}")
    if args.output:
        stem = f"{args.output}_{part}"
        how = f"tasks {' '.join(tasks)}, seed{'s' * (len(seeds) > 1)} {' '.join(map(str, seeds))}, {args.steps} steps"
        source = f"`python scripts/experiments/frontier.py --parts={part}`, {how}; {study.lab.origin()}"
        write_text(f"{stem}.md", f"# {PARTS[part][0]}\n\n{text}\n\n{NOTE}\n\n{source}\n")
        environments = list({facts["date"]: facts for facts in study.lab.used}.values())
        decides = {name: getattr(args, name) for name in ("tasks", "seeds", "shares", "methods", "steps")}
        write_json(f"{stem}.json", {**told, "made_by": source, "arguments": decides, "environments": environments})
        if part != "c":
            base, *points = [point for row in (Row("base"), *rows) for point in mean_curve(study, row)]
            labels = f"{PARTS[part][0]}: {', '.join(tasks)}", "general skills (%)", "mean of the tasks (%)"
            save_figure(draw_frontier(points, base, None, *labels), f"{stem}.svg")
    return text


if __name__ == "__main__":
    run_cli(main)
