r"""How much memory a training step takes at its peak, from a model's config alone: no weights, and no device.

A step's forward and backward run on tensors without storage, through the very code that trains: the family's modules,
our grouped GEMM, dispatch and combine, activation checkpointing. A mode under them notes every storage that is made
and let go, so that nothing has to be known about any family:

    bytes   |         ____/\/\_        activations pile up in the forward, then come the head's logits, then the
            |    ____/         \/\_    backward's workspaces while the activations go
            |___/                  \_   -> the highest point, and what lies there, by kind
            +-------------------------  time

Around it stands what never moves: weights, fp32 masters, optimizer states, and gradients where micro batches
accumulate. They are counted tensor by tensor, as methods.py makes them trainable and expert_parallel.py deals them out.

Two devices are told apart, since the code paths differ. For "cuda" the tensors are torch's `meta` ones, and attention
is a fused kernel, that saves q, k, v, its output and the mask; for "cpu" they are torch's fake ones, that say they are
on the CPU, and attention is whatever torch takes there. Sizes that depend on the data are expectations: routed rows are
spread evenly over experts, so a layer's S trained experts of E get S/E of them, and every rank receives as many as it
sends. A GPU computes with the size of all rows (grouped_gemm.py), so that this matters on the CPU only.

What no such run can show is a constant: see `CONTEXT_BYTES` and `FRAGMENTATION`.

Legend: T tokens, D hidden, K top-k, N = T*K routed rows, E experts, e of them on this rank, S trained ones of a layer.
"""

import contextlib
import copy
import dataclasses
import math
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

from . import expert_parallel
from .experts import find_experts, fused_names, train_experts, train_parameters
from .frozen import BLOCKS, CHUNK, NF4_BLOCK, weight_names
from .gradients import BUCKET_BYTES
from .grouped_gemm import IMPLEMENTATION
from .loading import auto_class
from .placement import place_layers
from .ranks import Ranks

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
class Settings:
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
        for key, known in {
            "dtype": DTYPES,
            "frozen_dtype": (None, *FROZEN_BYTES),
            "optim": tuple(OPTIMIZERS),
            "device": ("cuda", "cpu"),
        }.items():
            if (value := getattr(self, key)) not in known:
                raise ValueError(f"{key}={value}: its memory is known for {', '.join(map(str, known))}")
        for key in ("seq_length", "batch_size", "world_size", "ep_size"):
            if (value := getattr(self, key)) < 1:
                raise ValueError(f"{key}={value}: expected a whole number above 0")
        if not 0 < self.label_share <= 1:
            raise ValueError(f"label_share={self.label_share}: expected a share above 0 and up to 1")
        if self.world_size % self.ep_size:
            raise ValueError(f"ep_size={self.ep_size} does not divide the {self.world_size} processes")

    def changed_from(self, other: "Settings") -> str:
        """`key=value` of what differs, as train.py takes them."""
        pairs = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]
        told = [f"{k}={str(v).lower() if v is True else v}" for k, v in pairs if v != getattr(other, k)]
        return " ".join(told) or "as asked"


@dataclass(frozen=True)
class Memory:
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
    def weights(self) -> int:
        return self.experts + self.dense

    @property
    def peak(self) -> int:
        return sum(dataclasses.astuple(self)) - self.host

    def line(self) -> str:
        """The kinds that are there, in GiB (or in MiB, where all is small)."""
        unit, name, told = self._told()
        return ", ".join(f"{label} {size / unit:,.1f}" for label, size in told.items() if size) + f" {name}"

    def table(self) -> str:
        """A line per kind, in GiB (or in MiB, where all is small)."""
        unit, name, told = self._told()
        return "\n".join(f"  {label:<20}{size / unit:>10,.2f} {name}" for label, size in told.items())

    def _told(self) -> tuple[int, str, dict[str, int]]:
        unit, name = (2**30, "GiB") if self.peak >= 2**30 else (2**20, "MiB")
        told = {
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
        }
        if self.host:
            told["in host memory"] = self.host
        return unit, name, told


class Estimator:
    """The memory of training a model in a given way, under any settings. Runs are kept, so that settings which differ
    in what is merely counted cost nothing.

    Args:
        config: of the model; `loading.empty_model(path).config` has it.
        experts: {layer: ids of the experts to train}; None where `prepare` does it all.
        names: parameters outside the routed experts that are trained with them.
        prepare: what else makes a model (without storage) trainable, and returns it: `methods.prepare_model` for LoRA,
            `full` for full fine-tuning.

    Raises:
        ValueError: a model that has no fused experts where they are to be trained, or ep_size with another method.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        experts: Mapping[int, Collection[int]] | None = None,
        names: Collection[str] = (),
        prepare: Callable[[nn.Module], nn.Module] | None = None,
    ):
        self.config, self.experts, self.names, self.prepare = config, experts, names, prepare
        self._kept: dict[tuple, _Held] = {}
        self._runs: dict[tuple, Counter] = {}

    def estimate(self, settings: Settings) -> Memory:
        """Of the process that has most to hold."""
        s = settings
        if self.experts is None and (s.ep_size > 1 or s.shard_dense or s.frozen_dtype or s.offload_frozen):
            raise ValueError("ep_size, shard_dense, frozen_dtype and offload_frozen are for methods esft and random")
        return self._sum(settings, Counter(self._moving(settings)))

    def _sum(self, s: Settings, moving: Counter) -> Memory:
        """What is held, counted, and `moving` of a step."""
        held, host = self._held_by(s), 0
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
        state = OPTIMIZERS[s.optim]
        optimizer = sum(int(count * state(size)) for size, count in held.trained.items())
        if "bit" in s.optim and "32bit" not in s.optim:  # transformers keeps those of embeddings in 32 bits
            optimizer += int(held.embeddings * (OPTIMIZERS["paged_adamw_32bit"](4) - state(4)))
        gradients = sum(count * size for size, count in held.trained.items())
        if s.accumulation:
            moving["gradients"] = gradients
        elif moving.total() < gradients:  # the peak is the optimizer step, of which no activation is left
            moving = Counter(gradients=gradients)
        kinds = {kind: moving[kind] for kind in ("gradients", "activations", "logits", "transient")}
        used = experts + dense + held.masters + optimizer + sum(kinds.values())
        overhead = CONTEXT_BYTES + int(FRAGMENTATION * used) if s.device == "cuda" else 0
        return Memory(experts, dense, held.masters, optimizer=optimizer, overhead=overhead, host=host, **kinds)

    def ladder(self, settings: Settings, fixed: Collection[str] = ()) -> Iterator[tuple[str, object]]:
        """(key, value) that save memory, the least costly in time (or in quality) first; none of the keys `fixed`."""
        found: list[tuple[str, object]] = [("activation_checkpointing", True)]
        if self.experts is not None:
            with torch.device("meta"):
                most = min(module.num_experts for _, module in find_experts(self._model(settings)).values())
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
        self, settings: Settings, memory_bytes: int, fixed: Collection[str] = ()
    ) -> list[tuple[Settings, Memory]]:
        """Settings that fit into `memory_bytes`, the nearest to what was asked for first; empty where none does.

        What was asked for alone, where it fits. Else every single step of `ladder` that suffices; where none does, the
        shortest run of steps from its beginning that does, without those of them that are not needed.
        """

        def fits(changes: dict) -> tuple[Settings, Memory] | None:
            changed = dataclasses.replace(settings, **changes)
            if self._sum(changed, Counter()).peak > memory_bytes:  # without a step to run
                return None
            memory = self.estimate(changed)
            return (changed, memory) if memory.peak <= memory_bytes else None

        if found := fits({}):
            return [found]
        ladder = list(self.ladder(settings, fixed))
        singles: dict[str, tuple[Settings, Memory]] = {}
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

    def _model(self, settings: Settings) -> nn.Module:
        config = copy.deepcopy(self.config)
        return auto_class(config).from_config(config, dtype=getattr(torch, settings.dtype))

    def _held_by(self, s: Settings) -> "_Held":
        key = (s.dtype, s.ep_size)
        if key not in self._kept:
            self._kept[key] = _held(self._prepared(s))
        return self._kept[key]

    def _moving(self, s: Settings) -> Counter:
        """What `_step` finds."""
        key = (s.seq_length, s.batch_size, s.label_share, s.packed, s.accumulation, s.dtype, s.ep_size, s.device)
        key += (s.activation_checkpointing,)
        if key not in self._runs:
            model = self._prepared(s)
            if s.activation_checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
            with FakeTensorMode() if s.device == "cpu" else torch.device("meta"), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # equal ones, of an alias
                if s.device == "cpu":
                    _move(model)
                self._runs[key] = _step(model, s)
        return self._runs[key]

    def _prepared(self, s: Settings) -> nn.Module:
        """The model on `meta` as one process trains it."""
        with torch.device("meta"):
            model = self._model(s)
            placements = self._cut(model, s.ep_size)
            if self.experts is not None:
                model.requires_grad_(False)
                train_parameters(model, self.names)
                for layer, (_, module) in find_experts(model).items():
                    if self.experts.get(layer):
                        train_experts(module, self.experts[layer])
                model.set_experts_implementation(IMPLEMENTATION)
            if self.prepare:
                model = self.prepare(model)
            if placements:
                ranks = Ranks(world_size=s.ep_size, ep_size=s.ep_size)
                expert_parallel.connect_experts(model, placements, self.experts, ranks)
            return model.train()

    def _cut(self, model: nn.Module, ep_size: int) -> dict:
        """Leave the experts of one rank: that with the most trained ones. Returns the placements by layer."""
        if ep_size == 1:
            return {}
        layers = find_experts(model)
        trained = {layer: set(ids) for layer, ids in self.experts.items()}
        placements = place_layers({i: m.num_experts for i, (_, m) in layers.items()}, trained, ep_size)
        counts = [
            sum(len(trained.get(i, set()) & set(p[rank])) for i, p in placements.items()) for rank in range(ep_size)
        ]
        rank = counts.index(max(counts))
        placements = {i: (p[rank], *p[:rank], *p[rank + 1 :]) for i, p in placements.items()}  # it becomes rank 0
        for layer, (_, module) in layers.items():
            module.local_ids = sorted(placements[layer][0])
            for name in fused_names(module):
                full = getattr(module, name)
                setattr(module, name, nn.Parameter(full.new_empty(len(module.local_ids), *full.shape[1:])))
        return placements


def full(model: nn.Module) -> nn.Module:
    """`prepare` of full fine-tuning."""
    return model.requires_grad_(True)


@dataclass(frozen=True)
class _Held:
    """Bytes that stay from step to step, of a model as one process holds it."""

    trained_rows: int  # W[:S] of fused experts
    frozen_rows: int  # W[S:]
    dense: int
    masters: int
    trained: Counter  # bytes of an element -> trained parameters
    embeddings: int  # trained parameters of embeddings
    others: int  # trained parameters outside the routed experts
    frozen_entries: int  # of the matrices of frozen experts
    largest_matrix: int  # entries of an expert's largest matrix
    largest_layer: int  # weights of a decoder layer outside its experts
    outside: int  # weights outside decoder layers
    largest_bucket: int  # of gradients under way between processes


def _held(model: nn.Module) -> _Held:
    try:
        modules = dict(find_experts(model).values())
    except ValueError:  # a dense model, fully fine-tuned
        modules = {}
    rows, seen, largest = Counter(), set(), 0
    for module in modules.values():
        S = module.trained.num_trained if hasattr(module, "trained") else 0
        for name in fused_names(module):
            tensor = getattr(module, name)
            seen.add(_key(tensor))
            each = tensor.nbytes // max(len(tensor), 1)
            rows["trained"] += S * each
            rows["frozen"] += (len(tensor) - S) * each
            if name in weight_names(module):
                rows["entries"] += (len(tensor) - S) * tensor[0].numel()
                largest = max(largest, tensor[0].numel())
    dense, masters, trained, others, by_layer = 0, 0, Counter(), 0, Counter()
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    embedded = 0
    for name, param in model.named_parameters():
        if param.requires_grad:
            trained[param.element_size()] += param.numel()
            others += ".trained." not in name and param.numel()
            embedded += id(param) in embeddings and param.numel()
        if _key(param) in seen:  # an alias of W[:S], or tied
            continue
        seen.add(_key(param))
        if ".trained." in name or name.endswith(".original"):
            masters += param.nbytes
        else:
            dense += param.nbytes
            by_layer[_layer(name)] += param.nbytes if not param.requires_grad else 0
    for buffer in model.buffers():
        if _key(buffer) not in seen:
            seen.add(_key(buffer))
            dense += buffer.nbytes
    sizes = [p.nbytes for p in model.parameters() if p.requires_grad]
    return _Held(
        trained_rows=rows["trained"],
        frozen_rows=rows["frozen"],
        dense=dense,
        masters=masters,
        trained=trained,
        embeddings=embedded,
        others=others,
        frozen_entries=rows["entries"],
        largest_matrix=largest,
        largest_layer=max((size for layer, size in by_layer.items() if layer is not None), default=0),
        outside=by_layer[None],
        largest_bucket=max(min(sum(sizes), BUCKET_BYTES), *sizes, 0),
    )


def _move(model: nn.Module) -> None:
    """From `meta` to the device of the mode at work, ties and aliases kept, which Module.to would refuse or lose."""
    storages: dict[int, Tensor] = {}
    params: dict[int, nn.Parameter] = {}

    def moved(tensor: Tensor) -> Tensor:
        key = _key(tensor)
        if key not in storages:
            storages[key] = torch.empty(tensor.untyped_storage().nbytes(), dtype=torch.uint8, device="cpu")
        flat = storages[key].view(tensor.dtype)
        return flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                if id(param) not in params:
                    params[id(param)] = nn.Parameter(moved(param), requires_grad=param.requires_grad)
                module._parameters[name] = params[id(param)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = moved(buffer)


def _layer(name: str) -> str | None:
    return next((part for part in name.split(".") if part.isdigit()), None)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _step(model: nn.Module, s: Settings) -> Counter:
    """Bytes by kind at the peak of a forward and backward, without what the model itself holds."""
    tracker = _Tracker(model, s.packed)
    labels_here = max(1, round(s.label_share * s.seq_length))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_substituted(expert_parallel, _make_route=_even_route, _exchange=_exchange))
        if s.device == "cuda":  # `meta` knows no autocast, which peft asks for, to turn it off
            stack.enter_context(_substituted(torch, autocast=lambda *_, **__: contextlib.nullcontext()))
        stack.enter_context(_substituted(nn.functional, scaled_dot_product_attention=_attention(s.device)))
        tracker.watch_head(model, stack)
        tracker.watch_rows(model, stack)
        if s.accumulation:
            for param in model.parameters():
                if param.requires_grad:
                    param.grad = torch.empty_like(param)
                    tracker.know(param.grad)
        stack.enter_context(tracker)
        shape, kind = (s.batch_size, s.seq_length), {"dtype": torch.long, "device": tracker.device}
        inputs = {"input_ids": torch.empty(shape, **kind), "position_ids": torch.empty(shape, **kind)}
        labels = torch.empty(s.batch_size * labels_here, **kind)
        kept = torch.empty(labels_here, **kind)
        logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits
        tracker.phase = "logits"
        # as trainer.py has it, which lets go of the model's outputs before the backward
        logits = logits.flatten(0, 1).float()
        loss = nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        del logits
        torch.autograd.backward(loss)  # not loss.backward(), in which a default device would not hold
        del loss
    return tracker.at_peak([p.grad for p in model.parameters() if p.grad is not None])


class _Tracker(TorchDispatchMode):
    """Notes when every storage is made and let go, and by what part of the step. Answers what only data could tell."""

    def __init__(self, model: nn.Module, packed: bool):
        super().__init__()
        self.packed = packed
        self.device = next(model.parameters()).device
        self.phase, self.rows = "forward", 0
        self.made: list[tuple[int, int, str]] = []  # storage, bytes, phase
        self.events: list[int] = []  # number of what was made, or ~number of what was let go
        self.alive: dict[int, tuple[int, weakref.ref]] = {}
        self.known: list = []  # storages of the model, so that none of their addresses is used again
        self.forward_ends = 0
        for tensor in (*model.parameters(), *model.buffers()):
            self.know(tensor)

    def know(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.known.append(storage)
        self.alive[storage._cdata] = (-1, None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._answer(args[0])
        if func is torch.ops.aten._grouped_mm.default:  # torch's own stand-in knows no fp32
            out = _grouped_mm(*args, **kwargs or {})
        else:
            out = func(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _answer(self, tensor: Tensor) -> bool | int | float:
        if tensor.dtype == torch.bool:  # "is there one document only?"
            return not self.packed
        if tensor.dtype == torch.int32 and self.rows:  # offs_E[S - 1]: rows of the first S of e experts
            return (
                self.rows * (tensor.storage_offset() + 1) * tensor.element_size() // tensor.untyped_storage().nbytes()
            )
        return 0 if not tensor.dtype.is_floating_point else 0.0

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive or not storage.nbytes():
            return
        number = len(self.made)
        self.made.append((key, storage.nbytes(), self.phase))
        self.events.append(number)

        def gone(_, key=key, number=number):
            self.events.append(~number)
            self.alive.pop(key, None)

        self.alive[key] = (number, weakref.ref(storage, gone))

    def watch_head(self, model: nn.Module, stack: contextlib.ExitStack) -> None:
        """Between decoder and loss stands the head: what it makes are logits, in the backward until its input has a
        gradient."""

        def enter(_, args):
            self.phase, self.forward_ends = "logits", len(self.events)
            if args[0].requires_grad:
                args[0].register_hook(leave)

        def leave(grad):
            self.phase = "backward"

        stack.callback(model.get_output_embeddings().register_forward_pre_hook(enter).remove)

    def watch_rows(self, model: nn.Module, stack: contextlib.ExitStack) -> None:
        def note(_, args, kwargs):
            ids = args[1] if len(args) > 1 else kwargs["top_k_index"]
            self.rows = ids.numel()

        with contextlib.suppress(ValueError):  # a dense model
            for _, module in find_experts(model).values():
                stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)

    def at_peak(self, grads: list[Tensor]) -> Counter:
        grads_made = {self.alive.get(_key(grad), (-1,))[0] for grad in grads}
        ended = {~event: at for at, event in enumerate(self.events) if event < 0}
        total, best, peak_at = 0, 0, 0
        for at, event in enumerate(self.events):
            total += self.made[event][1] if event >= 0 else -self.made[~event][1]
            if total > best:
                best, peak_at = total, at
        kinds = Counter()
        begun = {event: at for at, event in enumerate(self.events) if event >= 0}
        for number, (_, size, phase) in enumerate(self.made):
            if begun[number] <= peak_at < ended.get(number, len(self.events)):
                if number in grads_made:
                    kind = "gradients"
                elif phase == "logits":
                    kind = "logits"
                elif phase == "forward" and ended.get(number, len(self.events)) > self.forward_ends:
                    kind = "activations"
                else:
                    kind = "transient"
                kinds[kind] += size
        return kinds


# --------------------------------------------------------------------------------------------------------------------
# stand-ins for what cannot run without data, other processes, or a device


@contextlib.contextmanager
def _substituted(module, **functions):
    before = {name: getattr(module, name) for name in functions}
    vars(module).update(functions)
    try:
        yield
    finally:
        vars(module).update(before)


def _even_route(shard, slot_TK: Tensor) -> "expert_parallel._Route":
    """`expert_parallel._make_route` where every rank sends, and receives, the same number of rows."""
    slot_N, P = slot_TK.reshape(-1), len(shard.sizes_P)
    _, perm_N = torch.sort(slot_N, stable=True)
    inverse_N = torch.empty_like(perm_N).scatter_(0, perm_N, torch.arange(len(slot_N), device=slot_N.device))
    share = [(rank + 1) * len(slot_N) // P - rank * len(slot_N) // P for rank in range(P)]
    return expert_parallel._Route(
        shard.group, perm_N, inverse_N.view(slot_TK.shape), share, share, torch.empty_like(slot_N)
    )


def _exchange(rows: Tensor, sent: list[int], received: list[int], group) -> Tensor:
    return rows.contiguous().new_empty(sum(received), rows.shape[1])


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor, bias=None, out_dtype=None) -> Tensor:
    """(N, I) and (groups, I, O) -> (N, O), or (O, N) and (N, I) -> (groups, O, I)."""
    return a.new_empty(len(a), b.shape[-1]) if b.ndim == 3 else a.new_empty(len(offs), len(a), b.shape[-1])


class _Attention(torch.autograd.Function):
    """What a fused kernel holds: q, k, v (B, H, T, C), the output in the order of tokens, and a number per row."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        if mask is not None and mask.dtype == torch.bool:  # torch makes numbers of it, and keeps them for the backward
            mask = torch.empty_like(mask, dtype=q.dtype)
        B, H, T, _ = q.shape
        out = q.new_empty(B, T, H, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(B, H, T, dtype=torch.float32), mask)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, _, lse, _ = ctx.saved_tensors
        torch.empty_like(lse)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def _attention(device: str):
    """torch's scaled_dot_product_attention as the device would run it."""

    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        options = {"is_causal": is_causal, "enable_gqa": enable_gqa}
        if device == "cuda" or _fuses(q, k, v, attn_mask, dropout_p, **options):
            return _Attention.apply(q, k, v, attn_mask)
        return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, scale=scale, **options)[
            0
        ]

    return attend


def _fuses(q, k, v, mask, dropout_p, is_causal, enable_gqa) -> bool:
    """Whether torch would take a fused kernel on the CPU: asked of torch, with small tensors."""
    with _disable_current_modes(), torch.device("cpu"):
        q, k, v = (torch.zeros(1, t.shape[1], 2, t.shape[3], dtype=t.dtype, requires_grad=True) for t in (q, k, v))
        mask = None if mask is None else torch.ones(1, 1, 2, 2, dtype=mask.dtype)
        return torch._fused_sdp_choice(q, k, v, mask, dropout_p, is_causal, enable_gqa=enable_gqa) == 1
