"""Open a model: on one device, spread over several GPUs by whole layers, or without its weights."""

import re
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def load_tokenizer(path: str | Path):
    """The tokenizer of a model folder or a hub id. Raises ValueError or FileNotFoundError where there is none."""
    return _load(AutoTokenizer.from_pretrained, path)


def load_base_model(path: str | Path, *, dtype: str | torch.dtype = "auto", device=None):
    """(model, tokenizer) of a folder or a hub id, through the Auto classes, in evaluation mode and without remote code.

    Args:
        dtype: as from_pretrained takes it; "auto" is the checkpoint's.
        device: one device, or a list of GPUs over which the layers are spread by free memory; None is the CPU.

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
    model, found = _load(AutoModelForCausalLM.from_pretrained, path, dtype=dtype, **place, **report)
    if wrong := sorted(found["missing_keys"]) + sorted(name for name, *_ in found["mismatched_keys"]):
        raise ValueError(
            f"model {str(path)!r}: its checkpoint lacks, or holds in another shape, {len(wrong)} tensors that its "
            f"config.json asks for ({wrong[0]}): fetch it again"
        )
    if len(devices) > 1 and not set(model.hf_device_map.values()) <= set(gpus):
        raise ValueError(f"model {str(path)!r} does not fit on {', '.join(map(str, devices))}: give it more GPUs")
    return model.eval(), tokenizer


def empty_model(path: str | Path) -> nn.Module:
    """The model of a folder or a hub id without its weights, on the meta device. Raises as `load_base_model` does."""
    config = _load(AutoConfig.from_pretrained, path)
    with torch.device("meta"):
        return _load(lambda _: AutoModelForCausalLM.from_config(config), path)


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
