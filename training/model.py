"""The model of a run: read what this process holds, place its experts, connect the ranks."""

import logging
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from transformers import set_seed

import esft
from deepseek.expert_parallel import connect_experts, shard_dense
from deepseek.experts import moe_layers
from deepseek.fp8 import compute_in_fp8
from deepseek.frozen import Storage
from deepseek.loading import draws_in_training, keeps_documents_apart
from deepseek.placement import Placement, imbalance, place_layers
from deepseek.process_groups import Ranks
from training.config import RunConfig
from training.data import Packs
from training.first_selection import find_scores
from training.methods import format_trained, prepare_model
from training.plan import Plan
from training.routers import TrainedRouters
from utils import counted, size, split_names

logger = logging.getLogger("esft")


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be trained, and what was found while it was read."""

    model: nn.Module
    documents_apart: bool  # the documents of a pack do not see each other
    read_bytes: int | None  # weights that this rank read, where it read only a part of them
    routers: TrainedRouters | None = None  # where they are trained


def load_model(config: RunConfig, plan: Plan, ranks: Ranks) -> LoadedModel:
    """Read the base model and make it trainable. Under expert parallelism a rank reads its own experts only."""
    set_seed(config.seed)  # LoRA starts from random numbers
    placements = ranks.on_rank_zero(lambda: place_experts(config, plan)) if ranks.ep_size > 1 else {}
    experts = {index: placement[ranks.expert_rank] for index, placement in placements.items()} or None
    frozen = None
    if plan.experts and (plan.frozen_dtype or config.offload_frozen):
        frozen = Storage(plan.frozen_dtype, config.offload_frozen, plan.experts.experts)

    def read_and_prepare() -> tuple[nn.Module, nn.Module]:
        base, _ = esft.load_base_model(
            config.base_model_path,
            dtype=config.dtype,
            device=plan.device if plan.device.type == "cuda" else None,
            experts=experts,
            attention=config.attn_implementation,
            frozen=frozen,
        )
        lora = config.lora_rank, config.lora_alpha, split_names(config.lora_modules or "")
        return base, prepare_model(base, config.kind, plan.experts, *lora, config.keeps_base)

    base, model = ranks.run_or_fail_together(read_and_prepare)
    read_bytes = base.read_bytes if experts or frozen else None
    if config.method == "full" and base.dtype != torch.float32:
        warnings.warn("full fine-tuning in bfloat16 rounds small updates away; set dtype=float32", stacklevel=2)
    if placements:
        connect_experts(model, placements, plan.experts.experts, ranks)
        read = ranks.gather(read_bytes)
        logger.info(f"  each process reads at most {size(max(read))} of weights")
    if config.expert_compute:
        compute_in_fp8(model)
    if not (documents_apart := keeps_documents_apart(base)):
        warnings.warn(
            f"in a {base.config.model_type} the documents of a pack would see each other, so every sample becomes a "
            "pack of its own: batch sizes count samples",
            stacklevel=2,
        )
    if draws_in_training(base):
        warnings.warn(
            f"this {base.config.model_type} draws random numbers in training (in its routers, or for dropout): its "
            "losses depend on per_device_train_batch_size and on the number of processes, by more than rounding",
            stacklevel=2,
        )
    routers = None
    if plan.experts and plan.experts.routers:
        routers = TrainedRouters(model, plan.experts.routers, config.router_kl, config.router_rate)
    if config.shard_dense and ranks.world_size > 1:
        shard_dense(model, config.timeout, plan.device)
    return LoadedModel(model, documents_apart, read_bytes, routers)


def place_experts(config: RunConfig, plan: Plan) -> dict[int, Placement]:
    """Return the placement of each layer's experts, by their scores where they can be found, and log its balance."""
    num_experts_L = {index: layer.num_experts for index, layer in moe_layers(plan.empty).items()}
    load_LE, source = None, "no expert scores found (expert_scores_dir=...), so all experts count the same"
    if (path := find_scores(config)) is not None:
        load_LE, source = esft.ExpertScores.load(path)["token"], f"by {path}"
    contiguous, trained = config.placement == "contiguous", plan.most_experts.experts
    placements = place_layers(num_experts_L, trained, plan.ep_size, load_LE, contiguous)
    load_LE = load_LE or {index: dict.fromkeys(range(n), 1 / n) for index, n in num_experts_L.items()}
    found = imbalance(placements, trained, load_LE)
    logger.info(
        f"  experts shared out over {plan.ep_size} processes ({config.placement}; {source}); the busiest process gets "
        f"{found['load']:.2f} x the mean load ({found['load_worst']:.2f} x in the worst layer), and "
        f"{found['trained']:.2f} x the mean number of trained experts"
    )
    return placements


def log_model(model: nn.Module, config: RunConfig, packs: Packs) -> None:
    """Log what is trained, and on what; warn of samples that are longer than the model's context."""
    logger.info(format_trained(model, config.kind))
    what = "sample" if packs.together == 1 else "pair"
    samples, tokens = counted(sum(map(len, packs.members)) // packs.together, what), sum(packs.lengths)
    logger.info(f"  {samples}, {tokens:,} tokens in {counted(len(packs), 'pack')} of up to {config.seq_length:,}")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = packs.longest_document
    if context and longest > context:
        warnings.warn(
            f"the longest sample has {longest} tokens, more than the model's context of {context}: set "
            f"seq_length={context}, and overlong=truncate or shorter samples",
            stacklevel=2,
        )
