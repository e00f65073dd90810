"""The files of an adapter: find, check and read them, and compare their note of the base with a model."""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from deepseek.experts import moe_layers

CONFIG_NAME = "expert_cfg.json"


BASE_NAME = "base.json"  # beside a LoRA: what an expert config says of its base


WEIGHTS_NAME = "adapter.safetensors"


DTYPES = ("F64", "F32", "F16", "BF16")  # of an adapter's tensors, in the words of safetensors


def router_parameters(model: nn.Module) -> list[str]:
    """Names of the routers' weights: in each MoE block, the matrices that have E rows, beside the experts."""
    names = []
    for layer in moe_layers(model).values():
        block = layer.name.rpartition(".")[0]
        for key, param in sorted(model.get_submodule(block).named_parameters()):
            if param.ndim == 2 and param.shape[0] == layer.num_experts and not key.startswith("experts"):
                names.append(f"{block}.{key}")
    return names


def router_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the routers' weights in bf16; "" where there are none to be seen, or they have no storage."""
    digest, names = hashlib.sha256(), router_parameters(model)
    if any(model.get_parameter(name).is_meta for name in names):
        return ""
    for name in names:
        weight = model.get_parameter(name).detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(weight.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if names else ""


def base_note(model: nn.Module, router: str) -> dict:
    """What an adapter tells of the base it is for; `router` is its `router_fingerprint`."""
    layers = moe_layers(model)
    return {
        "model_type": model.config.model_type,
        "layers": [min(layers), max(layers)],
        "num_experts": next(iter(layers.values())).num_experts,
        "router": router,
    }


def read_adapter(
    folder: str | Path, expected: Mapping[str, Tensor], skipped: Collection[str] = ()
) -> dict[str, Tensor]:
    """The tensors that `find_adapter_tensors` finds, by the names in `expected`.

    Raises:
        ValueError, FileNotFoundError: as it does, and for NaN or infinite values.
    """
    found, loaded = find_adapter_tensors(folder, expected, skipped), {}
    for path in sorted({path for path, _ in found.values()}):
        with _open(path) as file:
            loaded |= {name: file.get_tensor(key) for name, (where, key) in found.items() if where == path}
    if broken := [name for name, tensor in loaded.items() if not tensor.isfinite().all()]:
        raise ValueError(
            f"{broken[0]} has values that are no finite numbers ({len(broken)} tensors have); train it anew"
        )
    return loaded


def find_adapter_tensors(
    folder: str | Path, expected: Mapping[str, Tensor], skipped: Collection[str] = ()
) -> dict[str, tuple[Path, str]]:
    """(file, key in it) of each tensor of an adapter folder, by the names in `expected`, whose shapes they must have.

    All `*.safetensors` are looked at, without reading a tensor; their names may lack the leading "model."; those of
    `skipped` may be there.

    Raises:
        ValueError, FileNotFoundError: no file, a damaged one; a tensor missing, unknown, of another shape, or not of
            floating point numbers that a model can be trained in.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no *.safetensors in it, so it is no adapter")
    found: dict[str, tuple[Path, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with _open(path) as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                name = key if key in expected or key in skipped else f"model.{key}"
                if name in skipped:
                    continue
                if name not in expected:
                    raise ValueError(f"{path.name}: {key} is not in its {CONFIG_NAME} or not in this model")
                if name in found:
                    raise ValueError(f"{path.name}: {key} is in this folder twice; keep one adapter per folder")
                header = file.get_slice(key)
                if header.get_dtype() not in DTYPES:
                    raise ValueError(
                        f"{path.name}: {key} is stored as {header.get_dtype()}, expected {', '.join(DTYPES)}: save the "
                        "adapter in one of these"
                    )
                found[name], shapes[name] = (path, key), tuple(header.get_shape())
    for name, view in expected.items():
        if name not in found:
            raise ValueError(f"{name} is missing")
        if shapes[name] != view.shape:
            raise ValueError(
                f"{name} has shape {shapes[name]}, this model's is {tuple(view.shape)}: it was made for another base"
            )
    return found


@contextlib.contextmanager
def _open(path: Path):
    """A safetensors file to read from; ValueError where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} is damaged or truncated ({error}); fetch or save it again") from error


def check_base(model: nn.Module, folder: str | Path) -> None:
    """Raise ValueError where an adapter's notes say that it was made for a base other than `model`; a LoRA's are those
    that train.py puts beside it."""
    path = Path(folder) / (BASE_NAME if is_lora(folder) else CONFIG_NAME)
    base = json.loads(path.read_text(encoding="utf-8")).get("base") if path.is_file() else None
    base = base if isinstance(base, dict) else {}  # a note of someone else's
    router = getattr(model, "_esft", None)
    router = router.router if router else router_fingerprint(model)
    if base.get("model_type", model.config.model_type) != model.config.model_type:
        raise ValueError(f"it was made for a {base['model_type']} model, this one is {model.config.model_type}")
    if base.get("router") and router and base["router"] != router:
        raise ValueError("it was trained on another base model: the routers' weights differ")


def _no_adapter(folder: Path) -> str:
    """What is wrong with a folder that holds no adapter, and what may have been meant."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))
    if (folder / "config.json").is_file():
        hint = "it holds a whole model: give it as --base_model_path"
    elif checkpoints:
        hint = f"its run did not finish: go on with it, or give {checkpoints[-1]}"
    elif (folder / "summary.json").is_file():
        hint = "it holds expert scores, of which scripts/expert/generate_expert_config.py makes an expert config"
    else:
        hint = f"an adapter is {CONFIG_NAME} with {WEIGHTS_NAME}, or a LoRA with adapter_config.json"
    return f"{folder} is no adapter, it has no {CONFIG_NAME}: {hint}"


def is_lora(folder: str | Path) -> bool:
    """Whether a folder holds an adapter in peft's format."""
    return (Path(folder) / "adapter_config.json").is_file()


def _merge_lora(model: nn.Module, folder: str | Path) -> nn.Module:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(
            f"adapter {folder} is a LoRA, which needs peft: python -m pip install -c constraints.txt peft"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # patterns that peft makes for the fused experts and then finds unused
        try:
            check_base(model, folder)
            return PeftModel.from_pretrained(model, str(folder), local_files_only=True).merge_and_unload()
        except Exception as error:  # whatever a damaged folder makes peft raise
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            reason = f"{kind}{error}".strip().split("\n")[0]
            raise ValueError(f"adapter {folder} is no LoRA of this model ({reason})") from error
