"""Prove that what is frozen keeps its bits (`verify_frozen`): for the whole run, or for the part in which it is frozen.

Where the trained experts change, methods.frozen_hashes hashes each frozen expert for itself, and the hashes follow:

    an expert begins to be trained    it must have its hash. That proves it from the start, or since it was frozen
    an expert is frozen               it gets a hash, and must have it when it is trained again, and at the end

A checkpoint keeps the hashes of experts that were trained before. A run that goes on from it compares them with what it
reads, so the proof has no gap.
"""

import logging
from collections.abc import Mapping

from torch import nn

from deepseek.experts import moe_layers
from deepseek.process_groups import Ranks
from training.expert_schedule import ExpertSchedule
from training.methods import check_frozen, expert_hashes, frozen_hashes

logger = logging.getLogger("esft")


class FrozenProof:
    """The hashes of what is frozen now on this rank, from the start of a run on. `schedule` changes the experts."""

    def __init__(self, model: nn.Module, ranks: Ranks, schedule: ExpertSchedule | None = None):
        self.model, self.ranks, self.by_expert = model, ranks, schedule is not None
        self.hashes = frozen_hashes(model, self.by_expert)
        self.frozen_at: dict[str, int] = {}  # expert that was trained before -> the step after which it was frozen
        self.proven: list[int] = []  # for how many steps an expert that is trained for a part was frozen
        if schedule:
            schedule.proof = self

    def before_change(self, since_L: Mapping[int, Mapping[int, int]], step: int) -> None:
        """Verify the experts that begin to be trained. All ranks call this."""
        now = expert_hashes(self.model)
        thawed = {name: now[name] for name in self._names(since_L) & now.keys()}
        self._compare(thawed)
        for name in thawed:
            del self.hashes[name]
            self.proven.append(step - self.frozen_at.pop(name, 0))

    def after_change(self, step: int) -> None:
        """Take the hashes of the experts that were frozen."""
        new = {name: value for name, value in expert_hashes(self.model).items() if name not in self.hashes}
        self.hashes |= new
        self.frozen_at |= dict.fromkeys(new, step)

    def close(self, step: int) -> None:
        """Verify the experts that were trained before, for the last time, as the best checkpoint takes their place."""
        now = expert_hashes(self.model)
        self._compare({name: now[name] for name in self.frozen_at})
        for name in list(self.frozen_at):
            del self.hashes[name]
            self.proven.append(step - self.frozen_at.pop(name))

    def check(self, step: int) -> None:
        """Verify all at the end of a run of `step` steps, and log for how long it was proven. All ranks call this."""
        check_frozen(self.hashes, self.model, self.ranks, self.by_expert)
        own = self.proven + [step - start for start in self.frozen_at.values()]
        spans = [span for rank in self.ranks.gather(own)[: self.ranks.ep_size] for span in rank]
        if spans:
            how = f"{min(spans)} to {max(spans)} of {step} steps"
            logger.info(f"  frozen for a time: {len(spans)} times an expert kept its bits while it was frozen ({how})")

    def _names(self, since_L: Mapping[int, Mapping[int, int]]) -> set[str]:
        layers = moe_layers(self.model)
        return {f"{layers[index].name}.{expert}" for index, since in since_L.items() for expert in since}

    def _compare(self, found: Mapping[str, str]) -> None:
        changed = [name for name, value in found.items() if self.hashes[name] != value]
        lost = f"{len(changed)} frozen experts changed in training, {', '.join(changed[:1])} the first"
        self.ranks.raise_on_all(changed and f"cannot go on: {lost}. This is a bug. Please report it.")

    # ---- checkpoints

    def state(self) -> dict:
        """Return what a checkpoint keeps. All ranks call this."""
        ranks = self.ranks.gather((self.frozen_at, {n: self.hashes[n] for n in self.frozen_at}, self.proven))
        parts = ranks[: self.ranks.ep_size]
        return {
            "frozen_at": {name: step for at, _, _ in parts for name, step in at.items()},
            "hashes": {name: value for _, hashes, _ in parts for name, value in hashes.items()},
            "proven": [span for _, _, spans in parts for span in spans],
        }

    def restore(self, saved: Mapping, since_L: Mapping[int, Mapping[int, int]]) -> None:
        """Go on from `state`, when the model has the values of that checkpoint. All ranks call this."""
        now = expert_hashes(self.model)
        for name in self._names(since_L) & self.hashes.keys():
            del self.hashes[name]
        self.frozen_at = {name: step for name, step in saved["frozen_at"].items() if name in now}
        self.hashes |= {name: saved["hashes"][name] for name in self.frozen_at}
        self._compare({name: now[name] for name in self.frozen_at})
        self.proven = saved["proven"] if self.ranks.rank == 0 else []
