"""Bootstrap intervals: draw the samples again, with replacement, and see how far their mean moves.

    strata = Strata(columns)                  # columns: [stratum][model][sample]
    before, after = strata.means()
    draws_CR = strata.draws(seed=0)           # C models, R draws
    low, high = interval(draws_CR[0])         # 95 %
    compare_pairs(strata, (before, after), draws_CR, most=100)

A draw of N samples has a mean that varies too little: its variance is that of N samples divided by N, not by N - 1.
`resample` corrects this, which matters for the few samples of a skill or a task.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

LEAST_CHANGED = 6  # pairs; a sign test of fewer cannot exclude chance at 5 %, even if all change in one direction
RESAMPLES = 2000  # draws of an interval
AT_ONCE = 5_000_000  # drawn numbers held in memory


def resample(
    columns: Sequence[Sequence], rng: np.random.Generator, resamples: int, aggregate: Callable = np.mean
) -> np.ndarray:
    """Return (C, R): what `aggregate` makes of each draw from the N samples of C columns, or NaN for a single sample.

    All columns are drawn alike, so the difference of two of them is that of pairs. The results are moved away from that
    of all samples, as an unbiased variance asks.
    """
    n, found_CR = len(columns[0]), np.full((len(columns), resamples), np.nan)
    if n == 1:
        return found_CR
    step = max(1, AT_ONCE // n)
    for start in range(0, resamples, step):
        draws_RN = rng.integers(n, size=(min(step, resamples - start), n))
        for c, column in enumerate(columns):
            if aggregate is np.mean:
                part_R = np.asarray(column, float)[draws_RN].mean(axis=1)
            else:
                part_R = [aggregate([column[i] for i in draw]) for draw in draws_RN]
            found_CR[c, start : start + step] = part_R
    center_C1 = np.array([[aggregate(column)] for column in columns])
    return center_C1 + (found_CR - center_C1) * np.sqrt(n / (n - 1))


@dataclass(frozen=True)
class Strata:
    """The skills of a data set or the tasks of a suite: values of C models on the same samples.

    Each stratum has an aggregate (default: the mean) and a weight (default: 1) in the mean of all.
    """

    columns: Sequence[Sequence[Sequence]]  # [stratum][model][sample]
    weights: Sequence[float] | None = None
    aggregates: Sequence[Callable] | None = None

    def means(self) -> np.ndarray:
        """Return (C,): the mean of each model."""
        means_SC = [[aggregate(column) for column in columns] for columns, aggregate in self._with_aggregates()]
        return np.average(means_SC, axis=0, weights=self.weights)

    def draws(self, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
        """Return (C, R): the means of draws within each stratum. They are NaN if one has a single sample."""
        rng = np.random.default_rng(seed)
        draws_SCR = [resample(columns, rng, resamples, aggregate) for columns, aggregate in self._with_aggregates()]
        return np.average(draws_SCR, axis=0, weights=self.weights)

    def _with_aggregates(self) -> zip:
        return zip(self.columns, self.aggregates or [np.mean] * len(self.columns))


def interval(draws_R: np.ndarray, bounds: tuple[float, float] = (-np.inf, np.inf)) -> list[float] | None:
    """Return the 95 % percentile interval of the draws, within what is possible, or None if they are NaN."""
    low, high = np.percentile(draws_R, [2.5, 97.5]).clip(*bounds)
    return None if np.isnan(low) else [round(float(low), 4), round(float(high), 4)]


def compare_pairs(strata: Strata, means_C: Sequence[float], draws_CR: np.ndarray, most: float) -> dict:
    """Return how the second of two models differs from the first, on the same samples. A mean is at most `most`.

    {"n", "base", "adapter", "difference": means, "ci95": of the difference, "certain"}

    It is certain if the interval excludes 0, and enough pairs changed to say so.
    """
    before, after = map(float, means_C)
    means = {"base": before, "adapter": after, "difference": after - before}
    bounds = interval(draws_CR[1] - draws_CR[0], (-most, most))
    changed = sum(a != b for columns in strata.columns for a, b in zip(*columns))
    return {
        "n": sum(len(columns[0]) for columns in strata.columns),
        **{name: round(value, 4) for name, value in means.items()},
        "ci95": bounds,
        "certain": bounds is not None and bool(changed >= LEAST_CHANGED) and (bounds[0] > 0 or bounds[1] < 0),
    }
