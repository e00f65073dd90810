"""Bootstrap intervals: draw the samples again, with replacement, and see how far their mean moves.

    draws_CR = resample(columns_CN, rng, resamples)     # C models, the same samples of each; R draws
    low, high = interval(draws_CR[-1])                  # 95 %

A draw of N samples has a mean that varies too little: its variance is that of N samples divided by N, not by N - 1.
`small_sample_spread` corrects this, which matters for the few samples of a skill or a task.
"""

from collections.abc import Callable, Sequence

import numpy as np

LEAST_CHANGED = 6  # pairs; a sign test of fewer cannot exclude chance at 5 %, even if all change in one direction
AT_ONCE = 5_000_000  # drawn numbers held in memory


def small_sample_spread(means: np.ndarray, center: np.ndarray, n: int) -> np.ndarray:
    """Return the means of draws from n > 1 samples, moved away from `center` as an unbiased variance asks."""
    return center + (means - center) * np.sqrt(n / (n - 1))


def resample(
    columns: Sequence[Sequence], rng: np.random.Generator, resamples: int, aggregate: Callable | None = None
) -> np.ndarray:
    """Return (C, R): what `aggregate` (default: the mean) makes of each draw from the N > 1 samples of C columns.

    All columns are drawn alike, so the difference of two of them is that of pairs.
    """
    n, found_CR = len(columns[0]), np.empty((len(columns), resamples))
    step = max(1, AT_ONCE // n)
    for start in range(0, resamples, step):
        draws_RN = rng.integers(n, size=(min(step, resamples - start), n))
        for c, column in enumerate(columns):
            if aggregate is None:
                part_R = np.asarray(column, float)[draws_RN].mean(axis=1)
            else:
                part_R = [aggregate([column[i] for i in draw]) for draw in draws_RN]
            found_CR[c, start : start + step] = part_R
    centers = [np.mean(column) if aggregate is None else aggregate(column) for column in columns]
    return small_sample_spread(found_CR, np.array(centers)[:, None], n)


def interval(draws_R: np.ndarray, bounds: tuple[float, float] = (-np.inf, np.inf)) -> list[float]:
    """Return the 95 % percentile interval of the draws, within what is possible."""
    return [round(float(bound), 4) for bound in np.percentile(draws_R, [2.5, 97.5]).clip(*bounds)]


def is_certain(bounds: list[float] | None, changed: int) -> bool:
    """Whether the interval of a difference excludes 0, and enough pairs changed to say so."""
    return bounds is not None and bool(changed >= LEAST_CHANGED) and (bounds[0] > 0 or bounds[1] < 0)
