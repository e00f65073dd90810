r"""Trace a training step without weights and without a device, and count what it would hold.

`count_resident` counts what never moves: weights, fp32 masters, trained parameters. `trace_step` sends a micro batch
forward and back through tensors without storage. It runs the code that trains: the modules of the family, our grouped
GEMM, dispatch and combine, activation checkpointing. A mode below them notes every storage that is made and let go. It
needs to know nothing about a family:

    bytes   |         ____/\/\_        Activations pile up in the forward. Then come the logits of the head, then the
            |    ____/         \/\_    workspaces of the backward while the activations go.
            |___/                  \_   -> the highest point, and what is there, by kind
            +-------------------------  time

The code paths of two devices differ. For "cpu" the tensors are torch's fake ones, which say that they are on the CPU,
and attention takes whatever torch takes there. For "cuda" they are torch's `meta` tensors, and attention is a fused
kernel that saves q, k, v, its output and the mask.

Sizes that depend on the data are expectations. Routed rows are spread evenly over the experts, so the S trained experts
of E get S/E of them, and a rank receives as many rows as it sends. This matters on the CPU only, because a GPU computes
with the size of all rows (grouped_gemm.py).

No function of torch or of this project is replaced. Modes of torch answer for attention and for values of tensors, and
the model that is traced, which is private to the trace, gets a `Shard` that needs no other rank.

Legend: T tokens, K top-k, N = T*K routed rows, E experts, e of them on this rank, S trained experts of a layer,
P ranks; in attention B batch, H heads, C head size.
"""

import functools
import warnings
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from deepseek.expert_parallel import Route, Shard
from deepseek.experts import moe_layers
from deepseek.gradient_sync import BUCKET_BYTES

# --------------------------------------------------------------------------------------------------------------------
# what stays


@dataclass(frozen=True)
class Resident:
    """What one process holds from step to step, in bytes unless a field says otherwise."""

    trained_rows: int  # W[:S] of fused experts
    frozen_rows: int  # W[S:]
    dense: int  # all other weights and buffers
    masters: int
    trained: Counter  # bytes of an element -> trained parameters
    embeddings: int  # trained parameters of embeddings
    others: int  # trained parameters outside the routed experts
    frozen_entries: int  # numbers in the matrices of frozen experts
    largest_matrix: int  # numbers in an expert's largest matrix
    largest_layer: int  # frozen weights of a decoder layer outside its experts
    outside: int  # frozen weights outside decoder layers
    largest_bucket: int  # gradients on their way between processes


def count_resident(model: nn.Module) -> Resident:
    """Count what a model holds that is ready to be trained."""
    seen: set[int] = set()
    rows, largest = _count_experts(model, seen)
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trained, counts, by_layer = Counter(), Counter(), Counter()
    for name, param in model.named_parameters():
        if param.requires_grad:
            trained[param.element_size()] += param.numel()
            counts["others"] += param.numel() if ".trained." not in name else 0
            counts["embeddings"] += param.numel() if id(param) in embeddings else 0
        if _storage_key(param) in seen:  # an alias of W[:S], or tied
            continue
        seen.add(_storage_key(param))
        if ".trained." in name or name.endswith(".original"):
            counts["masters"] += param.nbytes
        else:
            counts["dense"] += param.nbytes
            layer = next((part for part in name.split(".") if part.isdigit()), None)
            by_layer[layer] += param.nbytes if not param.requires_grad else 0
    for buffer in model.buffers():
        if _storage_key(buffer) not in seen:
            seen.add(_storage_key(buffer))
            counts["dense"] += buffer.nbytes
    gradients = [param.nbytes for param in model.parameters() if param.requires_grad]
    return Resident(
        trained_rows=rows["trained"],
        frozen_rows=rows["frozen"],
        dense=counts["dense"],
        masters=counts["masters"],
        trained=trained,
        embeddings=counts["embeddings"],
        others=counts["others"],
        frozen_entries=rows["entries"],
        largest_matrix=largest,
        largest_layer=max((size for layer, size in by_layer.items() if layer is not None), default=0),
        outside=by_layer[None],
        largest_bucket=max(min(sum(gradients), BUCKET_BYTES), *gradients, 0),
    )


def _count_experts(model: nn.Module, seen: set[int]) -> tuple[Counter, int]:
    """Count the rows of the fused experts and note their storages in `seen`. Also return the largest matrix."""
    rows, largest = Counter(), 0
    for layer in moe_layers(model, dense_ok=True).values():
        S = layer.num_trained
        for name in layer.tensor_names:
            tensor = layer.tensor(name)
            seen.add(_storage_key(tensor))
            each = tensor.nbytes // max(len(tensor), 1)
            rows["trained"] += S * each
            rows["frozen"] += (len(tensor) - S) * each
            if name in layer.weight_names:
                rows["entries"] += (len(tensor) - S) * tensor[0].numel()
                largest = max(largest, tensor[0].numel())
    return rows, largest


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# --------------------------------------------------------------------------------------------------------------------
# what comes and goes


def trace_step(
    model: nn.Module,
    device: str,
    seq_length: int,
    batch_size: int,
    label_share: float,
    packed: bool,
    accumulation: bool,
    activation_checkpointing: bool,
) -> Counter:
    """Count the bytes that a step of `model`, which is on `meta`, would hold on a device ("cuda" or "cpu").

    The arguments after `model` are those of `memory.MemorySettings`. Changes the model.

    Returns:
        The bytes at the peak of a forward and backward by kind: gradients, activations, logits, transient. The model's
        own are not among them.
    """
    answers = _Answers(model, device)
    if activation_checkpointing:  # torch turns such a mode off in the backward, so the recomputation brings its own
        how = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": lambda: (nullcontext(), answers)}
        model.activation_checkpointing_enable(how)
    with FakeTensorMode() if device == "cpu" else torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # equal for aliases
        if device == "cpu":
            _move(model)
        tracker = _FakeTracker(model, packed)
        for layer in moe_layers(model, dense_ok=True).values():
            layer.module.register_forward_pre_hook(tracker.note_rows, with_kwargs=True)
            if layer.shard:
                layer.module.shard = _EvenShard(**vars(layer.shard))
        labels_each = max(1, round(label_share * seq_length))
        shapes = [(batch_size, seq_length)] * 2 + [(labels_each,), (batch_size * labels_each,)]
        batch = [torch.empty(shape, dtype=torch.long, device=tracker.device) for shape in shapes]
        with answers:
            return record_step(model, tracker, accumulation, *batch)


def record_step(
    model: nn.Module,
    tracker: "StorageTracker",
    accumulation: bool,
    ids_BT: Tensor,
    position_ids_BT: Tensor,
    kept: Tensor,
    labels: Tensor,
) -> Counter:
    """Run one step under a tracker and count what it holds at its peak, as `trace_step` does.

    Args:
        accumulation: gradients are there before the forward.
        kept: positions of a pack that have logits.
        labels: one for each of them in all packs.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(tracker.enter_head)
    if accumulation:
        for param in model.parameters():
            if param.requires_grad:
                param.grad = torch.empty_like(param)
                tracker.leave_out(param.grad)
    with tracker:
        for tensor in (ids_BT, position_ids_BT, kept, labels):
            tracker.note(tensor)
        inputs = {"input_ids": ids_BT, "position_ids": position_ids_BT, "logits_to_keep": kept}
        logits = model(**inputs, use_cache=False).logits
        tracker.phase = "logits"
        # as in trainer.py, which lets go of the model's outputs before the backward
        logits = logits.flatten(0, 1).float()
        loss = nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        del logits
        loss.backward()
        del loss
    hook.remove()
    return tracker.at_peak([param.grad for param in model.parameters() if param.grad is not None])


def _move(model: nn.Module) -> None:
    """Move a model from `meta` to fake CPU tensors. Module.to would refuse, and would lose ties and aliases."""

    @functools.cache
    def flat(key: int, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def moved(tensor: Tensor) -> Tensor:
        storage = flat(_storage_key(tensor), tensor.untyped_storage().nbytes()).view(tensor.dtype)
        return storage.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    params: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                if id(param) not in params:
                    params[id(param)] = nn.Parameter(moved(param), requires_grad=param.requires_grad)
                module._parameters[name] = params[id(param)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = moved(buffer)


class StorageTracker(TorchDispatchMode):
    """Note when each storage is made and let go, and in which part of the step."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.phase = "forward"  # then logits, then backward
        self.made: list[tuple[int, str]] = []  # bytes, phase
        self.events: list[int] = []  # number of what was made, or ~number of what was let go
        self.alive: dict[int, tuple[int, weakref.ref | None]] = {}  # storage -> number, or -1 for what was there before
        self.before: list = []  # storages that were there before: kept, or their addresses would be used again
        self.forward_ends = 0
        for tensor in (*model.parameters(), *model.buffers()):
            self.leave_out(tensor)

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count this tensor."""
        storage = tensor.untyped_storage()
        self.before.append(storage)
        self.alive[storage._cdata] = (-1, None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return out

    def note(self, tensor: Tensor) -> None:
        """Count the tensor's storage from now until it is let go."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive or not storage.nbytes():
            return
        number = len(self.made)
        self.made.append((storage.nbytes(), self.phase))
        self.events.append(number)

        def gone(_, key=key, number=number):
            self.events.append(~number)
            self.alive.pop(key, None)

        self.alive[key] = (number, weakref.ref(storage, gone))

    def enter_head(self, _, args: tuple) -> None:
        """Hook of the head: what follows are logits, in the backward until the head's input has its gradient."""
        self.phase, self.forward_ends = "logits", len(self.events)
        if args[0].requires_grad:
            args[0].register_hook(self._leave_head)

    def _leave_head(self, _) -> None:
        self.phase = "backward"

    def at_peak(self, gradients: list[Tensor]) -> Counter:
        """Count by kind the bytes that are there when the most is."""
        begun = {event: at for at, event in enumerate(self.events) if event >= 0}
        ended = {~event: at for at, event in enumerate(self.events) if event < 0}
        heights = list(accumulate(self.made[e][0] if e >= 0 else -self.made[~e][0] for e in self.events))
        peak_at = heights.index(max(heights))
        of_gradients = {self.alive.get(_storage_key(grad), (-1,))[0] for grad in gradients}
        kinds = Counter()
        for number, (size, phase) in enumerate(self.made):
            end = ended.get(number, len(self.events))
            if not begun[number] <= peak_at < end:
                continue
            if number in of_gradients:
                kinds["gradients"] += size
            elif phase == "logits":
                kinds["logits"] += size
            elif phase == "forward" and end > self.forward_ends:
                kinds["activations"] += size
            else:
                kinds["transient"] += size
        return kinds


# --------------------------------------------------------------------------------------------------------------------
# answers for what cannot run without data, other processes, or a device


class _FakeTracker(StorageTracker):
    """Track a model without storage, and answer where the model asks for a value that only data could tell."""

    def __init__(self, model: nn.Module, packed: bool):
        super().__init__(model)
        self.packed, self.rows = packed, 0
        self.device = next(model.parameters()).device

    def note_rows(self, _, args: tuple, kwargs: dict) -> None:
        """Hook of an experts module: note how many rows are routed."""
        self.rows = (args[1] if len(args) > 1 else kwargs["top_k_index"]).numel()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._answer(args[0])
        if func is torch.ops.aten._grouped_mm.default:  # torch's own fake one refuses fp32
            func = _grouped_mm
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _answer(self, tensor: Tensor) -> bool | int | float:
        if tensor.dtype == torch.bool:  # "is there one document only?"
            return not self.packed
        if tensor.dtype == torch.int32 and self.rows:  # offs_E[S - 1], the rows of the first S of e experts
            e = tensor.untyped_storage().nbytes() // tensor.element_size()
            return self.rows * (tensor.storage_offset() + 1) // e
        return 0.0 if tensor.dtype.is_floating_point else 0


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor, bias=None, out_dtype=None) -> Tensor:
    """(N, I) and (groups, I, O) -> (N, O), or (O, N) and (N, I) -> (groups, O, I)."""
    return a.new_empty(len(a), b.shape[-1]) if b.ndim == 3 else a.new_empty(len(offs), len(a), b.shape[-1])


class _EvenRoute(Route):
    """A route without other ranks."""

    def exchange(self, rows: Tensor, back: bool = False) -> Tensor:
        return rows.contiguous().new_empty(sum(self.sent if back else self.received), rows.shape[1])


class _EvenShard(Shard):
    """A shard of which every rank sends, and receives, the same number of rows."""

    def route(self, slot_TK: Tensor) -> Route:
        slot_N, P = slot_TK.reshape(-1), len(self.sizes_P)
        N = len(slot_N)
        _, perm_N = torch.sort(slot_N, stable=True)
        inverse_N = torch.empty_like(perm_N).scatter_(0, perm_N, torch.arange(N, device=slot_N.device))
        share = [(rank + 1) * N // P - rank * N // P for rank in range(P)]
        return _EvenRoute(self.group, perm_N, inverse_N.view(slot_TK.shape), share, share, torch.empty_like(slot_N))


class _Answers(TorchFunctionMode):
    """Answer as the device would where the model asks torch for attention, or for the device of a weight."""

    def __init__(self, model: nn.Module, device: str):
        super().__init__()
        self.on_gpu, self.adapted = device == "cuda", set()
        if self.on_gpu and any("lora_" in name for name, _ in model.named_parameters()):
            self.adapted = {id(p) for layer in moe_layers(model).values() for p in layer.module.parameters()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs or {})
        if self.adapted and func == Tensor.device.__get__ and id(args[0]) in self.adapted:
            return torch.device("cuda")  # peft hands it to torch.autocast, which does not know `meta`
        return func(*args, **kwargs or {})

    def _attend(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> Tensor:
        options = {"is_causal": is_causal, "enable_gqa": enable_gqa}
        if self.on_gpu or _fuses(q, k, v, attn_mask, dropout_p, **options):
            return _FusedAttention.apply(q, k, v, attn_mask)
        return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, scale=scale, **options)[
            0
        ]


class _FusedAttention(torch.autograd.Function):
    """Hold what a fused kernel holds: q, k, v (B, H, T, C), the output in the order of tokens, and a number per row."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        if mask is not None and mask.dtype == torch.bool:  # torch turns it into numbers and keeps them
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


def _fuses(q, k, v, mask, dropout_p, is_causal, enable_gqa) -> bool:
    """Ask torch with small tensors whether it would take a fused kernel on the CPU."""
    with _disable_current_modes(), torch.device("cpu"):
        q, k, v = (torch.zeros(1, t.shape[1], 2, t.shape[3], dtype=t.dtype, requires_grad=True) for t in (q, k, v))
        mask = None if mask is None else torch.ones(1, 1, 2, 2, dtype=mask.dtype)
        return torch._fused_sdp_choice(q, k, v, mask, dropout_p, is_causal, enable_gqa=enable_gqa) == 1
