"""A loop of one's own: optimizers, clipping, accumulation, copies, pickles, and files of whole models."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_model, save_model
from transformers import AutoModelForCausalLM

import esft
from tests.client_helpers import chosen, moved, state_of, trainable
from tests.helpers import make_model

pytestmark = pytest.mark.clients
DTYPES = [torch.float32, torch.bfloat16]
CONFIG = {"experts": {"1": [5, 2], "2": [7]}}
IDS = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(0))


def fresh(dtype=torch.float32):
    return esft.to_esft(make_model(dtype=dtype), CONFIG)


def loss_of(model, ids=IDS):
    return model(ids, labels=ids, use_cache=False).loss


def train(model, optimizer=None, steps: int = 4) -> list[float]:
    """Take some steps, and return the losses before each and after the last."""
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=1e-2)
    losses = []
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure)))
    return [*losses, loss_of(model).item()]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def bnb(name: str, params, **options):
    return getattr(pytest.importorskip("bitsandbytes").optim, name)(params, **options)


OPTIMIZERS = {
    "AdamW, foreach": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, foreach=True),
    "AdamW, fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "SGD, momentum": lambda params: torch.optim.SGD(params, lr=1e-1, momentum=0.9, weight_decay=0.1),
    "SGD, fused": lambda params: torch.optim.SGD(params, lr=1e-1, fused=True),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=3e-2),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=1e-3),
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.5, max_iter=3),
    "AdamW, 8 bits": lambda params: bnb("AdamW8bit", params, lr=1e-2, min_8bit_size=64),
    "Lion, 8 bits": lambda params: bnb("Lion8bit", params, lr=1e-3, min_8bit_size=64),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_trains_the_chosen_experts_and_the_adapter_holds_it(name, dtype, tmp_path):
    """Some of them get all parameters. Those that are frozen have no gradient, so no weight decay reaches them."""
    model = fresh(dtype)
    before = state_of(model)
    params = list(model.parameters()) if name == "SGD, momentum" else trainable(model)
    losses = train(model, OPTIMIZERS[name](params))
    assert losses[-1] < losses[0]
    assert moved(before, model.state_dict()) == chosen(CONFIG)
    esft.save_adapter(model, tmp_path)
    assert torch.equal(logits(esft.add_adapter(make_model(dtype=dtype), tmp_path)), logits(model))


def test_gradients_are_clipped_and_accumulated():
    whole, half = fresh(), fresh()
    loss_of(whole).backward()
    for part in IDS.chunk(2):
        (loss_of(half, part) / 2).backward()
    for one, other in zip(trainable(whole), trainable(half), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.01)
    clipped = torch.nn.utils.get_total_norm([param.grad for param in trainable(whole)])
    assert norm > 0.02 and clipped.item() == pytest.approx(0.01, rel=1e-3)


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": by_torch_save,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_lives_a_life_of_its_own(name, dtype, tmp_path):
    model = fresh(dtype)
    train(model)
    before, wanted = state_of(model), logits(model)
    twin = COPIES[name](model)
    assert torch.equal(logits(twin), wanted)
    train(twin)
    assert moved(before, twin.state_dict()) == chosen(CONFIG)
    assert moved(before, model.state_dict()) == set() and torch.equal(logits(model), wanted)
    esft.save_adapter(twin, tmp_path)
    assert torch.equal(logits(esft.add_adapter(make_model(dtype=dtype), tmp_path)), logits(twin))
    esft.unload(twin)
    base = make_model(dtype=dtype)
    assert moved(base.state_dict(), twin.state_dict()) == set() and torch.equal(logits(twin), logits(base))
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_models_are_saved_and_loaded(dtype, tmp_path):
    """By state dict, safetensors and save_pretrained, into plain models and into ones of another choice of experts."""
    model = fresh(dtype)
    train(model)
    state, wanted = state_of(model), logits(model)
    save_model(model, str(tmp_path / "model.safetensors"))
    model.save_pretrained(tmp_path / "saved")
    for target in (
        make_model(dtype=dtype),
        fresh(dtype),
        esft.to_esft(make_model(dtype=dtype), {"experts": {"2": [0]}}),
    ):
        other = copy.deepcopy(target)
        other.load_state_dict(copy.deepcopy(state))
        assert torch.equal(logits(other), wanted)
        load_model(target, str(tmp_path / "model.safetensors"))
        assert torch.equal(logits(target), wanted)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert moved(state, plain.state_dict()) == set()
    assigned = fresh(dtype)
    assigned.load_state_dict(copy.deepcopy(state), assign=True)
    assert torch.equal(logits(assigned), wanted)
    train(assigned)
    assert moved(state, assigned.state_dict()) == chosen(CONFIG)
    assert {param.dtype for param in trainable(assigned)} == {torch.float32}
