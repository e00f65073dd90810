"""Models without weights, for estimates: those of configs/published.json by name, and any other by folder or hub id."""

import json
from pathlib import Path

from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from deepseek.files import suggest
from deepseek.loading import empty_model, model_of
from utils import ROOT


def published_models() -> dict[str, tuple[PreTrainedConfig, float]]:
    """Return name -> (config, total parameters in billions, as the makers give them)."""
    found = {}
    for name, values in json.loads((ROOT / "configs" / "published.json").read_text(encoding="utf-8")).items():
        billions = values.pop("published_billions")
        found[name] = (AutoConfig.for_model(values.pop("model_type"), **values), billions)
    return found


def open_model(path: str) -> nn.Module:
    """Return the model of a folder, a hub id or a published name, without weights."""
    known = published_models()
    if not Path(path).exists() and (name := path.rpartition("/")[2]) in known:
        config, _ = known[name]
        return model_of(config)
    if "/" not in path and not Path(path).exists():
        raise FileNotFoundError(
            f"cannot open model {path!r}: it is neither a folder nor a name of configs/published.json"
            f"{suggest(path, known)}"
        )
    return empty_model(path)
