"""Train other experts of a model from some step on, while an optimizer is at work.

    since the start    rows | 2 5 6 | 0 1 3 4 7         trained: 2 5 6
    from step 100 on   rows | 2 6 | 1 4 | 0 3 5 7       5 stays frozen where it stands; 1 and 4 begin
                              ^^^   ^^^ two generations

The fp32 masters of experts that stay keep their bits. The master of one that leaves is rounded to the dtype of the
model, in which it was computed with all along. So the forward does not change by a bit.

Most optimizers count the steps of a parameter. AdamW divides its averages by 1 - beta^steps, which would be wrong for
rows that are younger than the parameter. So an optimizer sees a parameter for each generation: a view of these rows of
the master. It keeps states for each alone. Those of a generation that stays are not touched, and a new one begins with
none, as at the start of a run. That holds for any optimizer whose states belong to a parameter. Two hooks of the
optimizer lead gradients from the master to the views:

    before a step   view.data = master[rows]        view.grad = master.grad[rows]
    after it        with a warmup of W steps, the update of a generation of age a < W is scaled by (a + 1) / W

Averages that begin anew make large steps, and networks whose weights are swapped in training lose stability by it
(RigL, arXiv 1911.11134; SMET, arXiv 2606.00888). The warmup is against that.

Legend: S trained experts of the layer.
"""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deepseek.adapters import adapter_shapes, adapter_views, find_state, on_host
from deepseek.experts import MoELayer, SelectedExperts, inner_model, moe_layers, release_experts, train_experts
from deepseek.fp8 import note_changes
from deepseek.frozen import thaw_experts
from deepseek.optimizer_rows import by_row, join_parts, join_rows, parts_of

Since = Mapping[int, Mapping[int, int]]  # layer -> expert -> the step since which it is trained


# --------------------------------------------------------------------------------------------------------------------
# the model


@torch.no_grad()
def change_experts(model: nn.Module, since_L: Since, config) -> None:
    """Train exactly the routed experts of `since_L` from now on. `config` names them and all that were trained before.

    Experts that `config` no longer names get the base's values, which must have been kept.
    """
    state = find_state(model)
    names = adapter_shapes(model, config).keys()
    for name, view in adapter_views(model, state.config).items():
        if name not in names:
            view.copy_(state.displaced.pop(name))
    note_changes(model, state.config.experts)
    for layer in moe_layers(model).values():
        since = since_L.get(layer.index, {})
        here = {expert: since[expert] for expert in layer.local_ids if expert in since}
        ever, known = (set(c.experts.get(layer.index, ())) for c in (config, state.config))
        if here != (layer.trained.since if layer.trained else {}) or ever - known:
            _change_layer(layer, here, ever)
    if state.displaced is not None:
        views = adapter_views(model, config).items()
        state.displaced |= {name: on_host(view) for name, view in views if name not in state.displaced}
    state.config = config
    others = [module for module in state.trained if not isinstance(module, SelectedExperts)]
    state.trained[:] = [*others, *(layer.trained for layer in moe_layers(model).values() if layer.trained)]


def _change_layer(layer: MoELayer, since: Mapping[int, int], ever: Collection[int]) -> None:
    """Train the experts `since` of a layer, and give all that were `ever` trained rows of the fused tensors."""
    kept: dict[int, dict[str, Tensor]] = {}
    if layer.trained:
        masters = dict(layer.trained.named_parameters())
        for row, expert in enumerate(layer.trained.expert_ids):
            kept[expert] = {name: master.data[row] for name, master in masters.items()}
        release_experts(layer)
    thaw_experts(layer, ever)
    train_experts(layer, since)
    for row, expert in enumerate(layer.trained.expert_ids if layer.trained else ()):
        for name, values in kept.get(expert, {}).items():
            layer.trained.get_parameter(name).data[row] = values


# --------------------------------------------------------------------------------------------------------------------
# the optimizer


@dataclass
class Generation:
    """Experts of a layer that began to be trained at one step, and the parameters with which an optimizer sees them."""

    since: int
    expert_ids: list[int]
    params: dict[str, nn.Parameter]
    rows: slice  # of the masters
    masters: dict[str, nn.Parameter]


class Reselection:
    """Changes which experts of a model are trained, between two steps of its optimizer.

        reselection = Reselection(model, optimizer)       # after to_esft, before the first step
        ...
        reselection.train(select_experts(...))            # from here on exactly these

    The adapter holds all experts that were ever trained: `trained_config(model)`.

    Args:
        model: a model in training (`to_esft`), not sharded by FSDP.
        optimizer: of any kind that keeps its states by parameter. Experts are in one parameter group for each fused
            tensor.
        warmup: over so many steps the updates of experts that begin later grow to their full size.
        step: of how many steps the optimizer has taken.

    Raises:
        ValueError: LoRA or FSDP holds the experts; `optimizer` does not have them.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, warmup: int = 0, step: int = 0):
        self._model, self._optimizer, self._warmup, self.step = inner_model(model), optimizer, warmup, step
        state = find_state(self._model)
        if state is None or not state.training or state.lora:
            raise ValueError("cannot change the trained experts: the model trains none, or LoRA on them. Call to_esft.")
        places = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._group_of: dict[str, int] = {}  # of each fused tensor
        self._known: dict[tuple[int, int], Generation] = {}  # by layer and first step
        for layer in moe_layers(self._model).values():
            found = _generations(layer) if layer.trained else []
            for name, master in found[0].masters.items() if found else ():
                if isinstance(master, DTensor):
                    raise ValueError("cannot change the trained experts: FSDP has sharded them. Use it without FSDP.")
                if id(master) not in places:
                    lacks = f"the optimizer lacks {layer.name}.{name}"
                    raise ValueError(f"cannot change the trained experts: {lacks}. Give it all that is trained.")
                self._group_of[name] = places[id(master)]
            if len(found) == 1:
                self._known[layer.index, found[0].since] = found[0]
            elif found:
                self._remove(list(found[0].masters.values()))
        self.follow()
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def train(self, config) -> None:
        """Train exactly the routed experts of `config` from now on.

        Raises:
            ValueError: the model has no such expert, or the config differs in more than routed experts.
        """
        config.check(self._model)
        known = find_state(self._model).config
        if dataclasses.replace(config, experts={}) != dataclasses.replace(known, experts={}):
            raise ValueError("cannot change what is trained beside routed experts. Name only these otherwise.")
        now = {layer.index: layer.trained.since for layer in moe_layers(self._model).values() if layer.trained}
        since_L = {
            layer: {expert: now.get(layer, {}).get(expert, self.step) for expert in ids}
            for layer, ids in config.experts.items()
        }
        change_experts(self._model, since_L, with_experts(known, config.experts))
        self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """Let the optimizer see the generations of the experts that the model trains now."""
        before, self._known = self._known, {}
        for layer in moe_layers(self._model).values():
            found = _generations(layer) if layer.trained else []
            for number, new in enumerate(found):
                place = (layer.index, new.since)
                if place in before and set(new.expert_ids) <= set(before[place].expert_ids):
                    old = before.pop(place)
                    self._keep_rows(old, new.expert_ids)
                    found[number] = new = dataclasses.replace(new, params=old.params)
                else:
                    self._add(new.params)
                self._known[place] = new
            if found:
                layer.trained.parts = found
        self._remove([param for generation in before.values() for param in generation.params.values()])
        self._lead()

    def _add(self, params: dict[str, nn.Parameter]) -> None:
        groups = self._optimizer.param_groups
        for name, param in params.items():
            kinds = [group.get("matrix") for group in groups]  # of Muon
            fit = [i for i, kind in enumerate(kinds) if kind == (name if name in kinds else None)]
            usual = fit[min(1, len(fit) - 1) if name.endswith("_bias") else 0]  # Trainer's second has no weight decay
            groups[self._group_of.setdefault(name, usual)]["params"].append(param)

    def _remove(self, params: list[nn.Parameter]) -> None:
        gone = set(map(id, params))
        for group in self._optimizer.param_groups:
            group["params"] = [param for param in group["params"] if id(param) not in gone]
        for param in params:
            self._optimizer.state.pop(param, None)

    def _keep_rows(self, old: Generation, expert_ids: list[int]) -> None:
        """Keep the states of some experts of a generation, bit for bit."""
        rows = [old.expert_ids.index(expert) for expert in expert_ids]
        for param in old.params.values() if len(rows) < len(old.expert_ids) else ():
            state = self._optimizer.state.get(param, {})
            parts = parts_of({key: value for key, value in state.items() if isinstance(value, Tensor)})
            for key, part in parts.items():
                row_of = by_row(key, part, param)
                parts[key] = join_rows(key, [row_of[row] for row in rows])
            param.data = param.data[rows]
            state |= join_parts(parts, param, self._optimizer)

    def _lead(self) -> None:
        """Make the views those of the masters, and their gradients, too."""
        for generation in self._known.values():
            for name, param in generation.params.items():
                master = generation.masters[name]
                if param is not master:
                    param.data = master.data[generation.rows]
                    param.grad = None if master.grad is None else master.grad[generation.rows]

    def _before_step(self, *_) -> None:
        self._lead()
        self._young: list[tuple[nn.Parameter, Tensor, float]] = []
        for generation in self._known.values():
            share = (self.step - generation.since + 1) / max(1, self._warmup)
            if generation.since and share < 1:
                self._young += [(param, param.detach().clone(), share) for param in generation.params.values()]

    @torch.no_grad()
    def _after_step(self, *_) -> None:
        self.step += 1
        for param, before, share in self._young:
            param.copy_(before.lerp(param, share))
        for generation in self._known.values():
            for name, param in generation.params.items():
                if param is not generation.masters[name]:
                    param.grad = generation.masters[name].grad = None


def _generations(layer: MoELayer) -> list[Generation]:
    """Return the generations of a layer, the oldest first. An only one has the masters themselves as parameters."""
    masters, found, start = dict(layer.trained.named_parameters()), [], 0
    ids, since = layer.trained.expert_ids, layer.trained.since
    for step in sorted(set(since.values())):
        of_step = [expert for expert in ids if since[expert] == step]
        rows = slice(start, start := start + len(of_step))
        params = {name: nn.Parameter(master.data[rows]) for name, master in masters.items()}
        found.append(Generation(step, of_step, masters if len(of_step) == len(ids) else params, rows, masters))
    return found


def with_experts(config, experts_L: Mapping[int, tuple[int, ...]]):
    """Return a config of all that `config` names, and of `experts_L`."""
    before = config.experts
    more = {la: tuple(e for e in ids if e not in before.get(la, ())) for la, ids in experts_L.items()}
    experts = {la: before.get(la, ()) + more.get(la, ()) for la in before | more}
    return dataclasses.replace(config, experts=dict(sorted(experts.items())))
