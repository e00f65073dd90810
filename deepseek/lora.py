"""LoRA on the selected experts: a low-rank change of each of their matrices, in place of the matrices themselves.

    W' = W + s B A        A (r, I), B (O, r), s = alpha / r        for each projection of each selected expert

A and B are what is trained, in fp32. B is zero at the start, and A as peft draws it (Hu et al. 2021). The fused tensor
keeps the values of the base. The grouped products add the change to the rows of the trained prefix, as two thin
products (grouped_gemm.py). They take one pair of factors per fused matrix. For gate_up_proj these are joined, with a
block for gate and one for up, in the order of its rows:

    A (S, 2r, D) = [A_gate; A_up]        B (S, 2F, 2r) = [B_gate 0; 0 B_up]

An adapter is in peft's format, with the name that peft would give if each expert were Linear layers of its own:

    out/adapter_config.json          rank, alpha, and the names of the changed layers
    out/adapter_model.safetensors    base_model.model.model.layers.1.mlp.experts.7.gate_proj.lora_A.weight (r, D), ...
    out/base.json                    the note of the base (fingerprint.py)

Legend: S trained experts of the layer, O and I outputs and inputs of a matrix, D hidden, F expert hidden, r rank.
"""

import math
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from deepseek.experts import MoELayer, SelectedExperts
from deepseek.files import atomic_path, named, read_json, write_json
from deepseek.shards import Shard

LORA_CONFIG_NAME = "adapter_config.json"
LORA_WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of peft's names
WIDTH = 8  # the rank is filled up to a multiple of this, as a grouped product needs rows of whole 16 bytes
# what peft can make of an adapter that these two factors do not say, and its value where it is not in use
PLAIN = {"use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
         "bias": "none", "fan_in_fan_out": False, "lora_bias": False}  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """The size of the change, and its scale s = alpha / rank."""

    rank: int
    alpha: float

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"cannot train with LoRA: {name} is {value}. Give a number above 0.")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LoraExperts(SelectedExperts):
    """The factors of the selected experts of one layer: gate_proj_lora_A (S, r, D), gate_proj_lora_B (S, F, r), ..."""

    def __init__(self, layer: MoELayer, experts: Iterable[int], lora: Lora):
        super().__init__(layer, experts)
        self.rank, self.scale = lora.rank, lora.scale
        device, ids = layer.module.down_proj.device, sorted(set(experts) & set(layer.local_ids))
        for name, (rows, columns) in matrix_shapes(layer).items():
            A = torch.stack([_draw(self.rank, columns, f"{layer.index} {e} {name}") for e in ids])
            B = torch.zeros(len(A), rows, self.rank)
            self.register_parameter(f"{name}_lora_A", nn.Parameter(A.to(device)))
            self.register_parameter(f"{name}_lora_B", nn.Parameter(B.to(device)))

    def factor(self, projection: str, letter: str) -> nn.Parameter:
        """Return A (S, r, I) or B (S, O, r) of a projection."""
        return self.get_parameter(f"{projection}_lora_{letter}")

    def views(self, expert: int) -> dict[str, Tensor]:
        """Return views of one expert's factors, by their names in an adapter: {"gate_proj.lora_A.weight": ...}."""
        row = self.expert_ids.index(expert)
        return {
            f"{name}.lora_{letter}.weight": self.factor(name, letter).data[row]
            for name in matrix_shapes(self._layer)
            for letter in "AB"
        }

    def operands(self) -> tuple[Tensor, ...]:
        """Return the factors of the first fused matrix and of the second, A (S, R, I) and B (S, O, R) with s in B.

        They are in the dtype of the computation. Autograd leads from them to the parameters.
        """
        found = []
        for name in self._layer.weight_names:
            projections, dtype = self._layer.projections(name), self._layer.tensor(name).dtype
            As = [_widen(self.factor(projection, "A"), 1) for projection in projections]
            Bs = [self.scale * _widen(self.factor(projection, "B"), 2) for projection in projections]
            if len(Bs) == 2:
                R = Bs[0].shape[2]
                Bs = [nn.functional.pad(Bs[0], (0, R)), nn.functional.pad(Bs[1], (R, 0))]
            found += [torch.cat(As, 1).to(dtype), self._layer.join(Bs).to(dtype)]
        return tuple(found)

    def change(self, name: str, row: int) -> Tensor:
        """Return s B A of one expert, in the layout of its slice of the fused matrix `name`, in fp32."""
        pairs = [(self.factor(p, "B")[row], self.factor(p, "A")[row]) for p in self._layer.projections(name)]
        change = self._layer.join([self.scale * B @ A for B, A in pairs])
        return change.T if self._layer.module.is_transposed else change

    def write_back(self, params: Iterable[Tensor] | None = None) -> None:
        """Leave W[:S] as it is: the base's."""

    @torch.no_grad()
    def merge(self) -> None:
        """Add the change to W[:S], rounded once."""
        for name in self._layer.weight_names:
            for row in range(self.num_trained):
                W = self._layer.tensor(name).data[row]
                W.copy_(W.float() + self.change(name, row))


def matrix_shapes(layer: MoELayer) -> dict[str, torch.Size]:
    """Return (O, I) of the matrices of an expert: {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}."""
    return {k.removesuffix(".weight"): one.shape for k, one in layer.expert_shapes().items() if one.ndim == 2}


def _draw(rank: int, columns: int, place: str) -> Tensor:
    """Return A as peft draws it. It depends on the seed and the place alone, so ranks draw what one process would."""
    generator = torch.Generator().manual_seed(random.Random(f"{torch.initial_seed()} {place}").getrandbits(63))
    with torch.device("cpu"):
        return nn.init.kaiming_uniform_(torch.empty(rank, columns), a=math.sqrt(5), generator=generator)


def _widen(factor: Tensor, dim: int) -> Tensor:
    """Fill the rank up with zeros to a multiple of `WIDTH`."""
    missing = -factor.shape[dim] % WIDTH
    return nn.functional.pad(factor, (0, 0, 0, missing) if dim == 1 else (0, missing)) if missing else factor


# --------------------------------------------------------------------------------------------------------------------
# files


def is_lora(folder: str | Path) -> bool:
    """Return whether a folder holds an adapter in peft's format."""
    return (Path(folder) / LORA_CONFIG_NAME).is_file()


def changed_layers(folder: str | Path) -> list[str]:
    """Return the names of the layers that an adapter in peft's format changes, as in the model."""
    with Shard(Path(folder) / LORA_WEIGHTS_NAME) as shard:
        return sorted({key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in shard.header})


def of_single_experts(folder: str | Path) -> bool:
    """Return whether an adapter in peft's format changes single experts, which peft cannot put into fused ones."""
    there = is_lora(folder) and (Path(folder) / LORA_WEIGHTS_NAME).is_file()
    return there and any(re.search(r"experts\.\d+\.", name) for name in changed_layers(folder))


def read_lora(folder: str | Path) -> Lora:
    """Return the size of an adapter in peft's format. Raise ValueError if it is more than B A with one scale."""
    path = Path(folder) / LORA_CONFIG_NAME
    config = read_json(path, "r", "lora_alpha")
    with named(path):
        if more := [key for key, plain in PLAIN.items() if (config.get(key) or plain) != plain]:
            raise ValueError(f"{more[0]} is {config[more[0]]!r}. Only plain LoRA can be merged into single experts.")
        return Lora(int(config["r"]), float(config["lora_alpha"]))


def factor_shapes(shapes: Mapping[str, torch.Size], rank: int) -> dict[str, torch.Size]:
    """Return the shapes of the factors, by their names, for the matrices among `shapes`."""
    found = {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            layer = name.removesuffix(".weight")
            found[f"{layer}.lora_A.weight"] = torch.Size((rank, shape[1]))
            found[f"{layer}.lora_B.weight"] = torch.Size((shape[0], rank))
    return found


def save_lora(folder: Path, tensors: Mapping[str, Tensor], lora: Lora, base_name: str) -> None:
    """Write an adapter in peft's format. The two files are whole or not there."""
    layers = sorted({name.rpartition(".lora_")[0] for name in tensors})
    with atomic_path(folder / LORA_WEIGHTS_NAME) as temporary:
        save_file({f"{PREFIX}{name}": tensors[name] for name in sorted(tensors)}, temporary, {"format": "pt"})
    size = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "target_modules": layers}
    kind = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "inference_mode": True}
    write_json(folder / LORA_CONFIG_NAME, {**kind, **size, **PLAIN})
