"""The methods (esft, dpo, random, full, lora): what each trains of a model, counted and shown."""

import dataclasses
import logging
import random
import warnings
from collections.abc import Collection

import torch
from torch import nn

import esft
from deepseek.experts import moe_layers
from deepseek.files import import_extra, suggest
from deepseek.fingerprint import router_parameters
from deepseek.lora import matrix_shapes
from training.keys import LORA_SELECTED, ON_EXPERTS
from utils import size

logger = logging.getLogger("esft")


def choose_experts(
    method: str, expert_config: str | None, seed: int, model: nn.Module, routers: str | None = None
) -> esft.ExpertConfig | None:
    """Return the experts to train, checked against `model` (without weights); None for full, and lora on all layers.

    Method random draws as many experts per layer as `expert_config` names, by `seed`. If `routers` is given, it
    replaces that of the config.
    """
    if method not in ON_EXPERTS:
        return None
    named = esft.ExpertConfig.load(expert_config)
    named = dataclasses.replace(named, routers=routers or named.routers)
    named.check(model)
    if method != "random":
        return named
    generator, sizes = random.Random(seed), {index: layer.num_experts for index, layer in moe_layers(model).items()}
    drawn = {index: tuple(generator.sample(range(sizes[index]), len(ids))) for index, ids in named.experts.items()}
    return dataclasses.replace(named, experts=drawn)


def prepare_model(
    model: nn.Module,
    method: str,
    experts: esft.ExpertConfig | None = None,
    lora_rank: int = 8,
    lora_alpha: int = 16,
    lora_modules: Collection[str] = (),
    keep_base: bool = False,
) -> nn.Module:
    """Make trainable what `method` trains, and nothing else. With `keep_base`, keep the base's values of it."""
    if method == "full":
        return model.requires_grad_(True)
    if method == "lora":
        return _add_lora(model, lora_rank, lora_alpha)
    if method == LORA_SELECTED:
        if lora_modules:
            _add_lora(model, lora_rank, lora_alpha, lora_modules)
        return esft.to_esft(model, experts, lora_rank=lora_rank, lora_alpha=lora_alpha)
    return esft.to_esft(model, experts, keep_base=keep_base)


def lora_layers(model: nn.Module, only: Collection[str] = ()) -> list[str]:
    """Return the names of the linear layers that LoRA is for: all but the head and the routers.

    With `only`, they are those with one of these words between the dots of their names.

    Raises:
        ValueError: no layer has one of the words.
    """
    routers, head = {name.rpartition(".")[0] for name in router_parameters(model)}, model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    layers = [name for name in linear if name not in routers]
    known = {word for name in layers for word in name.split(".") if not word.isdigit()}
    if unknown := sorted(set(only) - known):
        near = suggest(unknown[0], known)
        raise ValueError(f"cannot put LoRA on {unknown[0]!r}{near}: linear layers have the names {sorted(known)}.")
    return [name for name in layers if not only or set(only) & set(name.split("."))]


def _add_lora(model: nn.Module, rank: int, alpha: int, only: Collection[str] = ()) -> nn.Module:
    """Put LoRA of peft on `lora_layers`, and without `only` on the fused experts. Routers stay frozen, as in ESFT."""
    peft = import_extra("peft", "lora")
    layers, linear = moe_layers(model).values(), lora_layers(model, only)
    # peft takes these names for experts of an older layout wherever they stand, and would leave the modules out
    taken = tuple(f".{name}" for name in ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"))
    fused = [f"{layer.name}.{tensor}" for layer in layers for tensor in layer.weight_names if not only]
    two_in_one = r".*\.gate_up_proj"  # rank and alpha of two projections
    lora = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=[name for name in linear if not name.endswith(taken)],
        target_parameters=fused + [f"{name}.weight" for name in linear if name.endswith(taken)],
        rank_pattern={two_in_one: 2 * rank},
        alpha_pattern={two_in_one: 2 * alpha},
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # about patterns that peft makes itself, and a property that transformers renamed
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        note = {"base": esft.base_note(model)}
        adapted_model = peft.get_peft_model(model, lora)
        adapted_model.base_note = note  # which is saved with it
        return adapted_model


def count_trained(model: nn.Module) -> dict:
    """Return the parameters of the whole model, those trained, and the bytes of their gradients and AdamW states.

    Under expert parallelism these are for all ranks of a replica together; frozen_expert_bytes is for this rank alone.
    """
    trained = [param for param in model.parameters() if param.requires_grad]
    # the trained rows of fused experts are parameters of their own and would count twice, and LoRA's are extra
    named = model.named_parameters()
    parameters = sum(param.numel() for name, param in named if ".trained." not in name and "lora_" not in name)
    count, nbytes, frozen_bytes = sum(param.numel() for param in trained), sum(param.nbytes for param in trained), 0
    if esft.trained_config(model):
        for layer in moe_layers(model).values():
            frozen_bytes += sum(layer.tensor(name).data[layer.num_trained :].nbytes for name in layer.weight_names)
            each = sum(layer.tensor(name).shape[1:].numel() for name in layer.tensor_names)
            parameters += (layer.num_experts - len(layer.local_ids)) * each
            if layer.frozen:
                parameters += layer.frozen.num_parameters()
                frozen_bytes += layer.frozen.nbytes()
        count = sum(shape.numel() for shape in esft.trained_shapes(model).values())
        nbytes = count * torch.float32.itemsize
    return {
        "parameters": parameters,
        "trained_parameters": count,
        "gradient_bytes": nbytes,
        "optimizer_bytes": 2 * nbytes,
        "frozen_expert_bytes": frozen_bytes,
    }


def budget_of(model: nn.Module, share: float, train_shared_experts: bool = False) -> float:
    """Return the share of a model's routed experts that is `share` of all its parameters.

    With `train_shared_experts` it is what these leave of `share`: below 0 where they alone are more.
    """

    def count(config: esft.ExpertConfig) -> int:
        return sum(view.numel() for view in esft.adapter_views(model, config).values())

    every = {index: tuple(range(layer.num_experts)) for index, layer in moe_layers(model).items()}
    wanted = share * sum(param.numel() for param in model.parameters())
    shared = count(esft.ExpertConfig({}, shared_experts=True)) if train_shared_experts else 0
    return (wanted - shared) / count(esft.ExpertConfig(every))


def rank_of(model: nn.Module, share: float, budget: float | None = None) -> int:
    """Return the rank at which LoRA trains as many parameters as `share` of a model's, rounded, and at least 1.

    It is on all layers of `model`, which has no weights and gets LoRA by this, or on a share `budget` of the experts.
    """
    total = sum(param.numel() for param in model.parameters())
    if budget:
        layers = moe_layers(model).values()
        of_rank_1 = budget * sum(layer.num_experts * sum(map(sum, matrix_shapes(layer).values())) for layer in layers)
    else:
        of_rank_1 = count_trained(_add_lora(model, 1, 2))["trained_parameters"]
    return max(1, round(share * total / of_rank_1))


def format_trained(model: nn.Module, method: str) -> str:
    """Return what is trained as text: layers, experts, parameters, share, bytes of gradients and optimizer states."""
    counts = count_trained(model)
    lines = [f"method {method}, weights {model.dtype}".replace("torch.", "")]
    if selected := esft.trained_config(model):
        for layer in moe_layers(model).values():
            if ids := sorted(selected.experts.get(layer.index, ())):
                lines.append(f"  layer {layer.index:>3}: {len(ids):>3} of {layer.num_experts} experts  {ids}")
    if selected and selected.routers:
        lines.append(f"  routers: {selected.routers}")
    if stored := [layer.frozen for layer in moe_layers(model).values() if layer.frozen] if selected else []:
        where = ", in host memory" if stored[0].offload else ""
        frozen = size(counts["frozen_expert_bytes"])
        lines.append(f"  frozen experts as {stored[0].dtype or 'they are'}{where}: {frozen}")
    share = counts["trained_parameters"] / counts["parameters"]
    lines.append(f"  trained parameters {counts['trained_parameters']:,} of {counts['parameters']:,} ({share:.2%})")
    lines.append(f"  gradients {size(counts['gradient_bytes'])}, AdamW states {size(counts['optimizer_bytes'])}")
    return "\n".join(lines)
