"""How a run lies on its processes: how many share a replica (ep_size), who holds which experts, the model of each."""

import os
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

import esft
from deepseek.expert_parallel import connect_experts, shard_dense
from deepseek.experts import find_experts, fused_names
from deepseek.frozen import Storage
from deepseek.loading import empty_model, keeps_documents_apart
from deepseek.placement import Placement, choose_ep_size, imbalance, place_layers
from deepseek.ranks import Ranks
from methods import chosen_experts, prepare_model


def find_scores(config) -> Path | None:
    """The expert scores that placement goes by: those given, or those that lie where the README's commands put them."""
    if config.expert_scores_dir:
        return Path(config.expert_scores_dir)
    made = Path(config.expert_config)
    folder = made.parent.parent / "expert_scores"
    return next((path for path in (folder / made.stem, folder) if (path / "summary.json").is_file()), None)


def place_experts(config, empty: nn.Module, experts: esft.ExpertConfig, ep_size: int, say) -> dict:
    """{layer: Placement} for `ep_size` ranks, by the scores if they can be found, and what is expected of it, said."""
    num_experts_L = {layer: module.num_experts for layer, (_, module) in find_experts(empty).items()}
    load_LE, source = None, "no expert scores found (expert_scores_dir=...), so all experts count the same"
    if (path := find_scores(config)) is not None:
        scores = esft.ExpertScores.load(path)
        load_LE, source = scores["token"], f"by {path}"
    contiguous = config.placement == "contiguous"
    try:
        placements = place_layers(num_experts_L, experts.experts, ep_size, load_LE, contiguous)
    except ValueError as error:
        raise ValueError(f"{error} (placement {source}; expert_scores_dir=... gives others)") from error
    load_LE = load_LE or {layer: dict.fromkeys(range(n), 1 / n) for layer, n in num_experts_L.items()}
    found = imbalance(placements, experts.experts, load_LE)
    say(
        f"  {'contiguous' if contiguous else 'balanced'} placement of experts on {ep_size} ranks, expected max/mean: "
        f"load {found['load']:.2f} (worst layer {found['load_worst']:.2f}), trained experts {found['trained']:.2f}; "
        f"{source}"
    )
    return placements


def plan_ep_size(config, empty: nn.Module, experts: esft.ExpertConfig, ranks: Ranks, say) -> int:
    """`ep_size` as a number; what `auto` chooses is said."""
    if config.ep_size != "auto":
        return config.ep_size
    modules = dict(find_experts(empty).values())
    dtype = {"auto": empty.config.dtype or torch.float32}.get(config.dtype) or getattr(torch, config.dtype)
    fused = sum(getattr(module, name).numel() for module in modules.values() for name in fused_names(module))
    views = esft.adapter_views(empty, experts)
    routed = sum(view.numel() for name, view in views.items() if name.startswith(tuple(modules)))
    others = sum(view.numel() for view in views.values()) - routed
    state = 12 if dtype == torch.float32 else 16  # gradient, two moments, and a master where it is not fp32
    if torch.cuda.is_available() and config.device != "cpu":
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    ep_size, why = choose_ep_size(
        ranks.world_size,
        min(module.num_experts for module in modules.values()),
        (sum(param.numel() for param in empty.parameters()) - fused) * dtype.itemsize + others * state,
        fused * dtype.itemsize,
        routed * state,
        min(ranks.gather(memory)),
    )
    say(f"  {why}")
    return ep_size


def load_model(config, ranks: Ranks, timeout: timedelta, device: torch.device, say) -> tuple[nn.Module, bool, Ranks]:
    """(model, made trainable; whether it keeps packed documents apart; ranks with their groups).

    Under expert parallelism a rank reads its own experts only.
    """
    empty = ranks.together(lambda: empty_model(config.base_model_path))
    experts = ranks.together(lambda: chosen_experts(config, empty))  # before a large model is loaded in vain
    ep_size = plan_ep_size(config, empty, experts, ranks, say) if experts else 1
    ranks = ranks.with_experts(ep_size, timeout)
    placements: dict[int, Placement] = {}
    if ranks.ep_size > 1:
        placements = ranks.on_first(lambda: place_experts(config, empty, experts, ranks.ep_size, say))
    local = {layer: placement[ranks.expert_rank] for layer, placement in placements.items()} or None
    on = device if device.type == "cuda" else None
    place = {"dtype": config.dtype, "device": on, "experts": local}
    if experts and (config.frozen_dtype or config.offload_frozen):
        place["frozen"] = Storage(config.frozen_dtype, config.offload_frozen, experts.experts)
    base, _ = ranks.together(lambda: esft.load_base_model(config.base_model_path, **place))
    model = ranks.together(lambda: prepare_model(base, config, experts))
    if placements:
        connect_experts(model, placements, experts.experts, ranks)
        read = ranks.gather(model.read_bytes)
        say(f"  read by each rank: {min(read) / 2**20:,.1f} to {max(read) / 2**20:,.1f} MiB of weights")
    apart = keeps_documents_apart(base)
    if config.shard_dense and ranks.world_size > 1:
        shard_dense(model, timeout, device)
    return model, apart, ranks
