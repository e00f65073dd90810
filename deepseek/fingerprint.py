"""Tell one base model from another by what its files hold, however they are stored.

    base_note(model)  ->  {"model_type", "layers", "num_experts", "router", "weights", "dtypes", "revision"}

`router` is the SHA-256 of the routers' weights in memory. `weights` is that of a sample of every tensor in the files of
the checkpoint. ESFT leaves routers alone, so a merged model has the routers of its base, and other weights. The sample
is `SAMPLE` entries at each of four places of a tensor. A change that misses them all is not seen.

Values count, not bytes. They are rounded to bf16, so a copy in bf16 or fp32 is the same base. So is the bf16 form of a
checkpoint in fp8, whose entries are multiplied by their scales. Tensors count by name. How they are shared out to files
does not count, nor does a tied tensor that is stored twice. A checkpoint in another packed format (mxfp4) is compared
with checkpoints of that format alone.
"""

import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from deepseek.experts import moe_layers
from deepseek.files import named
from deepseek.shards import TORCH_DTYPES, Shard, read_tensor, scale_names, stored_tensors, weight_files

SAMPLE = 256


def base_note(model: nn.Module) -> dict:
    """Return the note of a base that an adapter, an expert config and a run hold.

    The checkpoint is the one from which transformers read the model (`name_or_path`).
    """
    layers = moe_layers(model)
    return {
        "model_type": model.config.model_type,
        "layers": [min(layers), max(layers)],
        "num_experts": layers[min(layers)].num_experts,
        "router": router_fingerprint(model),
        **checkpoint_note(model.name_or_path),
    }


def difference(here: Mapping, there: Mapping) -> str | None:
    """Say how the base `here` is another one than `there`; None where the notes agree in what both of them hold."""

    def differ(key: str) -> bool:
        return bool(here.get(key) and there.get(key) and here[key] != there[key])

    if differ("model_type"):
        return f"a {there['model_type']} model, this one is {here['model_type']}"
    if differ("router"):
        return "the routers' weights differ"
    revisions = f" (revision {there['revision']}, this one is {here['revision']})" if differ("revision") else ""
    (form, _, digest), (its_form, _, its_digest) = (str(n.get("weights", "")).partition(":") for n in (here, there))
    if form and form == its_form:
        return f"the weights differ{revisions}" if digest != its_digest else None
    return f"it is another revision{revisions}" if revisions and not (form and its_form) else None


# --------------------------------------------------------------------------------------------------------------------
# in memory


def router_parameters(model: nn.Module) -> list[str]:
    """Return the names of the routers' weights: the matrices with E rows beside the experts of each MoE block."""
    names = []
    for layer in moe_layers(model).values():
        block = layer.name.rpartition(".")[0]
        for key, param in sorted(model.get_submodule(block).named_parameters()):
            other = key.startswith("experts") or "lora_" in key
            if param.ndim == 2 and param.shape[0] == layer.num_experts and not other:
                names.append(f"{block}.{key}")
    return names


def router_fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of the routers' weights in bf16, or "" if there are none or they have no storage."""
    digest, names = hashlib.sha256(), router_parameters(model)
    if any(model.get_parameter(name).is_meta for name in names):
        return ""
    for name in names:
        weight = model.get_parameter(name).detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(weight.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if names else ""


# --------------------------------------------------------------------------------------------------------------------
# on disk


def checkpoint_note(path: str | Path) -> dict:
    """Return {"weights": "<form>:<SHA-256>", "dtypes": [...]} of a folder or a hub id; of that also the "revision".

    Of a hub id, the files in the cache are read, and nothing is fetched. What is not known is left out: a folder that
    is not there, or does not hold all its weights as safetensors.

    Raises:
        ValueError: a file is damaged.
    """
    folder, note = Path(path), {}
    if not folder.is_dir() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)):  # a hub id
        cached = try_to_load_from_cache(str(path), "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else folder
        note = {"revision": folder.name} if isinstance(cached, str) else {}
    try:
        files = weight_files(folder) if path else set()
    except FileNotFoundError:
        files = set()
    if not files or not all((folder / name).is_file() for name in files):
        return note
    stats = [(folder / name).stat() for name in ("config.json", *sorted(files))]
    stamps = tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)
    return {**_read_weights(folder, tuple(sorted(files)), stamps), **note}


@functools.lru_cache
def _read_weights(folder: Path, files: tuple[str, ...], stamps: tuple) -> dict:
    """Return the "weights" and "dtypes" of a note. The stamps change with the files, so these are read once."""
    with named(folder / "config.json"):  # which may repeat a key: transformers takes the last
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization_config") or {}
    form, block = quantization.get("quant_method") or "values", quantization.get("weight_block_size")
    stored, digests = stored_tensors(folder), {}
    in_fp8 = [key for key, one in stored.items() if one.dtype.startswith("F8_E")] if form == "fp8" else []
    scale_of = {key: name for key in in_fp8 for name in scale_names(key) if name in stored}
    scales = set(scale_of.values())
    for file in files:
        with Shard(folder / file) as shard:
            for key in shard.header.keys() - scales:
                scale = None
                if name := scale_of.get(key):
                    scale = shard.read(name) if stored[name].file == file else read_tensor(folder, stored, name)
                content = _sample(shard, key, scale, block or stored[key].shape)
                digests[key.removeprefix("model.")] = hashlib.sha256(content).hexdigest()
    by_digest = {digest: name for name, digest in sorted(digests.items())}  # the last name of what is stored twice
    total = hashlib.sha256(repr(sorted(by_digest.items())).encode()).hexdigest()
    dtypes = sorted({one.dtype for one in stored.values()})
    return {"weights": f"{'values' if form == 'fp8' else form}:{total}", "dtypes": dtypes}


def _sample(shard: Shard, key: str, scale: Tensor | None, block: Sequence[int]) -> bytes:
    """Return a sample of a tensor as bf16, or as it is stored where its numbers are packed.

    `scale` has a number for each `block` (rows, columns) of the tensor.
    """
    shape, dtype = shard.header[key]["shape"], TORCH_DTYPES.get(shard.header[key]["dtype"])
    size = math.prod(shape)
    starts = [0, size // 3, 2 * size // 3, size - SAMPLE] if size > 4 * SAMPLE else [0]
    count = SAMPLE if len(starts) > 1 else size
    content = b"".join(shard.read_bytes(key, start, count) for start in starts)
    if dtype is None or not size:
        return content
    values = torch.frombuffer(bytearray(content), dtype=dtype).float()
    if scale is not None:
        index = torch.cat([torch.arange(start, start + count) for start in starts])
        scale = scale.float().reshape(math.ceil(shape[0] / block[0]), -1)
        values *= scale[index // shape[1] // block[0], index % shape[1] // block[1]]
    return values.bfloat16().view(torch.uint8).numpy().tobytes()
