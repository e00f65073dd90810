"""The files of an adapter, and the places in a model where its tensors go.

    out/expert_cfg.json        which experts, and a note of the base (deepseek/fingerprint.py)
    out/adapter.safetensors    model.layers.1.mlp.experts.7.gate_proj.weight (F, D), ...

An adapter of LoRA on single experts is in peft's format (lora.py). It stands for the same tensors: each is that of the
base plus s B A.

`config` is an `esft.ExpertConfig` everywhere.
"""

import contextlib
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deepseek.experts import base_name, moe_layers
from deepseek.files import import_extra, list_checkpoints, read_json
from deepseek.fingerprint import base_note, difference
from deepseek.lora import (
    LORA_CONFIG_NAME,
    LORA_WEIGHTS_NAME,
    PREFIX,
    Lora,
    factor_shapes,
    is_lora,
    of_single_experts,
    read_lora,
)
from deepseek.masters import DTYPE_OF_BASE, name_in_base, trained_parameter
from deepseek.routing import router_weights
from deepseek.shards import DTYPES, Shard

CONFIG_NAME = "expert_cfg.json"
WEIGHTS_NAME = "adapter.safetensors"
BASE_NAME = "base.json"  # the note of the base that train.py puts beside a LoRA adapter
EXPERT = re.compile(r"(?:^|\.)(?P<layer>\d+)\..*?experts\.(?P<expert>\d+)\.")  # in a tensor's name in an adapter

# --------------------------------------------------------------------------------------------------------------------
# in the model


def on_host(tensor: Tensor) -> Tensor:
    """Return a copy in host memory, from where it comes back to a GPU quickly."""
    return tensor.cpu().pin_memory() if tensor.is_cuda else tensor.to("cpu", copy=True)


def ordinary_parameters(model: nn.Module, config) -> list[str]:
    """Return the names (as in the base) of the parameters outside the routed experts that `config` includes.

    Raises:
        ValueError: peft adapts one of them.
    """
    experts = [layer.name for layer in moe_layers(model).values()]
    routed = tuple(f"{name}." for name in experts)
    layers = tuple(re.match(r".*?\.\d+\.", name)[0] for name in experts)
    names, of_routers = [], {id(param) for param in router_weights(model, config.routers)}
    for name, param in model.named_parameters():
        name = name_in_base(name)
        if name.startswith(routed) or name == DTYPE_OF_BASE:
            continue
        # shared experts are beside the routed experts or, in Granite, beside the block that holds them
        shared = name.startswith(layers) and re.search(r"\.[^.]*shared[^.]*(?<!gate)\.", name)
        named = name in config.parameters or id(param) in of_routers
        if named or (config.shared_experts if shared else config.non_expert_modules):
            if re.search(r"\.(base_layer|original_module)\.", name):
                raise ValueError(
                    f"cannot train {base_name(name)}: an adapter of peft is on it, too. Leave it out of the config of "
                    "peft or out of that of the experts."
                )
            names.append(name)
    return names


def adapter_views(model: nn.Module, config) -> dict[str, Tensor]:
    """Return the tensors that an adapter of `config` stands for, by their names in it, as views into `model`.

    A routed expert has `<experts module>.<expert>.gate_proj.weight` (F, D), `up_proj` and `down_proj` (D, F), whatever
    the layout in memory. Others have the name of their parameter. Under expert parallelism only local experts are here.
    """
    views: dict[str, Tensor] = {}
    for layer in moe_layers(model).values():
        local = set(layer.local_ids)
        for expert in config.experts.get(layer.index, ()):
            if expert in local:
                for projection, view in layer.expert_views(expert).items():
                    views[f"{layer.name}.{expert}.{projection}"] = view
    for name in ordinary_parameters(model, config):
        views[name] = trained_parameter(model, name).data
    return views


def lora_views(model: nn.Module) -> dict[str, Tensor]:
    """Return the factors that are trained, by their names in an adapter, as views: of experts, and those of peft."""
    views: dict[str, Tensor] = {}
    for layer in moe_layers(model).values():
        for expert in layer.lora.expert_ids if layer.lora else ():
            views |= {f"{layer.name}.{expert}.{name}": view for name, view in layer.lora.views(expert).items()}
    return views | {name: param.data for name, param in _of_peft(model).items()}


def _of_peft(model: nn.Module) -> dict[str, nn.Parameter]:
    named = model.named_parameters()
    return {f"{n.removesuffix('.default.weight')}.weight": p for n, p in named if n.endswith(".default.weight")}


def lora_shapes(model: nn.Module, config, lora: Lora) -> dict[str, torch.Size]:
    """Return the shapes of the factors of `lora_views`, under expert parallelism of all ranks.

    Raises:
        ValueError: a layer of peft has another rank or scale than the experts.
    """
    shapes = factor_shapes(adapter_shapes(model, config), lora.rank)
    for name, param in _of_peft(model).items():
        layer, _, letter = name.removesuffix(".weight").rpartition(".lora_")
        rank, scale = param.shape[letter == "B"], model.get_submodule(layer).scaling["default"]
        if (rank, scale) != (lora.rank, lora.scale):
            raise ValueError(f"cannot write one adapter: {layer} has rank {rank} and scale {scale:g}, the experts have "
                             f"{lora.rank} and {lora.scale:g}. Give peft the same r and lora_alpha.")  # fmt: skip
        shapes[name] = param.shape
    return shapes


def adapter_shapes(model: nn.Module, config, local: bool = False) -> dict[str, torch.Size]:
    """Return the shapes of the tensors of an adapter of `config`, by their names in it.

    Under expert parallelism they are those of all ranks, or with `local` those of this rank.
    """
    shapes: dict[str, torch.Size] = {}
    for layer in moe_layers(model).values():
        here, views = set(layer.local_ids), layer.expert_shapes().items()
        for expert in config.experts.get(layer.index, ()):
            if expert in here or not local:
                shapes |= {f"{layer.name}.{expert}.{projection}": view.shape for projection, view in views}
    return shapes | {name: trained_parameter(model, name).shape for name in ordinary_parameters(model, config)}


def experts_by_layer(names: Iterable[str]) -> tuple[dict[int, list[int]], list[str]]:
    """Return the expert ids by layer, and the names of the other tensors, from tensor names of an adapter."""
    experts, others = defaultdict(set), []
    for name in names:
        if place := EXPERT.search(name):
            experts[int(place["layer"])].add(int(place["expert"]))
        else:
            others.append(name)
    return {layer: sorted(experts[layer]) for layer in sorted(experts)}, sorted(others)


# --------------------------------------------------------------------------------------------------------------------
# the base of an adapter


def find_state(model: nn.Module):
    """Return what `esft.to_esft` or `esft.add_adapter` noted on the model, or None."""
    return getattr(model, "_esft", None)


def read_base_note(path: str | Path) -> dict:
    """Return the note of the base in an adapter's folder or in an expert config, or {}."""
    path = Path(path)
    path = path / (BASE_NAME if is_lora(path) else CONFIG_NAME) if path.is_dir() else path
    found = read_json(path).get("base") if path.is_file() else None
    if isinstance(found, str):  # a note that someone else wrote
        return {"name": found}
    return found if isinstance(found, dict) else {}


def check_base(base: Mapping, folder: str | Path) -> None:
    """Raise ValueError if an adapter's note says that it was made for another base than `base`, a `base_note`."""
    found = read_base_note(folder)
    if how := difference(base, found):
        name = f" ({found['name']})" if found.get("name") else ""
        raise ValueError(f"it was trained on another base model{name}: {how}. Give the one that it was trained on.")


# --------------------------------------------------------------------------------------------------------------------
# files


def is_adapter(folder: str | Path) -> bool:
    """Return whether a folder holds an adapter, of experts or in peft's format."""
    return is_lora(folder) or (Path(folder) / CONFIG_NAME).is_file()


@dataclass(frozen=True)
class Source:
    """Where the new value of a tensor is: in one tensor of an adapter, or in the factors A and B, or nowhere."""

    path: Path
    keys: tuple[str, ...]
    scale: float = 1.0

    def read(self, shard: Shard) -> tuple[Tensor, ...]:
        return tuple(shard.read(key) for key in self.keys)

    def value(self, read: tuple[Tensor, ...], base: Tensor) -> Tensor:
        """Return the new value of a tensor that is `base`."""
        if len(read) < 2:
            return read[0] if read else base
        A, B = (factor.to(base.device, torch.float32) for factor in read)
        return base.float() + self.scale * B @ A


def read_sources(found: Mapping[str, Source], names: Collection[str]) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """Yield (name, what is read for it) of some sources. Raise ValueError for values that are not finite."""
    for path in sorted({found[name].path for name in names}):
        with Shard(path) as shard:
            for name in [name for name in names if found[name].path == path]:
                read = found[name].read(shard)
                if not all(tensor.isfinite().all() for tensor in read):
                    raise ValueError(f"{name} has values that are not finite. Train it anew.")
                yield name, read


def find_sources(folder: str | Path, shapes: Mapping[str, torch.Size]) -> dict[str, Source]:
    """Return where an adapter has the new values of the tensors of these shapes. Raise as `find_adapter_tensors`."""
    if not is_lora(folder):
        return find_adapter_tensors(folder, shapes)
    lora = read_lora(folder)
    factors = find_adapter_tensors(folder, factor_shapes(shapes, lora.rank), PREFIX)
    sources = {}
    for name in shapes:
        of_name = [factors[key] for key in factor_shapes({name: shapes[name]}, lora.rank)]  # none for a bias
        path = of_name[0].path if of_name else Path(folder, LORA_WEIGHTS_NAME)
        sources[name] = Source(path, tuple(key for one in of_name for key in one.keys), lora.scale)
    return sources


def find_adapter_tensors(folder: str | Path, expected: Mapping[str, torch.Size], prefix: str = "") -> dict[str, Source]:
    """Return where each tensor of an adapter folder is, by the names in `expected`, without reading it.

    A key is `prefix` and the name, and may lack the leading "model.".

    Raises:
        ValueError: a file is damaged; a tensor is missing, unknown, there twice, of another shape than in `expected`,
            or not of a dtype in `DTYPES`.
    """
    places: dict[str, list[Source]] = {name: [] for name in expected}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with Shard(path) as shard:
            for key, entry in shard.header.items():
                name = key.removeprefix(prefix)
                name = f"model.{name}" if f"model.{name}" in expected else name
                places.setdefault(name, []).append(Source(path, (key,)))
                shape, dtype = tuple(entry["shape"]), entry["dtype"]
                wanted = tuple(expected.get(name, shape))
                if shape != wanted or dtype not in DTYPES:
                    known = ", ".join(DTYPES)
                    raise ValueError(f"{name} has shape {shape} in {dtype}, this model's is {wanted} in {known}")
    for name, found in sorted(places.items(), key=lambda item: item[0] in expected):  # unknown names first
        if len(found) != (name in expected):
            files = ", ".join(one.path.name for one in found) or "*.safetensors"
            problem = "there twice" if found else "missing"
            if name not in expected:
                like = f", whose names are like {min(expected)}" if expected else ""
                problem = f"not in its {CONFIG_NAME} or not in this model{like}"
            raise ValueError(f"{name} is {problem} ({files})")
    return {name: found[0] for name, found in places.items()}


def describe_wrong_folder(folder: Path) -> str:
    """Return a sentence that says what a folder without an adapter holds instead."""
    checkpoints = list_checkpoints(folder)
    if (folder / "config.json").is_file():
        hint = "It holds a whole model: give it as --base_model_path."
    elif checkpoints:
        hint = f"Its run did not finish: go on with it, or give {checkpoints[-1]}."
    elif (folder / "summary.json").is_file() or (folder / "expert_scores.json").is_file():
        hint = "It holds expert scores: make an expert config of them with scripts/expert/generate_expert_config.py."
    elif is_lora(folder):
        hint = "It holds a LoRA adapter: merge it with esft.add_adapter."
    else:
        hint = f"An adapter is {CONFIG_NAME} with {WEIGHTS_NAME}, or a LoRA with {LORA_CONFIG_NAME}."
    return f"cannot use {folder}: it is not an adapter, as it has no {CONFIG_NAME}. {hint}"


# --------------------------------------------------------------------------------------------------------------------
# LoRA, for comparison and beside trained experts


def has_peft(model: nn.Module) -> bool:
    """Return whether an adapter of peft is in the model. peft notes it there, and forgets it when it is merged."""
    return "peft_config" in vars(model)


@contextlib.contextmanager
def without_peft(model: nn.Module) -> Iterator[None]:
    """Switch the adapters of peft in the model off while open."""
    if not has_peft(model):
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    layers = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    layers = [layer for layer in layers if not layer.disable_adapters]
    learns = [(param, param.requires_grad) for param in model.parameters()]  # peft sets it as it switches
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for param, value in learns:
            param.requires_grad_(value)


def any_requires_grad(modules: Iterable[nn.Module]) -> bool:
    """Return whether a parameter of `modules`, without their children, requires a gradient."""
    return any(param.requires_grad for module in modules for param in module.parameters(recurse=False))


def set_requires_grad(modules: Iterable[nn.Module], value: bool) -> None:
    """Make the parameters of `modules`, without their children, require a gradient, or freeze them."""
    for module in modules:
        for param in module.parameters(recurse=False):
            param.requires_grad_(value)


def refuse_lora_on_experts(model: nn.Module) -> None:
    """Raise ValueError if peft adapts fused experts. `to_esft` has another order of the rows."""
    for layer in moe_layers(model).values():
        if model.get_submodule(layer.name) is not layer.module:
            _refuse_lora_on(layer.name)


def _refuse_lora_on(experts: str) -> None:
    raise ValueError(
        f"cannot train {experts}: LoRA is on its fused tensors, where peft puts it for target_parameters, all-linear, "
        "gate_proj, up_proj and down_proj. Name other modules in LoraConfig, as q_proj and o_proj."
    )


def check_forward(trained: list[nn.Module], experts: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Refuse a forward in which peft's adapters learn and what `to_esft` trains does not: a pre-hook of `experts`.

    `trained` holds the parameters of the whole model that `to_esft` trains. A model in which nothing learns passes,
    and so does one in evaluation mode.
    """
    if parametrize.is_parametrized(experts):  # by LoRA, during its forward
        _refuse_lora_on("the experts")
    if experts.training and args[0].requires_grad and trained and not any_requires_grad(trained):
        raise ValueError(
            "cannot train the experts: a gradient passes through them, and all of them are frozen, as peft freezes "
            "what it finds. Call to_esft after get_peft_model, or again with the same config. If they shall stay as "
            "they are, call merge before."
        )


def is_for_peft(folder: str | Path) -> bool:
    """Return whether peft has to merge an adapter: one of LoRA that is not on single experts."""
    return is_lora(folder) and not of_single_experts(folder)


def forget_name(model: nn.Module) -> None:
    """Note that a model is not the checkpoint any more that it was read from. TRL would read its reference there."""
    model.name_or_path = model.config.name_or_path = ""


def merge_lora(model: nn.Module, folder: str | Path, strength: float = 1.0) -> nn.Module:
    """Merge a LoRA adapter of peft into the model, for good, with `strength` times its change."""
    if has_peft(model) or ((state := find_state(model)) and state.training):
        raise ValueError(
            f"cannot merge the LoRA adapter {folder}: the model is in training, or holds an adapter of peft. Merge it "
            "before to_esft, or load it by peft itself."
        )
    learns = {name: param.requires_grad for name, param in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft makes patterns for the fused experts, and then finds them unused
        try:
            PeftModel = import_extra("peft", "lora").PeftModel
            rescale_adapter_scale = import_extra("peft.helpers", "lora").rescale_adapter_scale
            check_base(base_note(model), folder)
            lora = PeftModel.from_pretrained(model, str(folder), local_files_only=True)
            found = lora.load_adapter(str(folder), "default", local_files_only=True)
            if lost := found.unexpected_keys + found.missing_keys:  # peft only warns
                lora.unload()
                raise ValueError(f"{lost[0]} is not in both its files and this model ({len(lost)} such tensors)")
            with rescale_adapter_scale(lora, strength) if strength != 1 else contextlib.nullcontext():
                merged = lora.merge_and_unload()
            forget_name(merged)
            for name, param in merged.named_parameters():  # peft has frozen them
                param.requires_grad_(learns[name])
            return merged
        except Exception as error:  # a damaged folder makes peft raise almost anything
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            reason = f"{kind}{error}".strip().split("\n")[0]
            raise ValueError(f"cannot merge the LoRA adapter {folder}: {reason}") from error
