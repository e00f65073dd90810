"""Open a model: on one device, spread over several GPUs by whole layers, some experts of it only, or no weights."""

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from . import modeling  # noqa: F401 (registers model type "deepseek")
from .experts import find_experts, fused_names


def load_tokenizer(path: str | Path):
    """The tokenizer of a model folder or a hub id. Raises ValueError or FileNotFoundError where there is none."""
    return _load(AutoTokenizer.from_pretrained, path)


def load_base_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device=None,
    experts: Mapping[int, Iterable[int]] | None = None,
):
    """(model, tokenizer) of a folder or a hub id, through the Auto classes, in evaluation mode and without remote code.

    Args:
        dtype: as from_pretrained takes it; "auto" is the checkpoint's.
        device: one device, or a list of GPUs over which the layers are spread by free memory; None is the CPU.
        experts: for expert parallelism, the ids of the experts to read and hold, by layer (all layers); None is all.
            `model.read_bytes` then counts what was read.

    Raises:
        ValueError, FileNotFoundError: no such model, one that transformers cannot load, a checkpoint that lacks tensors
            or holds them in another shape (transformers would draw them at random), or too large for its GPUs.
    """
    tokenizer = load_tokenizer(path)
    devices = device if isinstance(device, list) else [device or "cpu"]
    place: dict = {"device_map": devices[0]} if str(devices[0]) != "cpu" else {}
    gpus = [torch.device(one).index for one in devices]
    if len(devices) > 1:
        free = {gpu: int(0.8 * torch.cuda.mem_get_info(gpu)[0]) for gpu in gpus}  # the rest: activations and cache
        place = {"device_map": "auto", "max_memory": free}
    report = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    from_pretrained = auto_class(_load(AutoConfig.from_pretrained, path)).from_pretrained
    if experts is not None:
        from_pretrained = _class_that_reads(type(empty_model(path)), experts).from_pretrained
    model, found = _load(from_pretrained, path, dtype=dtype, **place, **report)
    if wrong := sorted(found["missing_keys"]) + sorted(name for name, *_ in found["mismatched_keys"]):
        raise ValueError(
            f"model {str(path)!r}: its checkpoint lacks, or holds in another shape, {len(wrong)} tensors that its "
            f"config.json asks for ({wrong[0]}): fetch it again"
        )
    if len(devices) > 1 and not set(model.hf_device_map.values()) <= set(gpus):
        raise ValueError(f"model {str(path)!r} does not fit on {', '.join(map(str, devices))}: give it more GPUs")
    return model.eval(), tokenizer


def _class_that_reads(cls: type[nn.Module], experts: Mapping[int, Iterable[int]]) -> type[nn.Module]:
    """A subclass of a transformers model whose `from_pretrained` reads and holds the experts `experts` only.

    from_pretrained builds the model on the meta device and hands it to `_load_pretrained_model` with the checkpoint's
    files, which is where the experts modules are cut to size, and tensors of other experts left out.
    """

    def load(model, state_dict, checkpoint_files, load_config, *args):
        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise ValueError("expert parallelism reads *.safetensors only: convert the checkpoint")
        layer_of = {}
        for layer, (name, module) in find_experts(model).items():
            module.local_ids = sorted(experts[layer])
            for tensor in fused_names(module):
                layer_of[f"{name}.{tensor}"] = layer
                full = getattr(module, tensor)
                setattr(module, tensor, nn.Parameter(full.new_empty(len(module.local_ids), *full.shape[1:])))
        files = [safe_open(file, "pt") for file in checkpoint_files]
        slices = {key: _Slice(file.get_slice(key)) for file in files for key in file.keys()}  # noqa: SIM118
        kept = _local_slices(model, slices, layer_of, load_config.weight_mapping or [])
        loaded = cls._load_pretrained_model(model, kept, None, load_config, *args)
        model.read_bytes = sum(one.read_bytes for one in kept.values())
        model.__class__ = cls
        return loaded

    return type(cls.__name__, (cls,), {"_load_pretrained_model": staticmethod(load)})


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


def _local_slices(
    model: nn.Module, slices: dict[str, _Slice], layer_of: dict[str, int], mapping: list
) -> dict[str, _Slice]:
    """Of a checkpoint's tensors, those that a model of local experts needs.

    Which tensors become a fused one is transformers' knowledge (`mapping`): either one tensor per expert, in the order
    of their numbers, or one for all of them, expert dimension first.
    """
    mapping = copy.deepcopy(mapping)  # it notes which of its patterns matched
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    known, kept = model.state_dict(), {}
    sources: dict[tuple, list[str]] = defaultdict(list)
    for key in sorted(slices, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name in layer_of:
            sources[name, pattern].append(key)
        else:
            kept[key] = slices[key]
    for (name, _), keys in sources.items():
        module = dict(find_experts(model).values())[name.rpartition(".")[0]]
        if len(keys) == module.num_experts:
            kept |= {keys[expert]: slices[keys[expert]] for expert in module.local_ids}
        elif len(keys) == 1 and slices[keys[0]].get_shape()[0] == module.num_experts:
            kept[keys[0]] = _Slice(slices[keys[0]].source, module.local_ids)
        else:
            raise ValueError(f"{name} has {len(keys)} tensors in the checkpoint for {module.num_experts} experts")
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
