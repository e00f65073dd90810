"""The count of operations is that of torch's counter, for every method, and the log shows MFU where a peak is known."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import esft
from deepseek.experts import moe_layers
from tests.helpers import EXPERTS, make_model
from training.flops import ModelFlops, count_flops, peak_flops, work_of
from training.methods import prepare_model

T = 256
IDS = torch.randint(3, 128, (1, T), generator=torch.Generator().manual_seed(0))
EVERY = {"experts": {"1": list(range(8)), "2": list(range(8))}}
UPPER = {"experts": {"2": list(range(8))}}


def grouped_mm_flops(a_shape, b_shape, *_, out_shape=None, **__) -> int:
    """(N, I) and (groups, I, O), or (O, N) and (N, I): every row meets one matrix."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[-1]


def measured(model) -> int:
    """The operations of a step on 256 tokens with a label each. Eager attention sees all keys."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_mm_flops})
    with counter:
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return counter.get_total_flops()


def counted(model) -> float:
    return count_flops(model).of(torch.tensor([T, T, T * T], dtype=torch.float64))


def eager(family: str, **changes):
    return make_model(family, attn_implementation="eager", **changes).train()


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize(
    "what", ["full", "every expert", "upper experts", "shared experts", "some experts", "lora on some"]
)
def test_the_count_is_that_of_torch(family, what):
    model = eager(family)
    if what == "lora on some":
        model = esft.to_esft(model, EXPERTS, lora_rank=8)
    elif what == "full":
        model.set_experts_implementation("grouped_mm")
        model = prepare_model(model, "full")
    else:
        config = {"every expert": EVERY, "upper experts": UPPER, "some experts": EXPERTS}.get(what)
        config = config or {**EXPERTS, "shared_experts": True}
        model = esft.to_esft(model, config)
    exact = what in ("full", "every expert", "upper experts")
    assert counted(model) == pytest.approx(measured(model), rel=0.01 if exact else 0.06)


def test_what_is_not_trained_and_not_routed_to_is_not_counted():
    """The negative: the counts of other methods, and of all experts, are off."""
    some, full = esft.to_esft(eager("mixtral"), EXPERTS), eager("mixtral")
    every = esft.to_esft(eager("mixtral", num_experts_per_tok=8), EXPERTS)
    assert counted(every) > 1.2 * measured(some) and counted(full) > 1.2 * measured(some)


def test_lora_beside_attention_is_counted():
    peft = pytest.importorskip("peft")
    model = eager("qwen3_moe")
    model.set_experts_implementation("grouped_mm")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert counted(peft.get_peft_model(model, config)) == pytest.approx(measured(model), rel=0.06)


def test_lora_on_experts_is_counted_for_those_that_a_token_meets():
    pytest.importorskip("peft")
    model = make_model("qwen3_moe")
    frozen = count_flops(model.requires_grad_(False)).per_token
    adapted = count_flops(prepare_model(model, "lora", lora_rank=4))
    params = {name: p.numel() for name, p in model.named_parameters() if "lora_" in name}
    in_experts = sum(size for name, size in params.items() if ".experts." in name)
    trained = sum(params.values()) - in_experts + in_experts * 3 / 8
    assert adapted.per_token == 2 * frozen + 2 * 3 * trained  # forward, input gradients, weight gradients
    assert adapted.per_label == 4 * 128 * 32


def test_the_reference_of_dpo_is_a_forward_more():
    model = make_model()
    forward = count_flops(model.requires_grad_(False))
    model = esft.to_esft(model, EXPERTS)
    for unit in ("per_token", "per_label", "per_key"):
        with_reference, plain = (getattr(count_flops(model, references=n), unit) for n in (1, 0))
        assert with_reference - plain == getattr(forward, unit) > 0


def test_ranks_count_the_trained_experts_of_all():
    whole, half = (make_model() for _ in range(2))
    every = {"experts": {"1": [0, 5], "2": [1, 6]}}
    for layer in moe_layers(half).values():
        layer.keep_local(range(4))
    for layer in moe_layers(esft.to_esft(whole, every)).values():
        assert layer.num_trained == 2
    esft.to_esft(half, every)
    assert [layer.num_trained for layer in moe_layers(half).values()] == [1, 1]
    assert count_flops(half).per_token == pytest.approx(count_flops(whole).per_token)


def test_the_work_of_a_batch_counts_keys_within_documents():
    inputs = {
        "labels": torch.tensor([[-100, 5, 6, -100, 7, 8], [1, -100, -100, -100, -100, 2]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]),
    }
    assert work_of(inputs).tolist() == [12, 5, 6 + 6 + 21]
    assert ModelFlops(10, 100, 1).of(work_of(inputs)) == 120 + 500 + 33


def test_a_model_that_does_not_say_how_many_experts_a_token_meets_has_no_count(monkeypatch):
    model = make_model("mixtral")
    monkeypatch.setattr(model.config, "get_text_config", SimpleNamespace)
    assert count_flops(model) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA B200", 2.25e15), ("NVIDIA GB200", 2.5e15), ("NVIDIA H20", 148e12),
        ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("NVIDIA T4", None),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_the_device(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert peak_flops(torch.device("cuda"), torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_a_run_logs_its_share_of_the_peak(start, monkeypatch):
    start("unknown", max_steps=2, logging_steps=1)
    monkeypatch.setattr("training.trainer.peak_flops", lambda device, dtype: 1e9)
    start("known", max_steps=2, logging_steps=1)
    unknown, known = (
        [
            row
            for row in json.loads((start.folder / name / "trainer_state.json").read_text())["log_history"]
            if "loss" in row
        ]
        for name in ("unknown", "known")
    )
    assert len(known) == 2 and not any("mfu" in row for row in unknown)
    for row in known:
        per_token = row["mfu"] * 1e9 / row["tokens_per_second"]
        assert 1e5 < per_token < 1e6  # of some 40 tokens, most with a label
