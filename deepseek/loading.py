"""Open a model: on one device, over several GPUs by whole layers, with only some of its experts, or without weights."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from accelerate import infer_auto_device_map
from torch import nn
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
from transformers.utils import cached_file

from deepseek import modeling  # noqa: F401 (registers model type "deepseek")
from deepseek.experts import moe_layers
from deepseek.files import check_file
from deepseek.frozen import Storage, forbid_state_dict
from deepseek.grouped_gemm import IMPLEMENTATION
from deepseek.partial_loading import class_that_reads, quantization
from deepseek.process_groups import lost_contact
from deepseek.shards import check_quantization, readable_index

MOST_LAYERS, MOST_EXPERTS = 10_000, 65_536
UNQUANTIZED = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}  # formats that transformers can dequantize


def load_tokenizer(path: str | Path):
    """Return the tokenizer of a model folder or a hub id. Raise ValueError or FileNotFoundError if there is none."""
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
    """Return (model, tokenizer) of a folder or a hub id, in evaluation mode. Remote code is never run.

    Args:
        dtype: as in from_pretrained; "auto" takes that of the checkpoint.
        device: one device, or a list of GPUs over which the layers are spread by free memory; None is the CPU.
        experts: ids of the experts to read, for every MoE layer, as one rank of expert parallelism holds them. None
            reads all. `model.read_bytes` then counts the bytes that were read.
        frozen: how to store the frozen experts while they are read. None keeps the model's dtype, except for a
            checkpoint in block-scaled fp8: its bytes and scales are kept.
        attention: as attn_implementation in from_pretrained, e.g. "flash_attention_2".

    Raises:
        ValueError, FileNotFoundError: there is no such model, transformers cannot load it, its checkpoint lacks tensors
            or holds them in another shape (transformers would draw them at random), or its GPUs are too small.
    """
    tokenizer, config = load_tokenizer(path), load_config(path)
    quantized = quantization(config)
    if quantized and quantized not in UNQUANTIZED:
        raise ValueError(f"cannot load model {str(path)!r}: it is quantized as {quantized}, which cannot be "
                         f"trained on. Give the unquantized one (or {' or '.join(UNQUANTIZED)}).")  # fmt: skip
    if quantized == "fp8" and frozen is None:
        frozen = Storage("fp8")
    devices = device if isinstance(device, list) else [device or "cpu"]
    options: dict = {"device_map": devices[0]} if str(devices[0]) != "cpu" else {}
    gpus = [torch.device(one).index for one in devices]
    if len(devices) > 1:
        free = {gpu: int(0.8 * torch.cuda.mem_get_info(gpu)[0]) for gpu in gpus}  # the rest: activations and cache
        options = {"device_map": _spread(path, free) if frozen else "auto", "max_memory": free}
    if quantized:
        options["quantization_config"] = UNQUANTIZED[quantized](dequantize=True)
    if attention is not None:
        options["attn_implementation"] = attention
    reader = auto_class(config)
    if experts is not None or frozen is not None:
        reader = class_that_reads(type(empty_model(path)), experts, frozen)
    model = _read(reader, path, dtype=dtype, **options)
    if not Path(path).exists():  # a hub id: its files are in the cache now
        check_quantization(Path(cached_file(str(path), "config.json")).parent, quantized)
    if len(devices) > 1 and not set(model.hf_device_map.values()) <= set(gpus):
        raise ValueError(f"cannot load model {str(path)!r}: it needs more GPUs than {', '.join(map(str, devices))}")
    if frozen is not None:
        model.set_experts_implementation(IMPLEMENTATION)
        forbid_state_dict(model)
    return model.eval(), tokenizer


def _read(reader: type, path: str | Path, **options) -> nn.Module:
    """Call from_pretrained of the class `reader`. Refuse a checkpoint that does not fill the model."""
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with readable_index(path) as folder:
        model, found = _load(lambda _, **options: reader.from_pretrained(folder, **options), path, **options)
    if folder != path:
        model.name_or_path = model.config.name_or_path = str(path)
    if wrong := sorted(found["missing_keys"]) + sorted(name for name, *_ in found["mismatched_keys"]):
        raise ValueError(
            f"cannot load model {str(path)!r}: its checkpoint lacks, or holds in another shape, {len(wrong)} tensors "
            f"that its config.json asks for ({wrong[0]}). Fetch it again."
        )
    return model


def _spread(path: str | Path, free: dict[int, int]) -> dict[str, int | str]:
    """Assign layers to GPUs with `free` bytes each, counting one byte per parameter of an expert."""
    empty = empty_model(path)
    layers = moe_layers(empty).values()
    one_byte = {f"{layer.name}.{name}": torch.int8 for layer in layers for name in layer.tensor_names}
    return infer_auto_device_map(
        empty, free, empty._no_split_modules, dtype=empty.config.dtype, special_dtypes=one_byte
    )


def empty_model(path: str | Path, attention: str | None = None) -> nn.Module:
    """Return the model of a folder or a hub id without weights, on the meta device. Raise as `load_base_model`."""
    config, given = load_config(path), {"attn_implementation": attention} if attention else {}
    model = _load(lambda _, **options: model_of(config, **options), path, **given)
    top_k = getattr(config.get_text_config(), "num_experts_per_tok", None)  # some families have another name for it
    for layer in moe_layers(model, dense_ok=True).values():
        _check_size(path, "the number of experts", layer.num_experts, MOST_EXPERTS)
        if isinstance(top_k, int):
            _check_size(path, "num_experts_per_tok", top_k, layer.num_experts)
    return model


def model_of(config: PreTrainedConfig, *, trust_remote_code: bool = False, **options) -> nn.Module:
    """Return the model of a config without weights, on the meta device. `options` are those of from_config."""
    with torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=trust_remote_code, **options)


def load_config(path: str | Path) -> PreTrainedConfig:
    """Return the config of a folder or a hub id. Refuse a folder with weights that are not quantized as it says."""
    config = _load(AutoConfig.from_pretrained, path)
    _check_size(path, "num_hidden_layers", config.get_text_config().num_hidden_layers, MOST_LAYERS)
    check_quantization(Path(path), quantization(config))
    return config


def _check_size(path: str | Path, name: str, value: int, most: int) -> None:
    """Refuse a config that no model can have: to build it would take forever, or to run it would fail."""
    if not 0 < value <= most:
        raise ValueError(f"cannot load model {str(path)!r}: {name} is {value} in its config.json, not 1 to {most}.")


def vocab_size(path: str | Path) -> int:
    """Return how many tokens the model of a folder or a hub id knows: the rows of its embedding."""
    return _load(AutoConfig.from_pretrained, path).get_text_config().vocab_size


def auto_class(config: PreTrainedConfig) -> type:
    """Return the Auto class of a causal language model, or else of a model of images and text.

    Some families, such as Qwen3-VL-MoE, have no language model of their own. Their text can be trained all the same.
    """
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


@contextlib.contextmanager
def first_forward(model: nn.Module) -> Iterator[None]:
    """Turn what a bad value of config.json causes when the model first runs into a ValueError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, NameError, RuntimeError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or lost_contact(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        name = model.config.name_or_path or model.config.model_type
        raise ValueError(
            f"cannot run model {name!r}: {type(error).__name__}: {reason}. Look at the values in its config.json."
        ) from error


def keeps_documents_apart(model: nn.Module) -> bool:
    """Return whether `model` masks attention between the documents of a pack.

    transformers makes that mask where `position_ids` start again. Some families make none, and recurrent layers carry
    their state over. The test: if documents are apart, the second one's hidden states have a gradient of exactly 0 with
    respect to the first one's embeddings, in any dtype.
    """
    kept = []

    def hook(_module, _args, output):
        kept.append(output.detach().requires_grad_())
        return kept[0]

    embeddings = model.get_input_embeddings()
    positions_BT = torch.arange(4).repeat(2)[None].to(embeddings.weight.device)
    with embeddings.register_forward_hook(hook), torch.enable_grad(), first_forward(model):
        out = model.base_model(input_ids=positions_BT, position_ids=positions_BT, use_cache=False)
        second_TD = out.last_hidden_state[0, 4:]
        (grad_TD,) = torch.autograd.grad(second_TD.float().pow(2).sum(), kept)[0]
    return not grad_TD[:4].any()


def draws_in_training(model: nn.Module) -> bool:
    """Return whether `model` draws random numbers in training: its routers sample or add noise, or it has dropout.

    The test is a forward of four tokens, after which the state of the random numbers is as before.
    """
    device = model.get_input_embeddings().weight.device
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), first_forward(model):
        before = torch.cuda.get_rng_state(device) if devices else torch.get_rng_state()
        model.train()
        try:
            model.base_model(input_ids=torch.arange(4, device=device)[None], use_cache=False)
        finally:
            model.eval()
        return not torch.equal(before, torch.cuda.get_rng_state(device) if devices else torch.get_rng_state())


def _load(function, path: str | Path, **kwargs):
    """Call a loading function of transformers, without remote code. An error is one sentence with the path in it."""
    path, hub_id = str(path), re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path))
    if not (Path(path, "config.json").is_file() or (hub_id and not Path(path).exists())):
        why = "it has no config.json" if Path(path).exists() else "no such folder, and not a hub id (owner/name)"
        raise FileNotFoundError(f"cannot load model {path!r}: {why}")
    for file in Path(path).iterdir() if Path(path).is_dir() else ():
        if not (file.is_dir() or file.name.startswith(".")):
            check_file(file)
    try:
        return function(path, trust_remote_code=False, **kwargs)  # left out, it would ask on stdin
    except Exception as error:  # a damaged folder makes transformers and its libraries raise almost anything
        told = " ".join(" ".join(str(error).strip().split("\n")[:2]).split())
        reason = f"{type(error).__name__}: {told}"
        if isinstance(error, OSError) and not Path(path).exists():
            reason = f"no such folder, and it could not be read from the hub or its cache ({reason})"
        if "trust_remote_code" in str(error):
            reason = "the code in its folder is never run. Give a model that transformers has a class for."
        raise ValueError(f"cannot load model {path!r}: {reason}") from error
