"""Count where a model's router sends the tokens of a task: by hooks on a model, or from the released routing logs.

Legend: T tokens, K top-k, E experts, L MoE layers; an array named x_LE is indexed [layer][expert].
"""

import inspect
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from deepseek.experts import moe_layers


@dataclass
class RouterCounts:
    """What routing leaves behind, exact and additive: the sum of the counts of two halves is the count of the whole.

    `slots_LE` counts routed slots. Gate weights and probabilities are summed as integers of 2**-30, so that no order of
    addition, number of processes or device changes a bit.
    """

    UNIT = 2.0**30

    top_k: int
    tokens: int
    slots_LE: dict[int, list[int]]
    gates_LE: dict[int, list[int]]
    probs_LE: dict[int, list[int]] = field(default_factory=dict)

    def __add__(self, other: "RouterCounts") -> "RouterCounts":
        def add(a: dict[int, list[int]], b: dict[int, list[int]]) -> dict[int, list[int]]:
            return {layer: [x + y for x, y in zip(a[layer], b[layer], strict=True)] for layer in a}

        if (self.top_k, self.slots_LE.keys()) != (other.top_k, other.slots_LE.keys()):
            raise ValueError("counts of different models cannot be added: their layers or their top-k differ")
        return RouterCounts(
            self.top_k,
            self.tokens + other.tokens,
            add(self.slots_LE, other.slots_LE),
            add(self.gates_LE, other.gates_LE),
            add(self.probs_LE, other.probs_LE),
        )


class RouterCapture:
    """Count, while the context is open, which experts the tokens of a model's forwards are routed to.

    A pre-hook on every experts module sees the ids and weights that reach the experts: group limits, bias correction,
    normalisation and scaling included. Padding is not counted where the forward gets a 2-D `attention_mask`;
    `token_mask` (B, T), set before a forward, says explicitly what counts and takes precedence.
    With `prob=True` the mean router probability over all experts is kept too, where transformers records the family's
    router logits (softmax of the logits; routers that already return probabilities are taken as they are).

    Raises:
        ValueError: the model has no fused experts; `prob` was asked of a family that records no router logits;
            a layer's hook never fired, or not for every token, or saw NaN (at `counts`).
    """

    def __init__(self, model: nn.Module, prob: bool = False):
        self.layers = moe_layers(model)
        self.token_mask: Tensor | None = None
        self._model, self._mask = model, None
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._top_k: dict[int, int] = {}
        self._routers = _routers(model) if prob else {}
        self._handles: list = []
        if prob and not self._routers:
            raise ValueError(f"transformers records no router logits for {type(model).__name__}: drop the prob score")
        if prob and (missing := sorted(self.layers.keys() - self._routers.keys())):
            raise ValueError(
                f"transformers records no router logits for layer {missing[0]} of {type(model).__name__} "
                f"({len(missing)} of {len(self.layers)} layers): drop the prob score"
            )

    def __enter__(self) -> "RouterCapture":
        self._handles = [self._model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for layer in self.layers.values():
            self._handles.append(layer.module.register_forward_pre_hook(self._count(layer.index)))
        for layer, (module, index) in self._routers.items():
            self._handles.append(module.register_forward_hook(self._count_probs(layer, index)))
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, module, args, kwargs) -> None:
        mask = self.token_mask
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
        if mask is None and given is not None and given.ndim == 2:
            mask = given
        self._mask = None if mask is None else mask.reshape(-1).bool()

    def _count(self, layer: int):
        num_experts = self.layers[layer].num_experts

        def hook(_module, args) -> None:
            _, ids_TK, weights_TK, *_ = args
            T, K = ids_TK.shape
            self._top_k[layer] = K
            if self._mask is not None and len(self._mask) != T:
                raise ValueError(f"the token mask has {len(self._mask)} tokens, the forward {T}")
            ones_T = torch.ones(T, dtype=torch.int64, device=ids_TK.device)
            keep_T = ones_T if self._mask is None else self._mask.to(ids_TK.device, torch.int64)
            # a weight of 0 is a token that skips its expert (ZAYA)
            slots = (keep_T[:, None] * (weights_TK != 0)).reshape(-1)
            gates = (weights_TK.detach().double() * RouterCounts.UNIT).round().long().reshape(-1) * slots
            index = ids_TK.reshape(-1)
            unsound = ~weights_TK.isfinite().all(1)
            zeros = torch.zeros(num_experts, dtype=torch.int64, device=index.device)
            self._add("slots", layer, zeros.scatter_add(0, index, slots))
            self._add("gates", layer, zeros.scatter_add(0, index, gates))
            self._add("tokens", layer, keep_T.sum())
            self._add("unsound", layer, (unsound * keep_T).sum())

        return hook

    def _count_probs(self, layer: int, index: int):
        num_experts = self.layers[layer].num_experts

        def hook(_module, _args, output) -> None:
            logits_TE = output[index].detach().float()[:, :num_experts]  # beyond them, ZAYA's router may skip them all
            sums_T = logits_TE.sum(-1)
            done = bool((logits_TE >= 0).all()) and torch.allclose(sums_T, torch.ones_like(sums_T), atol=1e-3)
            probs_TE = (logits_TE if done else logits_TE.softmax(-1)).double()
            if self._mask is not None:
                probs_TE = probs_TE * self._mask.to(probs_TE.device)[:, None]
            self._add("probs", layer, (probs_TE * RouterCounts.UNIT).round().long().sum(0))

        return hook

    def _add(self, kind: str, layer: int, value: Tensor) -> None:
        total = self._sums.get((kind, layer))
        self._sums[kind, layer] = value if total is None else total.to(value.device) + value

    def counts(self) -> RouterCounts:
        """The counts so far. Raises ValueError where a layer's hook never fired or saw other tokens than the rest."""
        tokens = {layer: int(self._sums.get(("tokens", layer), 0)) for layer in self.layers}
        for layer, count in tokens.items():
            if layer not in self._top_k:
                raise ValueError(
                    f"the experts of layer {layer} ({self.layers[layer].name}) were never called: no score"
                )
            if count != max(tokens.values()) or self._top_k[layer] != max(self._top_k.values()):
                raise ValueError(f"layer {layer} saw {count} tokens where another saw {max(tokens.values())}")
            if unsound := int(self._sums["unsound", layer]):
                raise ValueError(
                    f"layer {layer}: the gate weights of {unsound} of {count} tokens are not finite: the model is "
                    "damaged, or its dtype overflows"
                )

        def gather(kind: str) -> dict[int, list[int]]:
            return {layer: self._sums[kind, layer].tolist() for layer in self.layers if (kind, layer) in self._sums}

        top_k = max(self._top_k.values())
        return RouterCounts(top_k, max(tokens.values()), gather("slots"), gather("gates"), gather("probs"))


def _routers(model: nn.Module) -> dict[int, tuple[nn.Module, int]]:
    """Layer -> (router, place of the logits in its output), where transformers records router logits."""
    recorders = [getattr(module, "_can_record_outputs", None) or {} for module in model.modules()]
    recorders = [r["router_logits"] for r in recorders if hasattr(r.get("router_logits"), "target_class")]
    routers = {}
    for layer in moe_layers(model).values():
        block = model.get_submodule(layer.name.rpartition(".")[0])
        for module in block.modules():
            for recorder in recorders:
                if isinstance(module, recorder.target_class):
                    routers[layer.index] = (module, recorder.index)
    return routers


def read_logs(folder: Path) -> RouterCounts:
    """Counts from the released raw logs: a line per forward, T*K expert ids, two tabs, T*K gate weights.

    Neither K nor E is written there. E is the highest id seen, over all layers, plus one. A token's K experts are
    distinct, so K is the longest run length that divides every line and repeats no expert within a run; a run in a
    hundred may, so that one damaged token is reported and does not pass for another K.
    """
    ranks = sorted(p for p in folder.glob("rank_*") if p.is_dir()) or [folder]
    log_by_layer: dict[int, list[tuple[str, list[int], list[float]]]] = {}
    for number, rank in enumerate(ranks):
        files = {int(m[1]): p for p in rank.iterdir() if (m := re.fullmatch(r"expert_weights_(\d+)\.txt", p.name))}
        if not files:
            raise FileNotFoundError(f"{rank}: no summary.json and no expert_weights_<layer>.txt in it")
        if number and files.keys() != log_by_layer.keys():
            odd = min(files.keys() ^ log_by_layer.keys())
            raise ValueError(f"{rank}: layer {odd} is logged by some ranks and not by others; compute the logs again")
        shapes: dict[int, list[int]] = {}
        for layer, path in sorted(files.items()):
            log = _read_log(path)
            log_by_layer.setdefault(layer, []).extend(log)
            shapes[layer] = [len(ids) for _, ids, _ in log]
            first = next(iter(shapes))
            if shapes[layer] != shapes[first]:
                raise ValueError(
                    f"{path}: its {len(log)} forwards ({sum(shapes[layer])} slots) are not those of {files[first].name}"
                    f" ({len(shapes[first])}, {sum(shapes[first])}): truncated, or mixed up with another run"
                )
    lines = [ids for log in log_by_layer.values() for _, ids, _ in log]
    common, slots = math.gcd(*map(len, lines)), sum(map(len, lines))

    def repeats(ids: list[int], k: int) -> int:
        return sum(len(set(ids[i : i + k])) < k for i in range(0, len(ids), k))

    divisors = [k for k in range(1, common + 1) if common % k == 0]
    top_k = max(k for k in divisors if sum(repeats(ids, k) for ids in lines) <= 0.01 * slots / k)
    num_experts = max(map(max, lines)) + 1
    slots_LE = {layer: [0] * num_experts for layer in sorted(log_by_layer)}
    gates_LE = {layer: [0] * num_experts for layer in sorted(log_by_layer)}
    for layer, log in log_by_layer.items():
        for where, ids, gates in log:
            if repeats(ids, top_k):
                raise ValueError(f"{where}: a token has one expert twice among its {top_k}: the log is damaged")
            for expert, gate in zip(ids, gates):
                slots_LE[layer][expert] += 1
                gates_LE[layer][expert] += round(gate * RouterCounts.UNIT)
    return RouterCounts(top_k, slots // len(log_by_layer) // top_k, slots_LE, gates_LE)


def _read_log(path: Path) -> list[tuple[str, list[int], list[float]]]:
    """("file:line", expert ids, gate weights) of every forward."""
    log = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        where = f"{path}:{number}"
        left, tab, right = line.strip().partition("\t\t")
        try:
            ids, gates = [int(x) for x in left.split("\t")], [float(x) for x in right.split("\t")]
        except ValueError as error:
            raise ValueError(f"{where}: not a line of the routing log ({error}): truncated, or not a log") from error
        if not tab or len(ids) != len(gates):
            raise ValueError(f"{where}: {len(ids)} expert ids but {len(gates)} gate weights: the line is truncated")
        bad = next((g for g in gates if not math.isfinite(g) or g < 0), None)
        if bad is not None or min(ids) < 0:
            raise ValueError(f"{where}: {min(ids) if bad is None else bad} is no expert id or gate weight")
        log.append((where, ids, gates))
    if not log:
        raise ValueError(f"{path}: the log is empty; compute it again")
    return log
