"""Where the host waits for the device in a forward and backward: nowhere, but for what is told in the docs.

A GPU is asked (torch.cuda.set_sync_debug_mode). Without one, the same code runs on tensors without storage, and a mode
notes each operation that would make the host wait.
"""

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import esft
from deepseek.experts import moe_layers
from deepseek.grouped_gemm import has_kernel
from tests.helpers import FAMILIES, make_model
from training.data import IGNORE
from training.loss import TokenLosses, label_positions

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "bincount"}
OF_TRANSFORMERS = {"masking_utils.py"}  # does a pack hold several documents?


class _Waits(TorchDispatchMode):
    """Notes the file of each operation that would wait, and answers it."""

    def __init__(self):
        super().__init__()
        self.files: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors} | {torch.device(kwargs.get("device") or "meta").type}
        copies = name in ("_to_copy", "copy_") and len(devices) > 1
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in WAITS or copies or by_mask:
            stack = [Path(frame.filename) for frame in traceback.extract_stack()[:-1]]
            self.files.append(next(path.name for path in reversed(stack) if "torch" not in path.parts))
        if name == "_local_scalar_dense":
            return False if args[0].dtype == torch.bool else 0
        if name == "nonzero":
            return args[0].new_empty(5, args[0].ndim, dtype=torch.long)
        return func(*args, **kwargs)


@contextmanager
def noted(device: torch.device) -> Iterator[list[str]]:
    """Give the names of the files whose code made the host wait."""
    if device.type == "meta":
        with _Waits() as mode:
            yield mode.files
        return
    files: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield files
        finally:
            torch.cuda.set_sync_debug_mode("default")
    files += [Path(w.filename).name for w in caught if "synchronizing" in str(w.message)]


@pytest.fixture
def asked(device) -> torch.device:
    return torch.device("meta") if device.type == "cpu" else device


def trained_model(family: str, device: torch.device, dtype=torch.bfloat16):
    model = make_model(family, dtype).to(device)
    first = min(moe_layers(model))
    return esft.to_esft(model, {"experts": {str(first): [5, 2], "2": [7]}}, keep_base=False).train()


def batch(device: torch.device) -> dict:
    """Two documents in a pack, on the device, with the positions of the labels that the host has found."""
    ids = torch.arange(3, 35)[None]
    labels = ids.clone()
    labels[:, :9] = IGNORE
    positions = torch.cat([torch.arange(20), torch.arange(12)])[None]
    kept = label_positions(labels)[1]
    inputs = {"input_ids": ids, "labels": labels, "position_ids": positions, "kept": kept}
    return {name: tensor.to(device) for name, tensor in inputs.items()} | {"use_cache": False}


def step(model, inputs: dict, chunk: int) -> None:
    inputs = dict(inputs)
    labels, inputs["logits_to_keep"] = label_positions(inputs.pop("labels"), inputs.pop("kept"))
    losses = TokenLosses(model.get_output_embeddings(), chunk)(model, inputs, labels)
    losses.sum().backward()


@pytest.mark.parametrize("chunk", [7 * 128, 10**9], ids=["chunks", "whole"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_does_not_wait_for_the_device(asked, family, chunk):
    model, inputs = trained_model(family, asked), batch(asked)
    if asked.type == "cuda":
        step(model, inputs, chunk)  # what is set up once
        if not has_kernel(inputs["input_ids"].bfloat16()):
            pytest.skip("this GPU has no grouped kernel, so offsets are read")
    with noted(asked) as files:
        step(model, inputs, chunk)
    assert set(files) <= OF_TRANSFORMERS, files


def test_offsets_are_read_once_per_layer_without_a_kernel(asked, monkeypatch):
    monkeypatch.setattr("deepseek.grouped_gemm.has_kernel", lambda x: False)
    model, inputs = trained_model("qwen3_moe", asked), batch(asked)
    if asked.type == "meta":
        pytest.skip("the offsets have no values there")
    step(model, inputs, 10**9)
    with noted(asked) as files:
        step(model, inputs, 10**9)
    assert files.count("grouped_gemm.py") == len(moe_layers(model))


def test_a_wait_is_noticed(asked):
    """The negative: the positions of labels, when they are looked for on the device."""
    inputs = batch(asked)
    with noted(asked) as files:
        label_positions(inputs["labels"])
    assert "loss.py" in files
