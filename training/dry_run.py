r"""Count the bytes that a training step would hold, without weights and without a device.

`count_resident` counts what stays from step to step: weights, fp32 masters and trained parameters. `trace_step` sends a
micro batch forward and back through tensors without storage. It runs the same code as a training, for every family of
models, and a torch mode notes when each storage is made and freed:

    bytes   |         ____/\/\_        The forward saves activations. The head makes logits. The backward makes
            |    ____/         \/\_    workspaces and frees the activations.
            |___/                  \_   -> the result: what is there at the highest point, by kind
            +-------------------------  time

The code that runs depends on the device. For "cpu" the tensors are torch's fake tensors on the CPU, and attention is
what torch chooses there. For "cuda" they are `meta` tensors, and attention is a fused kernel. It saves q, k, v, its
output and the mask. No function is replaced: torch modes answer when the model asks for attention or for a value.

Sizes that depend on the data are expectations. Routed rows are spread evenly over the experts: S trained experts of E
get S/E of the rows, and a rank receives as many rows as it sends. This matters on the CPU only. A GPU reserves room for
all rows (grouped_gemm.py).

T tokens, K top-k, N = T*K routed rows, E experts, e experts on this rank, S trained experts of a layer, P ranks. In
attention: B batch, H heads, C head size.
"""

import copy
import math
import warnings
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from deepseek.expert_parallel import ExpertShard, Route
from deepseek.experts import moe_layers
from deepseek.gradient_sync import BUCKET_BYTES
from training.loss import TokenLosses

if TYPE_CHECKING:
    from training.memory import MemorySettings


@dataclass
class Resident:
    """What one process holds from step to step, in bytes if the comment does not say otherwise."""

    trained_rows: int = 0  # W[:S] of the fused experts
    frozen_rows: int = 0  # W[S:] of the fused experts
    dense: int = 0  # all other weights and buffers
    masters: int = 0
    trained: Counter = field(default_factory=Counter)  # bytes of an element -> count of trained parameters
    embeddings: int = 0  # count of trained parameters in embeddings
    others: int = 0  # count of trained parameters outside the routed experts
    frozen_entries: int = 0  # count of numbers in the matrices of frozen experts
    largest_matrix: int = 0  # count of numbers in the largest matrix of an expert
    largest_layer: int = 0  # frozen weights of a decoder layer outside its experts
    outside: int = 0  # frozen weights outside decoder layers
    largest_bucket: int = 0  # gradients that processes exchange at once


def count_resident(model: nn.Module) -> Resident:
    """Count what a prepared model holds."""
    held, seen, by_layer = Resident(), set(), Counter()
    for layer in moe_layers(model, dense_ok=True).values():
        S = layer.num_trained
        for name in layer.tensor_names:
            tensor = layer.tensor(name)
            seen.add(_storage_key(tensor))
            each = tensor.nbytes // max(len(tensor), 1)
            held.trained_rows += S * each
            held.frozen_rows += (len(tensor) - S) * each
            if name in layer.weight_names:
                held.frozen_entries += (len(tensor) - S) * tensor[0].numel()
                held.largest_matrix = max(held.largest_matrix, tensor[0].numel())
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for name, param in model.named_parameters():
        if param.requires_grad:
            held.trained[param.element_size()] += param.numel()
            held.others += param.numel() if ".trained." not in name else 0
            held.embeddings += param.numel() if id(param) in embeddings else 0
        if _storage_key(param) in seen:  # an alias of W[:S], or a tied weight
            continue
        seen.add(_storage_key(param))
        if ".trained." in name or name.endswith(".original"):
            held.masters += param.nbytes
        else:
            held.dense += param.nbytes
            layer_index = next(filter(str.isdigit, name.split(".")), None)
            by_layer[layer_index] += 0 if param.requires_grad else param.nbytes
    held.dense += sum({_storage_key(b): b.nbytes for b in model.buffers() if _storage_key(b) not in seen}.values())
    held.outside = by_layer.pop(None, 0)
    held.largest_layer = max(by_layer.values(), default=0)
    gradients = [param.nbytes for param in model.parameters() if param.requires_grad]
    held.largest_bucket = max(min(sum(gradients), BUCKET_BYTES), *gradients, 0)
    return held


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def trace_step(model: nn.Module, s: "MemorySettings") -> Counter:
    """Count the bytes that a step would hold at its peak, by kind: gradients, activations, logits, transient.

    The model's own bytes are not counted. `model` is on `meta` and is changed. The step is one on the device of `s`.
    """
    with FakeTensorMode() if s.device == "cpu" else torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # it tells aliases from copies
        if s.device == "cpu":
            model = _copy_to_cpu(model)
        answers = _Answers(model, s.device)
        if s.activation_checkpointing:  # torch turns the mode off in the backward, so the recomputation turns it on
            how = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": lambda: (nullcontext(), answers)}
            model.activation_checkpointing_enable(how)
        tracker = _FakeTracker(model, s.packed)
        for layer in moe_layers(model, dense_ok=True).values():
            layer.module.register_forward_pre_hook(tracker.note_rows, with_kwargs=True)
            if layer.shard:
                layer.module.shard = _EvenShard(**vars(layer.shard))
        with answers:
            return record_step(model, tracker, s)


def _copy_to_cpu(model: nn.Module) -> nn.Module:
    """Copy a model from `meta` to fake CPU tensors. Unlike Module.to, keep its tied weights and aliases."""
    storages, copies = {}, {}
    for tensor in (*model.parameters(), *model.buffers()):
        nbytes = tensor.untyped_storage().nbytes()
        flat = storages.setdefault(_storage_key(tensor), torch.empty(nbytes, dtype=torch.uint8)).view(tensor.dtype)
        own = flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
        copies[id(tensor)] = nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own
    return copy.deepcopy(model, copies)


def record_step(model: nn.Module, tracker: "StorageTracker", s: "MemorySettings") -> Counter:
    """Run one step on random tokens under a tracker. Return the bytes at its peak by kind, as `trace_step` does."""
    trained = [param for param in model.parameters() if param.requires_grad]
    for param in trained if s.accumulation else ():  # an earlier micro batch has left gradients
        param.grad = torch.empty_like(param)
        tracker.leave_out(param.grad)
    B, T, labels_each = s.batch_size, s.seq_length, max(1, round(s.label_share * s.seq_length))
    device = next(model.parameters()).device
    ids_BT = torch.randint(model.config.get_text_config().vocab_size, (B, T), device=device)
    shapes = ((B, T), (labels_each,), (B, labels_each))
    position_ids_BT, kept, labels = (torch.zeros(shape, dtype=torch.long, device=device) for shape in shapes)
    token_losses = TokenLosses(model.get_output_embeddings())
    with tracker:
        token_losses.try_head(model)
        hook = token_losses.head.register_forward_pre_hook(tracker.enter_head)
        for tensor in (ids_BT, position_ids_BT, kept, labels):
            tracker.note(tensor)
        inputs = {"input_ids": ids_BT, "position_ids": position_ids_BT, "logits_to_keep": kept, "use_cache": False}
        loss = token_losses(model, inputs, labels).sum()
        loss.backward()
        del loss
    hook.remove()
    return tracker.at_peak([param.grad for param in trained if param.grad is not None])


@dataclass
class Block:
    """A storage. Times are counted in events: the making and the freeing of storages."""

    nbytes: int
    phase: str  # the part of the step that made it
    made: int
    freed: float = math.inf


class StorageTracker(TorchDispatchMode):
    """Notes when each storage is made and freed, and in which part of the step."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.phase = "forward"  # then logits, then backward
        self.clock = self.bytes = self.peak = self.peak_at = self.forward_ends = 0
        self.blocks: list[Block] = []
        self.alive: dict[int, Block | None] = {}  # by storage; None: not counted
        self.before: list = []  # storages that are not counted; kept here, because a freed address is used again
        for tensor in (*model.parameters(), *model.buffers()):
            self.leave_out(tensor)

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count this tensor."""
        self.before.append(tensor.untyped_storage())
        self.alive[_storage_key(tensor)] = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return out

    def note(self, tensor: Tensor) -> None:
        """Count the tensor's storage from now until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive or not storage.nbytes():
            return
        block = Block(storage.nbytes(), self.phase, self.clock)
        self.blocks.append(block)
        self.bytes += block.nbytes
        if self.bytes > self.peak:
            self.peak, self.peak_at = self.bytes, self.clock
        self.clock += 1
        self.alive[key] = block
        weakref.finalize(storage, self._free, key, block)

    def _free(self, key: int, block: Block) -> None:
        block.freed = self.clock
        self.bytes -= block.nbytes
        self.clock += 1
        del self.alive[key]

    def enter_head(self, _, args: tuple) -> None:
        """Hook of the head: logits follow. In the backward they end with the gradient of the head's input."""
        self.phase, self.forward_ends = "logits", self.clock
        if args[0].requires_grad:
            args[0].register_hook(self._leave_head)

    def _leave_head(self, _) -> None:
        self.phase = "backward"

    def at_peak(self, gradients: list[Tensor]) -> Counter:
        """Return the bytes at the peak by kind."""
        for grad in gradients:
            if block := self.alive[_storage_key(grad)]:
                block.phase = "gradients"
        kinds = Counter()
        for block in self.blocks:
            if block.made <= self.peak_at < block.freed:
                saved = block.phase == "forward" and block.freed > self.forward_ends
                rest = "activations" if saved else "transient"
                kinds[block.phase if block.phase in ("gradients", "logits") else rest] += block.nbytes
        return kinds


class _FakeTracker(StorageTracker):
    """Tracks a model without storage, and answers when the model asks for a value that depends on data."""

    def __init__(self, model: nn.Module, packed: bool):
        super().__init__(model)
        self.packed, self.rows = packed, 0

    def note_rows(self, _, args: tuple, kwargs: dict) -> None:
        """Hook of an experts module: note how many rows are routed."""
        self.rows = (args[1] if len(args) > 1 else kwargs["top_k_index"]).numel()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._answer(args[0])
        if func is torch.ops.aten._grouped_mm.default:  # torch's own version for fake tensors refuses fp32
            func = _grouped_mm
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _answer(self, tensor: Tensor) -> bool | int | float:
        if tensor.dtype == torch.bool:  # the question is: does the pack hold a single document?
            return not self.packed
        if tensor.dtype == torch.int32 and self.rows:  # offs_E[S - 1]: how many rows the first S of e experts get
            e = tensor.untyped_storage().nbytes() // tensor.element_size()
            return self.rows * (tensor.storage_offset() + 1) // e
        return 0.0 if tensor.dtype.is_floating_point else 0


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor, bias=None, out_dtype=None) -> Tensor:
    """Return an empty result: (N, I) and (groups, I, O) -> (N, O), or (O, N) and (N, I) -> (groups, O, I)."""
    return a.new_empty(len(a), b.shape[-1]) if b.ndim == 3 else a.new_empty(len(offs), len(a), b.shape[-1])


class _EvenRoute(Route):
    """A route that makes room for rows, but exchanges none."""

    def exchange(self, rows: Tensor, back: bool = False) -> Tensor:
        return rows.contiguous().new_empty(sum(self.sent if back else self.received), rows.shape[1])


class _EvenShard(ExpertShard):
    """A shard where every rank sends and receives the same number of rows."""

    def route(self, slot_TK: Tensor) -> Route:
        slot_N, P = slot_TK.reshape(-1), len(self.sizes_P)
        N = len(slot_N)
        _, perm_N = torch.sort(slot_N, stable=True)
        inverse_N = torch.empty_like(perm_N).scatter_(0, perm_N, torch.arange(N, device=slot_N.device))
        share = [(rank + 1) * N // P - rank * N // P for rank in range(P)]
        return _EvenRoute(self.group, perm_N, inverse_N.view(slot_TK.shape), share, share, torch.empty_like(slot_N))


class _Answers(TorchFunctionMode):
    """Answers as the device would when the model asks torch for attention or for the device of a weight."""

    def __init__(self, model: nn.Module, device: str):
        super().__init__()
        self.on_gpu, self.adapted = device == "cuda", set()
        if self.on_gpu and any("lora_" in name for name, _ in model.named_parameters()):
            self.adapted = {id(p) for layer in moe_layers(model).values() for p in layer.module.parameters()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs or {})
        if self.adapted and func == Tensor.device.__get__ and id(args[0]) in self.adapted:
            return torch.device("cuda")  # peft gives it to torch.autocast, which does not know `meta`
        return func(*args, **kwargs or {})

    def _attend(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> Tensor:
        options = {"is_causal": is_causal, "enable_gqa": enable_gqa}
        if self.on_gpu or _fuses(q, k, v, attn_mask, dropout_p, **options):
            return _FusedAttention.apply(q, k, v, attn_mask)
        by_hand = torch.ops.aten._scaled_dot_product_attention_math
        return by_hand(q, k, v, attn_mask, dropout_p, scale=scale, **options)[0]


class _FusedAttention(torch.autograd.Function):
    """Holds what a fused kernel holds: q, k, v (B, H, T, C), the mask, the output (B, T, H, C), a number per row."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        if mask is not None and mask.dtype == torch.bool:  # torch converts the mask to numbers and keeps those
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
    """Ask torch, with small tensors, whether it would choose a fused kernel on the CPU."""
    with _disable_current_modes(), torch.device("cpu"):
        q, k, v = (torch.zeros(1, t.shape[1], 2, t.shape[3], dtype=t.dtype, requires_grad=True) for t in (q, k, v))
        mask = None if mask is None else torch.ones(1, 1, 2, 2, dtype=mask.dtype)
        return torch._fused_sdp_choice(q, k, v, mask, dropout_p, is_causal, enable_gqa=enable_gqa) == 1
