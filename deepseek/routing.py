"""Count where a model's router sends the tokens of a task: with hooks on a model, or from the released routing logs.

The same hooks measure what the experts do there, if asked for: the norms of their outputs, and the gradients of their
weights (expert_sums.py).

Legend: T tokens, K top-k, N = T*K routed slots, E experts, L MoE layers.
"""

import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from deepseek.expert_sums import gated_norms, squared_gradients
from deepseek.experts import MoELayer, inner_model, moe_layers
from deepseek.masters import name_in_base

SUMS = {"token": "slots", "gate": "gates", "prob": "probs", "gradient": "squares", "reap": "norms"}  # of each score


@dataclass
class RouterCounts:
    """Sums over the routing of some tokens. They are exact: the counts of two halves add up to the counts of the whole.

    `sums` holds int64 tensors (L, E): the routed "slots" of each expert, the sum of its "gates" and, if asked for, of
    its router "probs". The latter two are in units of 1 / UNIT. So the order of addition, the number of processes and
    the device do not change a bit. If asked for, it also holds float64 tensors (L, E): the sum of gate weight x norm of
    the output ("norms"), and of the squared gradients of the expert's weights ("squares"). They are exact where they
    are added in the same order.
    """

    UNIT = 2.0**30

    top_k: int
    tokens: int
    layers: list[int]
    sums: dict[str, Tensor]

    def __add__(self, other: "RouterCounts") -> "RouterCounts":
        assert (self.top_k, self.layers) == (other.top_k, other.layers), "these are counts of different models"
        sums = {kind: sums_LE + other.sums[kind] for kind, sums_LE in self.sums.items()}
        return RouterCounts(self.top_k, self.tokens + other.tokens, self.layers, sums)


class RouterCapture:
    """Count the experts to which a model routes tokens, in every forward while the context is open.

    A pre-hook on each experts module sees the ids and gate weights that reach the experts. So group limits, bias
    correction, normalization and scaling are included. With a 2-D `attention_mask`, padding is not counted. To choose
    the tokens yourself, set `token_mask` (B, T) before a forward; it takes precedence. The model may be wrapped (DDP,
    FSDP, torch.compile, peft), and `generate` may call it.

    With `prob`, router probabilities are summed too, if transformers records the family's router logits. Logits go
    through a softmax. Routers that return probabilities already are taken as they are.

    With `reap`, each forward also computes the outputs of single experts. With `gradient`, call `backward` on a loss
    after each forward. While the context is open, no weight has a gradient: the squared gradients of the experts are
    summed up in the backward, by document. A document is a row of the batch, or a part of it whose `position_ids` begin
    at 0.

    Raises:
        ValueError: the model has no fused experts, no router logits for `prob`, or not all experts for `reap` and
            `gradient`. From `counts`: a layer's hook missed tokens, or saw NaN, or no backward reached it.
    """

    def __init__(self, model: nn.Module, prob: bool = False, reap: bool = False, gradient: bool = False):
        self.layers, self._reap, self._gradient = moe_layers(model), reap, gradient
        self._model, self._frozen_here, self._document = model, [], None
        if (reap or gradient) and any(layer.shard for layer in self.layers.values()):
            raise ValueError("cannot measure what experts do: a process has only some of them. Score them before, with "
                             "whole copies of the model.")  # fmt: skip
        self.token_mask: Tensor | None = None
        self._holders, self._depth, self._mask = _holders(model, self.layers), 0, None
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._top_k: dict[int, int] = {}
        self._routers = find_routers(model, self.layers) if prob else {}
        self._handles: list = []
        if prob and (missing := sorted(self.layers.keys() - self._routers.keys())):
            raise ValueError(
                f"cannot compute the prob score: transformers records no router logits for {len(missing)} of "
                f"{len(self.layers)} MoE layers of {type(model).__name__}. Drop the prob score."
            )

    def __enter__(self) -> "RouterCapture":
        for module in self._holders:
            self._handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._end, always_call=True))
        for layer in self.layers.values():
            self._handles.append(layer.module.register_forward_pre_hook(self._count(layer)))
            if router := self._routers.get(layer.index):
                self._handles.append(router[0].register_forward_hook(self._count_probs(layer, router[1])))
            if self._reap or self._gradient:
                self._handles.append(layer.module.register_forward_hook(self._measure(layer)))
        if self._gradient:
            embeddings = inner_model(self._model).get_input_embeddings()
            self._handles.append(embeddings.register_forward_hook(lambda *a: a[-1].detach().requires_grad_()))
            self._frozen_here = [param for param in self._model.parameters() if param.requires_grad]
            self._model.requires_grad_(False)
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for param in self._frozen_here:
            param.requires_grad_(True)

    def _begin(self, module, args, kwargs) -> None:
        """Take the first 2-D mask on the way from the model that is called to its layers."""
        if self._depth == 0:
            self._mask = None if self.token_mask is None else self.token_mask.reshape(-1).bool()
        self._depth += 1
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        padding, ids = given.get("attention_mask"), given.get("input_ids")
        tokens = given.get("inputs_embeds") if ids is None else ids
        if self._mask is None and isinstance(padding, Tensor) and padding.ndim == 2:
            # while an answer is generated, the mask also covers what is cached
            self._mask = padding[:, -tokens.shape[1] :].reshape(-1).bool()
        if self._gradient:
            starts = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2]) == 0
            positions = given.get("position_ids")
            if isinstance(positions, Tensor) and positions.shape == starts.shape:
                starts = starts | (positions == 0)
            self._document = starts.reshape(-1).cumsum(0)

    def _end(self, *_) -> None:
        self._depth -= 1

    def _count(self, layer: MoELayer):
        def hook(_module, args) -> None:
            ids_TK, weights_TK = args[1], args[2].detach()  # else activation checkpointing would see tensors be saved
            T, self._top_k[layer.index] = ids_TK.shape
            mask_T = torch.ones(T) if self._mask is None else self._mask
            keep_T = mask_T.to(ids_TK.device, torch.int64)
            slots_N = (keep_T[:, None] * (weights_TK != 0)).reshape(-1)  # in ZAYA, weight 0 skips the expert
            gates_N = (weights_TK.double() * RouterCounts.UNIT).round().long().reshape(-1) * slots_N
            ids_N = ids_TK.reshape(-1)
            zeros_E = torch.zeros(layer.num_experts, dtype=torch.int64, device=ids_N.device)
            self._add("slots", layer, zeros_E.scatter_add(0, ids_N, slots_N))
            self._add("gates", layer, zeros_E.scatter_add(0, ids_N, gates_N))
            self._add("tokens", layer, keep_T.sum())
            self._add("unsound", layer, (~weights_TK.isfinite().all(1) * keep_T).sum())

        return hook

    def _measure(self, layer: MoELayer):
        def hook(_module, args, output) -> None:
            x_TD, ids_TK, weights_TK, *_ = args
            x_TD = x_TD.detach().reshape(len(ids_TK), -1)
            if self._reap:
                keep_T = torch.ones(len(x_TD)) if self._mask is None else self._mask
                with torch.no_grad():
                    norms_E = gated_norms(layer, x_TD, ids_TK, weights_TK, keep_T.to(x_TD.device))
                self._add("norms", layer, norms_E)
            if self._gradient and output.requires_grad:
                document_T = self._document.to(x_TD.device)

                def backward_hook(g_TD: Tensor) -> None:
                    rows_TD = g_TD.reshape(x_TD.shape)
                    squares_E = squared_gradients(layer, x_TD, ids_TK, weights_TK, rows_TD, document_T)
                    self._add("squares", layer, squares_E)

                output.register_hook(backward_hook)

        return hook

    def _count_probs(self, layer: MoELayer, position: int):
        def hook(_module, _args, output) -> None:
            # ZAYA's router has one column more than there are experts, for a token that skips them all
            logits_TE = output[position].detach().float()[:, : layer.num_experts]
            probs_TE = (logits_TE if are_probabilities(logits_TE) else logits_TE.softmax(-1)).double()
            if self._mask is not None:
                probs_TE = probs_TE * self._mask.to(probs_TE.device)[:, None]
            self._add("probs", layer, (probs_TE * RouterCounts.UNIT).round().long().sum(0))

        return hook

    def _add(self, kind: str, layer: MoELayer, value: Tensor) -> None:
        total = self._sums.get((kind, layer.index))
        self._sums[kind, layer.index] = value if total is None else total.to(value.device) + value

    def counts(self) -> RouterCounts:
        """Return the counts so far, in host memory."""
        tokens = {index: int(self._sums.get(("tokens", index), 0)) for index in self.layers}
        for index, layer in self.layers.items():
            if index not in self._top_k or tokens[index] != max(tokens.values()):
                seen = f"{tokens[index]} of {max(tokens.values())} tokens"
                raise ValueError(f"cannot score layer {index}: its experts ({layer.name}) saw {seen}")
            if unsound := int(self._sums["unsound", index]):
                raise ValueError(
                    f"cannot score layer {index}: the gate weights of {unsound} tokens are not finite. The model is "
                    "damaged, or its dtype overflows."
                )
            if self._gradient and ("squares", index) not in self._sums:
                raise ValueError(f"cannot score layer {index}: no backward reached its experts. Call backward on a "
                                 "loss of each forward, with gradients enabled.")  # fmt: skip
        kinds = ["slots", "gates"] + ["probs"] * bool(self._routers)
        kinds += ["norms"] * self._reap + ["squares"] * self._gradient
        sums = {kind: torch.stack([self._sums[kind, index].cpu() for index in self.layers]) for kind in kinds}
        return RouterCounts(max(self._top_k.values()), max(tokens.values()), list(self.layers), sums)


def _holders(model: nn.Module, layers: dict[int, MoELayer]) -> list[nn.Module]:
    """Return the transformers models that hold all layers: one inside the other, below any wrapper."""
    names = [f".{layer.name}" for layer in layers.values()]
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and all(one.startswith(f".{name}") for one in names)
    ]


def are_probabilities(logits_TE: Tensor) -> bool:
    """Return whether a router gives probabilities where others give logits."""
    sums_T = logits_TE.sum(-1)
    return bool((logits_TE >= 0).all()) and torch.allclose(sums_T, torch.ones_like(sums_T), atol=1e-3)


def find_routers(model: nn.Module, layers: dict[int, MoELayer]) -> dict[int, tuple[nn.Module, int]]:
    """Return (router, position of the logits in its output) of each layer for which transformers records the logits.

    Beside the logits, the output holds the gate weights and the expert ids of each token, at the next two positions.
    """
    recorded = (module._can_record_outputs or {} for module in model.modules() if isinstance(module, PreTrainedModel))
    recorders = [r["router_logits"] for r in recorded if isinstance(r.get("router_logits"), OutputRecorder)]
    routers = {}
    for layer in layers.values():
        block = model.get_submodule(layer.name.rpartition(".")[0])
        for module in block.modules():
            for recorder in recorders:
                if isinstance(module, recorder.target_class):
                    routers[layer.index] = (module, recorder.index)
    return routers


def router_weights(model: nn.Module, kind: str | None) -> list[nn.Parameter]:
    """Return what `kind` ("full", "bias", or None for nothing) trains of a model's routers.

    A correction bias changes which experts are chosen and no gate weight, so it has no gradient and is never trained.
    """
    found = []
    for router, _ in find_routers(model, moe_layers(model)).values() if kind else ():
        named = {name_in_base(name): param for name, param in router.named_parameters()}
        of_kind = {"bias"} if kind == "bias" else {name for name in named if "correction_bias" not in name}
        found += [param for name, param in named.items() if name in of_kind]
    return found


# --------------------------------------------------------------------------------------------------------------------
# the released logs

Line = tuple[Path, int, list[int], list[float]]  # file, number in it, expert ids and gate weights of one forward


def read_logs(folder: Path) -> list[RouterCounts]:
    """Return the counts of each forward in the released raw logs.

    A log `expert_weights_<layer>.txt` has a line per forward: T*K expert ids, two tabs, T*K gate weights. It does not
    say what K and E are. E is the highest id of all layers plus one. K is found by `_find_top_k`.
    """
    lines_L = _read_ranks(folder)
    top_k = _find_top_k([ids for lines in lines_L.values() for *_, ids, _ in lines])
    num_experts = 1 + max(max(ids) for lines in lines_L.values() for *_, ids, _ in lines)
    counts = []
    for forward in zip(*lines_L.values()):
        for path, number, ids, _ in forward:
            if _repeats(ids, top_k):
                raise ValueError(f"cannot use {path}:{number}: a token has one expert twice among its {top_k}")
        ids_LN = torch.tensor([ids for *_, ids, _ in forward])
        gates_LN = torch.tensor([gates for *_, gates in forward], dtype=torch.float64)
        zeros_LE = torch.zeros(len(forward), num_experts, dtype=torch.int64)
        sums = {
            "slots": zeros_LE.scatter_add(1, ids_LN, torch.ones_like(ids_LN)),
            "gates": zeros_LE.scatter_add(1, ids_LN, (gates_LN * RouterCounts.UNIT).round().long()),
        }
        counts.append(RouterCounts(top_k, ids_LN.shape[1] // top_k, list(lines_L), sums))
    return counts


def _find_top_k(lines: Sequence[list[int]]) -> int:
    """Return the largest K that divides every line and repeats no expert within a token.

    One token in a hundred may repeat an expert. Such a token is damaged, and must not make a smaller K look right.
    """
    common, slots = math.gcd(*map(len, lines)), sum(map(len, lines))
    divisors = [k for k in range(1, common + 1) if common % k == 0]
    return max(k for k in divisors if sum(_repeats(ids, k) for ids in lines) <= 0.01 * slots / k)


def _repeats(ids: list[int], top_k: int) -> int:
    """Return the number of tokens that have an expert twice."""
    return sum(len(set(ids[i : i + top_k])) < top_k for i in range(0, len(ids), top_k))


def _read_ranks(folder: Path) -> dict[int, list[Line]]:
    """Return the lines of all ranks by layer. Raise ValueError or FileNotFoundError where the logs do not match."""
    lines_L: dict[int, list[Line]] = {}
    for rank in sorted(path for path in folder.glob("rank_*") if path.is_dir()) or [folder]:
        for path in rank.iterdir():
            if match := re.fullmatch(r"expert_weights_(\d+)\.txt", path.name):
                lines_L.setdefault(int(match[1]), []).extend(_read_log(path))
    if not any(lines_L.values()):
        raise FileNotFoundError(
            f"cannot read {folder}: no summary.json, expert_scores.json, or line in any expert_weights_<layer>.txt"
        )
    shapes_L = {layer: [(path.parent, len(ids)) for path, _, ids, _ in lines] for layer, lines in lines_L.items()}
    first = min(lines_L)
    if odd := [layer for layer in sorted(lines_L) if shapes_L[layer] != shapes_L[first]]:
        raise ValueError(
            f"cannot read {folder}: layers {first} and {odd[0]} do not log the same forwards ({len(shapes_L[first])} "
            f"and {len(shapes_L[odd[0]])} lines). A log is truncated, missing, or of another run."
        )
    return dict(sorted(lines_L.items()))


def _read_log(path: Path) -> list[Line]:
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        left, _, right = line.strip().partition("\t\t")
        try:
            ids, gates = [int(x) for x in left.split("\t")], [float(x) for x in right.split("\t")]
            sound = len(ids) == len(gates) and min(ids) >= 0 and all(0 <= gate < math.inf for gate in gates)
        except ValueError:
            sound = False
        if not sound:
            expected = "expert ids, two tabs, and as many gate weights, all from 0"
            raise ValueError(
                f"cannot read {path}:{number}: expected {expected}. The line is truncated, or the file is not a log."
            )
        lines.append((path, number, ids, gates))
    return lines
