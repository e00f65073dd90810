"""Which packs make a batch, in which order this process sees them, and which tokens of a batch are a document."""

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from deepseek.process_groups import Ranks
from training import data
from training.loss import label_positions

EMPTY_PACK = data.Pack([0, 0], [data.IGNORE] * 2, [0, 1], [])  # for a rank without a batch, which still takes part


def collate(packs: list[data.Pack], pad_token_id: int, documents_apart: bool = True) -> dict:
    """Make a batch of packs, or of none. "rows" are their rows of the data set, for the error about a bad step.

    "kept" are the positions of labels (loss.py).
    Each document is a row of the batch for a model that does not keep the documents of a pack apart.
    """
    rows = [row for pack in packs for row in pack.samples]
    packs = packs if documents_apart else data.unpack(packs)
    batch = data.collate(packs or [EMPTY_PACK], pad_token_id)
    return {**batch, "kept": label_positions(batch["labels"])[1], "rows": rows}


def document_numbers(inputs: dict) -> Tensor:
    """Number the documents of a batch (B, T) from 0, row by row. A pack's padding is a document, too."""
    starts_BT = inputs["position_ids"] == 0
    return starts_BT.flatten().cumsum(0).view_as(starts_BT) - 1


def labels_of_documents(inputs: dict) -> Tensor:
    """Count the labels of every document of a batch. There are B*T counts, so no host waits for a GPU to size them."""
    numbers_N = document_numbers(inputs).flatten()
    return torch.zeros_like(numbers_N).index_add(0, numbers_N, (inputs["labels"] != data.IGNORE).flatten().long())


class Means:
    """Means for a run's log, over all processes: of training, and with "eval_" before their names of a validation."""

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names = names
        self.sums = {kind: torch.zeros(len(names) + 1, dtype=torch.float64, device=device) for kind in ("", "eval_")}

    def add(self, *sums: Tensor) -> None:
        """Add a batch: a sum for each name, and how many terms these have. A validation computes no gradients."""
        self.sums["" if torch.is_grad_enabled() else "eval_"] += torch.stack([one.detach().double() for one in sums])

    def take(self, kind: str, reduce: Callable[[Tensor, str], Tensor]) -> dict[str, float]:
        """Return the means since the last call, or none if nothing was added. All ranks call this."""
        *sums, count = reduce(self.sums[kind], "sum").tolist()
        self.sums[kind].zero_()
        return {f"{kind}{name}": total / count for name, total in zip(self.names, sums)} if count else {}


class Batches:
    """A batch sampler of this rank. The order of an epoch's batches depends on `seed` and on the epoch.

    Every rank has the same number of batches; empty ones come last.
    """

    def __init__(self, length: int, batch_size: int, ranks: Ranks, seed: int):
        self.length, self.batch_size, self.ranks, self.seed, self.epoch = length, batch_size, ranks, seed, 0

    def __len__(self) -> int:
        return -(-self.length // (self.batch_size * self.ranks.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        order = random.Random(f"{self.seed} {self.epoch}").sample(range(self.length), self.length)
        batches = [order[start : start + self.batch_size] for start in range(0, self.length, self.batch_size)]
        batches = batches[self.ranks.rank :: self.ranks.world_size]
        yield from batches + [[]] * (len(self) - len(batches))
