"""The checks of scripts/curate.py that look at texts. A check returns why a row is removed, or None.

A word is a run of letters and digits, in lower case. In scripts that write no blanks (Chinese, Japanese, Thai, ...) a
character is a word. System prompts and tools do not count, since many rows share them. Nothing here depends on Python's
hash seed, so the same rows give the same result.
"""

import functools
import hashlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch.utils._pytree import tree_map_only

from benchmarks import load_rows
from deepseek.files import import_extra
from training.data import is_pair, read_messages, read_pair
from training.data.documents import texts_of

WORD = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\w+")
WORD_OR_SYMBOL = re.compile(rf"{WORD.pattern}|[^\w\s]")
RENDERED = re.compile(r"User: (.*?)\s*Assistant:", re.DOTALL)  # a prompt of the published evaluation files
SHINGLE = 3  # words and symbols that are compared as one, in near duplicates
RUN, COMMON = 13, 10  # words that are compared as one, with the evaluation; rows that may share them by chance
CERTAIN = 0.5  # probability from which a language counts
PERMUTATIONS = 128


def squeezed(value: object) -> object:
    """Return a value with one blank for each run of blanks in its texts, in Unicode's composed form (NFC)."""
    return tree_map_only(str, lambda text: " ".join(unicodedata.normalize("NFC", text).split()), value)


def words_of(text: str, kind: re.Pattern = WORD) -> list[str]:
    return kind.findall(unicodedata.normalize("NFC", text).casefold())


def runs(words: list[str], length: int) -> set[tuple[str, ...]]:
    """Return all runs of `length` words. Fewer words are one run."""
    return {tuple(words[start : start + length]) for start in range(max(len(words) - length, 0) + 1)}


@dataclass(frozen=True)
class Sample:
    """A row of training or preference data. `number` counts from 1."""

    number: int
    where: str
    row: dict

    @functools.cached_property
    def messages(self) -> list[dict]:
        """The messages of the row; of a pair the rejected answer comes last."""
        if not is_pair(self.row):
            return read_messages(self.row, self.where)
        chosen, rejected = read_pair(self.row, self.where)
        return [*chosen, *(message for message in rejected if not message.get("mask"))]

    @functools.cached_property
    def key(self) -> bytes:
        """What equal messages have in common, but for blanks."""
        return hashlib.sha256(json.dumps(squeezed(self.messages), sort_keys=True).encode()).digest()

    @functools.cached_property
    def turns(self) -> list[str]:
        """The texts of its turns, without system prompts and tools."""
        spoken = [message for message in self.messages if message["role"] != "system"]
        parts = [{key: value for key, value in message.items() if key != "tools"} for message in spoken]
        return ["\n".join(filter(None, texts_of([part]))) for part in parts]

    @functools.cached_property
    def text(self) -> str:
        return "\n".join(self.turns)


class Duplicates:
    """Finds rows that are equal to a row before that was kept, or nearly so.

    The similarity of two rows is the Jaccard index |A & B| / |A | B| of their sets of runs of SHINGLE words and
    symbols: 2 + 2 is not 2 - 2. MinHash with locality-sensitive hashing (Broder 1997; Indyk and Motwani 1998) finds
    candidates, and their index is computed exactly. So no row is removed that is less similar. At the threshold itself
    one pair of ten to fifty is missed, and more similar ones almost never.

    sample: returns a row by its number.
    threshold: the least index of near duplicates. None looks for equal rows only.
    """

    def __init__(self, sample: Callable[[int], Sample], threshold: float | None = None):
        self.sample, self.threshold = sample, threshold
        self.equal: dict[bytes, int] = {}
        if threshold:
            self.sketches = import_extra("datasketch", "curate")
            weights = (0.05, 0.95)  # of false candidates, which cost time, and of missed ones
            self.index = self.sketches.MinHashLSH(min(threshold, 0.9), PERMUTATIONS, weights)

    def __call__(self, sample: Sample) -> dict | None:
        if number := self.equal.get(sample.key):
            return {"reason": "duplicate", "why": f"a copy of row {number}", "of": number}
        if self.threshold:
            shingles = runs(words_of(sample.text, WORD_OR_SYMBOL), SHINGLE)
            sketch = self.sketches.MinHash(PERMUTATIONS)
            sketch.update_batch([" ".join(run).encode() for run in shingles])
            near = [(self.similarity(shingles, number), -number) for number in self.index.query(sketch)]
            similarity, number = max(near, default=(0.0, 0))
            if similarity >= self.threshold:
                why = f"similar to row {-number} by {similarity:.3f}"
                return {"reason": "near_duplicate", "why": why, "of": -number, "similarity": round(similarity, 4)}
            self.index.insert(sample.number, sketch)
        self.equal[sample.key] = sample.number
        return None

    def similarity(self, shingles: set, number: int) -> float:
        others = runs(words_of(self.sample(number).text, WORD_OR_SYMBOL), SHINGLE)
        return len(shingles & others) / len(shingles | others)


class Overlap:
    """Finds rows that hold a question of an evaluation.

    Words of a question count as held if they stand in a run of RUN words that the row has, too, and that at most COMMON
    rows have: others belong to a template (GPT-3, arXiv 2005.14165, appendix C). A row overlaps if it holds at least
    `share` of a question's words (compare Tulu 3, arXiv 2411.15124), or if a whole turn is the question. So short
    questions, of fewer than RUN words, have to be a whole turn.

    samples: all rows, to count runs in. Copies count once.
    """

    def __init__(self, datasets: list[str], share: float, samples: Iterable[Sample]):
        self.share = share
        self.prompts = [row["prompt"] for dataset in datasets for row in load_rows(dataset)]
        self.words, self.whole = [], {}
        index: dict[tuple[str, ...], set[int]] = defaultdict(set)
        for number, prompt in enumerate(self.prompts):
            match = RENDERED.fullmatch(prompt)
            text = match[1] if match else prompt
            self.whole.setdefault(squeezed(text).casefold(), number)
            self.words.append(words_of(text))
            for run in runs(self.words[-1], RUN):
                index[run].add(number)
        rows = {sample.key: runs(words_of(sample.text), RUN) & index.keys() for sample in samples}
        counts = Counter(run for held in rows.values() for run in held)
        self.index = {run: numbers for run, numbers in index.items() if len(run) == RUN and counts[run] <= COMMON}

    def __call__(self, sample: Sample) -> dict | None:
        said = (self.whole.get(squeezed(turn).casefold()) for turn in sample.turns)
        number = next((number for number in said if number is not None), None)
        if number is not None:
            return self.found(number, 1.0)
        held = runs(words_of(sample.text), RUN) & self.index.keys()
        asked = sorted({number for run in held for number in self.index[run]})
        share, number = max(((self.held(held, self.words[n]), -n) for n in asked), default=(0.0, 0))
        return self.found(-number, share) if share >= self.share else None

    @staticmethod
    def held(runs_of_row: set, words: list[str]) -> float:
        """Return the share of a question's words in runs of the row."""
        starts = [start for start in range(len(words) - RUN + 1) if tuple(words[start : start + RUN]) in runs_of_row]
        return len({at for start in starts for at in range(start, start + RUN)}) / len(words)

    def found(self, number: int, share: float) -> dict:
        prompt = self.prompts[number]
        why = f"{share:.0%} of the question {' '.join(prompt.split())[:60]!r}"
        return {"reason": "overlap", "why": why, "question": prompt, "share": round(share, 4)}


def language_check(wanted: list[str]) -> Callable[[Sample], dict | None]:
    """Return a check of the language of a row. Where no language is more likely than the others together, it is kept.

    Raises:
        ValueError: py3langid does not know a language of `wanted`.
    """
    langid = import_extra("py3langid.langid", "curate")
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    if unknown := [code for code in wanted if code not in identifier.labels]:
        raise ValueError(f"cannot tell {unknown[0]!r} from other languages. Give codes of {sorted(identifier.labels)}.")

    def check(sample: Sample) -> dict | None:
        language, probability = identifier.classify(sample.text)
        if language in wanted or probability < CERTAIN:
            return None
        why = f"{language} with probability {probability:.2f}"
        return {"reason": "language", "why": why, "language": language, "probability": round(probability, 4)}

    return check
