"""Lay a run out over its processes: who takes part, how many share a copy of the experts, and what fits on a GPU."""

import dataclasses
import itertools
import logging
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.utils.logging import disable_progress_bar

import esft
from deepseek.adapters import adapter_views, read_base_note
from deepseek.experts import moe_layers
from deepseek.files import import_extra
from deepseek.fingerprint import difference
from deepseek.fp8 import check_fp8
from deepseek.frozen import quantize
from deepseek.loading import empty_model
from deepseek.partial_loading import quantization
from deepseek.process_groups import Ranks, SharedError, join
from deepseek.selection import check_amounts
from training.config import RunConfig
from training.data import Packs
from training.expert_schedule import ExpertSchedule
from training.first_selection import selected_experts
from training.keys import ON_EXPERTS
from training.memory import Estimator, MemoryEstimate, MemorySettings
from training.methods import choose_experts, lora_layers
from training.teacher import Teacher
from utils import counted, log_to_stdout, size, split_names

logger = logging.getLogger("esft")
FEW_STEPS = 50  # a shorter run gets a note


@dataclass(frozen=True)
class Plan:
    """What is trained and how it is laid out. `memory` is the expected peak of a process, where it was estimated."""

    empty: nn.Module  # the model without weights
    experts: esft.ExpertConfig | None  # those to train; None for the methods that choose none
    frozen_dtype: str | None
    device: torch.device
    ep_size: int
    activation_checkpointing: bool
    schedule: ExpertSchedule | None = None  # if other experts are trained from some step on
    memory: MemoryEstimate | None = None
    memory_advice: str = "activation_checkpointing=true"  # keys that would save memory, the least costly first

    @property
    def most_experts(self) -> esft.ExpertConfig | None:
        """The experts at the end of a run that expands, and those to train of any other."""
        return self.schedule.at_end if self.schedule else self.experts


def join_processes(config: RunConfig) -> Ranks:
    """Join the processes that torchrun started, one per GPU. Only rank 0 prints from here on."""
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if on_gpu and processes > gpus:
        raise SharedError(
            f"cannot start {processes} processes: the machine has {counted(gpus, 'GPU')}. Lower --nproc-per-node "
            "or give device=cpu."
        )
    ranks = join(config.timeout, "cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    log_to_stdout(ranks.rank)
    if ranks.rank:
        warnings.simplefilter("ignore")
        disable_progress_bar()
    elif on_gpu and gpus > ranks.world_size:
        logger.info(f"  {ranks.world_size} of {counted(gpus, 'GPU')}: torchrun --nproc-per-node=N uses more")
    return ranks


def open_empty(config: RunConfig, ranks: Ranks) -> nn.Module:
    """Return the model of a run without weights.

    All that can be refused without weights and data is refused here, before data are encoded and experts are scored.

    Raises:
        ValueError, OSError, ImportError: the model, its experts, or a library that the config needs.
    """
    empty = empty_model(config.base_model_path, config.attn_implementation)
    if quantization(empty.config) == "fp8" and config.kind not in ON_EXPERTS:
        raise ValueError(
            f"cannot train {config.base_model_path} by method {config.method}: it is stored in fp8. Give its bfloat16 "
            "form, or method=esft."
        )
    if config.ep_size != "auto":
        ranks.check_ep_size(int(config.ep_size))
    if config.distill_from not in (None, "base"):
        Teacher(config.distill_from)
    if config.kind == "lora" or config.lora_modules:
        import_extra("peft", "lora")
        lora_layers(empty, split_names(config.lora_modules or ""))
    layers = moe_layers(empty)
    if config.expert_config and Path(config.expert_config) != selected_experts(config.output_dir):
        experts = choose_experts(config.kind, config.expert_config, config.seed, empty, config.train_router)
        schedule_of(config, experts, empty)
    elif config.train_router and config.kind in ON_EXPERTS:
        esft.ExpertConfig({}, routers=config.train_router).check(empty)
    if config.train_shared_experts and not adapter_views(empty, esft.ExpertConfig({}, shared_experts=True)):
        raise ValueError("cannot train shared experts: this model has none. Leave out train_shared_experts.")
    most = min(layer.num_experts for layer in layers.values())
    check_amounts(most, len(layers), top_k=config.top_k, upper_layers=config.upper_layers)
    layer = next(iter(layers.values()))
    splits = config.save_opt_states or config.reselect_steps
    if layer.module.has_bias and splits and config.training.get("optim") == "adafactor":
        raise ValueError(
            "cannot keep the states of optim=adafactor by expert: the experts of this model have biases, and it keeps "
            "means over all of them. Set optim=adamw_torch_fused, or leave out save_opt_states and reselect_steps."
        )
    if config.expert_compute:
        if quantization(empty.config) == "fp8":
            raise ValueError("cannot compute experts in fp8: the model is stored in fp8. Give its bfloat16 form.")
        check_fp8([layer], (empty.config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)))
    for name in layer.weight_names if config.frozen_dtype else ():
        quantize(torch.zeros(1, *layer.tensor(name).shape[1:]), config.frozen_dtype)
    return empty


def plan_run(config: RunConfig, args: TrainingArguments, packs: Packs, ranks: Ranks, empty: nn.Module) -> Plan:
    """Choose the experts, and ep_size and activation_checkpointing where they are auto.

    On a GPU the first layout that is expected to fit is taken, or the most saving one. Elsewhere nothing is estimated:
    auto means whole copies (ep_size=1) and saved activations (false).
    """
    experts = ranks.run_or_fail_together(
        lambda: choose_experts(config.kind, config.expert_config, config.seed, empty, config.train_router)
    )
    chosen_on = read_base_note(config.expert_config) if experts and config.method != "random" else {}
    if chosen_on and (how := difference(esft.base_note(empty), chosen_on)):
        warnings.warn(f"the experts of {config.expert_config} were chosen on another base model: {how}", stacklevel=2)
    frozen_dtype = config.frozen_dtype or ("fp8" if quantization(empty.config) == "fp8" else None)
    layouts = possible_layouts(config, empty, ranks.world_size)
    schedule = ranks.run_or_fail_together(lambda: schedule_of(config, experts, empty))
    plan = Plan(empty, experts, frozen_dtype, args.device, *layouts[0], schedule)
    budget = memory_of_a_process(args.device)
    most = layouts[-1][0]
    if config.ep_size == "auto" and budget is None and most > 1:
        logger.info(f"  ep_size=auto is 1 on a CPU: every process holds all experts. ep_size={most} shares them out")
    if len(layouts) == 1 or budget is None:
        return plan
    budget = min(ranks.gather(budget))
    settings = memory_settings(config, args, plan, packs, ranks.world_size)
    found = ranks.on_rank_zero(lambda: first_that_fits(layouts, settings, plan, config, budget))
    return dataclasses.replace(plan, **found)


def schedule_of(config: RunConfig, experts: esft.ExpertConfig | None, empty: nn.Module) -> ExpertSchedule | None:
    """Return what changes the experts of a run while it trains, or None. Raise where that cannot be done."""
    num_experts_L = {index: layer.num_experts for index, layer in moe_layers(empty).items()}
    return ExpertSchedule(config, experts, num_experts_L) if config.changes_experts else None


def possible_layouts(config: RunConfig, empty: nn.Module, world_size: int) -> list[tuple[int, bool]]:
    """Return the (ep_size, activation_checkpointing) that the config allows, the least costly in time first."""
    sizes, choices = [1], {"auto": (False, True), "true": (True,), "false": (False,)}
    if config.ep_size != "auto":
        sizes = [int(config.ep_size)]
    elif config.kind in ON_EXPERTS:
        most = min(layer.num_experts for layer in moe_layers(empty).values())
        sizes = [n for n in range(1, world_size + 1) if world_size % n == 0 and n <= most]
    return list(itertools.product(sizes, choices[config.activation_checkpointing]))


def memory_of_a_process(device: torch.device) -> int | None:
    """Return the bytes of a process's GPU; None on a CPU, for which nothing is estimated."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def first_that_fits(
    layouts: list[tuple[int, bool]], settings: MemorySettings, plan: Plan, config: RunConfig, budget: int
) -> dict:
    """Return the fields of the Plan of the first layout whose peak is at most `budget` bytes, else of the last."""
    tried = []
    try:
        estimator = Estimator(plan.empty, config.kind, plan.most_experts, config.lora_rank)
        for ep_size, checkpointing in layouts:
            settings = dataclasses.replace(settings, ep_size=ep_size, activation_checkpointing=checkpointing)
            memory = estimator.estimate(settings)
            how = f"{ep_size=} activation_checkpointing={str(checkpointing).lower()}"
            tried.append(f"{size(memory.peak)} with {how}")
            if memory.peak <= budget:
                break
        saving = ", ".join(f"{key}={str(value).lower()}" for key, value in estimator.ladder(settings))
    except Exception as error:  # an estimate is advice, and no run fails without it
        logger.info(f"  memory of a process could not be estimated: {(str(error) or repr(error)).splitlines()[0]}")
        return dict(zip(("ep_size", "activation_checkpointing"), layouts[-1]))
    logger.info(f"  memory of a process, of {size(budget)}, estimated: {'; '.join(tried)}")
    logger.info("    " + ", ".join(f"{kind} {part}" for kind, part in memory.sizes().items()))
    if memory.peak > budget:
        warnings.warn(f"it may run out of memory; what saves some: {saving}", stacklevel=2)
    return {"ep_size": ep_size, "activation_checkpointing": checkpointing, "memory": memory, "memory_advice": saving}


def memory_settings(
    config: RunConfig, args: TrainingArguments, plan: Plan, packs: Packs, world_size: int
) -> MemorySettings:
    """Return what the memory of a run depends on, with the longest pack and the largest share of labels in `packs`."""
    stored = plan.empty.config.dtype or torch.float32
    return MemorySettings(
        seq_length=max(packs.lengths),
        batch_size=args.per_device_train_batch_size,
        label_share=packs.label_share,
        packed=any(len(members) > 1 for members in packs.members),
        accumulation=args.gradient_accumulation_steps > 1,
        dtype=config.dtype if config.dtype != "auto" else str(stored).removeprefix("torch."),
        world_size=world_size,
        shard_dense=config.shard_dense,
        frozen_dtype=plan.frozen_dtype,
        offload_frozen=config.offload_frozen,
        expert_compute=config.expert_compute,
        keep_base=config.keeps_base,
        optim=args.optim.value,
        device=args.device.type,
    )


def tell_few_steps(args: TrainingArguments, packs: int, packs_per_step: int) -> None:
    """Say so if a run is too short to learn much, or for its schedule."""
    how, steps = f"max_steps={args.max_steps}", args.max_steps
    if steps <= 0:
        steps = math.ceil(math.ceil(packs / packs_per_step) * args.num_train_epochs)
        how = f"{counted(packs, 'pack')}, {packs_per_step} per step, {args.num_train_epochs:g} epochs"
    if steps < FEW_STEPS:
        more = "Raise max_steps" if args.max_steps > 0 else "Raise epochs, lower seq_length or batch_size"
        rate = f"a learning rate of at most {args.learning_rate:g}"
        few = f"only {counted(steps, 'optimizer step')} ({how}) at {rate}"
        logger.info(f"  {few}: little is learned. {more}, or raise the rate")
    schedule = args.lr_scheduler_kwargs if args.lr_scheduler_type == "warmup_stable_decay" else {}
    warmup, decay = args.get_warmup_steps(steps), schedule.get("num_decay_steps")
    stable = schedule.get("num_stable_steps")
    below = f"so the learning rate stays below {args.learning_rate:g}"
    if warmup >= steps:
        logger.info(f"  the warmup takes the whole run, {below}")
    elif decay and stable is None and warmup + decay > steps:
        logger.info(f"  the decay of num_decay_steps={decay} begins within the warmup, {below}. Lower it")
    elif stable is not None and warmup + stable >= steps:
        logger.info(f"  num_stable_steps={stable} leaves no step to the decay. Lower it")
