"""Training on a device: the step of the CPU, only selected experts change, and every way to hold the frozen ones."""

import importlib.util

import pytest
import torch

import esft
from deepseek.experts import moe_layers
from deepseek.frozen import freeze_experts
from deepseek.routing import RouterCapture
from tests.helpers import assert_near, make_model
from training.loss import TokenLosses
from training.methods import prepare_model

CONFIG = {"experts": {"1": [5, 2], "2": [7]}}
SHARED = {**CONFIG, "shared_experts": True}
IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
STORED = ["fp8", "int8", None] + ["nf4"] * bool(importlib.util.find_spec("bitsandbytes"))


def step(model, device) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss and the gradients of a step, on the CPU."""
    ids = IDS.to(device)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    grads = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.requires_grad}
    return loss.detach().float().cpu(), grads


def train(model, device, steps: int = 3, rate: float = 1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, fused=True)
    for _ in range(steps):
        step(model, device)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe", "gpt_oss"])
def test_a_step_is_that_of_the_cpu(device, family, dtype):
    """In bf16 within what rounding does."""
    found, grads = step(esft.to_esft(make_model(family, dtype).to(device), CONFIG), device)
    wanted, expected = step(esft.to_esft(make_model(family, dtype), CONFIG), "cpu")
    near = 1e-4 if dtype == torch.float32 else 0.1
    assert_near("loss", found, wanted, near / 5)
    assert grads.keys() == expected.keys() and len(grads) > 2
    for name, grad in grads.items():
        error = (grad - expected[name]).norm() / expected[name].norm()
        assert error < near, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selected_rows_move_and_all_else_keeps_its_bits(device, dtype):
    model = train(esft.to_esft(make_model(dtype=dtype).to(device), CONFIG), device)
    state, base = model.state_dict(), make_model(dtype=dtype).state_dict()
    assert state.keys() == base.keys()
    for name, tensor in base.items():
        chosen = CONFIG["experts"].get(name.split(".")[2], []) if ".experts." in name else []
        others = [row for row in range(len(tensor)) if row not in chosen]
        assert torch.equal(state[name][others].cpu(), tensor[others]), name
        assert not any(torch.equal(state[name][row].cpu(), tensor[row]) for row in chosen)


def test_masters_learn_what_bf16_would_round_away(device):
    model = train(esft.to_esft(make_model(dtype=torch.bfloat16).to(device), SHARED), device, 3, rate=1e-6)
    base = make_model(dtype=torch.bfloat16)
    fresh = dict(esft.to_esft(base, SHARED).named_parameters())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) > 6
    for name, param in trained.items():
        moved = (param.detach().cpu() - fresh[name].detach()).abs().max()
        assert param.dtype == torch.float32 and 1e-6 < moved < 1e-5, name
    for layer in moe_layers(model).values():
        for name in layer.weight_names:
            rows = layer.tensor(name).data[: layer.num_trained]
            assert rows.dtype == torch.bfloat16
            assert_near(name, rows.float(), layer.trained.get_parameter(name).data, 0.01)


@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "in host memory"])
@pytest.mark.parametrize("stored", STORED)
def test_stored_experts_compute_as_on_the_cpu(device, stored, offload):
    if stored is None and not offload:
        pytest.skip("nothing is stored in another way")

    def model_on(where):
        model = make_model("qwen3_moe", hidden_size=64, moe_intermediate_size=64, dtype=torch.bfloat16)
        for layer in moe_layers(model.to(where)).values():
            freeze_experts(layer, CONFIG["experts"].get(str(layer.index), ()), stored, offload)
        return esft.to_esft(model, CONFIG)

    model = model_on(device)
    held = {t.device.type for layer in moe_layers(model).values() for ts in layer.frozen.stored.values() for t in ts}
    assert held == {"cpu" if offload else device.type}
    found, grads = step(model, device)
    wanted, expected = step(model_on("cpu"), "cpu")
    assert_near("loss", found, wanted, 0.01)
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() / expected[name].norm() < 0.05, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_in_chunks_is_the_plain_one(device, dtype):
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 512, bias=False, device=device, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(1, 40, 32, device=device, dtype=dtype)
    labels = torch.randint(512, (1, 40), device=device)

    class Outputs(torch.nn.Module):
        def forward(self, h):
            self.logits = head(h)
            return self

    found = []
    for chunk in (7 * 512, 10**9):
        h = hidden.clone().requires_grad_()
        losses = TokenLosses(head, chunk)(Outputs(), {"h": h}, labels)
        losses.sum().backward()
        found.append((losses.detach().float(), h.grad.float()))
    near = 1e-5 if dtype == torch.float32 else 0.02
    for part, whole in zip(*found):
        assert part.abs().max() > 0
        assert_near("chunks", part, whole, near)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "qwen3_moe"])
def test_scores_are_those_of_the_cpu(device, family):
    def scores(where):
        model = make_model(family).to(where)
        with torch.no_grad(), RouterCapture(model) as capture:
            model(input_ids=IDS.to(where))
        return esft.ExpertScores.from_counts(capture.counts())

    found, wanted = scores(device), scores("cpu")
    for kind in ("token", "gate"):
        for layer, row in wanted[kind].items():
            assert found[kind][layer] == pytest.approx(row, abs=2e-4), (kind, layer)


def test_the_reference_of_dpo_is_the_base(device):
    """Its values are put in for a call, and taken out again."""
    with torch.no_grad():
        base = make_model().to(device)(input_ids=IDS.to(device)).logits
        model = train_with_base(device)
        trained, reference = model(input_ids=IDS.to(device)).logits, esft.ReferenceModel(model)
        assert_near("the base", reference(input_ids=IDS.to(device)).logits, base, 1e-5)
        assert_near("the policy", model(input_ids=IDS.to(device)).logits, trained, 1e-5)
        assert (trained - base).abs().max() > 0.01


def train_with_base(device):
    with torch.enable_grad():
        return train(esft.to_esft(make_model().to(device), CONFIG), device).eval()


@pytest.mark.parametrize("method", ["full", "lora", "lora on selected experts"])
def test_other_methods_take_the_step_of_the_cpu(device, method):
    if method == "lora":
        pytest.importorskip("peft")

    def prepared(where):
        torch.manual_seed(1)
        model = make_model("qwen3_moe")
        model = prepare_model(model, method) if method in ("full", "lora") else esft.to_esft(model, CONFIG, lora_rank=4)
        with torch.no_grad():
            for name, param in model.named_parameters():
                if "lora_B" in name:
                    param.normal_(std=0.1)
        return model.to(where)

    found, grads = step(prepared(device), device)
    wanted, expected = step(prepared("cpu"), "cpu")
    assert_near("loss", found, wanted, 1e-4)
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= 1e-3 * expected[name].norm() + 1e-6, name


def test_activation_checkpointing_changes_nothing(device):
    plain = step(esft.to_esft(make_model().to(device), CONFIG).train(), device)
    model = esft.to_esft(make_model().to(device), CONFIG).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, grads = step(model, device)
    assert torch.equal(loss, plain[0])
    for name, grad in grads.items():
        assert_near(name, grad, plain[1][name], 1e-5)
