"""How strong a change of a base is: base + strength x (tuned - base).

Between 0 (the base) and 1 (as it was trained), a model keeps more of what the base knew (Wortsman et al., WiSE-FT,
arXiv 2109.01903). Up to 2 the change is extrapolated. The tuned values are those of an adapter, or those of a whole
fine-tuned model.
"""

from itertools import chain
from numbers import Real
from pathlib import Path

from torch import Tensor, nn

from deepseek.adapters import find_state, forget_name, is_adapter
from deepseek.files import read_json
from deepseek.fingerprint import base_note, difference
from deepseek.loading import empty_model, load_base_model

MOST = 2.0  # beyond, a change is larger than all that was learned


def check_strength(strength: float) -> None:
    """Raise ValueError for a strength that is not from 0 to 2."""
    if not isinstance(strength, Real) or not 0 <= strength <= MOST:
        raise ValueError(f"cannot use strength {strength!r}: it is not from 0 (the base) to {MOST:g}. 1 is as trained.")


def blend(base: Tensor, tuned: Tensor, strength: float) -> Tensor:
    """Return base + strength x (tuned - base) in fp32, for the caller to round once; at strength 1, `tuned` itself."""
    if strength == 1:
        return tuned
    return base.float() + strength * (tuned.to(base.device).float() - base.float())


def is_whole(folder: str | Path) -> bool:
    """Return whether a folder holds a whole model, and not an adapter."""
    folder = Path(folder)
    return not is_adapter(folder) and (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def check_whole(model: nn.Module, folder: str | Path) -> None:
    """Raise ValueError if a whole model was not trained from `model`, which may be without weights."""
    if find_state(model):
        raise ValueError(f"cannot use {folder}: the model is in training, or holds an adapter. Call unload first.")
    theirs = {name: param.shape for name, param in empty_model(folder).named_parameters()}
    ours = {name: param.shape for name, param in model.named_parameters()}
    if odd := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        raise ValueError(
            f"cannot use {folder} with this base: {odd[0]} is not in both, or has another shape ({len(odd)} such "
            "parameters). Give the base that it was trained from, or the model alone, as --base_model_path."
        )
    run = Path(folder) / "run.json"
    if run.is_file() and (how := difference(base_note(model), read_json(run).get("base", {}))):
        raise ValueError(f"cannot use {folder}: it was trained on another base model: {how}. Give that one.")


def blend_whole(model: nn.Module, folder: str | Path, strength: float) -> nn.Module:
    """Change a model toward a whole fine-tuned one, for good: all parameters and buffers. The host holds both.

    Raises:
        ValueError, FileNotFoundError: it was not trained from this model, or cannot be loaded.
    """
    check_whole(model, folder)
    tuned, _ = load_base_model(folder)  # in the dtype in which it is stored
    # the biases by which some routers choose are buffers
    ours, theirs = (dict(chain(one.named_parameters(), one.named_buffers())) for one in (model, tuned))
    for name, tensor in ours.items():
        tensor.data.copy_(blend(tensor.data, theirs[name].data, strength))
    forget_name(model)
    return model
