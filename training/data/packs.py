"""Tokens -> packs -> tensors.

A pack holds whole documents end to end. Each counts its positions from 0 (`.` is -100: no loss):

    input_ids      BOS  q  q  a  a EOS | BOS  q  a EOS | pad pad
    labels           .  .  .  a  a EOS |   .  .  a EOS |   .   .
    position_ids     0  1  2  3  4   5 |   0  1  2   3 |   0   1

transformers builds a mask from the restarts in `position_ids`, if it gets no attention mask and no KV cache
(`use_cache=False`). The mask keeps the documents apart, and a packed document has the logits that it has alone. A few
model families build no such mask. `deepseek.loading.keeps_documents_apart` finds them, and there each document is a
pack of its own. The first label of each document is -100, so no document predicts the start of the next one.

A sample is one document or several, and stays together. A pair of preference data is two: the chosen answer after its
prompt, then the rejected one.
"""

import bisect
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from training.data.documents import IGNORE, Documents, Encoded


@dataclass(frozen=True, slots=True)
class Pack:
    """Whole documents end to end, as lists of one length.

    `samples` are the numbers of their samples, from 1, and from -1 down in a pack of replayed documents.
    """

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    samples: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def replayed(self) -> bool:
        return self.samples[0] < 0 if self.samples else False

    def documents(self) -> list["Pack"]:
        """Return each document as a pack of its own."""
        starts = [i for i, position in enumerate(self.position_ids) if position == 0]
        return [
            Pack(self.input_ids[a:b], self.labels[a:b], self.position_ids[a:b], [sample])
            for sample, a, b in zip(self.samples, starts, [*starts[1:], len(self)])
        ]


def unpack(packs: Iterable[Pack]) -> list[Pack]:
    """Return each document of some packs as a pack of its own."""
    return [document for pack in packs for document in pack.documents()]


class Packs(Sequence):
    """The packs of a data set, each made when it is asked for.

    documents: what is packed, by number; a memory-mapped table.
    samples: the number of the sample of each document.
    members: the documents of each pack, in order.
    together: how many documents, one after the other, are packed together: two in preference data.
    """

    def __init__(
        self,
        documents: Documents,
        samples: np.ndarray,
        members: list[list[int]],
        seq_length: int,
        together: int = 1,
    ):
        self.documents, self.samples, self.members, self.seq_length = documents, samples, members, seq_length
        self.together, self.sizes = together, sizes_in_pack(documents.lengths, seq_length, together)

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Pack:
        return pack_of(self.documents, self.members[index], self.sizes, self.samples)

    @property
    def lengths(self) -> list[int]:
        """The tokens of each pack."""
        return [int(self.sizes[members].sum()) for members in self.members]

    @property
    def longest_document(self) -> int:
        return max(int(self.sizes[members].max()) for members in self.members)

    @property
    def label_share(self) -> float:
        """The largest share of tokens with a label in a pack. Documents that are cut count with all their labels."""
        shares = (self.documents.label_counts[members].sum() / self.sizes[members].sum() for members in self.members)
        return min(max(map(float, shares)), 1.0)

    def split(self) -> "Packs":
        """Return each sample as a pack of its own, for a model that does not keep the documents of a pack apart."""
        step = self.together
        alone = [members[i : i + step] for members in self.members for i in range(0, len(members), step)]
        return Packs(self.documents, self.samples, alone, self.seq_length, step)


def sample_name(number: int) -> str:
    """Return the number of a sample as text: 3, or "replayed 3" for -3."""
    return str(number) if number > 0 else f"replayed {-number}"


def sizes_in_pack(lengths: np.ndarray, seq_length: int, together: int = 1) -> np.ndarray:
    """Return the tokens that a pack takes of each document: all, or their share of `seq_length` if that is too few."""
    too_long = np.repeat(lengths.reshape(-1, together).sum(1) > seq_length, together)
    return np.where(too_long, np.minimum(lengths, seq_length // together), lengths)


def best_fit(lengths: Sequence[int], seq_length: int, seed: int = 0, dropped: Sequence[int] = ()) -> list[list[int]]:
    """Return packs of at most `seq_length` tokens, as lists of documents: longest first, best fit, then shuffled.

    lengths: the tokens of each document; more than `seq_length` count as that many.
    seed: orders documents of equal length, and the packs.
    dropped: documents to leave out.
    """
    rng, left_out = random.Random(seed), set(dropped)
    order = [i for i in range(len(lengths)) if i not in left_out]
    rng.shuffle(order)
    order.sort(key=lambda i: -lengths[i])  # stable: equals stay shuffled
    packs: list[list[int]] = []
    open_packs: dict[int, list[list[int]]] = {}  # by the tokens that are left in them
    rooms: list[int] = []  # those numbers, ascending: at most seq_length, so that a step is O(log seq_length)
    for i in order:
        size = min(lengths[i], seq_length)
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            packs.append(target := [])
            room = seq_length
        else:
            room = rooms[at]
            target = open_packs[room].pop()
            if not open_packs[room]:
                del open_packs[rooms.pop(at)]
        target.append(i)
        if room := room - size:
            if room not in open_packs:
                bisect.insort(rooms, room)
            open_packs.setdefault(room, []).append(target)
    rng.shuffle(packs)
    return packs


def pack(
    lengths: Sequence[int],
    learns: Callable[[int], bool],
    samples: Sequence[int],
    seq_length: int,
    overlong: str = "error",
    seed: int = 0,
) -> list[list[int]]:
    """Return packs as lists of samples (see `best_fit`), without those that have no label in `seq_length` tokens.

    lengths, samples: the tokens of each sample, and its number in the data set.
    learns: whether a sample that is cut still has a label in each of its documents.
    overlong: "error", or "truncate": a longer sample keeps its head, or is dropped. A warning counts both.

    Raises:
        ValueError: a sample is longer than `seq_length`, and `overlong` is "error".
    """
    too_long = [i for i, length in enumerate(lengths) if length > seq_length]
    if too_long and overlong == "error":
        first, longest = too_long[0], max(lengths)
        raise ValueError(
            f"cannot pack: sample {sample_name(samples[first])} has {lengths[first]} tokens, more than "
            f"seq_length={seq_length} ({len(too_long)} such samples). Set seq_length={longest} or overlong=truncate"
        )
    dropped = [i for i in too_long if not learns(i)]
    if too_long:
        warnings.warn(
            f"{len(too_long)} of {len(lengths)} samples are longer than seq_length={seq_length}: "
            f"{len(too_long) - len(dropped)} truncated, {len(dropped)} dropped as they have no label left",
            stacklevel=2,
        )
    return best_fit(lengths, seq_length, seed, dropped)


def pack_of(documents: Sequence[Encoded], members: list[int], sizes: Sequence[int], numbers: Sequence[int]) -> Pack:
    """Return a pack of some documents. Of each, `sizes` and `numbers` hold the tokens to take and its sample."""
    pack = Pack([], [], [], [int(numbers[i]) for i in members])
    for i in members:
        document, size = documents[i], int(sizes[i])
        pack.input_ids.extend(document.input_ids[:size])
        pack.labels.extend([IGNORE, *document.labels[1:size]])
        pack.position_ids.extend(range(size))
    return pack


def has_label(document: Encoded, size: int) -> bool:
    """Return whether a document has a label in its first `size` tokens."""
    return any(label != IGNORE for label in document.labels[1:size])


def collate(packs: list[Pack], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return input_ids, labels and position_ids, int64 (B, T), where T is the length of the longest pack.

    Padding is a document of its own. There is no attention_mask: with one, transformers would build no mask itself.
    """
    length = max(map(len, packs))
    gaps = [(p, length - len(p)) for p in packs]
    return {
        "input_ids": torch.tensor([p.input_ids + [pad_token_id] * gap for p, gap in gaps]),
        "labels": torch.tensor([p.labels + [IGNORE] * gap for p, gap in gaps]),
        "position_ids": torch.tensor([p.position_ids + list(range(gap)) for p, gap in gaps]),
    }


def pack_rows(
    documents: Documents, rows: Sequence[int], numbers: np.ndarray, settings: object, together: int = 1
) -> Packs:
    """Pack the documents of some rows, each as often as its row is there.

    numbers: the number of the sample of each row.
    settings: seq_length, overlong and seed are among its fields.
    together: how many documents of a row are packed together.
    """
    times = np.bincount(np.asarray(rows, int), minlength=len(numbers))[documents.rows]
    chosen = np.arange(len(documents)).repeat(times).reshape(-1, together)
    samples, sizes = numbers[documents.rows], sizes_in_pack(documents.lengths, settings.seq_length, together)
    found = pack(
        documents.lengths[chosen].sum(1).tolist(),
        lambda i: all(has_label(documents[number], sizes[number]) for number in chosen[i]),
        samples[chosen[:, 0]],
        settings.seq_length,
        settings.overlong,
        settings.seed,
    )
    packs = [chosen[members].flatten().tolist() for members in found]
    return Packs(documents, samples, packs, settings.seq_length, together)
