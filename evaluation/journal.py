"""The finished batches of an evaluation, in a file from which an interrupted one goes on, and finished answers."""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

from deepseek.files import read_json, read_jsonl, sha256
from utils import note


class AnswerJournal:
    """The finished batches of one job: `results` by index in the data set, and the `seconds` that they took.

    Each answer to a suite of lm-eval is a batch of its own, with a hash of the request as its index. They are kept in a
    hidden file beside the output. Its lines are `key`, which is all that decides the answers, and then {"indices",
    "results", "seconds"} of each batch. A file with another key starts over. A batch with an error in it is answered
    again. The `with` block removes the file at its end, unless an exception ends it or `keep` is set.
    """

    keep = False

    def __init__(self, output_path: Path, key: dict, graded_by: list[str] | None = None):
        self.path = output_path.with_name(f".{output_path.name}.partial")
        self.finished_key = {**key, "judge": graded_by}  # of the answers that are finished
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.results: dict[int | str, dict] = {}
        self.seconds = 0.0
        self.file = open(self.path, "a+b")  # noqa: SIM115
        self.file.seek(0)
        lines = []
        for line in self.file:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        found, *records = lines or [None]
        if found == key:
            for record in records:
                if not any("error" in result for result in record["results"]):
                    self._take(record)
            return
        if found:
            other = ", ".join(name for name in key if key[name] != found.get(name))
            note(f"{self.path} is of an evaluation that was interrupted, with another {other}: starting over")
        self.file.truncate(0)
        self._write(key)

    def __enter__(self) -> "AnswerJournal":
        return self

    def __exit__(self, error_type, *_) -> None:
        if (error_type is None and not self.keep) or self.all_failed:
            self.path.unlink()
        self.file.close()

    @property
    def all_failed(self) -> bool:
        return all("error" in result for result in self.results.values())

    def take_finished(self, summary: Path) -> None:
        """Take the answers beside a summary, but for those that failed."""
        lines = {i: line for i, line in enumerate(read_jsonl(answers_beside(summary))) if "error" not in line}
        self.results, self.seconds = {}, 0.0
        self.add({"indices": [*lines], "results": [*lines.values()], "seconds": read_json(summary)["seconds"]})

    def add(self, record: dict) -> None:
        self._write(record)
        self._take(record)

    def _take(self, record: dict) -> None:
        self.results.update(zip(record["indices"], record["results"]))
        self.seconds += record["seconds"]

    def _write(self, record: dict) -> None:
        self.file.write(b"\n" + json.dumps(record).encode())  # the line break comes first: the last line may be torn
        self.file.flush()


def answers_beside(summary: Path) -> Path:
    """Return the file of the answers of a summary."""
    return summary.with_name(summary.name.replace(".summary.json", ".jsonl"))


def find_finished(folders: Iterable[str | Path], key: dict) -> Path | None:
    """Return the summary with this key in one of the folders, if its answers are there as they were written."""
    for path in [path for folder in folders for path in sorted(Path(folder).glob("*.summary.json"))]:
        summary, answers = read_json(path), answers_beside(path)
        if summary.get("key") == key and answers.is_file() and sha256(answers) == summary["answers"]:
            return path
    return None
