"""How a run lies on its processes: what fits, how many share a replica (ep_size), who holds which experts, the model of
each."""

import dataclasses
import functools
import itertools
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import esft
from deepseek.experts import moe_layers
from deepseek.partial_loading import quantization
from deepseek.process_groups import Ranks
from training.data import IGNORE
from training.memory import Estimator, MemoryEstimate, MemorySettings, train_everything
from training.methods import prepare_model


@dataclass(frozen=True)
class Plan:
    """How a run is laid out, and what a process will hold at its peak (None: it could not be estimated)."""

    ep_size: int
    activation_checkpointing: bool
    memory: MemoryEstimate | None = None
    saving: str = ""  # keys that would save memory, the least costly first
    tried: list[str] = field(default_factory=list)  # peaks, as text; the last is this plan's


def make_estimator(empty: nn.Module, method: str, experts: esft.ExpertConfig | None, lora_rank: int = 8) -> Estimator:
    """The estimator of training `empty`, a model without weights, by a method of train.py."""
    if experts is None:
        how = SimpleNamespace(method=method, lora_rank=lora_rank, lora_alpha=lora_rank, dtype="float32")
        prepare = train_everything if method == "full" else functools.partial(prepare_model, config=how, experts=None)
        return Estimator(empty.config, prepare=prepare)
    experts.check(empty)
    routed = tuple(f"{layer.name}." for layer in moe_layers(empty).values())
    names = [name for name in esft.adapter_views(empty, experts) if not name.startswith(routed)]
    return Estimator(empty.config, experts.experts, names)


def memory_of_a_process(device: torch.device) -> int:
    """Bytes that a process may use: of its GPU, or its share of the host's memory, a fifth of which is left alone."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    every = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        every = min(every, int(text))
    return int(0.8 * every) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def stored_dtype(config, empty: nn.Module) -> str | None:
    """What frozen experts are stored as: what was asked for, else what a checkpoint in fp8 has them in."""
    if config.method not in ("esft", "random"):
        return None
    return config.frozen_dtype or ("fp8" if quantization(empty.config) == "fp8" else None)


def settings_of(config, args, empty: nn.Module, packs: list, ranks: Ranks) -> MemorySettings:
    """What the memory of a run depends on, with the longest pack and the largest share of labels in `packs`."""
    dtype = config.dtype if config.dtype != "auto" else str(empty.config.dtype or torch.float32).removeprefix("torch.")
    return MemorySettings(
        seq_length=max(map(len, packs)),
        batch_size=args.per_device_train_batch_size,
        label_share=max(sum(label != IGNORE for label in pack.labels) / len(pack) for pack in packs),
        packed=any(len(pack.samples) > 1 for pack in packs),
        accumulation=args.gradient_accumulation_steps > 1,
        dtype=dtype,
        world_size=ranks.world_size,
        shard_dense=config.shard_dense,
        frozen_dtype=stored_dtype(config, empty),
        offload_frozen=config.offload_frozen,
        optim=str(getattr(args.optim, "value", args.optim)),
        device=args.device.type,
    )


def plan_run(config, args, empty: nn.Module, experts: esft.ExpertConfig | None, packs: list, ranks: Ranks, say) -> Plan:
    """What `ep_size` and `activation_checkpointing` are where they are auto, and the memory that is expected, said.

    Whole replicas, which exchange no tokens, and saved activations, which cost no second forward, are kept where they
    fit; where nothing does, the most is taken of both.
    """
    sizes, choices = [config.ep_size if experts else 1], [config.activation_checkpointing]
    if sizes == ["auto"]:
        most = min(layer.num_experts for layer in moe_layers(empty).values())
        sizes = [n for n in range(1, ranks.world_size + 1) if ranks.world_size % n == 0 and n <= most]
    if choices[0] in (None, "auto"):
        choices = [False, True]
    budget = min(ranks.gather(memory_of_a_process(args.device)))

    def plan() -> Plan:
        if any(ranks.world_size % size for size in sizes):  # told elsewhere
            return Plan(sizes[-1], choices[-1] is True)
        tried = []
        try:
            estimator = make_estimator(empty, config.method, experts, config.lora_rank)
            settings = settings_of(config, args, empty, packs, ranks)
            for ep_size, checkpointing in itertools.product(sizes, choices):
                settings = dataclasses.replace(settings, ep_size=ep_size, activation_checkpointing=checkpointing)
                memory = estimator.estimate(settings)
                how = (
                    f"ep_size={ep_size} " * (len(sizes) > 1) + f"activation_checkpointing={str(checkpointing).lower()}"
                )
                tried.append(f"{memory.peak / 2**30:,.2f} with {how}")
                if memory.peak <= budget:
                    break
            saving = ", ".join(f"{key}={str(value).lower()}" for key, value in estimator.ladder(settings))
        except Exception as error:  # an estimate is advice: no run fails for want of it
            return Plan(
                sizes[-1], choices[-1] is True, tried=[f"not known, {(str(error) or repr(error)).splitlines()[0]}"]
            )
        return Plan(ep_size, checkpointing, memory, saving, tried)

    found = ranks.on_rank_zero(plan)
    if found.tried:
        say(f"  memory of a process (GiB, of {budget / 2**30:,.1f}), estimated: {'; '.join(found.tried)}")
    if found.memory:
        say(f"    {found.memory.line()}")
    if found.memory and found.memory.peak > budget:
        warnings.warn(f"it may run out of memory; what saves some: {found.saving}", stacklevel=2)
    return found
