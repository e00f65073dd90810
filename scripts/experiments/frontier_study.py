"""What frontier.py compares, and how a row's rate and strengths are found: rows, parts, and the study of them."""

import argparse
import copy
import functools
import itertools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from deepseek.loading import empty_model
from evaluation.frontier import RULES, Point, kept_at, learned_at, recommend
from scripts.experiments.frontier_runs import MAX_LOSS, RECIPES, FrontierLab, Trial
from scripts.experiments.paper_runs import TASKS, TINY
from training.methods import budget_of, rank_of
from utils import ROOT

SHARES = (0.025, 0.07, 0.15, 0.25)
PAPER, ADAPTED = "esft-token", "lora-selected"
SHARED = {name: name.removesuffix("-shared") for name in RULES if name.endswith("-shared")}  # -> without the shared
ADAPTED_SHARE = 0.25  # of the parameters, in the experts that LoRA adapts
CORE = (PAPER, "esft-gradient-global", "esft-gradient-global-shared", "lora")
AS_PAPER = {"random", *RECIPES} - {"muon"}  # they take the rate of the paper's rule
OTHERS = tuple(rule for rule in RULES if rule not in CORE)
RATES = {"full": ("2.5e-4", "5e-4", "1e-3"), "lora": ("5e-4", "1e-3", "2e-3"), "": ("1e-3", "2e-3", "4e-3")}
RATES |= {ADAPTED: RATES[""], "muon": ("8e-3", "1.6e-2", "3.2e-2"), **dict.fromkeys(SHARED, RATES["lora"])}
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
    def rated(self) -> "Row":
        """The row whose rates are tried for this one."""
        as_at_7 = self.name in OTHERS or (self.name in RULES and self.share == 0.15)
        return Row(PAPER if self.name in AS_PAPER else self.name, 0.07 if as_at_7 else self.share)

    @property
    def rates(self) -> tuple[str, ...]:
        if self.name not in RATES and self.share < SMALL:
            return RATES_OF_SMALL
        return RATES.get(self.name, RATES[""])


def rows_at(names: Iterable[str], shares: Iterable[float]) -> list[Row]:
    """Return a row for each name and share, but where the shared experts alone are more than the share."""
    return [Row(name, s) for name in names for s in shares if not (name in SHARED and s < SMALL)]


NAMES = [*CORE, "full", *OTHERS, ADAPTED, *RECIPES]
PARTS: dict[str, tuple[str, list[Row]]] = {
    "a": ("The paper's rule, gradients, LoRA and full", [*rows_at(CORE, SHARES), Row("full")]),
    "b": ("The other rules at 7 %", rows_at([PAPER, *OTHERS], [0.07])),
    "c": ("Other tasks, one seed", [*rows_at(CORE, SHARES), Row("full")]),
    "d": ("The other rules at the other shares, one seed", rows_at([PAPER, *OTHERS], [s for s in SHARES if s != 0.07])),
    "e": ("LoRA on selected experts", rows_at([PAPER, "lora", ADAPTED], SHARES[:3])),
    "f": ("What a run can do while it trains, at 7 %", rows_at([PAPER, *RECIPES], [0.07])),
}  # fmt: skip
ON_OTHER_TASKS, WITH_ONE_SEED = {"c"}, {"c", "d"}


class Study:
    """Finds each row's rate on --tasks, and then what it learns and keeps, on the tasks and seeds of a part."""

    def __init__(self, args: argparse.Namespace, lab: FrontierLab):
        self.args, self.lab, self.first = args, lab, args.seeds[0]
        self.tasks, self.seeds = args.tasks, args.seeds
        self.rate_of: dict[Row, str] = {}

    def for_part(self, part: str) -> "Study":
        """Return the study on the tasks and seeds of a part."""
        study = copy.copy(self)
        if part in ON_OTHER_TASKS:
            study.tasks = [task for task in TASKS if task not in self.args.tasks]
        if part in WITH_ONE_SEED:
            study.seeds = self.args.seeds[:1]
        return study

    def trial(self, row: Row, task: str, seed: int, rate: str = "") -> Trial:
        """Return a training of a row, at its best rate if no other is given."""
        method = {"lora": "lora", ADAPTED: "lora", "full": "full"}.get(row.name, "esft")
        rule = PAPER if row.name in (ADAPTED, *RECIPES) else row.name if method == "esft" else ""
        rule = SHARED.get(row.name, rule)
        return Trial(task, method, seed, learning_rate=rate or self.rate_of[row], row=row.name, rule=rule,
                     share=row.share, shared=row.name in SHARED, validated=seed == self.first,
                     **size_of(row))  # fmt: skip

    # ---- what is run ------------------------------------------------------------------------------------------------

    def run(self, parts: dict[str, list[Row]]) -> None:
        """Find the rates, and then train the rows of each part, and the paper's rule at their shares."""
        needed = {part: [*rows, *(Row(PAPER, row.share) for row in rows if row.share)] for part, rows in parts.items()}
        rated = {row: row.rated for row in itertools.chain(*needed.values())}
        tried = [(row, rate, task) for row in rated.values() for rate in row.rates for task in self.args.tasks]
        self.lab.make((self.trial(row, task, self.first, rate) for row, rate, task in tried), "rates")
        self.rate_of = {row: self.best_rate(rated_as) for row, rated_as in rated.items()}
        wanted = []
        for part, rows in needed.items():
            study = self.for_part(part)
            wanted += [self.trial(row, task, seed) for seed in study.seeds for task in study.tasks for row in rows]
        self.lab.make(wanted, "runs")

    def best_rate(self, row: Row) -> str:
        """Return the rate that learns most at its best strength on validation questions. The lower one of equals."""
        return max(row.rates, key=lambda rate: (self.validated(row, rate), -float(rate)))

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
        """Return a value of (task, seed) for each seed, averaged over the tasks."""
        return [statistics.fmean(value(task, seed) for task in self.tasks) for seed in self.seeds]

    def learned(self, row: Row) -> list[float]:
        return self.mean(lambda task, seed: self.taken(row, task, seed).task)

    def kept(self, row: Row) -> list[float]:
        return self.mean(lambda task, seed: self.taken(row, task, seed).general)

    def keeps_at_equal_learning(self, one: Row, other: Row) -> list[float]:
        """Return what `one` keeps more than `other` where both have learned the most that both reach."""

        def difference(task: str, seed: int) -> float:
            curves = [self.curve(row, task, seed) for row in (one, other)]
            level = min(max(point.task for point in curve) for curve in curves)
            kept, others = (kept_at(curve, level) for curve in curves)
            return kept - others

        return self.mean(difference)

    def learned_within(self, row: Row) -> list[float]:
        """Return the most that a row learns at any strength where it loses at most LOSS points of general skills."""

        def learned(task: str, seed: int) -> float:
            base, *_ = curve = self.curve(row, task, seed)
            return learned_at(curve, base.general - LOSS)

        return self.mean(learned)

    def cost(self, row: Row) -> dict:
        """Return the share that a row trains, its gradients and optimizer states in MiB, and seconds per step."""
        told = [self.lab.result(self.trial(row, task, seed))["trained"] for task in self.tasks for seed in self.seeds]
        held = [(one["gradient_bytes"] + one["optimizer_bytes"]) / 2**20 for one in told]
        return {
            "trained": statistics.fmean(one["trained_parameters"] / one["parameters"] for one in told),
            "held_mib": statistics.fmean(held),
            "step_seconds": statistics.median(one["step_seconds"] for one in told),
        }

    def validated(self, row: Row, rate: str = "") -> float:
        """Return what a row learns of --tasks on the validation questions, at its best rate or another."""
        points = [self.chosen(self.trial(row, task, self.first, rate)) for task in self.args.tasks]
        return statistics.fmean(point.task for point in points)


@functools.cache
def size_of(row: Row) -> dict:
    """Return the budget of experts and the rank of LoRA at which a row trains its share of the parameters."""
    model = empty_model(ROOT / TINY)
    if row.name == "lora":
        return {"rank": rank_of(model, row.share)}
    if row.name == ADAPTED:
        budget = budget_of(model, ADAPTED_SHARE)
        return {"budget": budget, "rank": rank_of(model, row.share, budget)}
    return {"budget": budget_of(model, row.share, row.name in SHARED)} if row.share else {}
