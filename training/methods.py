"""What a run trains: the four methods (esft, random, full, lora) on a model, counted, shown and verified."""

import dataclasses
import hashlib
import random
import warnings

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import esft
from deepseek.experts import FusedExperts, TrainedExperts, moe_layers
from deepseek.frozen import FrozenExperts


def chosen_experts(config, model: nn.Module) -> esft.ExpertConfig | None:
    """The experts that `config` (train.RunConfig) trains, checked against `model` (without weights); None for the
    methods that choose none. Method `random` draws as many per layer as its expert config names."""
    if config.method not in ("esft", "random"):
        return None
    experts = esft.ExpertConfig.load(config.expert_config)
    experts.check(model)
    if config.method == "esft":
        return experts
    generator, layers = random.Random(config.seed), moe_layers(model)
    drawn = {
        layer: tuple(generator.sample(range(layers[layer].num_experts), len(ids)))
        for layer, ids in experts.experts.items()
    }
    return dataclasses.replace(experts, experts=drawn)


def prepare_model(model: nn.Module, config, experts: esft.ExpertConfig | None) -> nn.Module:
    """Make trainable what `config.method` trains, and nothing else."""
    if config.method == "full":
        if model.dtype != torch.float32:
            warnings.warn("full fine-tuning in bfloat16 rounds small updates away; set dtype=float32", stacklevel=2)
        return model.requires_grad_(True)
    if config.method == "lora":
        return _add_lora(model, config)
    return esft.to_esft(model, experts, keep_base=False)


def _add_lora(model: nn.Module, config) -> nn.Module:
    """LoRA on every linear layer but the head, and on the fused experts; routers stay frozen, as in ESFT."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("method lora needs peft: python -m pip install -c constraints.txt peft") from error
    layers = moe_layers(model).values()
    experts_of_block = {layer.name.rpartition(".")[0]: layer.num_experts for layer in layers}

    def adapted(name: str, module: nn.Module) -> bool:
        if not isinstance(module, nn.Linear) or module is model.get_output_embeddings():
            return False
        block = next((block for block in experts_of_block if name.startswith(f"{block}.")), None)
        return block is None or module.out_features != experts_of_block[block]  # a router has a row per expert

    linear = [name for name, module in model.named_modules() if adapted(name, module)]
    # peft takes these names for experts of an older layout wherever they stand, and would leave the modules out
    taken = tuple(f".{name}" for name in ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"))
    fused = [f"{layer.name}.{tensor}" for layer in layers for tensor in layer.weight_names]
    two_in_one = {r".*\.gate_up_proj": 2}  # rank and alpha of two projections
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=[name for name in linear if not name.endswith(taken)],
        target_parameters=fused + [f"{name}.weight" for name in linear if name.endswith(taken)],
        rank_pattern={key: factor * config.lora_rank for key, factor in two_in_one.items()},
        alpha_pattern={key: factor * config.lora_alpha for key, factor in two_in_one.items()},
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # about patterns of its own making, and a property that transformers renamed
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        note = {"base": esft.base_note(model, esft.router_fingerprint(model))}
        adapted = get_peft_model(model, lora)
        adapted.base_note = note  # to be saved with it
        return adapted


def count_trained(model: nn.Module) -> dict:
    """Parameters of the whole model, those trained, and the bytes of their gradients and AdamW states, on all ranks of
    an expert-parallel replica together; and the bytes of frozen experts here."""
    trained = [param for param in model.parameters() if param.requires_grad]
    # the trained rows of fused experts are parameters of their own and would count twice; LoRA's come on top
    extra = (".trained.", "lora_")
    added = sum(p.numel() for name, p in model.named_parameters() if any(part in name for part in extra))
    parameters = sum(param.numel() for param in model.parameters()) - added
    count = sum(param.numel() for param in trained)
    nbytes = sum(param.numel() * param.element_size() for param in trained)
    frozen_bytes = 0
    if state := getattr(model, "_esft", None):
        for layer in moe_layers(model).values():
            frozen_bytes += frozen_experts_bytes(layer)
            each = sum(layer.tensor(name).shape[1:].numel() for name in layer.tensor_names)
            here = set(layer.local_ids)
            elsewhere = len(set(state.config.experts.get(layer.index, ())) - here) * each
            parameters += (layer.num_experts - len(here)) * each
            if layer.frozen:
                parameters += layer.frozen.num_parameters()
            count, nbytes = count + elsewhere, nbytes + elsewhere * torch.float32.itemsize
    return {
        "parameters": parameters,
        "trained_parameters": count,
        "gradient_bytes": nbytes,
        "optimizer_bytes": 2 * nbytes,
        "frozen_expert_bytes": frozen_bytes,
    }


def frozen_experts_bytes(layer: FusedExperts) -> int:
    """Bytes of the matrices of a layer that are not trained, in whatever form they are stored."""
    rows = sum(layer.tensor(name).data[layer.num_trained :].nbytes for name in layer.weight_names)
    return rows + (layer.frozen.nbytes() if layer.frozen else 0)


def trained_table(model: nn.Module, config) -> str:
    """What is trained, as text: layers, experts, parameters, share, bytes of gradient and optimizer state."""
    counts = count_trained(model)
    lines = [f"method {config.method}, weights {model.dtype}".replace("torch.", "")]
    if state := getattr(model, "_esft", None):
        for layer in moe_layers(model).values():
            if ids := sorted(state.config.experts.get(layer.index, ())):
                lines.append(f"  layer {layer.index:>3}: {len(ids):>3} of {layer.num_experts} experts  {ids}")
    if stored := [layer.frozen for layer in moe_layers(model).values() if layer.frozen] if state else []:
        where = ", in host memory" if stored[0].offload else ""
        size = counts["frozen_expert_bytes"] / 2**20
        lines.append(f"  frozen experts as {stored[0].dtype or 'they are'}{where}: {size:,.1f} MiB")
    share = counts["trained_parameters"] / counts["parameters"]
    lines.append(f"  trained parameters {counts['trained_parameters']:,} of {counts['parameters']:,} ({share:.2%})")
    lines.append(
        f"  gradients {counts['gradient_bytes'] / 2**20:,.1f} MiB, AdamW states "
        f"{counts['optimizer_bytes'] / 2**20:,.1f} MiB"
    )
    return "\n".join(lines)


def frozen_hashes(model: nn.Module) -> dict[str, str]:
    """SHA-256 of every parameter and persistent buffer that is not trained; of fused experts, of the frozen rows or of
    what is stored for them, and of what is shared out, of this rank's part."""
    hashes = {}
    for prefix, module in model.named_modules():
        experts = getattr(module, "trained", None)
        buffers = {k: b for k, b in module.named_buffers(recurse=False) if k not in module._non_persistent_buffers_set}
        if isinstance(module, FrozenExperts):
            buffers |= {f"{name}.{i}": t for name, stored in module.stored.items() for i, t in enumerate(stored)}
        for name, tensor in {**dict(module.named_parameters(recurse=False)), **buffers}.items():
            if not tensor.requires_grad:
                if isinstance(experts, TrainedExperts) and hasattr(experts, name):
                    tensor = tensor[experts.num_trained :]
                if isinstance(tensor, DTensor):
                    tensor = tensor.to_local()
                raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                hashes[f"{prefix}.{name}"] = hashlib.sha256(raw.numpy()).hexdigest()
    return hashes
