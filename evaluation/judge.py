"""A judge: a language model behind an OpenAI-compatible endpoint grades answers from 0 to 10, reported as 0..100.

    judge = Judge(model, key, cache, base_url); judge.check()
    judge.scores([judge_prompt("law", row["prompt"], answer, row["raw_answers"]), ...])  ->  [80.0, None, ...]

A sample without a reply, or without a score from 0 to 10 in it, has the score None, never 0, and `reasons` counts why.
The openai client makes the calls, and repeats what may pass (429, 5xx, a lost connection). Replies are kept on disk
under a hash of endpoint, model and prompt, so no judgment is paid for twice. The key is masked in all that is kept or
shown, in case a server repeats it.
"""

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from deepseek.files import import_extra, write_json
from evaluation.rubrics import judge_prompt, read_score

OPENAI = "https://api.openai.com/v1"
URL = re.compile(r"https?://(\[[0-9a-f:]+\]|[\w.-]+)(:\d{1,5})?(/[^\s?#]*)?", re.ASCII | re.IGNORECASE)
NO_SCORE = "a reply without a score from 0 to 10"


@dataclass
class Judge:
    """Grade prompts with `model` at `base_url`, OpenAI's by default. `key` may be empty, `cache` is a folder.

    `reasons` counts why samples of the last `scores` have none.
    """

    model: str
    key: str = field(repr=False)
    cache: Path
    base_url: str | None = None
    parallel: int = 8
    timeout: float = 120
    max_retries: int = 6
    reasons: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self._openai = openai = import_extra("openai", "eval")
        if not re.fullmatch(r"[!-~]*", self.key):  # the client would show the key in its error
            raise ValueError("cannot use the judge's key: it holds characters that no key has. Set it again.")
        self.base_url = check_url(self.base_url)
        self._refusal = ""
        self._client = openai.OpenAI(api_key=self.key or "none", base_url=self.base_url, timeout=self.timeout)
        headers = None if self.key else {"Authorization": openai.Omit()}
        self._options = {"model": self.model, "temperature": 0, "extra_headers": headers}

    def check(self) -> None:
        """Ask for one trivial judgment. Raises ValueError where no reply comes."""
        prompt = judge_prompt("translation", "Translate to English: uno", "one", ["one"])
        reply, reason = self._reply(prompt, max_retries=min(2, self.max_retries))
        if reply is None:
            raise ValueError(f"cannot ask the judge {self.model} at {self.base_url}: it does not answer ({reason})")

    def scores(self, prompts: Iterable[str | None], progress: bool = True) -> list[float | None]:
        """Return 0..100 or None for each prompt, in order. A prompt that is None has the score None."""
        prompts, self._refusal = list(prompts), ""
        unique = list(dict.fromkeys(prompt for prompt in prompts if prompt is not None))
        pool = ThreadPoolExecutor(self.parallel)
        try:
            replies = pool.map(lambda prompt: self._reply(prompt, self.max_retries), unique)
            bar = tqdm(replies, total=len(unique), unit="sample", desc="judging", disable=not (progress and unique))
            replied = dict(zip(unique, bar))
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C waits for the calls at work only
        scores: list[float | None] = []
        self.reasons.clear()
        for prompt in prompts:
            reply, reason = replied.get(prompt, (None, ""))
            score = None if reply is None else read_score(reply)
            scores.append(None if score is None else 10 * score)
            if prompt is not None and score is None:
                self.reasons[reason or NO_SCORE] += 1
        return scores

    def _reply(self, prompt: str, max_retries: int) -> tuple[str | None, str]:
        """Return a reply from the cache or the endpoint, or None and why there is none."""
        name = hashlib.sha256(json.dumps([self.base_url, self.model, prompt]).encode()).hexdigest()
        path = Path(self.cache, name[:2], f"{name}.json")
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a broken file is asked for again
            if isinstance(reply := json.loads(path.read_text(encoding="utf-8"))["reply"], str):
                return reply, ""
        if self._refusal:
            return None, self._refusal
        openai = self._openai
        try:
            reply = self._masked(self._ask(prompt, max_retries).choices[0].message.content)
        except openai.OpenAIError as error:
            reason = " ".join(self._masked(str(error)).split())[:300]
            lost = isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError)
            if lost or getattr(error, "status_code", None) in (401, 403, 404):  # so it is for every sample
                self._refusal = reason
            return None, reason
        except (ValueError, AttributeError, IndexError, TypeError):
            return None, "a reply that is not of the form of /chat/completions"
        with contextlib.suppress(OSError):  # a full disk costs the cache and not the judgment
            write_json(path, {"model": self.model, "reply": reply})
        return reply, ""

    def _ask(self, prompt: str, max_retries: int):
        create = self._client.with_options(max_retries=max_retries).chat.completions.create
        messages = [{"role": "user", "content": prompt}]
        try:
            return create(messages=messages, **self._options)
        except self._openai.BadRequestError as error:
            if "temperature" not in str(error):
                raise
            self._options = {**self._options, "temperature": self._openai.omit}  # some models allow only their own
            return create(messages=messages, **self._options)

    def _masked(self, text: str) -> str:
        """Return `text` without the key (a short one is a placeholder), and without what UTF-8 cannot hold."""
        text = text.encode(errors="replace").decode()
        return text.replace(self.key, "***") if len(self.key) >= 8 else text


def check_url(base_url: str | None) -> str:
    """Return an endpoint as the judge takes it. Raises ValueError, which does not show it, for anything else."""
    url = (base_url or OPENAI).rstrip("/").removesuffix("/chat/completions")
    if not URL.fullmatch(url):
        raise ValueError(f"cannot use --judge_base_url: give an address like {OPENAI}, without user, key or query.")
    return url


def grade(judge: Judge, tasks: list[str | None], results: list[dict]) -> list[dict]:
    """Return lines of a completions file with the metric "judge", which becomes their score.

    A line is left as it is where its task is None or where it has an error.
    """
    prompts = [
        judge_prompt(task, example["prompt"], example["raw_prediction"], example["raw_answers"])
        if task is not None and "error" not in result
        else None
        for task, result, example in zip(tasks, results, (result["example"] for result in results))
    ]
    graded = []
    for prompt, score, result in zip(prompts, judge.scores(prompts), results):
        if prompt is not None:
            others = {name: value for name, value in result["metrics"].items() if name != "judge"}  # graded before
            metrics = {"judge": score, **others}
            metrics |= {"score": score} if "score" in metrics else {}  # rows with evaluators of their own
            result = {**result, "score": None if score is None else score / 100, "metrics": metrics}
        graded.append(result)
    return graded
