"""The model of a run: read what this process holds, place its experts, connect the ranks."""

from datetime import timedelta
from pathlib import Path

from torch import nn

import esft
from deepseek.expert_parallel import connect_experts, shard_dense
from deepseek.experts import moe_layers
from deepseek.frozen import Storage
from deepseek.loading import empty_model, keeps_documents_apart
from deepseek.partial_loading import quantization
from deepseek.placement import Placement, imbalance, place_layers
from deepseek.process_groups import Ranks, SharedError
from training.methods import chosen_experts, prepare_model
from training.plan import Plan, plan_run, stored_dtype


def find_scores(config) -> Path | None:
    """The expert scores that placement goes by: those given, or those that lie where the README's commands put them."""
    if config.expert_scores_dir:
        return Path(config.expert_scores_dir)
    made = Path(config.expert_config)
    folder = made.parent.parent / "expert_scores"
    return next((path for path in (folder / made.stem, folder) if (path / "summary.json").is_file()), None)


def place_experts(config, empty: nn.Module, experts: esft.ExpertConfig, ep_size: int, say) -> dict:
    """{layer: Placement} for `ep_size` ranks, by the scores if they can be found, and what is expected of it, said."""
    num_experts_L = {index: layer.num_experts for index, layer in moe_layers(empty).items()}
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


def load_model(config, args, packs: list, ranks: Ranks, timeout: timedelta, say) -> tuple[nn.Module, bool, Ranks, Plan]:
    """(model, made trainable; whether it keeps packed documents apart; ranks with their groups; the plan).

    Under expert parallelism a rank reads its own experts only.
    """
    empty = ranks.run_or_fail_together(lambda: empty_model(config.base_model_path))
    if quantization(empty.config) == "fp8" and config.method in ("full", "lora"):
        raise SharedError(
            f"model {config.base_model_path} is stored in fp8, which method {config.method} cannot train: give its "
            "bfloat16 form, or method=esft"
        )
    experts = ranks.run_or_fail_together(
        lambda: chosen_experts(config, empty)
    )  # before a large model is loaded in vain
    plan = plan_run(config, args, empty, experts, packs, ranks, say)
    ranks = ranks.with_experts(plan.ep_size, timeout)
    placements: dict[int, Placement] = {}
    if ranks.ep_size > 1:
        placements = ranks.on_rank_zero(lambda: place_experts(config, empty, experts, ranks.ep_size, say))
    local = {layer: placement[ranks.expert_rank] for layer, placement in placements.items()} or None
    on = args.device if args.device.type == "cuda" else None
    place = {"dtype": config.dtype, "device": on, "experts": local, "attention": config.attn_implementation}
    if experts and (stored_dtype(config, empty) or config.offload_frozen):
        place["frozen"] = Storage(stored_dtype(config, empty), config.offload_frozen, experts.experts)
    base, _ = ranks.run_or_fail_together(lambda: esft.load_base_model(config.base_model_path, **place))
    model = ranks.run_or_fail_together(lambda: prepare_model(base, config, experts))
    if placements:
        connect_experts(model, placements, experts.experts, ranks)
        read = ranks.gather(model.read_bytes)
        say(f"  read by each rank: {min(read) / 2**20:,.1f} to {max(read) / 2**20:,.1f} MiB of weights")
    apart = keeps_documents_apart(base)
    if config.shard_dense and ranks.world_size > 1:
        shard_dense(model, timeout, args.device)
    return model, apart, ranks, plan
