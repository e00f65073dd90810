"""The metrics: each compares a prediction with one gold answer, and gives percent (0..100).

A metric that cannot be computed (a gold answer that is empty, or not of the form the metric needs) is None, never
taken for a 0. A prediction, whatever its text, always gets its metrics.

exact match   (intent) Prediction and answer, stripped of white space and of one final full stop ("。" or "."), are
              the same JSON value. The order of keys does not matter, nor does that of a slot's list. The order of any
              other list does. An answer that is not JSON is compared as text. This rule gives the scores published
              with the paper.
slot F1       Harmonic mean of precision and recall over (slot, value) pairs; a list is one pair per item.
ROUGE-L       F measure of the longest common subsequence (rouge-score) of lower-cased words; Chinese characters and
              kana are words of their own.
chrF          chrF2 of sacrebleu per sample; the mean over samples differs a little from a corpus chrF.
BLEU          Sentence BLEU of sacrebleu with effective order (n-grams longer than the text do not count), over words,
              or by sacrebleu's tokenizer for Chinese where the gold answer holds Chinese characters (by characters
              where it holds kana). The mean over samples is not a corpus BLEU.
final number  (math, GSM8K style) The number after the last "####", else in the last \\boxed{}, else the last one, is
              equal as a fraction to the gold answer's. Signs, thousands commas, decimals, fractions ("3/4", "1 1/2",
              "½"), and what surrounds a number (currencies, units, "%", markup) are understood.
"""

import json
import re
import unicodedata
from collections import Counter
from fractions import Fraction

from deepseek.files import import_extra

_NOT_JSON = object()


def _json_value(text: str) -> object:
    """Return the JSON value that a text spells, or _NOT_JSON. White space and one final full stop do not count."""
    text = text.strip()
    try:
        return json.loads(text[:-1] if text.endswith(("。", ".")) else text)
    except (ValueError, RecursionError):
        return _NOT_JSON


def json_exact_match(prediction: str, answer: str) -> float:
    """Return 100 or 0. The module's docstring has the rule."""
    gold = _json_value(answer)
    if gold is _NOT_JSON:
        return exact_match(prediction, answer)
    try:
        return 100.0 * (_spelled(_slots_sorted(_json_value(prediction))) == _spelled(_slots_sorted(gold)))
    except (TypeError, RecursionError):  # the prediction is not JSON, or has no end
        return 0.0


def _spelled(value: object) -> str:
    """Return a JSON value as it is compared: as text, since Python's True equals 1."""
    return json.dumps(value, sort_keys=True)


def _slots_sorted(value: object) -> object:
    """Return {"intent": .., "slots": {..}} with each slot's list in one order, and any other value as it is."""
    if not isinstance(value, dict) or not isinstance(value.get("slots"), dict):
        return value
    slots = value["slots"].items()
    return value | {"slots": {name: sorted(v, key=_spelled) if isinstance(v, list) else v for name, v in slots}}


def _slots(value: object) -> Counter | None:
    """Return the (slot, value) pairs of {"intent": .., "slots": {..}} with their counts, or None for another form."""
    slots = value.get("slots", {}) if isinstance(value, dict) else None
    if not isinstance(slots, dict):
        return None
    pairs = ((name, item) for name, items in slots.items() for item in (items if isinstance(items, list) else [items]))
    try:
        return Counter((name, _spelled(item)) for name, item in pairs)
    except RecursionError:
        return None


def slot_f1(prediction: str, answer: str) -> float | None:
    """Return the F1 over slots, 0..100. It is 100 without any slots, 0 for a prediction in another form, and None for
    a gold answer in another form."""
    gold, found = _slots(_json_value(answer)), _slots(_json_value(prediction))
    if gold is None:
        return None
    if found is None:
        return 0.0
    total = gold.total() + found.total()
    return 200.0 * (gold & found).total() / total if total else 100.0


def exact_match(prediction: str, answer: str) -> float:
    """Return 100 if the two texts are equal but for white space around them, else 0."""
    return 100.0 * (prediction.strip() == answer.strip())


class _Words:
    """A tokenizer for rouge-score. Its own drops everything that is not a-z or a digit."""

    _CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    _PATTERN = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")

    def tokenize(self, text: str) -> list[str]:
        return self._PATTERN.findall(text.lower())


def rouge_l(prediction: str, answer: str) -> float | None:
    """Return the ROUGE-L F measure, 0..100, or None if the gold answer has no word."""
    scorer = import_extra("rouge_score.rouge_scorer", "eval").RougeScorer(["rougeL"], tokenizer=_Words())
    return 100.0 * scorer.score(answer, prediction)["rougeL"].fmeasure if _Words().tokenize(answer) else None


def chrf(prediction: str, answer: str) -> float | None:
    """Return the sentence chrF2, 0..100, or None if the gold answer is blank."""
    sentence_chrf = import_extra("sacrebleu", "eval").sentence_chrf
    return sentence_chrf(prediction, [answer]).score if answer.strip() else None


_HAN, _KANA = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]"), re.compile("[\u3040-\u30ff]")


def bleu(prediction: str, answer: str) -> float | None:
    """Return the sentence BLEU, 0..100, or None if the gold answer is blank."""
    sentence_bleu = import_extra("sacrebleu", "eval").sentence_bleu
    tokenizer = "char" if _KANA.search(answer) else "zh" if _HAN.search(answer) else "13a"
    return sentence_bleu(prediction, [answer], tokenize=tokenizer).score if answer.strip() else None


# the lengths are limited, because Python converts long digits slowly and a large exponent does not fit in memory
_DIGITS = r"(?:\d{1,3}(?:,\d{3}){1,300}|\d{1,1000})(?!\d)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d{{1,1000}})?|\.\d{{1,1000}})(?:[eE][+-]?\d{{1,2}}(?!\d))?"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)\]])-[^\w\s]?)?(?<![\d.])(?:(?P<whole>\d{{1,9}})\s+(?=\d{{1,9}}\s?/))?"
    rf"(?P<top>{_DECIMAL})(?:\s?/\s?(?P<bottom>\d{{1,300}})(?!\d))?"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")


def _plain_character(c: str) -> str:
    plain = unicodedata.normalize("NFKC", c)
    if unicodedata.category(c) == "No":  # "1½" is not 11/2, and m² does not end on a number
        return " " + plain.replace("⁄", "/") if "⁄" in plain else ""
    return "-" if c == "−" else plain


def _plain(text: str) -> str:
    """Return a text with its full-width digits, vulgar fractions, minus signs and LaTeX in ASCII."""
    text = "".join(c if c.isascii() else _plain_character(c) for c in text)
    return _LATEX_FRACTION.sub(r" \1/\2", text.replace("{,}", ",").replace("\\$", "$"))


def _value(match: re.Match) -> Fraction | None:
    top, bottom = Fraction(match["top"].replace(",", "")), int(match["bottom"] or 1)
    if not bottom:
        return None
    value = Fraction(match["whole"] or 0) + top / bottom
    return -value if match["sign"] else value


def final_number(text: str) -> Fraction | None:
    """Return the number that a text ends on, by the rule of the module's docstring, or None."""
    text = _plain(text)
    for mark in ("####", "\\boxed{"):
        _, found, after = text.rpartition(mark)
        if found and (first := _NUMBER.search(after)):
            return _value(first)
    numbers = list(_NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def number_match(prediction: str, answer: str) -> float | None:
    """Return 100 if both end on the same number, else 0, or None if the gold answer has none."""
    gold = final_number(answer)
    return None if gold is None else 100.0 * (final_number(prediction) == gold)
