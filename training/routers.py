"""Routers that are trained: how far they have moved from the base's, a penalty on that, and a rate of their own.

    KL = mean over tokens and MoE layers of  sum_e p_e log(p_e / q_e)      p: the router's probabilities, q: the base's

Both are for the same input of the router, so no second forward of the model is needed: a hook runs a copy of the base's
router beside the trained one. The input is detached. So the penalty holds the routers themselves, and leaves the layers
below alone. `changed` is the share of tokens, over the layers, that go to another set of experts than the base's router
would send them to. Padding does not count. Routers that draw noise in training are compared without it.

Legend: B rows, T tokens of the batch, E experts, K top-k.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from deepseek.experts import inner_model, moe_layers
from deepseek.routing import are_probabilities, find_routers, router_weights
from training.batches import Means, document_numbers, labels_of_documents

MEASURES = ("router_kl", "router_changed")  # in the log


class TrainedRouters:
    """Measures the trained routers of a prepared model, whose values are still the base's.

    Args:
        kind: what is trained of them, "full" or "bias".
        weight: of the penalty in the loss.
        rate: their learning rate.
    """

    def __init__(self, model: nn.Module, kind: str, weight: float, rate: float):
        model = inner_model(model)
        self.params, self.weight, self.rate = router_weights(model, kind), weight, rate
        self.tokens: Tensor | None = None  # of the whole batch of a step, on all processes
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}  # KL and changed tokens of a layer
        self.means = Means(MEASURES, self.params[0].device)  # over tokens and layers
        self._are_probabilities: dict[int, bool] = {}
        self._open, self._mask_T = False, None
        for index, (router, position) in find_routers(model, moe_layers(model)).items():
            base = copy.deepcopy(router).requires_grad_(False).eval()
            router.register_forward_hook(self._compare(index, base, position), with_kwargs=True)

    def _compare(self, index: int, base: nn.Module, position: int) -> Callable:
        def hook(router, args, kwargs, _output) -> None:
            learns = self.weight > 0 and torch.is_grad_enabled()
            if not self._open and not learns:  # a recomputed forward does what the first one did
                return
            args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
            in_training = router.training
            with torch.set_grad_enabled(learns):
                here = router.eval().forward(*args, **kwargs)
                router.train(in_training)
                with torch.no_grad():
                    there = base(*args, **kwargs)
                kl = (self._kl(index, here[position], there[position]) * self._mask_T).sum()
            if self._open:
                ids_TK, base_ids_TK = (one[position + 2].sort(-1).values for one in (here, there))
                self._seen[index] = kl, ((ids_TK != base_ids_TK).any(-1) & self._mask_T).sum()

        return hook

    def _kl(self, index: int, logits_TE: Tensor, base_TE: Tensor) -> Tensor:
        """Return KL (T,) in fp32."""
        if index not in self._are_probabilities:
            self._are_probabilities[index] = are_probabilities(base_TE)
        p_TE, q_TE = (
            one.float().clamp(min=1e-20).log() if self._are_probabilities[index] else one.float().log_softmax(-1)
            for one in (logits_TE, base_TE)
        )
        return (p_TE.exp() * (p_TE - q_TE)).sum(-1)

    @contextlib.contextmanager
    def watch(self, inputs: dict) -> Iterator[None]:
        """Measure the forward of a batch in the block. Of several the last one counts: DPO's reference comes first."""
        self._mask_T, self._open = in_documents(inputs).flatten(), True
        try:
            yield
        finally:
            self._open = False
        kl, changed = (torch.stack(one).sum() for one in zip(*self._seen.values()))
        self._kl_sum, layers, self._seen = kl / len(self._seen), len(self._seen), {}
        self.means.add(kl, changed, layers * self._mask_T.sum())

    def count(self, batches: list[dict]) -> Tensor:
        """Return the tokens of the micro batches of a step."""
        return sum((in_documents(inputs).sum() for inputs in batches), torch.tensor(0))

    def penalty(self) -> Tensor:
        """Return what the batch that was watched adds to the loss of its step."""
        return self.weight * self._kl_sum / self.tokens

    def set_rate(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the routers groups of their own, which come last."""
        mine = {id(param) for param in self.params}
        for group in list(optimizer.param_groups):
            parts = {own: [p for p in group["params"] if (id(p) in mine) == own] for own in (True, False)}
            group["params"] = parts[False]
            if parts[True]:
                optimizer.add_param_group({**group, "params": parts[True], "lr": self.rate})


def drift_of(history: list[dict]) -> dict[str, float]:
    """Return the last `MEASURES` in a run's log, those of a validation where there was one."""
    for kind in ("eval_", ""):
        for entry in reversed(history):
            if f"{kind}{MEASURES[0]}" in entry:
                return {name: entry[f"{kind}{name}"] for name in MEASURES}
    return {}


def describe_drift(results: dict) -> str:
    kl, changed = (results[name] for name in MEASURES)
    return f"routers: KL to the base's {abs(kl):.4f}, and {changed:.1%} of the tokens go to another set of experts"


def in_documents(inputs: dict) -> Tensor:
    """Return bool (B, T): which tokens of a batch are no padding, which is a document without labels."""
    return labels_of_documents(inputs)[document_numbers(inputs)] > 0
