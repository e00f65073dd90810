"""The one bootstrap."""

import numpy as np

LEAST_PAIRS = 6  # of fewer, even all in one direction, a sign test cannot exclude chance at 5 %


def widened(means: np.ndarray, mean: float, n: int) -> np.ndarray:
    """Means of bootstrap draws from n > 1 samples, with the spread that an unbiased variance gives them."""
    return mean + (means - mean) * np.sqrt(n / (n - 1))


def _bootstrap(groups: list[np.ndarray], resamples: int, seed: int, bounds: tuple[float, float]) -> list[float] | None:
    """95 % percentile interval of the mean of the groups' means, within what it can be; samples are drawn again within
    each group. None where one of them has a single sample."""
    if min(map(len, groups)) < 2:
        return None
    rng = np.random.default_rng(seed)
    means_R = np.zeros(resamples)
    for values in groups:
        step = max(1, 10_000_000 // len(values))  # draws held in memory at once
        for start in range(0, resamples, step):
            part = means_R[start : start + step]
            drawn = values[rng.integers(len(values), size=(len(part), len(values)))].mean(axis=1)
            part += widened(drawn, values.mean(), len(values)) / len(groups)
    return [round(float(bound), 4) for bound in np.percentile(means_R, [2.5, 97.5]).clip(*bounds)]


def is_certain(interval: list[float] | None, changed: int) -> bool:
    """Whether an interval of a difference excludes 0, and enough pairs changed to say so."""
    return interval is not None and bool(changed >= LEAST_PAIRS) and (interval[0] > 0 or interval[1] < 0)
