"""How much memory a training step takes at its peak, from a model's config alone: no weights, and no device.

What comes and goes in a forward and backward is found by a dry run on tensors without storage (dry_run.py). Around it
stands what never moves: weights, fp32 masters, optimizer states, and gradients where micro batches accumulate. They are
counted tensor by tensor, as methods.py makes them trainable and expert_parallel.py deals them out. What no dry run can
show is a constant: see `CONTEXT_BYTES` and `FRAGMENTATION`.
"""

import copy
import dataclasses
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
from deepseek.loading import auto_class
from deepseek.placement import Placement, place_layers
from deepseek.process_groups import Ranks
from training import dry_run
from training.methods import prepare_model

CONTEXT_BYTES = 2**30  # of a GPU: CUDA context, kernels, and workspaces of cuBLAS and NCCL
FRAGMENTATION = 0.05  # of a GPU's memory in use, that the caching allocator holds and cannot use
SHORTEST = 512  # tokens of a pack, below which no advice goes
DTYPES = ("bfloat16", "float32")
FROZEN_BYTES = {kind: 1 + 4 / math.prod(block) for kind, block in BLOCKS.items()} | {"nf4": 0.5 + 4 / NF4_BLOCK}
# bytes of state per trained parameter; a factor times the parameter's own size where torch keeps them in its dtype
OPTIMIZERS: dict[str, Callable[[int], float]] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), lambda size: 2 * size),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit", "paged_adamw_8bit"), lambda _: 2 + 8 / 256),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), lambda _: 1 + 4 / 256),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit"), lambda _: 4),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit"), lambda _: 12),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), lambda _: 3 + 12 / 256),
    **dict.fromkeys(("rmsprop", "adagrad"), lambda size: size),
    "paged_adamw_32bit": lambda _: 8,
    "adamw_torch_4bit": lambda _: 1 + 8 / 128,
    "sgd": lambda _: 0,
}


@dataclass(frozen=True)
class MemorySettings:
    """What the memory of a run depends on, beside the model and what is trained; all for one process.

    seq_length and batch_size are tokens of a pack and packs of a micro batch; label_share is the share of tokens that
    bear a loss (the head runs on these only); packed: a pack holds several documents, so that attention takes a mask;
    accumulation: an optimizer step has several micro batches, so that gradients are there in each forward.
    """

    seq_length: int = 4096
    batch_size: int = 1
    label_share: float = 1.0
    packed: bool = True
    accumulation: bool = True
    dtype: str = "bfloat16"
    world_size: int = 1
    ep_size: int = 1
    shard_dense: bool = False
    frozen_dtype: str | None = None
    offload_frozen: bool = False
    optim: str = "adamw_torch_fused"
    activation_checkpointing: bool = False
    device: str = "cuda"

    def __post_init__(self):
        known = {"dtype": DTYPES, "frozen_dtype": (None, *FROZEN_BYTES), "optim": OPTIMIZERS, "device": ("cuda", "cpu")}
        for key, values in known.items():
            if (value := getattr(self, key)) not in values:
                raise ValueError(f"{key}={value}: its memory is known for {', '.join(map(str, values))}")
        if self.world_size % self.ep_size:
            raise ValueError(f"ep_size={self.ep_size} does not divide the {self.world_size} processes")

    def changed_from(self, other: "MemorySettings") -> str:
        """`key=value` of what differs, as train.py takes them."""
        pairs = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]
        told = [f"{k}={str(v).lower() if v is True else v}" for k, v in pairs if v != getattr(other, k)]
        return " ".join(told) or "as asked"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process at the moment of its peak, by kind; `peak` is their sum.

    experts, dense: weights in the dtype the model computes in (or quantized), routed experts and all else; masters:
    fp32 parameters beside weights of another dtype; activations: saved in the forward; logits: what the head makes, and
    its gradients; transient: workspaces, gathered or dequantized weights, a bucket of gradients; overhead: of the
    device, by rule of thumb. `host` lies in the host's memory and is no part of the peak.
    """

    experts: int
    dense: int
    masters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    transient: int
    overhead: int
    host: int = 0

    @property
    def peak(self) -> int:
        return sum(dataclasses.astuple(self)) - self.host

    def sizes(self) -> dict[str, str]:
        """Return the kinds that are there and their peak, in GiB (or in MiB, where all is small)."""
        unit, name = (2**30, "GiB") if self.peak >= 2**30 else (2**20, "MiB")
        sizes = {
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
        return {label: f"{size / unit:,.2f} {name}" for label, size in sizes.items() if size}


class Estimator:
    """The memory of training a model by a method of train.py, under any settings. Runs are kept, so that settings which
    differ in what is merely counted cost nothing.

    Args:
        empty: the model, without weights.
        experts: those to train; None for full and lora.

    Raises:
        ValueError: a model that has no such experts, or ep_size and the like with another method.
    """

    def __init__(self, empty: nn.Module, method: str, experts: esft.ExpertConfig | None = None, lora_rank: int = 8):
        self.config, self.method, self.experts, self.lora_rank = empty.config, method, experts, lora_rank
        if experts is not None:
            experts.check(empty)
        self._kept: dict[tuple, dry_run.Resident] = {}
        self._runs: dict[tuple, Counter] = {}

    def estimate(self, s: MemorySettings) -> MemoryEstimate:
        """Of the process that has most to hold."""
        if self.experts is None and (s.ep_size > 1 or s.shard_dense or s.frozen_dtype or s.offload_frozen):
            raise ValueError("ep_size, shard_dense, frozen_dtype and offload_frozen are for methods esft and random")
        return self._sum(s, Counter(self._moving(s)))

    def _sum(self, s: MemorySettings, moving: Counter) -> MemoryEstimate:
        """What is held, counted, and `moving` of a step."""
        held, host = self._held(s), 0
        experts, dense = held.trained_rows + held.frozen_rows, held.dense
        if s.frozen_dtype or s.offload_frozen:
            size = getattr(torch, s.dtype).itemsize
            entries = CHUNK * held.largest_matrix
            each = FROZEN_BYTES[s.frozen_dtype] if s.frozen_dtype else size
            stored = held.frozen_rows - int(held.frozen_entries * (size - each))
            # a few experts' matrices of one projection; from 8 bits they go through fp32, twice for a moment
            moving["transient"] += entries * (size + 8 * (s.frozen_dtype in BLOCKS))
            if s.offload_frozen and s.device == "cuda":
                host = int(held.frozen_entries * each)
                stored -= host
                moving["transient"] += int(entries * each)
            experts = held.trained_rows + stored
        if s.shard_dense and s.world_size > 1:
            # FSDP2: whole are the layer at work, the next one, and what stands outside of layers
            moving["transient"] += min(dense - dense // s.world_size, 2 * held.largest_layer + held.outside)
            dense //= s.world_size
        if s.world_size > s.ep_size or (s.world_size > 1 and held.others):
            moving["transient"] += held.largest_bucket
        gradients = sum(count * size for size, count in held.trained.items())
        if s.accumulation:
            moving["gradients"] = gradients
        elif moving.total() < gradients:  # the peak is the optimizer step, of which no activation is left
            moving = Counter(gradients=gradients)
        kinds = {kind: moving[kind] for kind in ("gradients", "activations", "logits", "transient")}
        optimizer = self._states(held, s.optim)
        used = experts + dense + held.masters + optimizer + sum(kinds.values())
        overhead = CONTEXT_BYTES + int(FRAGMENTATION * used) if s.device == "cuda" else 0
        return MemoryEstimate(experts, dense, held.masters, optimizer=optimizer, overhead=overhead, host=host, **kinds)

    @staticmethod
    def _states(held: dry_run.Resident, optim: str) -> int:
        """Bytes of optimizer states."""
        state = OPTIMIZERS[optim]
        total = sum(int(count * state(size)) for size, count in held.trained.items())
        if "bit" in optim and "32bit" not in optim:  # transformers keeps those of embeddings in 32 bits
            total += int(held.embeddings * (OPTIMIZERS["paged_adamw_32bit"](4) - state(4)))
        return total

    def ladder(self, settings: MemorySettings, fixed: Collection[str] = ()) -> Iterator[tuple[str, object]]:
        """(key, value) that save memory, the least costly in time (or in quality) first; none of the keys `fixed`."""
        found: list[tuple[str, object]] = [("activation_checkpointing", True)]
        if self.experts is not None:
            most = min(layer.num_experts for layer in moe_layers(self._model(settings)).values())
            sizes = range(settings.ep_size + 1, min(settings.world_size, most) + 1)
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
        """Return settings that fit into `memory_bytes`, the nearest to what was asked for first; empty where none does.

        What was asked for alone, where it fits. Else every single step of `ladder` that suffices; where none does, the
        shortest run of steps from its beginning that does, without those of them that are not needed.
        """

        def fits(changes: dict) -> tuple[MemorySettings, MemoryEstimate] | None:
            changed = dataclasses.replace(settings, **changes)
            if self._sum(changed, Counter()).peak > memory_bytes:  # without a step to run
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

    # ---- the run

    def _model(self, s: MemorySettings) -> nn.Module:
        with torch.device("meta"):
            return auto_class(self.config).from_config(copy.deepcopy(self.config), dtype=getattr(torch, s.dtype))

    def _held(self, s: MemorySettings) -> dry_run.Resident:
        key = (s.dtype, s.ep_size)
        if key not in self._kept:
            self._kept[key] = dry_run.count_resident(self._prepared(s))
        return self._kept[key]

    def _moving(self, s: MemorySettings) -> Counter:
        """Bytes by kind that come and go, at their peak."""
        key = (s.device, s.dtype, s.ep_size, s.seq_length, s.batch_size, s.label_share)
        key += (s.packed, s.accumulation, s.activation_checkpointing)
        if key not in self._runs:
            self._runs[key] = dry_run.trace_step(self._prepared(s), s)
        return self._runs[key]

    def _prepared(self, s: MemorySettings) -> nn.Module:
        """The model on `meta` as one process trains it."""
        model = self._model(s)
        with torch.device("meta"):
            placements = self._cut(model, s.ep_size) if s.ep_size > 1 else {}
            if self.method == "full":
                model.requires_grad_(True)
            else:
                model = prepare_model(model, self.method, self.experts, self.lora_rank)
            if placements:
                ranks = Ranks(world_size=s.ep_size, ep_size=s.ep_size)
                connect_experts(model, placements, self.experts.experts, ranks)
        return model.train()

    def _cut(self, model: nn.Module, ep_size: int) -> dict[int, Placement]:
        """Leave the experts of one rank: that with the most trained ones. Return the placements by layer."""
        layers, trained = moe_layers(model), self.experts.experts
        placements = place_layers({i: layer.num_experts for i, layer in layers.items()}, trained, ep_size)

        def count(rank: int) -> int:
            return sum(len(set(trained.get(i, ())) & set(placement[rank])) for i, placement in placements.items())

        rank = max(range(ep_size), key=count)
        placements = {i: (p[rank], *p[:rank], *p[rank + 1 :]) for i, p in placements.items()}  # it becomes rank 0
        for i, layer in layers.items():
            layer.keep_local(placements[i][0])
        return placements
