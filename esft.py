"""Expert-Specialized Fine-Tuning (arXiv 2407.01906): of a mixture-of-experts model, train the experts that a task uses.

    with RouterCapture(model) as capture:        # hooks, no model code touched
        model(**batch)                           # tokens of the task
    scores = ExpertScores.from_counts(capture.counts())
    config = select_experts(scores, score_function="token", top_p=0.2)
    to_esft(model, config)                       # trainable: these experts' FFNs, as fp32 parameters; nothing else
    ...                                          # any training loop
    save_adapter(model, "out")                   # a few % of the model
    unload(model)                                # the base again, bit for bit
    add_adapter(model, "out")                    # or merge(model): a plain checkpoint, no inference overhead

With N tokens, K routed experts per token, for layer l and expert e (paper, section 3.2; sums pooled over tokens):

    token score  r = (routed slots that went to e) / (K N)      every layer sums to 1
    gate score   g = (sum of the gate weights of e) / N

and the experts of a layer are taken best first until their running sum reaches `top_p`.

Legend: T tokens, D hidden, E experts, K top-k, L MoE layers; an array named score_LE is indexed [layer][expert].
"""

import json
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from deepseek.adapters import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    _merge_lora,
    _no_adapter,
    base_note,
    check_base,
    find_adapter_tensors,
    is_lora,
    read_adapter,
    router_fingerprint,
    router_parameters,
)
from deepseek.experts import (
    DTYPE_OF_BASE,
    moe_layers,
    release_experts,
    release_parameters,
    train_experts,
    train_parameters,
    trained_parameter,
)
from deepseek.files import atomic_path, suggest, suggest_path, write_json
from deepseek.frozen import forbid_state_dict, freeze_experts, thaw_experts
from deepseek.grouped_gemm import IMPLEMENTATION
from deepseek.loading import load_base_model, load_tokenizer
from deepseek.routing import RouterCapture, RouterCounts, read_logs

__all__ = [
    "ExpertConfig",
    "ExpertScores",
    "RouterCapture",
    "adapter_tensors",
    "adapter_views",
    "add_adapter",
    "base_note",
    "check_base",
    "find_adapter_tensors",
    "is_lora",
    "load_base_model",
    "load_esft_model",
    "load_tokenizer",
    "merge",
    "read_adapter",
    "router_fingerprint",
    "router_parameters",
    "save_adapter",
    "select_experts",
    "to_esft",
    "union",
    "unload",
]

SCORE_FUNCTIONS = ("token", "gate", "prob")
STRATEGIES = ("cumulative", "fraction", "topk", "random")

# --------------------------------------------------------------------------------------------------------------------
# scores


def _digits(num_experts: int) -> int:
    """Decimals of a score: 4 up to 100 experts, as released, and one more per further factor of ten."""
    return max(4, 2 + math.ceil(math.log10(max(num_experts, 1))))


@dataclass(frozen=True)
class ExpertScores:
    """Scores by function ("token", "gate", "prob"), layer and expert, all finite and >= 0, every layer complete."""

    by_function: dict[str, dict[int, dict[int, float]]]
    meta: dict = field(default_factory=dict)

    def __post_init__(self):
        if not any(self.by_function.values()):
            raise ValueError("there are no scores: no layer has any")
        for function, score_LE in self.by_function.items():
            absent = sorted(set().union(*self.by_function.values()) - score_LE.keys())
            if absent:
                raise ValueError(f"{function} scores: layer {absent[0]} is missing, which other scores have")
            width = max(max(score_E, default=-1) for score_E in score_LE.values()) + 1
            for layer, score_E in score_LE.items():
                where = f"{function} score of layer {layer}"
                missing = sorted(set(range(width)) - set(score_E))
                if missing:
                    raise ValueError(f"{where}: expert {missing[0]} is missing ({len(missing)} of {width} are)")
                for expert, score in score_E.items():
                    if expert < 0 or not isinstance(score, (int, float)) or not math.isfinite(score) or score < 0:
                        raise ValueError(
                            f"{where}, expert {expert}: {score!r} is not a score; compute the scores again"
                        )
                total = sum(score_E.values())
                if total == 0 or (function != "gate" and abs(total - 1) > 0.5 * width * 10 ** -_digits(width) + 1e-6):
                    raise ValueError(f"{where}: the experts' scores sum to {total:g}, not to 1; compute them again")

    def __getitem__(self, function: str) -> dict[int, dict[int, float]]:
        if function not in self.by_function:
            known = " and ".join(self.by_function)
            hint = ""
            if function == "prob":
                hint = "; get_expert_scores.py --prob adds it for models whose router logits transformers records"
            raise ValueError(
                f"there is no score {function!r}{suggest(function, self.by_function)}: there is {known}{hint}"
            )
        return self.by_function[function]

    @classmethod
    def from_counts(cls, counts: RouterCounts, **meta: object) -> "ExpertScores":
        """The paper's two scores (and `prob`) of counted routing, rounded as the released files are."""
        if not counts.tokens:
            raise ValueError("no token was counted: give more data, or look at the token mask")

        def share(sums_LE: dict[int, list[int]]) -> dict[int, dict[int, float]]:
            return {
                layer: {e: round(s / max(1, sum(sums)), _digits(len(sums))) for e, s in enumerate(sums)}
                for layer, sums in sums_LE.items()
            }

        def mean(sums_LE: dict[int, list[int]], unit: float) -> dict[int, dict[int, float]]:
            return {
                layer: {e: round(s / (unit * counts.tokens), _digits(len(sums))) for e, s in enumerate(sums)}
                for layer, sums in sums_LE.items()
            }

        by_function = {
            "token": share(counts.slots_LE),
            "gate": mean(counts.gates_LE, RouterCounts.UNIT),
            "prob": mean(counts.probs_LE, RouterCounts.UNIT),
        }
        meta = {**meta, "tokens": counts.tokens, "top_k": counts.top_k}
        return cls({name: score_LE for name, score_LE in by_function.items() if score_LE}, meta)

    def save(self, path: str | Path) -> None:
        """Write a summary in the released format: {"token_scores": {"<layer>": {"<expert>": score}}, ..., "meta"}."""
        write_json(
            path, {**{f"{name}_scores": score_LE for name, score_LE in self.by_function.items()}, "meta": self.meta}
        )

    @classmethod
    def load(cls, path: str | Path) -> "ExpertScores":
        """Read a summary file, a flat file {"layer_1_expert_0": 1234.5, ...}, or a folder: its summary.json, else its
        raw logs `expert_weights_<layer>.txt`, directly in it or in `rank_*` folders.

        Raises:
            ValueError, FileNotFoundError: whatever is missing, empty, truncated, mixed up or not a number, by name.
        """
        path = Path(path)
        if path.is_dir():
            return (
                cls.load(path / "summary.json")
                if (path / "summary.json").exists()
                else cls.from_counts(read_logs(path))
            )
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such scores{suggest_path(path)}; make them with scripts/expert/get_expert_scores.py"
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON ({error}); compute the scores again") from error
        try:
            if any(key.endswith("_scores") for key in data):
                return cls(
                    {
                        name: dict(
                            sorted((int(la), {int(e): s for e, s in row.items()}) for la, row in data[key].items())
                        )
                        for name in SCORE_FUNCTIONS
                        if (key := f"{name}_scores") in data
                    },
                    dict(data.get("meta", {})),
                )
            return cls({"token": _read_flat(data)})
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{path}: not a summary of expert scores, expected token_scores by layer") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _read_flat(data: Mapping[str, float]) -> dict[int, dict[int, float]]:
    score_LE: dict[int, dict[int, float]] = {}
    for key, value in data.items():
        match = re.fullmatch(r"layer_(\d+)_expert_(\d+)", key)
        if match is None:
            raise ValueError(f"unknown key {key!r}, expected layer_<l>_expert_<e>")
        score_LE.setdefault(int(match[1]), {})[int(match[2])] = value
    if not score_LE:
        raise ValueError("no scores in it")
    shares: dict[int, dict[int, float]] = {}
    for layer, row in score_LE.items():
        total = sum(row.values())
        if not math.isfinite(total) or total <= 0 or min(row.values()) < 0:
            raise ValueError(f"layer {layer}: scores must be finite, >= 0 and not all 0; compute the scores again")
        shares[layer] = {e: round(value / total, _digits(len(row))) for e, value in row.items()}
    return shares


# --------------------------------------------------------------------------------------------------------------------
# selection


def _without_repeats(pairs: list[tuple[str, object]]) -> dict:
    if len(dict(pairs)) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return dict(pairs)


@dataclass(frozen=True)
class ExpertConfig:
    """What is trained: expert ids by decoder layer (best first), and whether shared experts and all else are, too.

    `non_expert_modules` means every parameter outside routed and shared experts: attention, norms, embeddings, head,
    dense layers and routers, as in the released code.
    """

    experts: dict[int, tuple[int, ...]]
    shared_experts: bool = False
    non_expert_modules: bool = False

    @classmethod
    def load(cls, path: str | Path) -> "ExpertConfig":
        """Read an expert config, or an adapter folder's. Unknown keys, repeated ids and non-numbers are refused."""
        path = Path(path)
        if path.is_dir():
            if not (path / CONFIG_NAME).is_file():
                raise FileNotFoundError(_no_adapter(path))
            path = path / CONFIG_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such expert config{suggest_path(path)}; make one with "
                "scripts/expert/generate_expert_config.py"
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from error
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, data: Mapping) -> "ExpertConfig":
        """From {"experts": {"1": [ids]}, "shared_experts": bool, "non_expert_modules": bool} or the list form
        {"selected_experts": [["layer_1", 3], ...]}; "base" and "meta" are notes and skipped."""
        if not isinstance(data, Mapping):
            raise ValueError(f"expected a JSON object, found {type(data).__name__}")
        known = ("experts", "selected_experts", "shared_experts", "non_expert_modules", "base", "meta")
        for key in data:
            if re.fullmatch(r"\w+_scores|layer_\d+_expert_\d+", str(key)):
                raise ValueError(
                    "these are expert scores; make an expert config of them with "
                    "scripts/expert/generate_expert_config.py"
                )
            if key not in known:
                raise ValueError(f"unknown key {key!r}{suggest(key, known)}")
        if ("experts" in data) == ("selected_experts" in data):
            raise ValueError('expected either "experts" or "selected_experts"')
        experts: dict[int, tuple[int, ...]] = {}
        try:
            if "experts" in data:
                for layer, ids in data["experts"].items():
                    if int(layer) in experts:
                        raise ValueError(f"layer {int(layer)} twice")
                    experts[int(layer)] = tuple(ids)
            else:
                for layer, expert in data["selected_experts"]:
                    layer = int(str(layer).removeprefix("layer_"))
                    experts[layer] = (*experts.get(layer, ()), expert)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f'"experts" must map layer numbers to lists of expert ids ({error})') from error
        for layer, ids in experts.items():
            if any(type(e) is not int or e < 0 for e in ids) or len(set(ids)) != len(ids):
                raise ValueError(f"layer {layer}: expert ids must be distinct numbers from 0, found {list(ids)}")
        flags = {key: data.get(key, False) for key in ("shared_experts", "non_expert_modules")}
        for key, value in flags.items():
            if not isinstance(value, bool):
                raise ValueError(f"{key} must be true or false, found {value!r}")
        config = cls(dict(sorted(experts.items())), **flags)
        if not (any(experts.values()) or any(flags.values())):
            raise ValueError("it selects nothing: no expert, no shared experts, no other module")
        return config

    def to_dict(self) -> dict:
        """The released form."""
        return {
            "experts": {str(layer): list(ids) for layer, ids in self.experts.items()},
            "shared_experts": self.shared_experts,
            "non_expert_modules": self.non_expert_modules,
        }

    def check(self, model: nn.Module) -> None:
        """Raise ValueError where the config names a layer or an expert that `model` does not have."""
        layers = moe_layers(model)
        for layer, ids in self.experts.items():
            if layer not in layers:
                have = f"{min(layers)} to {max(layers)}"
                raise ValueError(
                    f"the expert config names layer {layer}, but the model's MoE layers are {have}: it was made for "
                    "another model"
                )
            num_experts = layers[layer].num_experts
            if max(ids, default=0) >= num_experts:
                raise ValueError(
                    f"the expert config names expert {max(ids)} of layer {layer}, which has {num_experts} (0 to "
                    f"{num_experts - 1}): it was made for another model"
                )


def select_experts(
    scores: ExpertScores,
    *,
    score_function: str = "token",
    strategy: str = "cumulative",
    top_p: float = 0.2,
    fraction: float = 0.1,
    top_k: int = 6,
    seed: int = 0,
) -> ExpertConfig:
    """Choose experts in every layer by their scores; a tie goes to the lower id.

    Args:
        strategy: "cumulative" (the paper): best first until the running sum reaches `top_p`, the sum being tested
            before an expert is added. "fraction": the best `fraction` of the experts, rounded up. "topk": the best
            `top_k`.
            "random": the control: as many as "cumulative" takes in that layer, drawn with `seed`.

    Raises:
        ValueError: an unknown strategy or score, or a value out of its range.
    """
    if strategy not in STRATEGIES:
        raise ValueError(
            f"unknown strategy {strategy!r}{suggest(strategy, STRATEGIES)}: one of {', '.join(STRATEGIES)}"
        )
    for name, value in (("top_p", top_p), ("fraction", fraction)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} is {value}, expected a number above 0 and up to 1")
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}, expected at least 1")
    generator = random.Random(seed)
    experts: dict[int, tuple[int, ...]] = {}
    for layer, score_E in sorted(scores[score_function].items()):
        ranked = sorted(score_E, key=lambda e: (-score_E[e], e))
        if strategy == "fraction":
            count = max(1, math.ceil(fraction * len(ranked) - 1e-9))  # 0.28 * 25 is 7.000000000000001
        elif strategy == "topk":
            if top_k > len(ranked):
                raise ValueError(f"top_k is {top_k}, but layer {layer} has {len(ranked)} experts")
            count = top_k
        else:
            count, total = 0, 0.0
            while count < len(ranked) and total < top_p:
                total += score_E[ranked[count]]
                count += 1
        chosen = generator.sample(sorted(score_E), count) if strategy == "random" else ranked[:count]
        experts[layer] = tuple(chosen)
    return ExpertConfig(experts)


# --------------------------------------------------------------------------------------------------------------------
# the method on a model


@dataclass
class _State:
    """What `to_esft` and `add_adapter` did to a model; it stays on the model until `unload` or `merge`."""

    config: ExpertConfig  # what is trained, or what the loaded adapters hold
    training: bool
    implementation: str | None
    frozen: set[str]
    router: str  # fingerprint of the base's routers
    displaced: dict[str, Tensor] | None = None  # the base's values, by adapter name


def to_esft(
    model: nn.Module,
    config: ExpertConfig | Mapping,
    keep_base: bool = True,
    frozen_dtype: str | None = None,
    offload_frozen: bool = False,
) -> nn.Module:
    """Make exactly what `config` names trainable, in fp32, and freeze the rest; the forward stays bit-equal.

    Works in place and returns the model. Any optimizer over the parameters that require a gradient trains it. The state
    dict keeps the names, shapes and expert order of the base.

    Args:
        keep_base: hold a copy of the base's values in host memory, for `unload`.
        frozen_dtype: store the frozen experts as "fp8", "int8" or "nf4" (deepseek/frozen.py), for good: the forward is
            no longer the base's, and of such a model only the adapter can be saved. Where a model does not fit before
            that, `load_base_model(frozen=...)` stores them while it reads.
        offload_frozen: keep the frozen experts in host memory.

    Raises:
        ValueError: no such layer or expert in this model, a model without fused experts, or one already prepared.
    """
    config = config if isinstance(config, ExpertConfig) else ExpertConfig.from_dict(config)
    config.check(model)
    if getattr(model, "_esft", None):
        raise ValueError("this model has been through to_esft or add_adapter: unload(model) or merge(model) it first")
    frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
    layers = moe_layers(model).values()
    for layer in layers:
        ids = config.experts.get(layer.index, ())
        if stored := layer.frozen:
            if (frozen_dtype or stored.dtype, offload_frozen or stored.offload) != (stored.dtype, stored.offload):
                raise ValueError(
                    f"this model's frozen experts are stored as {stored.dtype or 'they were'} already: give "
                    "frozen_dtype and offload_frozen to load_base_model (frozen=...)"
                )
            thaw_experts(layer, ids)
        elif frozen_dtype or offload_frozen:
            freeze_experts(layer, ids, frozen_dtype, offload_frozen)
    implementation = IMPLEMENTATION if _is_stored(model) else model.config._experts_implementation
    state = _State(config, True, implementation, frozen, router_fingerprint(model))
    if keep_base:
        state.displaced = {name: view.to("cpu", copy=True) for name, view in adapter_views(model, config).items()}
    model.requires_grad_(False)
    train_parameters(model, _ordinary_parameters(model, config))
    for layer in layers:
        if config.experts.get(layer.index):
            train_experts(layer, config.experts[layer.index])
    forbid_state_dict(model)
    model.set_experts_implementation(IMPLEMENTATION)
    model._esft = state
    return model


def unload(model: nn.Module) -> nn.Module:
    """Give the base model back, bit for bit: whatever was trained or loaded goes."""
    state = _state(model)
    if state.displaced is None:
        raise ValueError("the base's values were not kept: use to_esft(model, config, keep_base=True)")
    _release(model, state)
    for name, view in adapter_views(model, state.config).items():
        view.copy_(state.displaced[name])
    return model


def merge(model: nn.Module) -> nn.Module:
    """Make what was trained or loaded part of the model: a plain one, whose `save_pretrained` is a plain checkpoint.

    Raises:
        ValueError: nothing was trained or loaded, or the experts do not all lie here in the model's dtype.
    """
    if _is_stored(model):
        raise ValueError("the frozen experts are stored otherwise than in the base: save the adapter and merge that "
                         "on disk, with scripts/merge_adapter.py")  # fmt: skip
    _release(model, _state(model))
    return model


def _is_stored(model: nn.Module) -> bool:
    """Whether the frozen experts are stored otherwise than in the base (deepseek/frozen.py)."""
    return any(layer.frozen for layer in moe_layers(model).values())


def _state(model: nn.Module) -> _State:
    state = getattr(model, "_esft", None)
    if state is None:
        raise ValueError("this model has no adapter and nothing trained: call to_esft or add_adapter first")
    return state


def _release(model: nn.Module, state: _State) -> None:
    layers = moe_layers(model).values()
    if state.training and any(layer.shard for layer in layers):
        raise ValueError("the trained experts lie on several ranks: save the adapter, and merge that on disk")
    if state.training:
        for layer in layers:
            if state.config.experts.get(layer.index):
                release_experts(layer)
        release_parameters(model)
        model.set_experts_implementation(state.implementation)
    for name, param in model.named_parameters():
        param.requires_grad_(name not in state.frozen)
    del model._esft


def _ordinary_parameters(model: nn.Module, config: ExpertConfig) -> list[str]:
    """Names (as in the base) of the parameters that the two switches of `config` add to the routed experts."""
    experts = [layer.name for layer in moe_layers(model).values()]
    routed = tuple(f"{name}." for name in experts)
    layers = tuple(re.match(r".*?\.\d+\.", name)[0] for name in experts)
    names = []
    for name, _ in model.named_parameters():
        name = re.sub(r"parametrizations\.(.+)\.original$", r"\1", name)
        if name.startswith(routed) or name == DTYPE_OF_BASE:
            continue
        # beside the experts, or (Granite) beside the block that holds them
        shared = name.startswith(layers) and re.search(r"\.[^.]*shared[^.]*(?<!gate)\.", name)
        if config.shared_experts if shared else config.non_expert_modules:
            names.append(name)
    return names


def adapter_views(model: nn.Module, config: ExpertConfig) -> dict[str, Tensor]:
    """The tensors that an adapter of `config` holds, by their name in it, as views into `model`.

    A routed expert's are `<experts module>.<expert>.gate_proj.weight` (F, D), `up_proj` and `down_proj` (D, F),
    whatever the layout in memory; others have their parameter's name. Under expert parallelism, the local experts'.
    """
    views: dict[str, Tensor] = {}
    for layer in moe_layers(model).values():
        local = set(layer.local_ids)
        for expert in config.experts.get(layer.index, ()):
            if expert in local:
                for projection, view in layer.expert_views(expert).items():
                    views[f"{layer.name}.{expert}.{projection}"] = view
    for name in _ordinary_parameters(model, config):
        views[name] = trained_parameter(model, name).data
    return views


# --------------------------------------------------------------------------------------------------------------------
# adapters


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what was trained, in the dtype the model computes in, by adapter name, in host memory."""
    state = _state(model)
    for layer in moe_layers(model).values():
        if layer.trained:
            layer.trained.write_back()
    tensors = adapter_views(model, state.config)
    for name in _ordinary_parameters(model, state.config):
        module_name, _, param_name = name.rpartition(".")
        tensors[name] = getattr(model.get_submodule(module_name), param_name).detach()  # the cast of its master
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def save_adapter(model: nn.Module, folder: str | Path, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write the adapter: `adapter.safetensors` and `expert_cfg.json`, each beside and renamed.

    `tensors` are those of all ranks under expert parallelism; by default, this process holds them all.
    """
    state, folder = _state(model), Path(folder)
    tensors = adapter_tensors(model) if tensors is None else tensors
    with atomic_path(folder / WEIGHTS_NAME) as temporary:
        save_file({name: tensors[name] for name in sorted(tensors)}, temporary, metadata={"format": "pt"})
    write_json(folder / CONFIG_NAME, {**state.config.to_dict(), "base": base_note(model, state.router)})


def add_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put an adapter's experts in place, after checking all of it against the model; nothing moves if it is refused.

    Adapters whose experts are disjoint can be added one after the other; `unload` restores the base. On a model in
    training (`to_esft` with the same config) the values become the trained ones. A LoRA adapter in peft's format, for
    comparison, is merged for good.

    Raises:
        ValueError, FileNotFoundError: no adapter there; a tensor missing, unknown, truncated or of another shape; an
            adapter of another base; an expert that a loaded adapter already holds.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"adapter {folder}: no such folder{suggest_path(folder)}")
    if is_lora(folder):
        return _merge_lora(model, folder)
    config = ExpertConfig.load(folder)
    try:
        config.check(model)
        check_base(model, folder)
        if (state := getattr(model, "_esft", None)) is None:
            frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
            state = _State(ExpertConfig({}), False, None, frozen, router_fingerprint(model), {})
        if state.training and config != state.config:
            raise ValueError("it holds other experts than this model trains; unload(model) first")
        expected, remote = _expected(model, config)
        loaded = read_adapter(folder, expected, remote)
        taken = sorted(expected.keys() & (state.displaced or {}).keys()) if not state.training else []
        if taken:
            raise ValueError(
                f"{taken[0]} is held by an adapter loaded before ({len(taken)} tensors are); unload(model) first"
            )
    except ValueError as error:
        raise ValueError(f"adapter {folder}: {error}") from error
    if not state.training:
        for layer in moe_layers(model).values():
            thaw_experts(layer, config.experts.get(layer.index, ()))
    views = adapter_views(model, config)
    if not state.training:
        state.displaced |= {name: view.to("cpu", copy=True) for name, view in views.items()}
        state.config = union(state.config, config)
        model._esft = state
    for name, view in views.items():
        view.copy_(loaded[name])
    for layer in moe_layers(model).values():
        if layer.trained:
            layer.trained.read_in()
    return model


def _expected(model: nn.Module, config: ExpertConfig) -> tuple[dict[str, Tensor], set[str]]:
    """(tensors of the shapes that an adapter of `config` has here, by name; names of those of other ranks' experts)."""
    here: dict[str, Tensor] = {}
    remote: set[str] = set()
    for layer in moe_layers(model).values():
        local, shapes = set(layer.local_ids), layer.expert_shapes()
        for expert in config.experts.get(layer.index, ()):
            names = {f"{layer.name}.{expert}.{projection}": shape for projection, shape in shapes.items()}
            if expert in local:
                here |= names
            else:
                remote |= names.keys()
    return here | {name: trained_parameter(model, name) for name in _ordinary_parameters(model, config)}, remote


def union(a: ExpertConfig, b: ExpertConfig) -> ExpertConfig:
    """What two adapters hold that hold no expert both."""
    experts = {layer: (*a.experts.get(layer, ()), *b.experts.get(layer, ())) for layer in a.experts | b.experts}
    return ExpertConfig(
        dict(sorted(experts.items())),
        a.shared_experts or b.shared_experts,
        a.non_expert_modules or b.non_expert_modules,
    )


def load_esft_model(base_model_path: str | Path, adapter_dir: str | Path, **kwargs):
    """(model, tokenizer) of a base with an adapter in place; `kwargs` as in `load_base_model`."""
    model, tokenizer = load_base_model(base_model_path, **kwargs)
    return add_adapter(model, adapter_dir), tokenizer


TOP_P = {"token": 0.2, "gate": 0.1, "prob": 0.2}  # the paper's; prob sums to 1 as token does
