"""Commands on a GPU: a run, resumed and compared with the CPU's, its memory, an evaluation, and torchrun with NCCL.

Their CPU twins are the tests of the commands in the other folders. One of each runs here on the CPU, too.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import esft
import eval_multigpu
import train
from tests.helpers import ROOT, Killed, arguments, at_step, kill, losses, make_model, tensors_of, write_rows
from training.loss import TokenLosses, label_positions
from training.memory import Estimator, MemorySettings

KEYS = {
    "max_steps": 4,
    "eval_steps": None,
    "save_steps": 2,
    "save_opt_states": True,
    "activation_checkpointing": "false",
}
ON_GPU = pytest.mark.gpu


def run(files: Path, out: Path, device: torch.device, **changes) -> dict:
    """Train on the device."""
    on = "cpu" if device.type == "cpu" else None
    return train.main(arguments(files, out, **{**KEYS, "device": on, **changes}))


def assert_like(a: Path, b: Path, rel: float) -> None:
    """The losses of two runs are near each other, and they have changed."""
    found, wanted = losses(a), losses(b)
    assert found.keys() == wanted.keys() and len({value for (key, _), value in found.items() if key == "loss"}) > 1
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=rel), key
    assert tensors_of(a).keys() == tensors_of(b).keys()


def test_a_run_has_the_losses_of_the_cpu_and_resumes(device, files, tmp_path, monkeypatch):
    keys = {"logging_steps": 1}
    result = run(files, tmp_path / "whole", device, verify_frozen=True, **keys)
    assert result["frozen_verified"] and result["steps"] == 4
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 4, kill)
        run(files, tmp_path / "broken", device, **keys)
    run(files, tmp_path / "broken", device, **keys)
    assert_like(tmp_path / "broken", tmp_path / "whole", 1e-4)
    if device.type == "cuda":
        run(files, tmp_path / "cpu", torch.device("cpu"), **keys)
        assert_like(tmp_path / "whole", tmp_path / "cpu", 1e-3)


@ON_GPU
def test_the_log_shows_mfu(gpu, files, tmp_path):
    run(files, tmp_path / "out", gpu, logging_steps=1, base_model_path=files / "m16")
    rows = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert all(0 <= row["mfu"] < 1 for row in rows if "loss" in row)


WIDE = {
    "hidden_size": 1024, "moe_intermediate_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
    "vocab_size": 32_000, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "recomputed"])
def test_the_estimate_of_memory_is_near_what_a_step_takes(device, checkpointing):
    """The constants for the context and for fragments are left out, as torch does not count these.

    A CPU counts nothing: there the step is known to run, and tests/training/test_memory.py compares the figures.
    """
    wide, T = (WIDE, 2048) if device.type == "cuda" else ({}, 32)
    base = make_model(dtype=torch.bfloat16, **wide)
    experts = esft.ExpertConfig(dict.fromkeys(range(1, wide.get("num_hidden_layers", 3)), (0, 3)))
    settings = MemorySettings(seq_length=T, accumulation=False, packed=False, activation_checkpointing=checkpointing)
    memory = Estimator(copy.deepcopy(base).to("meta"), "esft", experts).estimate(settings)
    model = esft.to_esft(base.to(device), experts, keep_base=False).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 128, (1, T), device=device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step_of(model, ids)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert 0 < memory.overhead < memory.peak
    if device.type == "cuda":
        assert torch.cuda.max_memory_allocated() == pytest.approx(memory.peak - memory.overhead, rel=0.1)


def step_of(model, ids) -> None:
    labels, kept = label_positions(ids, torch.arange(ids.shape[1] - 1, device=ids.device))
    inputs = {"input_ids": ids, "logits_to_keep": kept, "use_cache": False}
    TokenLosses(model.get_output_embeddings())(model, inputs, labels).mean().backward()


def test_an_evaluation_gives_the_answers_of_the_cpu(device, files, tmp_path):
    questions = write_rows(tmp_path / "questions.jsonl", ["a", "b", "c", "d", "e", "f"])

    def answers(*flags: str) -> list[str]:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        command = [f"--model={files / 'm32'}", f"--eval_dataset={questions}", f"--output_path={out}"]
        eval_multigpu.main([*command, "--max_new_tokens=6", "--eval_batch_size=2", *flags])
        return [json.loads(line)["example"]["raw_prediction"] for line in out.read_text().splitlines()]

    found = answers("--device=cpu") if device.type == "cpu" else answers("--world_size=1", "--gpus_per_rank=1")
    assert found == answers("--device=cpu") and len(set(found)) > 1


@ON_GPU
@pytest.mark.parametrize(("world", "ep_size"), [(1, 1), (2, 1), (2, 2)])
def test_torchrun_with_nccl_trains_as_one_process(gpu, files, tmp_path, world, ep_size):
    if torch.cuda.device_count() < world:
        pytest.skip(f"there are fewer than {world} GPUs")
    keys = {**KEYS, "batch_size": None, "global_batch_size": 4, "logging_steps": 1}
    run(files, tmp_path / "one", gpu, **keys)
    words = arguments(files, tmp_path / "many", **keys, ep_size=ep_size)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}", "--standalone"]
    done = subprocess.run([*command, "train_ep.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_like(tmp_path / "many", tmp_path / "one", 1e-3)
