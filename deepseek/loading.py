"""Open a model: on one device, spread over several GPUs by whole layers, some experts of it only, or no weights."""

import contextlib
import copy
import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from accelerate import infer_auto_device_map
from safetensors import safe_open
from torch import nn
from tqdm import tqdm
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedConfig,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import logging

from deepseek import modeling  # noqa: F401 (registers model type "deepseek")
from deepseek.experts import MoELayer, moe_layers
from deepseek.frozen import BLOCKS, Storage, forbid_state_dict, freeze_experts
from deepseek.grouped_gemm import IMPLEMENTATION


def load_tokenizer(path: str | Path):
    """The tokenizer of a model folder or a hub id. Raises ValueError or FileNotFoundError where there is none."""
    return _load(AutoTokenizer.from_pretrained, path)


def load_base_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device=None,
    experts: Mapping[int, Iterable[int]] | None = None,
    frozen: Storage | None = None,
    attention: str | None = None,
):
    """(model, tokenizer) of a folder or a hub id, through the Auto classes, in evaluation mode and without remote code.

    Args:
        dtype: as from_pretrained takes it; "auto" is the checkpoint's.
        device: one device, or a list of GPUs over which the layers are spread by free memory; None is the CPU.
        experts: for expert parallelism, the ids of the experts to read and hold, by layer (all layers); None is all.
            `model.read_bytes` then counts what was read.
        frozen: how to store all experts but those it keeps, layer by layer while they are read; None is the model's
            dtype, and for a checkpoint in block-scaled fp8 its own bytes and scales.
        attention: as from_pretrained's attn_implementation takes it, e.g. "flash_attention_2"; None is its choice.

    Raises:
        ValueError, FileNotFoundError: no such model, one that transformers cannot load, a checkpoint that lacks tensors
            or holds them in another shape (transformers would draw them at random), or too large for its GPUs.
    """
    tokenizer = load_tokenizer(path)
    config = _load(AutoConfig.from_pretrained, path)
    quantized = quantization(config)
    if quantized and quantized not in UNQUANTIZED:
        raise ValueError(f"model {str(path)!r} is quantized as {quantized}, which cannot be trained on: give the "
                         f"unquantized one (or {' or '.join(UNQUANTIZED)})")  # fmt: skip
    if quantized == "fp8" and frozen is None:
        frozen = Storage("fp8")
    devices = device if isinstance(device, list) else [device or "cpu"]
    place: dict = {"device_map": devices[0]} if str(devices[0]) != "cpu" else {}
    gpus = [torch.device(one).index for one in devices]
    if len(devices) > 1:
        free = {gpu: int(0.8 * torch.cuda.mem_get_info(gpu)[0]) for gpu in gpus}  # the rest: activations and cache
        place = {"device_map": _spread(path, free) if frozen else "auto", "max_memory": free}
    if quantized:
        place["quantization_config"] = UNQUANTIZED[quantized](dequantize=True)
    if attention is not None:
        place["attn_implementation"] = attention
    report = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    from_pretrained = auto_class(config).from_pretrained
    if experts is not None or frozen is not None:
        from_pretrained = _class_that_reads(type(empty_model(path)), experts, frozen).from_pretrained
    model, found = _load(from_pretrained, path, dtype=dtype, **place, **report)
    if wrong := sorted(found["missing_keys"]) + sorted(name for name, *_ in found["mismatched_keys"]):
        raise ValueError(
            f"model {str(path)!r}: its checkpoint lacks, or holds in another shape, {len(wrong)} tensors that its "
            f"config.json asks for ({wrong[0]}): fetch it again"
        )
    if len(devices) > 1 and not set(model.hf_device_map.values()) <= set(gpus):
        raise ValueError(f"model {str(path)!r} does not fit on {', '.join(map(str, devices))}: give it more GPUs")
    if frozen is not None:
        model.set_experts_implementation(IMPLEMENTATION)
        forbid_state_dict(model)
    return model.eval(), tokenizer


UNQUANTIZED = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}  # formats that transformers can undo while it reads


def quantization(config: PreTrainedConfig) -> str | None:
    """The format that a checkpoint is quantized in, as its config has it."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found["quant_method"] if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method))


def _spread(path: str | Path, free: dict[int, int]) -> dict[str, int | str]:
    """Layers -> GPUs of `free` bytes for a model whose experts take a byte per parameter."""
    empty = empty_model(path)
    layers = moe_layers(empty).values()
    a_byte = {f"{layer.name}.{key}": torch.int8 for layer in layers for key in layer.tensor_names}
    return infer_auto_device_map(empty, free, empty._no_split_modules, dtype=empty.config.dtype, special_dtypes=a_byte)


def _class_that_reads(
    cls: type[nn.Module], experts: Mapping[int, Iterable[int]] | None, frozen: Storage | None
) -> type[nn.Module]:
    """A subclass of a transformers model whose `from_pretrained` reads and holds the experts `experts` only, and stores
    them as `frozen` says, a layer at a time.

    from_pretrained builds the model on the meta device and hands it to `_load_pretrained_model` with the checkpoint's
    files, which is where the experts modules are cut to size, and tensors of other experts left out.
    """

    def load(model, state_dict, checkpoint_files, load_config, *args):
        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise ValueError("expert parallelism and frozen_dtype read *.safetensors only: convert the checkpoint")
        layers, layer_of = moe_layers(model), {}
        if experts is not None:
            for layer in layers.values():
                layer.keep_local(experts[layer.index])
        files = [safe_open(file, "pt") for file in checkpoint_files]
        slices = {key: _Slice(file.get_slice(key)) for file in files for key in file.keys()}  # noqa: SIM118
        if quantization(model.config) == "fp8":
            block = tuple(load_config.hf_quantizer.quantization_config.weight_block_size or ())
            scales = [key for key in slices if key.endswith("_scale_inv")]
            as_they_are = set()
            if frozen is not None and frozen.dtype == "fp8" and block == BLOCKS["fp8"]:
                in_fp8 = {_layer_of(key) for key in scales if ".experts." in key}
                as_they_are = {layer for layer in in_fp8 & layers.keys() if _expect_fp8(layers[layer])}
            for key in scales:
                if not (".experts." in key and _layer_of(key) in as_they_are):
                    _spell_out(slices, key, block)
        for layer in layers.values():
            names = [f"{layer.name}.{name}" for name, _ in layer.module.named_parameters(recurse=False)]
            layer_of |= dict.fromkeys(names, layer.index)
        mapping = get_model_conversion_mapping(model, None, load_config.hf_quantizer)
        load_config = dataclasses.replace(load_config, weight_mapping=mapping)
        kept_L = _local_slices(model, slices, layer_of, mapping)
        if frozen is None:
            kept = {key: one for part in kept_L.values() for key, one in part.items()}
            loaded = cls._load_pretrained_model(model, kept, None, load_config, *args)
        else:
            loaded = _load_and_freeze(model, kept_L, load_config, frozen)
        model.read_bytes = sum(one.read_bytes for part in kept_L.values() for one in part.values())
        model.__class__ = cls
        return loaded

    return type(cls.__name__, (cls,), {"_load_pretrained_model": staticmethod(load)})


def _load_and_freeze(model: nn.Module, kept_L: Mapping[int | None, dict], load_config, frozen: Storage) -> tuple:
    """What transformers' `_load_pretrained_model` does, MoE layer by layer, each stored before the next is read."""
    layers = moe_layers(model)
    info, offloaded = convert_and_load_state_dict_in_model(model, kept_L[None], load_config, None)
    with no_bars():
        for layer in tqdm(layers, desc=f"experts as {frozen.dtype or 'they are'}", unit="layer"):
            one, _ = convert_and_load_state_dict_in_model(model, kept_L[layer], load_config, None)
            info.missing_keys &= one.missing_keys
            info.mismatched_keys |= one.mismatched_keys
            info.unexpected_keys |= one.unexpected_keys
            info.conversion_errors |= one.conversion_errors
            info.error_msgs += one.error_msgs
            if not one.mismatched_keys and not one.conversion_errors:
                freeze_experts(layers[layer], frozen.keep.get(layer, ()), frozen.dtype, frozen.offload, model.dtype)
    return info, offloaded


def _layer_of(key: str) -> int | None:
    return next((int(part) for part in key.split(".") if part.isdecimal()), None)


def _expect_fp8(layer: MoELayer) -> bool:
    """Let transformers read the experts of a checkpoint in fp8 as they are, with their scales beside them, where the
    blocks of single matrices stay blocks of the fused ones; whether they do."""
    module = layer.module
    if module.is_transposed or module.down_proj.shape[2] % BLOCKS["fp8"][0]:
        return False
    for name in layer.weight_names:
        weight = layer.tensor(name)
        scales = [math.ceil(size / block) for size, block in zip(weight.shape[1:], BLOCKS["fp8"])]
        setattr(module, name, nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False))
        module.register_parameter(
            f"{name}_scale_inv", nn.Parameter(weight.new_empty(len(weight), *scales, dtype=torch.float32), False)
        )
    return True


@contextlib.contextmanager
def no_bars():
    """Without transformers' bars of weights read and written, which would tear ours."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


class _Slice:
    """A tensor on disk, or some rows of it, as transformers' loading takes it: read by `[...]`."""

    def __init__(self, source, rows: list[int] | None = None):
        self.source, self.rows, self.read_bytes = source, rows, 0

    def __getitem__(self, index) -> torch.Tensor:
        if self.rows is None:
            tensor = self.source[index]
        else:
            tensor = torch.cat([self.source[row : row + 1] for row in self.rows])[index]
        self.read_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def get_shape(self) -> list[int]:
        shape = self.source.get_shape()
        return shape if self.rows is None else [len(self.rows), *shape[1:]]

    def get_dtype(self) -> str:
        return self.source.get_dtype()


def _spell_out(slices: dict[str, "_Slice"], key: str, block: tuple[int, ...]) -> None:
    """Give a matrix that does not consist of whole blocks a scale for every row or column.

    transformers takes the size of the matrix, divided by the number of scales, for that of a block; in DeepSeek-V3,
    kv_a_proj_with_mqa has 576 rows and 5 scales for them.
    """
    weight = slices.get(key.removesuffix("_scale_inv"))
    if weight is None or len(block) != 2 or len(slices[key].get_shape()) != 2:
        return
    partial = [size if size % edge else None for size, edge in zip(weight.get_shape(), block)]
    if any(partial):
        slices[key] = _Scales(slices[key].source, partial, block)


class _Scales(_Slice):
    """Scales of blocks, in some dimensions spelled out: one for each of so many rows or columns."""

    def __init__(self, source, sizes: list[int | None], block: tuple[int, ...]):
        super().__init__(source)
        self.sizes, self.block = sizes, block

    def __getitem__(self, index) -> torch.Tensor:
        scale = self.source[:]
        dtype, self.read_bytes = scale.dtype, self.read_bytes + scale.nbytes
        if scale.element_size() == 1:  # exponents alone, which torch cannot repeat as such
            scale = scale.view(torch.uint8)
        for dim, (size, block) in enumerate(zip(self.sizes, self.block)):
            if size is not None:
                scale = scale.repeat_interleave(block, dim).narrow(dim, 0, size)
        return scale.contiguous().view(dtype)[index]

    def get_shape(self) -> list[int]:
        return [size or n for size, n in zip(self.sizes, self.source.get_shape())]


def _local_slices(
    model: nn.Module, slices: dict[str, _Slice], layer_of: dict[str, int], mapping: list
) -> dict[int | None, dict[str, _Slice]]:
    """Of a checkpoint's tensors, those that a model of local experts needs, by the layer whose experts they are of, or
    None.

    Which tensors become a fused one is transformers' knowledge (`mapping`): either one tensor per expert, in the order
    of their numbers, or one for all of them, expert dimension first.
    """
    mapping = copy.deepcopy(mapping)  # it notes which of its patterns matched
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    known, kept = model.state_dict(), {None: {}, **{layer: {} for layer in layer_of.values()}}
    sources: dict[tuple, list[str]] = defaultdict(list)
    for key in sorted(slices, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name in layer_of:
            sources[name, pattern].append(key)
        else:
            kept[None][key] = slices[key]
    layers = {layer.name: layer for layer in moe_layers(model).values()}
    for (name, _), keys in sources.items():
        layer, here = layers[name.rpartition(".")[0]], kept[layer_of[name]]
        if len(keys) == layer.num_experts:
            here |= {keys[expert]: slices[keys[expert]] for expert in layer.local_ids}
        elif len(keys) == 1 and slices[keys[0]].get_shape()[0] == layer.num_experts:
            local = None if len(layer.local_ids) == layer.num_experts else layer.local_ids
            here[keys[0]] = _Slice(slices[keys[0]].source, local)
        else:
            raise ValueError(f"{name} has {len(keys)} tensors in the checkpoint for {layer.num_experts} experts")
    return kept


def empty_model(path: str | Path) -> nn.Module:
    """The model of a folder or a hub id without its weights, on the meta device. Raises as `load_base_model` does."""
    config = _load(AutoConfig.from_pretrained, path)
    with torch.device("meta"):
        return _load(lambda _: auto_class(config).from_config(config), path)


def auto_class(config: PreTrainedConfig) -> type:
    """The Auto class of a model: a causal language model, else one of images and text, whose text can be trained.

    Some families, such as Qwen3-VL-MoE, have no language model of their own.
    """
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def keeps_documents_apart(model: nn.Module) -> bool:
    """Whether the documents of a pack (`utils.collate`) do not see each other in `model`.

    The mask between them is transformers' work, from `position_ids` that start again; some families make none, and
    recurrent layers carry their state over. Where documents are apart, the gradient of the second one's hidden states
    with respect to the first one's embeddings is 0 exactly, whatever the dtype.
    """
    kept = []

    def hook(_module, _args, output):
        kept.append(output.detach().requires_grad_())
        return kept[0]

    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(hook)
    positions_T = torch.arange(4).repeat(2).to(embeddings.weight.device)
    try:
        with torch.enable_grad():
            out = model.base_model(
                input_ids=positions_T[None], position_ids=positions_T[None], use_cache=False
            ).last_hidden_state
            (grad_TD,) = torch.autograd.grad(out[0, 4:].float().pow(2).sum(), kept)[0]
    finally:
        handle.remove()
    return not grad_TD[:4].any()


def plan_devices(device: str, world_size: int, gpus_per_rank: int) -> list[list[str]]:
    """The devices of every rank, e.g. [["cuda:0", "cuda:1"], ["cuda:2", "cuda:3"]] or [["cpu"]].

    Args:
        device: "auto" (the GPUs where there are any), "cpu" or "cuda".

    Raises:
        ValueError: no GPU where one was asked for, or too few for world_size x gpus_per_rank.
    """
    gpus = torch.cuda.device_count()
    if device == "cuda" and not gpus:
        raise ValueError("--device cuda: torch sees no GPU here, give --device cpu or check the driver")
    if device == "cpu" or not gpus:
        if gpus_per_rank > 1:
            raise ValueError(f"--gpus_per_rank {gpus_per_rank} needs GPUs and this run is on the CPU: leave it out")
        return [["cpu"]] * world_size
    if world_size * gpus_per_rank > gpus:
        raise ValueError(
            f"--world_size {world_size} with --gpus_per_rank {gpus_per_rank} needs {world_size * gpus_per_rank} GPUs "
            f"and torch sees {gpus}: lower one of them"
        )
    return [[f"cuda:{rank * gpus_per_rank + i}" for i in range(gpus_per_rank)] for rank in range(world_size)]


def _load(function, path: str | Path, **kwargs):
    path = str(path)
    if not Path(path).exists() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        raise FileNotFoundError(f"model {path!r}: no such folder, and not a hub id (owner/name)")
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(f"model {path!r}: the folder has no config.json, so it is no model")
    try:
        return function(path, **kwargs)
    except Exception as error:  # whatever a damaged folder makes transformers and its libraries raise
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model {path!r} cannot be loaded: {type(error).__name__}: {reason}") from error
