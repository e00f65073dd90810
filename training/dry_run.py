r"""A training step without weights and without a device: what it would hold, noted storage by storage.

`held` counts what never moves: weights, fp32 masters, what is trained. `run` sends a micro batch forward and back
through tensors without storage, and so through the very code that trains: the family's modules, our grouped GEMM,
dispatch and combine, activation checkpointing. A mode under them notes every storage that is made and let go, so that
nothing has to be known about any family:

    bytes   |         ____/\/\_        activations pile up in the forward, then come the head's logits, then the
            |    ____/         \/\_    backward's workspaces while the activations go
            |___/                  \_   -> the highest point, and what lies there, by kind
            +-------------------------  time

Two devices are told apart, since the code paths differ. For "cuda" the tensors are torch's `meta` ones, and attention
is a fused kernel, that saves q, k, v, its output and the mask; for "cpu" they are torch's fake ones, that say they are
on the CPU, and attention is whatever torch takes there. Sizes that depend on the data are expectations: routed rows are
spread evenly over experts, so a layer's S trained experts of E get S/E of them, and every rank receives as many as it
sends. A GPU computes with the size of all rows (grouped_gemm.py), so that this matters on the CPU only.

Legend: T tokens, D hidden, K top-k, N = T*K routed rows, E experts, e of them on this rank, S trained ones of a layer;
of attention B batch, H heads, C head size.
"""

import contextlib
import warnings
import weakref
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from deepseek import expert_parallel
from deepseek.experts import moe_layers
from deepseek.gradient_sync import BUCKET_BYTES

# --------------------------------------------------------------------------------------------------------------------
# what stays


@dataclass(frozen=True)
class Held:
    """What stays from step to step, of a model as one process holds it: bytes, where nothing else is said."""

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
    largest_bucket: int  # of gradients under way between processes


def held(model: nn.Module) -> Held:
    """Count what a model holds that is ready to be trained."""
    rows, seen, largest = Counter(), set(), 0
    for layer in moe_layers(model, dense_ok=True).values():
        S = layer.num_trained
        for name in layer.tensor_names:
            tensor = layer.tensor(name)
            seen.add(_key(tensor))
            each = tensor.nbytes // max(len(tensor), 1)
            rows["trained"] += S * each
            rows["frozen"] += (len(tensor) - S) * each
            if name in layer.weight_names:
                rows["entries"] += (len(tensor) - S) * tensor[0].numel()
                largest = max(largest, tensor[0].numel())

    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trained, counts, by_layer = Counter(), Counter(), Counter()
    for name, param in model.named_parameters():
        if param.requires_grad:
            trained[param.element_size()] += param.numel()
            counts["others"] += param.numel() if ".trained." not in name else 0
            counts["embeddings"] += param.numel() if id(param) in embeddings else 0
        if _key(param) in seen:  # an alias of W[:S], or tied
            continue
        seen.add(_key(param))
        if ".trained." in name or name.endswith(".original"):
            counts["masters"] += param.nbytes
        else:
            counts["dense"] += param.nbytes
            layer = next((part for part in name.split(".") if part.isdigit()), None)
            by_layer[layer] += param.nbytes if not param.requires_grad else 0
    for buffer in model.buffers():
        if _key(buffer) not in seen:
            seen.add(_key(buffer))
            counts["dense"] += buffer.nbytes
    sizes = [param.nbytes for param in model.parameters() if param.requires_grad]
    return Held(
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
        largest_bucket=max(min(sum(sizes), BUCKET_BYTES), *sizes, 0),
    )


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# --------------------------------------------------------------------------------------------------------------------
# what comes and goes


def run(model: nn.Module, device: str, **batch: object) -> Counter:
    """`step` of a model on `meta`, without storage, as it would be on a device, "cuda" or "cpu"; changes the model."""
    with FakeTensorMode() if device == "cpu" else torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # equal ones, of an alias
        if device == "cpu":
            _move(model)
        return step(model, **batch)


def step(
    model: nn.Module, seq_length: int, batch_size: int, label_share: float, packed: bool, accumulation: bool
) -> Counter:
    """Bytes by kind (gradients, activations, logits, transient) at the peak of a forward and backward, without what the
    model itself holds; the arguments are those of `memory.Settings`."""
    tracker = _Tracker(model, packed)
    on_meta = tracker.device.type == "meta"
    with contextlib.ExitStack() as stack:
        stack.enter_context(_substituted(expert_parallel, make_route=_even_route, exchange=_even_exchange))
        if on_meta:  # which knows no autocast, that peft asks for, to turn it off
            stack.enter_context(_substituted(torch, autocast=lambda *_, **__: contextlib.nullcontext()))
        stack.enter_context(_substituted(nn.functional, scaled_dot_product_attention=_attention(on_meta)))
        tracker.watch_head(model, stack)
        tracker.watch_rows(model, stack)
        if accumulation:
            for param in model.parameters():
                if param.requires_grad:
                    param.grad = torch.empty_like(param)
                    tracker.know(param.grad)
        stack.enter_context(tracker)
        shape, kind = (batch_size, seq_length), {"dtype": torch.long, "device": tracker.device}
        inputs = {"input_ids": torch.empty(shape, **kind), "position_ids": torch.empty(shape, **kind)}
        labels_each = max(1, round(label_share * seq_length))
        labels = torch.empty(batch_size * labels_each, **kind)
        kept = torch.empty(labels_each, **kind)
        logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits
        tracker.phase = "logits"
        # as trainer.py has it, which lets go of the model's outputs before the backward
        logits = logits.flatten(0, 1).float()
        loss = nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        del logits
        torch.autograd.backward(loss)  # not loss.backward(), in which a default device would not hold
        del loss
    return tracker.at_peak([p.grad for p in model.parameters() if p.grad is not None])


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


class _Tracker(TorchDispatchMode):
    """Notes when every storage is made and let go, and by what part of the step. Answers what only data could tell."""

    def __init__(self, model: nn.Module, packed: bool):
        super().__init__()
        self.packed = packed
        self.device = next(model.parameters()).device
        self.phase, self.rows = "forward", 0
        self.made: list[tuple[int, str]] = []  # bytes, phase
        self.events: list[int] = []  # number of what was made, or ~number of what was let go
        self.alive: dict[int, tuple[int, weakref.ref | None]] = {}  # storage -> number, or -1 for what was there before
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
            func = _grouped_mm
        out = func(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _answer(self, tensor: Tensor) -> bool | int | float:
        if tensor.dtype == torch.bool:  # "is there one document only?"
            return not self.packed
        if tensor.dtype == torch.int32 and self.rows:  # offs_E[S - 1]: rows of the first S of e experts
            e = tensor.untyped_storage().nbytes() // tensor.element_size()
            return self.rows * (tensor.storage_offset() + 1) // e
        return 0.0 if tensor.dtype.is_floating_point else 0

    def _see(self, tensor: Tensor) -> None:
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
        """Note how many rows are routed."""

        def note(_, args, kwargs):
            ids = args[1] if len(args) > 1 else kwargs["top_k_index"]
            self.rows = ids.numel()

        for layer in moe_layers(model, dense_ok=True).values():
            stack.callback(layer.module.register_forward_pre_hook(note, with_kwargs=True).remove)

    def at_peak(self, grads: list[Tensor]) -> Counter:
        """Bytes by kind of what is there when the most is."""
        begun = {event: at for at, event in enumerate(self.events) if event >= 0}
        ended = {~event: at for at, event in enumerate(self.events) if event < 0}
        heights = list(accumulate(self.made[e][0] if e >= 0 else -self.made[~e][0] for e in self.events))
        peak_at = heights.index(max(heights))
        of_grads = {self.alive.get(_key(grad), (-1,))[0] for grad in grads}
        kinds = Counter()
        for number, (size, phase) in enumerate(self.made):
            end = ended.get(number, len(self.events))
            if begun[number] <= peak_at < end:
                if number in of_grads:
                    kind = "gradients"
                elif phase == "logits":
                    kind = "logits"
                elif phase == "forward" and end > self.forward_ends:
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


def _even_route(shard, slot_TK: Tensor) -> "expert_parallel.Route":
    """`expert_parallel.make_route` where every rank sends, and receives, the same number of rows."""
    slot_N, P = slot_TK.reshape(-1), len(shard.sizes_P)
    _, perm_N = torch.sort(slot_N, stable=True)
    inverse_N = torch.empty_like(perm_N).scatter_(0, perm_N, torch.arange(len(slot_N), device=slot_N.device))
    share = [(rank + 1) * len(slot_N) // P - rank * len(slot_N) // P for rank in range(P)]
    inverse_TK, row_R = inverse_N.view(slot_TK.shape), torch.empty_like(slot_N)
    return expert_parallel.Route(shard.group, perm_N, inverse_TK, share, share, row_R)


def _even_exchange(rows: Tensor, sent: list[int], received: list[int], group) -> Tensor:
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


def _attention(on_meta: bool):
    """torch's scaled_dot_product_attention as the device would run it."""

    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        options = {"is_causal": is_causal, "enable_gqa": enable_gqa}
        if on_meta or _fuses(q, k, v, attn_mask, dropout_p, **options):
            return _Attention.apply(q, k, v, attn_mask)
        options["scale"] = scale
        out, _ = torch.ops.aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, **options)
        return out

    return attend


def _fuses(q, k, v, mask, dropout_p, is_causal, enable_gqa) -> bool:
    """Whether torch would take a fused kernel on the CPU: asked of torch, with small tensors."""
    with _disable_current_modes(), torch.device("cpu"):
        q, k, v = (torch.zeros(1, t.shape[1], 2, t.shape[3], dtype=t.dtype, requires_grad=True) for t in (q, k, v))
        mask = None if mask is None else torch.ones(1, 1, 2, 2, dtype=mask.dtype)
        return torch._fused_sdp_choice(q, k, v, mask, dropout_p, is_causal, enable_gqa=enable_gqa) == 1
