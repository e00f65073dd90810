"""The commands of a runner of experiments, done by something fast, and broken off at will."""

import hashlib
from collections.abc import Callable


class Commands(list):
    """What a runner (`lab`, a class) runs from now on. `fake` does it."""

    def __init__(self, lab: type, fake: Callable[[list[str]], None], monkeypatch):
        self.fake, self.left = fake, float("inf")  # so many, and Ctrl-C comes
        monkeypatch.setattr(lab, "command", lambda _, *words: self.run(words))

    def run(self, words: tuple) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        self.append(list(map(str, words)))
        self.fake(self[-1])

    def trained(self) -> list[list[str]]:
        return [words for words in self if words[0] == "train.py"]

    def until_done(self, start: Callable[[], dict], after: int) -> tuple[dict, int]:
        """Break a runner off after so many commands, until it ends by itself. Return its result, and the tries."""
        self.clear()
        for tries in range(1, 1000):
            self.left = after
            try:
                result = start()
            except KeyboardInterrupt:
                continue
            self.left = float("inf")
            return result, tries


def number(*parts: object) -> float:
    """Return a number from 0 to 1 that these decide."""
    return int(hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:6], 16) / 2**24
