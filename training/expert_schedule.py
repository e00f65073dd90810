"""Which experts a run trains at which step, where the keys `expand_experts` or `reselect_steps` change that.

    expand_experts    begins with few experts and adds the next best by the scores of the run, up to a share of all
    reselect_steps    counts, every so many steps, where the router sends the batches of training. In each layer,
                      experts that lost their tokens give their place to untrained ones that have more

A change comes at the beginning of an optimizer step. What is due depends on the steps, losses and counts before it
alone, and a checkpoint has these. So a run that goes on from a checkpoint makes the same changes at the same steps, and
so does one that is made longer. Counts are integers, summed over all processes, so all of these agree.

    checkpoint-20/selection.json    the experts that are trained, with the step of each; changes and counts so far

deepseek/reselection.py makes the change. Legend: L MoE layers, E experts.
"""

import contextlib
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainerState

import esft
from deepseek.adapters import find_state
from deepseek.expert_parallel import follow_rows
from deepseek.files import read_json
from deepseek.process_groups import Ranks
from deepseek.reselection import change_experts, with_experts
from deepseek.selection import contrast_scores, order_experts
from training.data import IGNORE
from training.first_selection import find_scores
from training.run_config import RunConfig
from utils import counted

logger = logging.getLogger("esft")
SELECTION = "selection.json"
SAMPLE = 131_072  # tokens of a sample that scores experts, as in the paper
MARGIN = 11, 10  # a score takes the place of another only if it is larger by a tenth, so that noise changes nothing


def expansion_order(config: RunConfig, num_experts_L: Mapping[int, int]) -> list[tuple[int, int]]:
    """Return (layer, expert) of all experts by the scores of the run, the next best first; none without expansion.

    Raises:
        ValueError, FileNotFoundError: there are no scores, or they are of another model.
    """
    if not config.expand_experts:
        return []
    if (path := find_scores(config)) is None:
        raise ValueError("cannot expand the experts: there are no scores beside expert_config. Give expert_scores_dir.")
    score_LE = esft.ExpertScores.load(path)[config.score_function]
    if {layer: len(score_E) for layer, score_E in score_LE.items()} != num_experts_L:
        raise ValueError(f"cannot expand the experts: {path} has scores of other layers or experts. Score them anew.")
    general = config.contrast_scores_dir
    if general:
        general_LE = esft.ExpertScores.load(general)[config.score_function]
        score_LE = contrast_scores(score_LE, general_LE, config.contrast)
    shares = general is not None or config.score_function in esft.WITHOUT_SUM
    return order_experts(score_LE, config.strategy, config.upper_layers, shares)


class ExpertSchedule:
    """The experts that a run trains, on all ranks, and the changes so far.

    Raises:
        ValueError, FileNotFoundError: the run cannot be expanded as `expand_experts` says.
    """

    def __init__(self, config: RunConfig, experts: esft.ExpertConfig, num_experts_L: dict[int, int]):
        self.num_experts_L, self.total = num_experts_L, sum(num_experts_L.values())
        self.expand, self.order = config.expand_experts or {}, expansion_order(config, num_experts_L)
        self.every, self.score = config.reselect_steps, config.score_function
        self.since: dict[int, dict[int, int]] = {la: dict.fromkeys(ids, 0) for la, ids in experts.experts.items()}
        begins, self.ends = sum(map(len, self.since.values())), round(self.expand.get("to", 0) * self.total)
        self.by = max(1, round(self.expand.get("by", 0) * self.total))
        self.additions = math.ceil((self.ends - begins) / self.by)
        if self.expand and begins >= self.ends:
            raise ValueError(f"cannot expand the experts: the run begins with {begins} of {self.total}, and "
                             f"to={self.expand['to']} is not more. Raise it, or begin with fewer.")  # fmt: skip
        reach = begins + sum(expert not in self.since.get(layer, ()) for layer, expert in self.order)
        if self.expand and self.ends > reach:
            raise ValueError(f"cannot expand the experts: strategy={config.strategy} reaches {reach} of {self.total}, "
                             f"and to={self.expand['to']} is more. Lower it.")  # fmt: skip
        self.at_end = with_experts(experts, self._first({la: set(ids) for la, ids in self.since.items()}, self.ends))
        self.most = round(self.total * config.reselect_max) if config.reselect_max else max(2 * begins, self.ends)
        if config.reselect_max and self.most <= begins:
            raise ValueError(f"cannot exchange experts: the run begins with {begins} of {self.total}, and reselect_max="
                             f"{config.reselect_max} leaves room for no other. Raise it.")  # fmt: skip
        self.changes: list[dict] = []
        self.reselection: esft.Reselection | None = None
        self.proof = None  # a frozen_proof.FrozenProof, with verify_frozen
        self._earlier: Tensor | None = None  # counts of the same window before a resume, (L, E)
        self._window, self._measures, self._counted = 0, False, False

    def join(self, model: nn.Module, ranks: Ranks) -> None:
        """Take the model and the ranks of the run."""
        self.model, self.ranks, self._capture = model, ranks, esft.RouterCapture(model)

    def begin(self, optimizer: torch.optim.Optimizer, step: int, warmup: int, tokens: float) -> None:
        """Follow an optimizer that has taken `step` steps. A step sees about so many `tokens`."""
        self.reselection = esft.Reselection(self.model, optimizer, warmup, step)
        self._window = min(self.every or 0, math.ceil(SAMPLE / tokens))

    def tell_limits(self, steps: int) -> None:
        """Say so if a run of so many steps is over before a change, or cannot count the score that it has."""
        if self.every and self.score not in ("token", "gate"):
            logger.info(
                f"  experts are exchanged by their tokens: score_function={self.score} is not counted in training"
            )
        if self.every and self.every >= steps:
            logger.info(f"  reselect_steps={self.every} exchanges nothing in {counted(steps, 'step')}. Lower it")
        when = self.expand.get("when", "plateau")
        if when != "plateau" and when * self.additions >= steps:
            logger.info(f"  to={self.expand['to']} is reached after step {when * self.additions}, and the run has "
                        f"{steps}. Lower when, or raise by")  # fmt: skip

    # ---- when

    def before_step(self, state: TrainerState) -> bool:
        """Change the experts where that is due after `state.global_step` steps. Return whether they changed."""
        step, chosen = state.global_step, {layer: set(of_layer) for layer, of_layer in self.since.items()}
        if self.expand and self._is_expansion_due(state):
            chosen = self._first(chosen, min(self.ends, sum(map(len, chosen.values())) + self.by))
        if self.every and step and step % self.every == 0:
            chosen = self._reselected(chosen)
        self._measures = bool(self.every) and self.every - step % self.every <= self._window
        changed = any(chosen[layer] != self.since.get(layer, {}).keys() for layer in chosen)
        if changed:
            self._change(step, chosen)
        return changed

    def _is_expansion_due(self, state: TrainerState) -> bool:
        step, when = state.global_step, self.expand["when"]
        if when != "plateau":
            return step > 0 and step % when == 0
        losses = [(entry["step"], entry["eval_loss"]) for entry in state.log_history if "eval_loss" in entry]
        *before, (last, loss) = losses or [(None, math.inf)]
        return bool(before) and last == step and loss >= min(value for _, value in before)

    def _first(self, now: dict[int, set[int]], count: int) -> dict[int, set[int]]:
        """Return the experts of `now` with the next best, `count` in all."""
        more = [(layer, expert) for layer, expert in self.order if expert not in now.get(layer, ())]
        more = more[: max(0, count - sum(map(len, now.values())))]
        return {la: now.get(la, set()) | {expert for layer, expert in more if layer == la} for la in self.num_experts_L}

    def _reselected(self, now: dict[int, set[int]]) -> dict[int, set[int]]:
        """Exchange trained experts for others of their layer that got more tokens, as long as the adapter has room."""
        sums_LE = dict(zip(self.num_experts_L, self._all_counts().tolist()))
        self._capture, self._earlier, self._counted = esft.RouterCapture(self.model), None, False
        ever, swaps, more, less = {la: set(ids) for la, ids in self._config.experts.items()}, [], *MARGIN
        for layer, trained in now.items():
            sum_E = sums_LE[layer]
            worst = sorted(trained, key=lambda e: (sum_E[e], -e))
            best = sorted(set(range(len(sum_E))) - trained, key=lambda e: (-sum_E[e], e))
            pairs = [(w, b) for w, b in zip(worst, best) if less * sum_E[b] > more * sum_E[w]]
            swaps += [(sum_E[b] - sum_E[w], layer, w, b) for w, b in pairs]
        chosen = {layer: set(trained) for layer, trained in now.items()}
        room = self.most - max(0, self.ends - sum(map(len, now.values())))  # what expansion will need is left
        for _, layer, old, new in sorted(swaps, key=lambda swap: (-swap[0], swap[1:])):
            if new in ever[layer] or sum(map(len, ever.values())) < room:
                chosen[layer] = chosen[layer] - {old} | {new}
                ever[layer].add(new)
        return chosen

    # ---- counts

    def counting(self, labels_BT: Tensor) -> contextlib.AbstractContextManager:
        """Count the tokens of a batch at the routers while open, in the steps that need it. Padding is not counted."""
        if not self._measures:
            return contextlib.nullcontext()
        self._counted = True
        self._capture.token_mask = (labels_BT != IGNORE).flip(1).cumsum(1).flip(1) > 0  # up to a row's last label
        return self._capture

    def _all_counts(self) -> Tensor:
        """Return the counts of this window of all ranks, (L, E). All ranks call this."""
        own = [self._capture.counts().sums["gates" if self.score == "gate" else "slots"]] if self._counted else []
        own += [] if self._earlier is None else [self._earlier]
        zeros_LE = torch.zeros(len(self.num_experts_L), max(self.num_experts_L.values()), dtype=torch.int64)
        return torch.tensor(self.ranks.gather(sum(own, zeros_LE).tolist())).sum(0)

    # ---- the change

    @property
    def _config(self) -> esft.ExpertConfig:
        return find_state(self.model).config

    def _change(self, step: int, chosen: dict[int, set[int]]) -> None:
        old = self.since
        self.since = {la: {e: old.get(la, {}).get(e, step) for e in sorted(ids)} for la, ids in chosen.items() if ids}
        config = with_experts(self._config, {layer: tuple(ids) for layer, ids in self.since.items()})
        parts = []
        for layer in self.num_experts_L:
            was, now = old.get(layer, {}).keys(), self.since.get(layer, {}).keys()
            if was != now:
                added, removed = sorted(now - was), sorted(was - now)
                self.changes.append({"step": step, "layer": layer, "added": added, "removed": removed})
                parts.append(" ".join([f"layer {layer}:", *(f"+{e}" for e in added), *(f"-{e}" for e in removed)]))
        self.verify()
        self._put(config)
        self.verify(but=self.since)
        self.reselection.follow()
        count, ever = (sum(map(len, part.values())) for part in (self.since, config.experts))
        logger.info(f"  after step {step}: {count} of {self.total} experts are trained, {ever} in the adapter; "
                    + "; ".join(parts))  # fmt: skip

    def verify(self, but: Mapping[int, Collection[int]] | None = None) -> None:
        """Verify what is frozen, with `verify_frozen`. All ranks call this."""
        if self.proof:
            self.proof.verify(but=but)

    def _put(self, config: esft.ExpertConfig) -> None:
        change_experts(self.model, self.since, config)
        if self.ranks.ep_size > 1:
            follow_rows(self.model, self.ranks)

    # ---- files

    def state(self) -> dict:
        """Return what a checkpoint keeps. All ranks call this."""
        counts_LE = self._all_counts().tolist() if self.every else None
        return {"trained_since": self.since, "changes": self.changes, "counts": counts_LE}

    @contextlib.contextmanager
    def restoring(self, checkpoint: Path) -> Iterator[None]:
        """Train the experts of a checkpoint. While this is open, its values are put into the model."""
        config, now = esft.ExpertConfig.load(checkpoint), self.since
        ever = with_experts(self._config, config.experts).experts
        if self.reselection:  # the run is over, and this is its best checkpoint
            known = config.experts
            self.since = {la: {e: step for e, step in now[la].items() if e in known.get(la, ())} for la in now}
        else:
            saved = read_json(checkpoint / SELECTION)
            since = saved["trained_since"].items()
            self.since = {int(la): {int(e): step for e, step in row.items()} for la, row in since}
            self.changes = saved["changes"]
            if saved["counts"] and self.ranks.rank == 0:
                self._earlier = torch.tensor(saved["counts"])
        self.verify()
        self._put(config)
        yield
        self.verify(but=ever)
