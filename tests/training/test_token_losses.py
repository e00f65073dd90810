"""The loss without all logits: its values and gradients are those of the plain loss, and its memory is bounded."""

import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import esft
from deepseek.expert_parallel import shard_dense
from tests.helpers import FAMILIES, RANK_TIMEOUT, ROOT, assert_near, join_world, make_model, run_ranks
from training.data import IGNORE
from training.loss import TokenLosses, label_positions

SMALL, LARGE = 7 * 128, 10**9  # logits of seven rows at once; of all of them
EXPERTS = {"experts": {"1": [5, 2], "2": [7]}}
HEAD_TOO = {**EXPERTS, "non_expert_modules": True}


def batch(vocabulary: int = 128) -> dict:
    """Two rows with labels at different positions, and positions without one."""
    torch.manual_seed(3)
    ids = torch.randint(3, vocabulary, (2, 21))
    labels = ids.clone()
    labels[0, :9] = labels[1, 12:] = labels[:, 5] = IGNORE
    return {"input_ids": ids, "labels": labels}


def step(model, chunk: int, smoothing: float = 0.0) -> tuple[torch.Tensor, dict[str, torch.Tensor], TokenLosses]:
    """Return the losses of a batch, the gradients of a weighted sum of them, and what computed it."""
    inputs = {**batch(), "use_cache": False}
    labels, inputs["logits_to_keep"] = label_positions(inputs.pop("labels"))
    token_losses = TokenLosses(model.get_output_embeddings(), chunk)
    token_losses.try_head(model)
    losses = token_losses(model, inputs, labels, smoothing)
    (losses * torch.linspace(-1, 2, losses.numel()).view_as(losses)).sum().backward()
    named = {re.sub(r"parametrizations\.(.+)\.original$", r"\1", name): p for name, p in model.named_parameters()}
    grads = {name: param.grad for name, param in named.items() if param.requires_grad}
    model.zero_grad()
    assert not model.get_output_embeddings()._forward_hooks and labels.shape == losses.shape
    assert (losses[labels == IGNORE] == 0).all() and (labels == IGNORE).any() and losses.any()
    return losses.detach(), grads, token_losses


def by_hand(model, smoothing: float) -> torch.Tensor:
    """The losses from the model's own logits, at the positions with a label."""
    given = batch()
    labels = given["labels"][:, 1:]
    with torch.no_grad():
        logs = model(given["input_ids"], use_cache=False).logits[:, :-1].float().log_softmax(-1)
    losses = -(1 - smoothing) * logs.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) - smoothing * logs.mean(-1)
    return losses.masked_fill(labels == IGNORE, 0)[:, (labels != IGNORE).any(0)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("config", [EXPERTS, HEAD_TOO], ids=["experts", "head, too"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_all_logits(family, config, smoothing):
    if family == "nemotron_h":
        config = {**config, "experts": {"0": [5, 2], "2": [7]}}
    model = esft.to_esft(make_model(family), config)
    losses, grads, used = step(model, SMALL, smoothing)
    plain, wanted, _ = step(model, LARGE, smoothing)
    assert used.head_is_last
    assert_near("the losses", losses, plain, 1e-6)
    assert_near("the losses by hand", losses, by_hand(model, smoothing), 1e-5)
    assert grads.keys() == wanted.keys() and len(grads) > 1
    for name, grad in grads.items():
        assert_near(name, grad, wanted[name], 1e-5)


def test_in_bf16_it_is_as_near_to_fp32_as_the_plain_loss():
    exact, truth, _ = step(esft.to_esft(make_model(), HEAD_TOO), LARGE)
    found, grads, _ = step(esft.to_esft(make_model(dtype=torch.bfloat16), HEAD_TOO), SMALL)
    plain, wanted, _ = step(esft.to_esft(make_model(dtype=torch.bfloat16), HEAD_TOO), LARGE)
    assert (found - exact).abs().mean() < 1.1 * (plain - exact).abs().mean()
    for name, grad in truth.items():
        off, off_of_plain = ((found[name].float() - grad).norm() for found in (grads, wanted))
        assert off <= 1.5 * off_of_plain + 1e-6, name


class Capped(nn.Module):
    """A model that scales its logits after the head, as Granite and Cohere do."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, **inputs):
        self.calls += 1
        outputs = self.model(**inputs)
        outputs.logits = outputs.logits / 3
        return outputs


@pytest.mark.parametrize("chunk", [SMALL, LARGE])
def test_a_model_that_goes_on_after_its_head_runs_once_for_a_batch_of_any_size(chunk):
    model = esft.to_esft(make_model(), EXPERTS)
    wrapped = Capped(model)
    inputs = {**batch(), "use_cache": False}
    labels, inputs["logits_to_keep"] = label_positions(inputs.pop("labels"))
    token_losses = TokenLosses(model.get_output_embeddings(), chunk)
    token_losses.try_head(wrapped)
    losses = token_losses(wrapped, inputs, labels)
    assert wrapped.calls == 2 and not token_losses.head_is_last
    kept = inputs["logits_to_keep"]
    logits = model(inputs["input_ids"], use_cache=False).logits[:, kept] / 3
    wanted = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    assert_near("the losses", losses, wanted, 1e-6)


def test_nothing_is_left_behind_by_an_error():
    model = make_model()
    inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "use_cache": False}  # three positions, and two labels
    with pytest.raises(ValueError):
        TokenLosses(model.get_output_embeddings(), 1)(model, inputs, torch.tensor([[2, 3]]))
    head = model.get_output_embeddings()
    assert not head._forward_hooks and not head._forward_pre_hooks


def test_without_gradients_the_losses_are_the_same():
    model = esft.to_esft(make_model(), EXPERTS)
    losses, _, used = step(model, SMALL)
    inputs = {**batch(), "use_cache": False}
    labels, inputs["logits_to_keep"] = label_positions(inputs.pop("labels"))
    with torch.no_grad():
        assert torch.equal(used(model, inputs, labels), losses)


def _sharded(rank: int) -> None:
    join_world()
    plain, wanted, _ = step(esft.to_esft(make_model(), EXPERTS), LARGE)
    model = esft.to_esft(make_model(), EXPERTS)
    shard_dense(model, RANK_TIMEOUT, torch.device("cpu"))
    losses, grads, used = step(model, SMALL)
    assert used.head_is_last
    assert_near("the losses", losses, plain, 1e-6)
    for name, grad in wanted.items():
        assert_near(name, grads[name], grad, 1e-5)


def test_it_runs_where_the_head_is_sharded():
    run_ranks(2, _sharded)


PEAK = r"""
import re, sys
from pathlib import Path
import torch
from torch import nn
from types import SimpleNamespace
sys.path.insert(0, ".")
from training.loss import TokenLosses

labels, chunk = int(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
head = nn.Linear(32, 102_400, bias=False).requires_grad_(False)
model = lambda hidden, logits_to_keep: SimpleNamespace(logits=head(hidden[:, logits_to_keep]))
hidden = torch.randn(1, labels, 32, requires_grad=True)
inputs = {"hidden": hidden, "logits_to_keep": torch.arange(labels)}
chosen = torch.randint(102_400, (1, labels))
TokenLosses(head, 1)(model, {**inputs, "logits_to_keep": torch.arange(2)}, chosen[:, :2]).sum().backward()
hidden.grad = None
highest = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before = highest()
for size in (chunk, 10**12):  # the plain loss last, as the highest resident set only grows
    loss = TokenLosses(head, size)(model, inputs, chosen).sum()
    loss.backward()
    print(highest() - before, loss.item(), hidden.grad.double().norm().item())
    hidden.grad = None
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the highest resident set")
@pytest.mark.parametrize(
    ("labels", "chunk", "most"),
    [(256, 2**21, 60e6), pytest.param(4096, 2**25, 600e6, marks=pytest.mark.slow)],
)
def test_memory_is_that_of_a_chunk(labels, chunk, most):
    command = [sys.executable, "-c", PEAK, str(labels), str(chunk)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (peak, *found), (plain, *wanted) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert peak < most and plain > 4 * peak
    assert found == pytest.approx(wanted, rel=1e-6)  # the loss, and the norm of its gradient
