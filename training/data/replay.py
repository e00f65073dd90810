"""Which rows of a general data set are replayed beside the task, so that a model forgets less, and how often.

    L = (1 - s) L_task + s L_replayed        s = replay_share, as the loss is a mean over label tokens

So the share is one of label tokens, whatever the lengths of the answers in both sets. Rows are drawn by the seed, each
once. Where all of them are too few, they go round again. The packs of the task stay as they are without replay, and
replayed rows have packs of their own. They stay out of the validation set, and no row of that is replayed.

Source: experience replay (Rolnick et al. 2019, arXiv 1811.11682; for language models Ibrahim et al. 2024, arXiv
2403.08763).
"""

import random
from collections.abc import Callable

import numpy as np

from training.data.documents import Documents, Encoded
from training.data.packs import Packs, pack_rows
from utils import counted, note


def add_replay(train: Packs, validation: Packs, documents: Documents, config: "RunConfig") -> Packs:  # noqa: F821
    """Return the packs of a task with packs of replayed documents after them, and tell what these are.

    documents: those of the set to replay. Of a row that repeats, the documents are packed as often.

    Raises:
        ValueError: nothing can be replayed, as all of it is in the validation set, or a sample is too long.
    """
    import datasets  # slow, and not every command reads data

    of_task = sum(int(train.documents.label_counts[members].sum()) for members in train.members)
    labels_R = np.bincount(documents.rows, documents.label_counts).astype(int)
    held = {_tokens(validation.documents[number]) for members in validation.members for number in members}
    left_out: list[int] = []

    def held_out(row: int) -> bool:
        first, end = np.searchsorted(documents.rows, [row, row + 1])
        found = any(_tokens(documents[number]) in held for number in range(first, end))
        left_out.extend([row] * found)
        return found

    wanted = round(of_task * config.replay_share / (1 - config.replay_share))
    times_R = draw(labels_R, wanted, config.seed, held_out)
    if not times_R.any():
        raise ValueError(
            f"cannot replay {config.replay_dataset}: every row of it is in the validation set. Give other data."
        )
    rows_R = np.arange(len(times_R))
    replayed = pack_rows(documents, rows_R.repeat(times_R), -rows_R - 1, config)
    labels, repeat = int((labels_R * times_R).sum()), f"a row up to {times_R.max():,} times"
    note(
        f"replay: {np.count_nonzero(times_R):,} of {counted(len(times_R), 'row')} of {config.replay_dataset}, "
        f"{repeat if times_R.max() > 1 else 'each once'}, {sum(replayed.lengths):,} tokens, {labels:,} of them with "
        f"loss ({labels / (labels + of_task):.1%} of all)"
    )
    if left_out:
        note(f"replay: {counted(len(left_out), 'row')} of it left out, being in the validation set, too")
    both = Documents(datasets.concatenate_datasets([train.documents.table, documents.table]))
    shifted = [[len(train.documents) + number for number in members] for members in replayed.members]
    samples = np.concatenate([train.samples, replayed.samples])
    return Packs(both, samples, train.members + shifted, config.seq_length)


def _tokens(document: Encoded) -> bytes:
    return np.asarray(document.input_ids, np.int32).tobytes()


def draw(labels_R: np.ndarray, wanted: int, seed: int, held_out: Callable[[int], bool]) -> np.ndarray:
    """Return how often each of R rows is replayed, so that together they have `wanted` label tokens, or just more.

    labels_R: the label tokens of each row.
    held_out: whether a row must not be replayed. Rows are asked only until there are enough. If all are held out, none
        is replayed.
    """
    order = random.Random(seed).sample(range(len(labels_R)), len(labels_R))
    chosen, total = [], 0
    for row in order:
        if total >= wanted:
            break
        if not held_out(row):
            chosen.append(row)
            total += int(labels_R[row])
    rounds, rest = divmod(wanted, total) if 0 < total < wanted else (1, 0)
    times_R = np.zeros(len(labels_R), int)
    before_C = labels_R[chosen].cumsum() - labels_R[chosen]
    times_R[chosen] = rounds + (before_C < rest)
    return times_R
