"""Expert-Specialized Fine-Tuning (arXiv 2407.01906): train only those experts of a mixture that a task uses.

    with RouterCapture(model) as capture:        # hooks, no model code touched
        model(**batch)                           # tokens of the task
    scores = ExpertScores.from_counts(capture.counts())
    config = select_experts(scores, score_function="token", top_p=0.2)
    to_esft(model, config)                       # trainable: the FFNs of these experts, as fp32 parameters
    ...                                          # any training loop
    save_adapter(model, "out")                   # a few % of the model
    unload(model)                                # the base again, bit for bit
    add_adapter(model, "out")                    # or merge(model): a plain checkpoint, no inference overhead

The scores of expert e in layer l, over N tokens with K routed experts each (paper, section 3.2):

    token score  r = (routed slots that went to e) / (K N)      sums to 1 in every layer
    gate score   g = (sum of the gate weights of e) / N
    prob score   p = (sum of the router probabilities of e) / N      not in the paper; sums to 1

and two that look at what an expert does with its tokens, neither of them in the paper:

    gradient     squared gradients of e's weights, summed over documents, as a share of those of all experts
    reap         mean of gate weight x norm of e's output, over the tokens routed to e (arXiv 2510.13999)

The experts of a layer are taken best first until their scores sum to `top_p`; deepseek/selection.py has other rules.

Legend: E experts, L MoE layers; score_E maps expert -> score, and score_LE maps layer -> expert -> score.
"""

import contextlib
import functools
import itertools
import math
import operator
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deepseek.adapters import (
    BASE_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    Source,
    adapter_shapes,
    adapter_views,
    any_requires_grad,
    check_base,
    check_forward,
    describe_wrong_folder,
    experts_by_layer,
    find_adapter_tensors,
    find_sources,
    find_state,
    forget_name,
    has_peft,
    is_for_peft,
    is_lora,
    lora_shapes,
    lora_views,
    merge_lora,
    on_host,
    ordinary_parameters,
    read_sources,
    refuse_lora_on_experts,
    set_requires_grad,
    without_peft,
)
from deepseek.base_order import whole
from deepseek.experts import TrainedExperts, base_name, inner_model, moe_layers, release_experts, train_experts
from deepseek.files import atomic_path, named, read_json, suggest, suggest_path, write_json
from deepseek.fingerprint import base_note, difference, router_fingerprint  # noqa: F401
from deepseek.fp8 import note_changes
from deepseek.frozen import forbid_state_dict, store_frozen, thaw_experts
from deepseek.grouped_gemm import IMPLEMENTATION
from deepseek.loading import load_base_model, load_tokenizer  # noqa: F401
from deepseek.lora import PREFIX, Lora, LoraExperts, changed_layers, of_single_experts, read_lora, save_lora
from deepseek.masters import computed_value, release_parameters, train_parameters
from deepseek.reselection import Reselection
from deepseek.routing import SUMS, RouterCapture, RouterCounts, read_logs, router_weights
from deepseek.selection import check_amounts, check_strategy, contrast_scores, count_experts, rank
from deepseek.strength import blend, blend_whole, check_strength, check_whole, is_whole

SCORE_FUNCTIONS = tuple(SUMS)
TOP_P = {**dict.fromkeys(SCORE_FUNCTIONS, 0.2), "gate": 0.1}  # the paper's for token and gate
ROUTERS = ("full", "bias")  # what can be trained of them
WITHOUT_SUM = ("gradient", "reap")  # they have no sum of their own in a layer, so `top_p` is a share of their layer's
SCORE_FILES = ("summary.json", "expert_scores.json")  # in a folder of scores

__all__ = [
    "ESFTCallback", "ExpertConfig", "ExpertScores", "ReferenceModel", "Reselection", "RouterCapture",
    "RouterCounts", "adapter_tensors", "add_adapter", "base_values", "load_base_model", "load_esft_model", "merge",
    "save_adapter", "select_experts", "to_esft", "trained_config", "union", "unload",
]  # fmt: skip

# --------------------------------------------------------------------------------------------------------------------
# scores


def score_decimals(num_experts: int) -> int:
    """Return the decimals of a score: 4 up to 100 experts, as released, and one more per further factor of ten."""
    return max(4, 2 + math.ceil(math.log10(max(num_experts, 1))))


@dataclass(frozen=True)
class ExpertScores:
    """Scores by function (`SCORE_FUNCTIONS`), layer and expert. All are finite and >= 0, and none is missing."""

    by_function: dict[str, dict[int, dict[int, float]]]
    meta: dict = field(default_factory=dict)

    def __post_init__(self):
        layers = sorted(set().union(*self.by_function.values()))
        if not layers:
            raise ValueError("no layer has scores. Compute them again.")
        for function, score_LE in self.by_function.items():
            num_experts = 1 + max(max(score_E, default=-1) for score_E in score_LE.values())
            rounding = 0.5 * num_experts * 10 ** -score_decimals(num_experts) + 1e-6
            for layer in layers:
                where, score_E = f"{function} score of layer {layer}", score_LE.get(layer, {})
                for expert in sorted({*score_E, *range(num_experts)}):
                    score = score_E.get(expert, "nothing")
                    if expert < 0 or not isinstance(score, (int, float)) or not 0 <= score < math.inf:
                        raise ValueError(f"{where}, expert {expert}: found {score}, expected a number from 0")
                total = sum(score_E.values())
                if total == 0 or (function in ("token", "prob") and abs(total - 1) > rounding):
                    raise ValueError(f"{where}: the experts' scores sum to {total:g}, not to 1. Compute them again.")

    def __getitem__(self, function: str) -> dict[int, dict[int, float]]:
        """Return score_LE of a function."""
        if function in self.by_function:
            return self.by_function[function]
        hint = f"; get_expert_scores.py --scores={function} adds it" if function in SUMS else ""
        known = " and ".join(self.by_function)
        raise ValueError(f"cannot use score {function!r}{suggest(function, self.by_function)}: there is {known}{hint}")

    @classmethod
    def from_counts(cls, counts: RouterCounts, **meta: object) -> "ExpertScores":
        """Compute the scores of counted routing. Those of routing alone are rounded as in the released files."""
        if not counts.tokens:
            raise ValueError("cannot score experts: no token was counted. Give more data, or look at the token mask.")
        by_function: dict[str, dict[int, dict[int, float]]] = {}
        for function, kind in SUMS.items():
            sums_LE = counts.sums[kind].tolist() if kind in counts.sums else []
            whole = math.fsum(itertools.chain(*sums_LE))
            for layer, sum_E, slots_E in zip(counts.layers, sums_LE, counts.sums["slots"].tolist()):
                units = {"token": max(1, sum(sum_E)), "gradient": whole or 1}
                unit_E = [units.get(function, RouterCounts.UNIT * counts.tokens)] * len(sum_E)
                unit_E = [max(1, slots) for slots in slots_E] if function == "reap" else unit_E
                score_E = [total / unit for total, unit in zip(sum_E, unit_E)]
                if function not in WITHOUT_SUM:
                    score_E = [round(score, score_decimals(len(sum_E))) for score in score_E]
                by_function.setdefault(function, {})[layer] = dict(enumerate(score_E))
        return cls(by_function, {**meta, "tokens": counts.tokens, "top_k": counts.top_k})

    def save(self, path: str | Path) -> None:
        """Write the released format: {"token_scores": {"<layer>": {"<expert>": score}}, ..., "meta": {...}}."""
        tables = {f"{name}_scores": score_LE for name, score_LE in self.by_function.items()}
        write_json(path, tables | {"meta": self.meta})

    @classmethod
    def load(cls, path: str | Path) -> "ExpertScores":
        """Read a summary, a flat file {"layer_1_expert_0": 1234.5, ...}, or a folder.

        A folder holds summary.json, expert_scores.json, or the raw logs `expert_weights_<layer>.txt`, directly or in
        `rank_*` folders.

        Raises:
            ValueError, FileNotFoundError: something is missing, truncated or not a number. The message says where.
        """
        path = Path(path)
        if path.is_dir():
            for name in SCORE_FILES:
                if (path / name).exists():
                    return cls.load(path / name)
            return cls.from_counts(functools.reduce(operator.add, read_logs(path)))
        if not path.is_file():
            hint = "Make them with scripts/expert/get_expert_scores.py."
            raise FileNotFoundError(f"cannot read {path}: no such scores{suggest_path(path)}. {hint}")
        data = read_json(path)
        with named(path):
            try:
                if not any(key.endswith("_scores") for key in data):
                    return cls({"token": _read_flat(data)})
                tables = {name: data[f"{name}_scores"].items() for name in SCORE_FUNCTIONS if f"{name}_scores" in data}
                by_function = {
                    name: dict(sorted((int(layer), {int(e): s for e, s in row.items()}) for layer, row in table))
                    for name, table in tables.items()
                }
                return cls(by_function, dict(data.get("meta", {})))
            except (AttributeError, TypeError) as error:
                raise ValueError(f"not a summary of expert scores by layer ({error}). Compute them again.") from error


def _read_flat(data: Mapping[str, float]) -> dict[int, dict[int, float]]:
    sum_LE: dict[int, dict[int, float]] = {}
    for key, value in data.items():
        match = re.fullmatch(r"layer_(\d+)_expert_(\d+)", key)
        if match is None:
            raise ValueError(f"unknown key {key!r}, expected layer_<l>_expert_<e>")
        sum_LE.setdefault(int(match[1]), {})[int(match[2])] = value
    score_LE: dict[int, dict[int, float]] = {}
    for layer, sum_E in sum_LE.items():
        total, sound = sum(sum_E.values()), all(0 <= value < math.inf for value in sum_E.values())
        digits = score_decimals(len(sum_E))
        score_LE[layer] = {e: round(v / total, digits) for e, v in sum_E.items()} if sound and total else sum_E
    return score_LE


# --------------------------------------------------------------------------------------------------------------------
# selection


@dataclass(frozen=True)
class ExpertConfig:
    """What is trained: expert ids by decoder layer, best first, and whether shared experts and all else are trained.

    `non_expert_modules` means every parameter outside routed and shared experts: attention, norms, embeddings, head,
    dense layers and routers, as in the released code. `parameters` names some outside the routed experts. `routers` is
    "full" for all weights of the routers, or "bias" for the bias that some families have there.
    """

    experts: dict[int, tuple[int, ...]]
    shared_experts: bool = False
    non_expert_modules: bool = False
    parameters: tuple[str, ...] = ()
    routers: str | None = None

    @classmethod
    def load(cls, path: str | Path) -> "ExpertConfig":
        """Read an expert config, or the one of an adapter folder. Unknown keys, repeats and non-numbers are refused.

        That of an adapter of LoRA on single experts is found in the names of its tensors.
        """
        folder = Path(path)
        if of_single_experts(folder):
            experts, others = experts_by_layer(f"{name}.weight" for name in changed_layers(folder))
            return cls({layer: tuple(ids) for layer, ids in experts.items()}, parameters=tuple(others))
        path = folder / CONFIG_NAME if folder.is_dir() else folder
        if not path.is_file():
            wrong = f"cannot read {path}: no such expert config or adapter{suggest_path(path)}"
            raise FileNotFoundError(describe_wrong_folder(folder) if folder.is_dir() else wrong)
        data = read_json(path)
        with named(path):
            return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Mapping) -> "ExpertConfig":
        """Make a config of one of two forms; "base" and "meta" are notes and are skipped.

        {"experts": {"1": [ids]}, "shared_experts": bool, "non_expert_modules": bool, "routers": "full" or "bias"}
        {"selected_experts": [["layer_1", 3], ...], "frozen_experts": [["layer_1", 0], ...], "routing_frozen": bool}

        "frozen_experts" and "routing_frozen" change nothing, as all that is not selected is frozen. What they say must
        be so.
        """
        flags = ("shared_experts", "non_expert_modules", "routing_frozen")
        known = ("experts", "selected_experts", "frozen_experts", *flags, "parameters", "routers", "base", "meta")
        if unknown := [str(key) for key in data if key not in known] if isinstance(data, Mapping) else []:
            hint = suggest(unknown[0], known)
            if re.fullmatch(r"\w+_scores|layer_\d+_expert_\d+", unknown[0]):
                hint = ": these are expert scores; make a config of them with scripts/expert/generate_expert_config.py"
            raise ValueError(f"unknown key {unknown[0]!r}{hint}")
        try:
            (form,) = {"experts", "selected_experts"} & data.keys()
            experts, frozen = _by_layer(data[form]), _by_layer(data.get("frozen_experts", ()))
        except (TypeError, ValueError, AttributeError) as error:
            forms = '{"experts": {"1": [3, 7]}} or {"selected_experts": [["layer_1", 3], ["layer_1", 7]]}'
            raise ValueError(f"expected layers and their experts as in {forms} ({error})") from error
        for layer, ids in experts.items():
            if any(type(e) is not int or e < 0 for e in ids) or len(set(ids)) != len(ids):
                raise ValueError(f"layer {layer}: expert ids must be distinct numbers from 0, found {list(ids)}")
            if both := set(ids) & set(frozen.get(layer, ())):
                raise ValueError(f"layer {layer}: expert {min(both)} is both selected and frozen. Change one of them")
        if wrong := [key for key in flags if not isinstance(data.get(key, False), bool)]:
            raise ValueError(f"{wrong[0]} must be true or false, found {data[wrong[0]]!r}")
        shared, others = (data.get(key, False) for key in flags[:2])
        if (routers := data.get("routers")) not in (None, *ROUTERS):
            raise ValueError(f"routers must be one of {', '.join(ROUTERS)}, found {routers!r}")
        if data.get("routing_frozen", not (others or routers)) == bool(others or routers):
            raise ValueError(
                "routers are trained with routers or non_expert_modules, and only then: routing_frozen contradicts it"
            )
        parameters = data.get("parameters", [])
        if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
            raise ValueError(f"parameters must be a list of names, found {parameters!r}")
        if not (any(experts.values()) or shared or others or parameters or routers):
            raise ValueError("it selects nothing: no expert, no shared experts, no other module")
        return cls(dict(sorted(experts.items())), shared, others, tuple(parameters), routers)

    def to_dict(self) -> dict:
        """Return the released form."""
        return {
            "experts": {str(layer): list(ids) for layer, ids in self.experts.items()},
            "shared_experts": self.shared_experts,
            "non_expert_modules": self.non_expert_modules,
            **({"parameters": list(self.parameters)} if self.parameters else {}),
            **({"routers": self.routers} if self.routers else {}),
        }

    def check(self, model: nn.Module) -> None:
        """Warn if `model` has no shared experts to train.

        Raises:
            ValueError: the config names a layer or an expert that `model` does not have, or nothing that it has.
        """
        layers = moe_layers(model)
        first, last = min(layers), max(layers)
        for index, ids in self.experts.items():
            num_experts, highest = layers[index if index in layers else first].num_experts, max(ids, default=0)
            if index not in layers or highest >= num_experts:
                raise ValueError(
                    f"the expert config names expert {highest} of layer {index}, and this model's MoE layers are "
                    f"{first} to {last}, with experts 0 to {num_experts - 1}"
                )
        if unknown := sorted(set(self.parameters) - set(ordinary_parameters(model, self))):
            raise ValueError(f"the expert config names {unknown[0]}, and this model has no such parameter")
        if self.routers and not router_weights(model, self.routers):
            has = (
                "no bias with a gradient, so train them in full" if self.routers == "bias" else "no weights to be found"
            )
            raise ValueError(f"cannot train routers: those of {model.config.model_type} have {has}.")
        none = self.shared_experts and not ordinary_parameters(model, ExpertConfig({}, shared_experts=True))
        lack = "the expert config names shared experts, and this model has none"
        if not any(self.experts.values()) and not ordinary_parameters(model, self):
            cause = lack if none else "the expert config names nothing"
            raise ValueError(f"{cause}: nothing would be trained. Name experts of its MoE layers, {first} to {last}.")
        if none:
            warnings.warn(lack, stacklevel=1)


def _by_layer(data: Mapping | Iterable) -> dict[int, tuple[int, ...]]:
    """Return ids by layer of {"1": [ids]} or of [["layer_1", id], ...]."""
    experts: dict[int, tuple[int, ...]] = {}
    for name, ids in data.items() if isinstance(data, Mapping) else ((name, [expert]) for name, expert in data):
        layer = int(str(name).removeprefix("layer_"))
        experts[layer] = (*experts.get(layer, ()), *ids)
    return experts


def union(a: ExpertConfig, b: ExpertConfig) -> ExpertConfig:
    """Return what two adapters hold together. They share no expert."""
    experts = {layer: (*a.experts.get(layer, ()), *b.experts.get(layer, ())) for layer in a.experts | b.experts}
    flags = (a.shared_experts or b.shared_experts, a.non_expert_modules or b.non_expert_modules)
    return ExpertConfig(dict(sorted(experts.items())), *flags, (*a.parameters, *b.parameters), a.routers or b.routers)


def select_experts(
    scores: ExpertScores,
    *,
    score_function: str = "token",
    strategy: str = "cumulative",
    top_p: float = 0.2,
    fraction: float = 0.1,
    top_k: int = 6,
    seed: int = 0,
    budget: float | None = None,
    upper_layers: int | None = None,
    general: ExpertScores | None = None,
    contrast: str = "difference",
) -> ExpertConfig:
    """Choose experts by their scores. A tie goes to the lower layer, then to the lower id.

    Args:
        strategy: a rule of deepseek/selection.py: "cumulative" (the paper's), "global", "layers" (by default the upper
            half), "fraction" (rounded up), "topk", or the controls "random" and "uniform". Scores that have no sum of
            their own (gradient, reap, a contrast) count as shares of their layer's sum under `top_p`.
        budget: the share of all routed experts to select, in place of `top_p`, rounded to whole experts, at least one.
        general: scores on general data. Experts are then chosen by how much more they matter to the task, the
            "difference" or the "ratio" (`contrast`) of the two scores.

    Raises:
        ValueError: the strategy or the score is unknown, a value is out of its range, or `general` is of another model.
    """
    check_strategy(strategy)
    score_LE = scores[score_function]
    if general:
        score_LE = contrast_scores(score_LE, general[score_function], contrast)
    ranked_L, generator = rank(score_LE), random.Random(seed)
    most = min(map(len, ranked_L.values())) if strategy == "topk" else math.inf
    amounts = {"top_p": top_p, "fraction": fraction, "top_k": top_k, "budget": budget, "upper_layers": upper_layers}
    check_amounts(most, len(ranked_L), **amounts)
    if strategy == "fraction":  # 0.28 * 25 is 7.000000000000001
        counts_L = {layer: max(1, math.ceil(fraction * len(ids) - 1e-9)) for layer, ids in ranked_L.items()}
    elif strategy == "topk":
        counts_L = dict.fromkeys(ranked_L, top_k)
    else:
        shares = general is not None or score_function in WITHOUT_SUM
        counts_L = count_experts(score_LE, strategy, top_p, budget, upper_layers, shares)
    experts: dict[int, tuple[int, ...]] = {}
    for layer, ids in ranked_L.items():
        if count := counts_L.get(layer, 0):
            experts[layer] = tuple(generator.sample(sorted(ids), count) if strategy == "random" else ids[:count])
    if not experts:
        raise ValueError(f"cannot select experts: none has a {score_function} score above that on the general data.")
    return ExpertConfig(experts)


# --------------------------------------------------------------------------------------------------------------------
# the method on a model


@dataclass
class _State:
    """What `to_esft` and `add_adapter` did to a model. It stays on the model until `unload` or `merge`."""

    config: ExpertConfig  # what is trained, or what the adapters hold
    training: bool
    implementation: str | None
    frozen: set[str]
    base: dict  # the note of the base
    displaced: dict[str, Tensor] | None = None  # the base's values, by adapter name
    trained: list[nn.Module] = field(default_factory=list)  # they hold the trained parameters, each for itself
    hooks: list = field(default_factory=list)
    lora: Lora | None = None  # if low-rank changes are trained, which displace nothing


def _state(model: nn.Module) -> _State:
    if (state := find_state(model)) is None:
        raise ValueError(
            "cannot find what was trained: the model has no adapter of experts. Call to_esft, or add_adapter. (A LoRA "
            "adapter is merged as it is added.)"
        )
    return state


def _on_inner_model(function: Callable) -> Callable:
    """Let a function of a model take a wrapped one, too (DDP, FSDP, torch.compile, peft)."""

    @functools.wraps(function)
    def call(model: nn.Module, *args, **kwargs):
        result = function(inner_model(model), *args, **kwargs)
        return model if isinstance(result, nn.Module) else result

    return call


@_on_inner_model
def trained_config(model: nn.Module) -> ExpertConfig | None:
    """Return what `to_esft` made trainable, or what the loaded adapters hold; None for any other model."""
    return (state := find_state(model)) and state.config


@_on_inner_model
def to_esft(
    model: nn.Module,
    config: ExpertConfig | Mapping,
    keep_base: bool = True,
    frozen_dtype: str | None = None,
    offload_frozen: bool = False,
    lora_rank: int | None = None,
    lora_alpha: float = 16,
) -> nn.Module:
    """Make exactly what `config` names trainable, in fp32, and freeze the rest. The forward stays bit-equal.

    This works in place and returns the model. Any optimizer over the parameters that require a gradient trains it. The
    state dict keeps the names, shapes and expert order of the base. What an adapter of peft trains in the model stays
    trainable. peft freezes the experts when it comes later: call this again, with the same config.

    Args:
        keep_base: hold a copy of the base's values in host memory, for `unload`.
        frozen_dtype: store the frozen experts as "fp8", "int8" or "nf4" (deepseek/frozen.py), for good. The forward is
            no longer the base's, and only the adapter of such a model can be saved. If a model does not fit before it
            is quantized, `load_base_model(frozen=...)` quantizes it while it reads.
        offload_frozen: keep the frozen experts in host memory.
        lora_rank: train a low-rank change of the experts (deepseek/lora.py) instead of the experts themselves. Its
            scale is `lora_alpha` / `lora_rank`. LoRA of peft on other layers goes into the same adapter, and needs the
            same rank and scale. Save it by `save_adapter`: `save_pretrained` writes the base until `merge` was called.

    Raises:
        ValueError: the model has no such layer or expert, or no fused experts, or was prepared before. An adapter of
            peft is on the fused experts, or on what else the config trains. LoRA is asked for what is not a routed
            expert.
    """
    config = config if isinstance(config, ExpertConfig) else ExpertConfig.from_dict(config)
    config.check(model)
    refuse_lora_on_experts(model)
    ordinary, lora = ordinary_parameters(model, config), Lora(lora_rank, lora_alpha) if lora_rank is not None else None
    if lora and ordinary:
        raise ValueError("cannot train with LoRA: the config names more than routed experts. Leave it out there, and "
                         "add LoRA on these layers with peft.")  # fmt: skip
    if state := find_state(model):
        if state.training and (state.config, state.lora) == (config, lora) and not any_requires_grad(state.trained):
            set_requires_grad(state.trained, True)
            return model
        raise ValueError("cannot train: the model has been through to_esft or add_adapter. Call unload or merge first.")
    frozen = _frozen_names(model)
    layers = list(moe_layers(model).values())
    for layer in layers:
        store_frozen(layer, config.experts.get(layer.index, ()), frozen_dtype, offload_frozen)
    implementation = IMPLEMENTATION if any(layer.frozen for layer in layers) else model.config._experts_implementation
    state = _State(config, True, implementation, frozen, base_note(model), {} if lora else None, lora=lora)
    if keep_base and not lora:
        state.displaced = {name: on_host(view) for name, view in adapter_views(model, config).items()}
    _begin_training(model, state, ordinary)
    return model


def _begin_training(model: nn.Module, state: _State, ordinary: list[str]) -> None:
    layers, config = list(moe_layers(model).values()), state.config
    kind = functools.partial(LoraExperts, lora=state.lora) if state.lora else TrainedExperts
    trained_by_peft = [param for param in model.parameters() if param.requires_grad] if has_peft(model) else []
    model.requires_grad_(False)
    train_parameters(model, ordinary)
    for layer in layers:
        if config.experts.get(layer.index):
            train_experts(layer, config.experts[layer.index], kind)
    state.trained = [module for module in model.modules() if any_requires_grad([module])]
    for param in trained_by_peft:
        param.requires_grad_(True)
    hook = functools.partial(check_forward, state.trained)
    state.hooks = [layer.module.register_forward_pre_hook(hook) for layer in layers]
    forbid_state_dict(model)
    model.set_experts_implementation(IMPLEMENTATION)
    model._esft = state


@_on_inner_model
def unload(model: nn.Module) -> nn.Module:
    """Give the base model back, bit for bit. Whatever was trained or loaded is gone.

    What `add_adapter` merges for good stays: a LoRA adapter that peft merged, or a whole model.
    """
    state = _state(model)
    if state.displaced is None:
        raise ValueError("cannot unload: the base's values were not kept. Use to_esft(model, config, keep_base=True).")
    ordinary_parameters(model, state.config)  # raises before anything has changed
    _release(model, state)
    views = adapter_views(model, state.config)
    for name, value in state.displaced.items():
        views[name].copy_(value)
    return model


@_on_inner_model
def merge(model: nn.Module) -> nn.Module:
    """Make what was trained or loaded part of a plain model. Its `save_pretrained` writes a plain checkpoint.

    Raises:
        ValueError: nothing was trained or loaded, or not all experts are here in the model's dtype.
    """
    if any(layer.frozen or layer.shard for layer in moe_layers(model).values()):
        raise ValueError("cannot merge: not all experts are here as in the base. Save the adapter and merge it on "
                         "disk with scripts/merge_adapter.py.")  # fmt: skip
    state = _state(model)
    for layer in moe_layers(model).values():
        if layer.lora:
            layer.lora.merge()
    _release(model, state)
    forget_name(model)
    return model


@_on_inner_model
@contextlib.contextmanager
def base_values(model: nn.Module) -> Iterator[None]:
    """Let the model compute as its base, bit for bit, while open. Then what was trained or loaded is back.

    Adapters of peft are off meanwhile. A backward of an earlier forward may come after it. While open, the device holds
    the trained values once more.

    Raises:
        ValueError: the base's values were not kept, or FSDP holds them in shards.
    """
    state = _state(model)
    if state.displaced is None:
        raise ValueError(
            "cannot use the base's values: they were not kept. Use to_esft(model, config, keep_base=True)."
        )
    views, base = adapter_views(model, state.config), state.displaced
    if state.lora:
        views = {name: view for name, view in lora_views(model).items() if ".lora_B." in name}
        base = dict.fromkeys(views, torch.zeros(()))
    if any(isinstance(view, DTensor) for view in views.values()):
        raise ValueError("cannot use the base's values: FSDP has sharded them. Compute what you need of the base "
                         "before `fully_shard`, in TRL with precompute_ref_log_probs=True.")  # fmt: skip
    trained = {name: view.clone() for name, view in views.items()}
    for name, view in views.items():
        view.copy_(base[name], non_blocking=True)
    note_changes(model, state.config.experts)
    try:
        with without_peft(model):
            yield
    finally:
        for name, view in views.items():
            view.copy_(trained[name])
        note_changes(model, state.config.experts)
        for layer in moe_layers(model).values():
            if layer.trained:
                layer.trained.write_back()  # a backward reads the fused rows


class ReferenceModel(nn.Module):
    """The base of a model in training, as the reference of DPO or GRPO: `ref_model` of TRL's DPOTrainer.

    It is the same model with the base's values put in during a call (`base_values`), in evaluation mode and without
    gradients. It has no parameters of its own, so nothing is trained, saved, or moved twice. A call takes and returns
    what a call of the model does.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self._model = (inner_model(model),)  # a tuple, so that it is no submodule
        self.config = self._model[0].config

    def __call__(self, *args, **kwargs):  # TRL replaces `forward` here as it does in the model itself
        (model,) = self._model
        if "forward" in vars(self) and "forward" not in vars(model):
            raise ValueError("cannot use this reference: TRL trains another model. Give ReferenceModel that one.")
        in_training = [module for module in model.modules() if module.training]
        with base_values(model), torch.no_grad():
            model.eval()
            try:
                return model(*args, **kwargs)
            finally:
                for module in in_training:
                    module.training = True

    def state_dict(self, *args, **kwargs):
        raise ValueError("cannot give the state of a reference model: it has none of its own. With "
                         "precompute_ref_log_probs=True, give TRL no ref_model.")  # fmt: skip


def _frozen_names(model: nn.Module) -> set[str]:
    return {base_name(name) for name, param in model.named_parameters() if not param.requires_grad}


def _release(model: nn.Module, state: _State) -> None:
    if state.training:
        set_requires_grad(state.trained, False)
        for hook in state.hooks:
            hook.remove()
        for layer in moe_layers(model).values():
            if layer.trained:
                release_experts(layer)
        release_parameters(model)
        model.set_experts_implementation(state.implementation)
    if not has_peft(model):  # which wants the base frozen
        for name, param in model.named_parameters():
            param.requires_grad_(name not in state.frozen)
    del model._esft


# --------------------------------------------------------------------------------------------------------------------
# adapters


@_on_inner_model
def trained_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of what is trained on all ranks, by adapter name."""
    state = _state(model)
    return lora_shapes(model, state.config, state.lora) if state.lora else adapter_shapes(model, state.config)


@_on_inner_model
def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return copies in host memory of what was trained, by adapter name, in the dtype in which the model computes.

    The factors of LoRA are in fp32.
    """
    state = _state(model)
    if state.lora:
        return {name: whole(view).to("cpu", copy=True).contiguous() for name, view in lora_views(model).items()}
    dtype = next(iter(moe_layers(model).values())).tensor("down_proj").dtype
    others = set(ordinary_parameters(model, state.config))
    found = {}
    for name, view in adapter_views(model, state.config).items():  # one at a time: a GPU may have no room for all
        tensor = computed_value(model, name) if name in others else view.to(dtype)
        found[name] = whole(tensor).to("cpu", copy=True).contiguous()
    return found


@_on_inner_model
def save_adapter(model: nn.Module, folder: str | Path, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write `adapter.safetensors` and `expert_cfg.json`, each whole or not at all. LoRA has peft's files instead.

    Under expert parallelism, `tensors` are the `adapter_tensors` of all ranks. By default this process has them all.

    Raises:
        ValueError: layers of peft have another rank or scale than the experts.
    """
    state, folder = _state(model), Path(folder)
    tensors = adapter_tensors(model) if tensors is None else tensors
    if state.lora:
        trained_shapes(model)
        save_lora(folder, tensors, state.lora, model.name_or_path)
        write_json(folder / BASE_NAME, {"base": state.base})
        return
    with atomic_path(folder / WEIGHTS_NAME) as temporary:
        save_file({name: tensors[name] for name in sorted(tensors)}, temporary, metadata={"format": "pt"})
    write_json(folder / CONFIG_NAME, {**state.config.to_dict(), "base": state.base})


@_on_inner_model
def add_adapter(model: nn.Module, folder: str | Path, strength: float = 1.0) -> nn.Module:
    """Put the experts of an adapter into the model. All of it is checked first, and if it is refused nothing changes.

    Adapters with disjoint experts can be added one after the other. `unload` restores the base. On a model in training
    (`to_esft` with the same config) the values become the trained ones. A LoRA adapter of single experts counts as one
    of the experts it changes. Any other LoRA adapter is merged by peft, for good.

    Args:
        folder: an adapter, or a whole model that was fine-tuned from this one, which takes its place for good.
        strength: how much of the change to make, 0 to 2: base + strength x (tuned - base), computed in fp32 and rounded
            once. 1 is what was trained, 0 the base.

    Raises:
        ValueError, FileNotFoundError: there is no adapter; a tensor is missing, unknown, truncated or of another shape;
            the adapter is of another base; a loaded adapter already holds one of its experts; `strength` is out of its
            range, or not 1 on a model in training.
    """
    check_strength(strength)
    if is_whole(folder):
        return blend_whole(model, folder, strength)
    if is_for_peft(folder):
        return merge_lora(model, folder, strength)
    config = ExpertConfig.load(folder)
    with named(f"adapter {folder}"):
        state, sources, read = _read_checked(model, folder, config)
        if state.training and strength != 1:
            raise ValueError(f"a model in training takes it at strength 1, not {strength:g}. Call unload first.")
    layers = moe_layers(model).values()
    if not state.training:
        for layer in layers:
            thaw_experts(layer, config.experts.get(layer.index, ()))
    views = lora_views(model) if state.lora else adapter_views(model, config)
    if not state.training:
        state.displaced |= {name: on_host(view) for name, view in views.items()}
        state.config = union(state.config, config)
        model._esft = state
    for name, view in views.items():
        view.copy_(blend(view, sources[name].value(read[name], view), strength))
    note_changes(model, config.experts)
    return model


@_on_inner_model
def check_adapter(model: nn.Module, folder: str | Path) -> None:
    """Raise as `add_adapter` would, and put nothing into `model`, which may be without weights.

    A LoRA adapter is merged by peft all the same, so give it a model that is not used any more.
    """
    (check_whole if is_whole(folder) else merge_lora if is_for_peft(folder) else find_adapter)(model, folder)


def find_adapter(model: nn.Module, folder: str | Path, finite: bool = True) -> tuple[ExpertConfig, dict[str, Source]]:
    """Check an adapter as `add_adapter` does, and return its config and where the values of its tensors are.

    Without `finite`, NaN and infinite values are allowed.
    """
    config = ExpertConfig.load(folder)
    with named(f"adapter {folder}"):
        config.check(model)
        check_base(base_note(model), folder)
        found = find_sources(folder, adapter_shapes(model, config))
        for _ in read_sources(found, found) if finite else ():
            pass
    return config, found


def _read_checked(
    model: nn.Module, folder: str | Path, config: ExpertConfig
) -> tuple[_State, dict[str, Source], dict[str, tuple[Tensor, ...]]]:
    """Return the model's state (a new one if it has none), and an adapter's sources and tensors, checked with it."""
    state = find_state(model)
    if state is None or not state.lora:
        config.check(model)
    if state is None:
        state = _State(ExpertConfig({}), False, None, _frozen_names(model), base_note(model), {})
    check_base(state.base, folder)
    same = is_lora(folder) == bool(state.lora) and (config == state.config or state.lora)
    if state.training and not same:
        raise ValueError("it holds other experts than this model trains. Call unload first.")
    if state.lora:
        if (lora := read_lora(folder)) != state.lora:
            raise ValueError(f"it has rank {lora.rank} and alpha {lora.alpha:g}, and this model trains with "
                             f"{state.lora.rank} and {state.lora.alpha:g}. Give to_esft the same.")  # fmt: skip
        sources = find_adapter_tensors(folder, trained_shapes(model), PREFIX)
        return state, sources, dict(read_sources(sources, lora_views(model)))
    here = adapter_shapes(model, config, local=True)
    sources = find_sources(folder, adapter_shapes(model, config))
    read = dict(read_sources(sources, here))
    taken = [] if state.training else sorted(here.keys() & state.displaced.keys())
    if taken:
        raise ValueError(f"{taken[0]} is held by an adapter loaded before ({len(taken)} are). Call unload first.")
    return state, sources, read


def load_esft_model(base_model_path: str | Path, adapter_dir: str | Path, strength: float = 1.0, **kwargs):
    """Return (model, tokenizer) of a base with an adapter in it, at a `strength` as in `add_adapter`.

    `kwargs` are those of `load_base_model`.
    """
    check_strength(strength)
    model, tokenizer = load_base_model(base_model_path, **kwargs)
    return add_adapter(model, adapter_dir, strength), tokenizer


class ESFTCallback:
    """Makes the checkpoints of transformers' Trainer, and of TRL's, hold what was trained, and nothing else.

    Trainer writes the whole model with the names of single experts, and cannot read these names back. With this
    callback `model.safetensors` of a checkpoint holds the trained parameters as they are, in fp32. So Trainer resumes
    exactly, and finds its best model. The folder `adapter` in it is an adapter.

    With an adapter of peft beside the experts, both are in `model.safetensors`, and peft's files are there as well. The
    experts are made trainable again if TRL's `peft_config` has frozen them.

    It does not derive from `transformers.TrainerCallback`: that class imports peft, which takes two seconds.

    Raises:
        ValueError: the parameters are sharded. FSDP saves and loads them in a way of its own. An adapter of peft is on
            the fused experts. The model has been through no `to_esft`. The checkpoint to resume trained other experts,
            or another base. A `Reselection` changes them.
    """

    def __getattr__(self, name: str):
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None  # the events that this callback has no use for

    def on_init_end(self, args, state, control, model: nn.Module, **_) -> None:
        prepared = find_state(inner_model(model))
        if prepared and prepared.training and not any_requires_grad(prepared.trained):
            to_esft(model, prepared.config)

    def on_train_begin(self, args, state, control, model: nn.Module, **_) -> None:
        if any(isinstance(param, DTensor) for param in model.parameters()):
            raise ValueError(
                "cannot use ESFTCallback: FSDP saves sharded parameters by itself. Leave the callback out."
            )
        made = _state(inner_model(model))
        now = {"experts": {str(layer): sorted(ids) for layer, ids in made.config.experts.items()}, "base": made.base}
        before = {**now, **state.stateful_callbacks.get("ESFTCallback", {"attributes": {}})["attributes"]}
        if before["experts"] != now["experts"]:  # of the same number they have the same shapes
            raise ValueError("cannot resume: the checkpoint trained other experts. Call to_esft with its config.")
        if how := difference(made.base, before["base"]):
            raise ValueError(f"cannot resume: the checkpoint is of another base model: {how}. Load that one.")
        state.stateful_callbacks["ESFTCallback"] = {"args": {}, "attributes": now}

    def on_train_end(self, args, state, control, model: nn.Module, **_) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint:  # of a peft model, Trainer reads peft's files
            model.load_state_dict(load_file(Path(state.best_model_checkpoint, "model.safetensors")), strict=False)

    def on_save(self, args, state, control, model: nn.Module, **_) -> None:
        if not args.should_save:
            return
        if any(layer.trained and layer.trained.parts for layer in moe_layers(model).values()):
            raise ValueError("cannot save this checkpoint: a Reselection changes the trained experts, and Trainer "
                             "could not go on from it. Call save_adapter, or train with train.py.")  # fmt: skip
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        trained = {name: param.data for name, param in model.named_parameters() if param.requires_grad}
        with atomic_path(folder / "model.safetensors") as temporary:
            save_file(trained, temporary, metadata={"format": "pt"})
        for path in folder.glob("model-*.safetensors"):
            path.unlink()
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        save_adapter(model, folder / "adapter")
