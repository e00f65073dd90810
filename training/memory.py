"""Estimate the peak memory of a training step from a model's config. This takes no weights and no device.

A dry run on tensors without storage finds what comes and goes in a forward and backward (dry_run.py). Weights, fp32
masters and optimizer states stay, and so do gradients if micro batches accumulate. They are counted on the tensors of a
model that methods.py has made trainable and expert_parallel.py has split. Two constants stand for what neither can
show: `CONTEXT_BYTES` and `FRAGMENTATION`.
"""

import copy
import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import nn

import esft
from deepseek.expert_parallel import connect_experts
from deepseek.experts import moe_layers
from deepseek.frozen import BLOCKS, CHUNK, NF4_BLOCK
from deepseek.loading import first_forward, model_of
from deepseek.placement import place_layers
from deepseek.process_groups import Ranks
from training import dry_run
from training.methods import prepare_model
from utils import size

CONTEXT_BYTES = 2**30  # of a GPU: CUDA context, kernels, and workspaces of cuBLAS and NCCL
FRAGMENTATION = 0.05  # the share of a GPU's memory in use that the caching allocator holds and cannot use
SHORTEST = 512  # tokens: advice makes no pack shorter
FROZEN_BYTES = {kind: 1 + 4 / math.prod(block) for kind, block in BLOCKS.items()} | {"nf4": 0.5 + 4 / NF4_BLOCK}
# size in bytes of a trained parameter -> bytes of its optimizer states
OPTIMIZERS: dict[str, Callable[[int], float]] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), lambda size: 2 * size),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit", "paged_adamw_8bit"), lambda _: 2 + 8 / 256),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), lambda _: 1 + 4 / 256),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit"), lambda _: 4),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit"), lambda _: 12),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), lambda _: 3 + 12 / 256),
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_radam"), lambda size: 2 * size),
    **dict.fromkeys(("rmsprop", "adagrad", "muon", "schedule_free_sgd"), lambda n: n),
    "paged_adamw_32bit": lambda _: 8,
    "adamw_torch_4bit": lambda _: 1 + 8 / 256,
    "sgd": lambda _: 0,
}


@dataclass(frozen=True)
class MemorySettings:
    """The settings that the memory of one process depends on, beside the model and what is trained."""

    seq_length: int = 4096  # tokens of a pack
    batch_size: int = 1  # packs of a micro batch
    label_share: float = 1.0  # share of the tokens that have a loss: the head runs on these alone
    packed: bool = True  # a pack holds several documents, and attention takes a mask
    accumulation: bool = True  # a step has several micro batches, and gradients are there in each forward
    dtype: str = "bfloat16"
    world_size: int = 1
    ep_size: int = 1
    shard_dense: bool = False
    frozen_dtype: str | None = None
    offload_frozen: bool = False
    expert_compute: str | None = None
    keep_base: bool = False  # the base's values of what is trained; method dpo always keeps them
    optim: str = "adamw_torch_fused"
    activation_checkpointing: bool = False
    device: str = "cuda"

    def changed_from(self, other: "MemorySettings") -> str:
        """Return the settings that differ as `key=value`, as train.py takes them."""
        changed = [(key, value) for key, value in vars(self).items() if value != vars(other)[key]]
        return " ".join(f"{key}={str(value).lower()}" for key, value in changed) or "as asked"


@dataclass(frozen=True)
class MemoryEstimate:
    """The bytes of one process at the moment of its peak, by kind. `peak` is their sum."""

    experts: int  # weights of the routed experts, in the dtype the model computes in, or quantized
    dense: int  # all other weights
    masters: int  # fp32 parameters beside weights of another dtype
    gradients: int
    optimizer: int
    activations: int  # saved in the forward
    logits: int  # what the head makes, and its gradients
    transient: int  # workspaces, gathered or dequantized weights, a bucket of gradients
    overhead: int  # of the device: a rule of thumb
    host: int = 0  # in the host's memory, which is not a part of the peak

    @property
    def peak(self) -> int:
        return sum(dataclasses.astuple(self)) - self.host

    def sizes(self) -> dict[str, str]:
        """Return the kinds that take memory, and their peak, as text."""
        kinds = {
            "weights, experts": self.experts,
            "weights, all else": self.dense,
            "fp32 masters": self.masters,
            "gradients": self.gradients,
            "optimizer states": self.optimizer,
            "saved activations": self.activations,
            "logits": self.logits,
            "transient": self.transient,
            "device overhead": self.overhead,
            "peak": self.peak,
            "in host memory": self.host,
        }
        return {kind: size(nbytes) for kind, nbytes in kinds.items() if nbytes}


class Estimator:
    """Estimates the memory of training a model by a method of train.py, under any settings.

    It keeps its dry runs. Another estimate costs nothing if it differs only in what is counted.

    Args:
        empty: the model without weights.
        experts: the experts to train; None for methods full and lora.

    Raises:
        ValueError: the model does not have these experts.
    """

    def __init__(self, empty: nn.Module, method: str, experts: esft.ExpertConfig | None = None, lora_rank: int = 8):
        self.config, self.method, self.experts, self.lora_rank = empty.config, method, experts, lora_rank
        if experts is not None:
            experts.check(empty)
            self._most = min(layer.num_experts for layer in moe_layers(empty).values())
        self._held, self._traced = functools.cache(self._held), functools.cache(self._traced)  # the dry runs

    def estimate(self, s: MemorySettings) -> MemoryEstimate:
        """Return the memory of the process that holds the most. Raise ValueError for an unknown optimizer."""
        if s.optim not in OPTIMIZERS:
            raise ValueError(f"cannot estimate the memory of optim={s.optim}: known are {', '.join(OPTIMIZERS)}")
        return self._sum(s, Counter(self._moving(s)))

    def _sum(self, s: MemorySettings, moving: Counter) -> MemoryEstimate:
        """Add what stays to what is `moving` in a step."""
        held, host = self._held(s.dtype, s.ep_size), 0
        experts, dense = held.trained_rows + held.frozen_rows, held.dense
        if s.frozen_dtype or s.offload_frozen:
            size = getattr(torch, s.dtype).itemsize
            entries = CHUNK * held.largest_matrix
            each = FROZEN_BYTES[s.frozen_dtype] if s.frozen_dtype else size
            stored = held.frozen_rows - int(held.frozen_entries * (size - each))
            # matrices of one projection of a few experts; dequantizing 8 bits makes two copies in fp32
            moving["transient"] += entries * (size + 8 * (s.frozen_dtype in BLOCKS))
            if s.offload_frozen and s.device == "cuda":
                host = int(held.frozen_entries * each)
                stored -= host
                moving["transient"] += int(entries * each)
            experts = held.trained_rows + stored
        if s.expert_compute:
            experts *= 2  # two copies of one byte per entry, beside two bytes
        if s.shard_dense and s.world_size > 1:
            # FSDP2 gathers the layer at work, the next one, and the weights outside the layers
            moving["transient"] += min(dense - dense // s.world_size, 2 * held.largest_layer + held.outside)
            dense //= s.world_size
        if s.world_size > s.ep_size or (s.world_size > 1 and held.others):
            moving["transient"] += held.largest_bucket
        gradients = trained = sum(count * size for size, count in held.trained.items())
        if s.keep_base or self.method == "dpo":
            base = held.trained_rows + held.others * getattr(torch, s.dtype).itemsize
            host, experts = (host + base, experts) if s.device == "cuda" else (host, experts + base)
        if self.method == "dpo":
            # the reference's forward saves no activations, and holds the trained values a second time
            moving["transient"] += max(0, trained - moving["activations"])
        if s.accumulation:
            moving["gradients"] = gradients
        elif moving.total() < gradients:  # the peak is in the optimizer step, where no activation is left
            moving = Counter(gradients=gradients)
        kinds = {kind: moving[kind] for kind in ("gradients", "activations", "logits", "transient")}
        state = OPTIMIZERS[s.optim]
        optimizer = sum(int(count * state(size)) for size, count in held.trained.items())
        if "bit" in s.optim and "32bit" not in s.optim:  # transformers keeps the states of embeddings in 32 bits
            optimizer += int(held.embeddings * (OPTIMIZERS["paged_adamw_32bit"](4) - state(4)))
        used = experts + dense + held.masters + optimizer + sum(kinds.values())
        overhead = CONTEXT_BYTES + int(FRAGMENTATION * used) if s.device == "cuda" else 0
        return MemoryEstimate(experts, dense, held.masters, optimizer=optimizer, overhead=overhead, host=host, **kinds)

    def ladder(self, settings: MemorySettings, fixed: Collection[str] = ()) -> Iterator[tuple[str, object]]:
        """Yield (key, value) that save memory, the least costly in time or quality first, and no key in `fixed`."""
        found: list[tuple[str, object]] = [("activation_checkpointing", True)]
        if self.experts is not None:
            sizes = range(settings.ep_size + 1, min(settings.world_size, self._most) + 1)
            found += [("ep_size", size) for size in sizes if settings.world_size % size == 0]
            found += [("shard_dense", True)] * (settings.world_size > 1)
            worth = {None: 0, "int8": 1, "fp8": 1, "nf4": 2}
            found += [("frozen_dtype", k) for k in ("fp8", "nf4") if worth[k] > worth[settings.frozen_dtype]]
        if OPTIMIZERS[settings.optim](4) > 4:
            found.append(("optim", "adamw_bnb_8bit"))
        if self.experts is not None and settings.device == "cuda":
            found.append(("offload_frozen", True))
        lengths = (settings.seq_length >> by for by in range(1, settings.seq_length.bit_length()))
        found += [("seq_length", length) for length in lengths if length >= SHORTEST]
        yield from ((key, value) for key, value in found if key not in fixed and getattr(settings, key) != value)

    def advise(
        self, settings: MemorySettings, memory_bytes: int, fixed: Collection[str] = ()
    ) -> list[tuple[MemorySettings, MemoryEstimate]]:
        """Return settings that fit into `memory_bytes`, the least costly first. Return [] if nothing fits.

        If `settings` fit, they are the only answer. Otherwise the answers are `settings` with one step of `ladder`, for
        every step that is enough. If no step is, the answer is the shortest beginning of `ladder` that fits, without
        the steps that it can spare.
        """

        def fits(changes: dict) -> tuple[MemorySettings, MemoryEstimate] | None:
            changed = dataclasses.replace(settings, **changes)
            if self._sum(changed, Counter()).peak > memory_bytes:  # what stays is too much: no dry run is needed
                return None
            memory = self.estimate(changed)
            return (changed, memory) if memory.peak <= memory_bytes else None

        if found := fits({}):
            return [found]
        ladder = list(self.ladder(settings, fixed))
        singles: dict[str, tuple[MemorySettings, MemoryEstimate]] = {}
        for key, value in ladder:
            if key not in singles and (found := fits({key: value})):
                singles[key] = found
        if singles:
            return list(singles.values())
        together: dict = {}
        for step in ladder:
            together |= dict([step])
            if found := fits(together):
                for key in list(together):
                    fewer = {k: v for k, v in together.items() if k != key}
                    if smaller := fits(fewer):
                        together, found = fewer, smaller
                return [found]
        return []

    # ---- the model and its dry run

    def _held(self, dtype: str, ep_size: int) -> dry_run.Resident:
        return dry_run.count_resident(self._prepared(dtype, ep_size))

    def _moving(self, s: MemorySettings) -> Counter:
        """Return the bytes by kind that come and go, at their peak. Settings that are only counted need no own run."""
        counted = {"world_size": s.ep_size, "shard_dense": False, "frozen_dtype": None, "offload_frozen": False}
        return self._traced(dataclasses.replace(s, **counted, keep_base=False, optim="sgd"))

    def _traced(self, s: MemorySettings) -> Counter:
        model = self._prepared(s.dtype, s.ep_size)
        with first_forward(model):
            return dry_run.trace_step(model, s)

    def _prepared(self, dtype: str, ep_size: int) -> nn.Module:
        """Return the model on `meta` as the process trains it that holds the most: rank 0, where all loads are even."""
        model, placements = model_of(copy.deepcopy(self.config), dtype=getattr(torch, dtype)), {}
        with torch.device("meta"):
            if ep_size > 1:
                layers, trained = moe_layers(model), self.experts.experts
                placements = place_layers({i: layer.num_experts for i, layer in layers.items()}, trained, ep_size)
                for i, layer in layers.items():
                    layer.keep_local(placements[i][0])
            # without the base's values, which dpo keeps: there are none on `meta`
            model = prepare_model(model, self.method, self.experts, self.lora_rank)
            if placements:
                ranks = Ranks(world_size=ep_size, ep_size=ep_size)
                connect_experts(model, placements, trained, ranks)
        return model.train()
