"""An adapter of peft and trained experts share a model: both learn, and each is saved, loaded and merged by itself."""

import copy
import functools
import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments, set_seed

import datasets
import esft
from deepseek.experts import inner_model, moe_layers
from tests.helpers import make_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.clients
EXPERTS = {"1": [5, 2], "2": [7]}
SHARED = {"experts": EXPERTS, "shared_experts": True}
IDS = torch.randint(3, 128, (4, 9), generator=torch.Generator().manual_seed(0))
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ORDERS = ["peft first", "esft first"]


def with_lora(model, **changes):
    config = {"r": 2, "target_modules": ["q_proj", "o_proj"], "init_lora_weights": False, **changes}
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**config))


def both(order: str, config=SHARED, dtype=torch.float32):
    """A model with LoRA and trained experts, as the one and the other order of calls make it."""
    if order == "peft first":
        return esft.to_esft(with_lora(make_model(dtype=dtype)), config)
    model = esft.to_esft(make_model(dtype=dtype), config)
    return esft.to_esft(with_lora(model), config)


def train(model, steps: int = 2):
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def trainable(model) -> set[str]:
    named = inner_model(model).named_parameters()
    return {name for name, param in named if param.requires_grad}


def of_lora(model) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, _ in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
def test_both_learn_and_all_else_keeps_its_bits(order, dtype):
    model, alone = both(order, dtype=dtype), esft.to_esft(make_model(dtype=dtype), SHARED)
    assert trainable(model) == trainable(alone) | of_lora(model)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    train(model)
    for name, param in model.named_parameters():
        assert param.requires_grad != torch.equal(param, before[name]) or name.endswith((".gate_up_proj", ".down_proj"))
    state = {name.replace(".base_layer", ""): tensor for name, tensor in model.get_base_model().state_dict().items()}
    for name, tensor in make_model(dtype=dtype).state_dict().items():
        chosen = EXPERTS.get(name.split(".")[2], []) if ".experts." in name else []
        others = [row for row in range(len(tensor)) if row not in chosen]
        assert torch.equal(state[name][others], tensor[others]) != (".shared_experts." in name), name
        assert not any(torch.equal(state[name][row], tensor[row]) for row in chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_the_calls_does_not_matter(dtype):
    one, other = (train(both(order, dtype=dtype)) for order in ORDERS)
    found = dict(other.named_parameters())
    assert all(torch.equal(param, found[name]) for name, param in one.named_parameters())
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("order", ORDERS)
def test_each_part_is_saved_and_loaded_by_its_own_library(order, tmp_path):
    model = train(both(order))
    model.save_pretrained(tmp_path / "lora")
    esft.save_adapter(model, tmp_path / "experts")
    lora = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert len(lora) == len(of_lora(model)) and all("lora_" in name for name in lora)
    tensors = load_file(tmp_path / "experts" / "adapter.safetensors")
    wanted = esft.adapter_views(make_model(), esft.ExpertConfig.from_dict(SHARED))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {n: view.shape for n, view in wanted.items()}
    assert esft.trained_config(model) == esft.ExpertConfig.from_dict(SHARED)

    loaded = peft.PeftModel.from_pretrained(esft.add_adapter(make_model(), tmp_path / "experts"), tmp_path / "lora")
    assert torch.equal(logits(loaded), logits(model))
    loaded = esft.add_adapter(peft.PeftModel.from_pretrained(make_model(), tmp_path / "lora"), tmp_path / "experts")
    assert torch.equal(logits(loaded), logits(model))
    again = both(order)  # to be trained further
    esft.add_adapter(again, tmp_path / "experts")
    again.load_adapter(tmp_path / "lora", "default", is_trainable=True)
    assert torch.equal(logits(again), logits(model)) and trainable(again) == trainable(model)
    one, other = esft.add_adapter(make_model(), tmp_path / "lora"), make_model()
    assert all(param.requires_grad for param in one.parameters())
    torch.testing.assert_close(logits(esft.add_adapter(one, tmp_path / "experts")), logits(model))
    esft.add_adapter(esft.add_adapter(other, tmp_path / "experts"), tmp_path / "lora")
    torch.testing.assert_close(logits(other), logits(model))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_are_merged_into_a_plain_model(order, dtype):
    model = train(both(order, dtype=dtype))
    one, other, wanted = copy.deepcopy(model), model, logits(model)
    esft.merge(one)
    assert torch.equal(logits(one), wanted) and trainable(one) == of_lora(one)
    one = one.merge_and_unload()
    other = esft.merge(other.merge_and_unload())
    base = make_model(dtype=dtype).state_dict()
    for merged in (one, other):
        tolerance = {} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}
        torch.testing.assert_close(logits(merged), wanted, **tolerance)
        assert {name: tensor.shape for name, tensor in merged.state_dict().items()} == {
            name: tensor.shape for name, tensor in base.items()
        }
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("order", ORDERS)
def test_one_part_is_taken_away_and_the_other_stays(order, tmp_path):
    model = train(both(order))
    model.save_pretrained(tmp_path / "lora")
    esft.save_adapter(model, tmp_path / "experts")
    experts_only = esft.add_adapter(make_model(), tmp_path / "experts")
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(experts_only))
    lora_only = peft.PeftModel.from_pretrained(make_model(), tmp_path / "lora")
    without_lora = copy.deepcopy(model).unload()
    assert torch.equal(logits(without_lora), logits(experts_only))
    assert esft.adapter_tensors(without_lora).keys() == esft.adapter_tensors(model).keys()
    assert esft.unload(model) is model and trainable(model) == of_lora(model)
    assert torch.equal(logits(model), logits(lora_only)) and esft.trained_config(model) is None
    assert torch.equal(logits(model.unload()), logits(make_model()))


def test_the_base_is_there_while_both_are_put_aside():
    model = train(both("peft first"))
    after, learns = logits(model), trainable(model)
    with esft.base_values(model):
        assert torch.equal(logits(model), logits(make_model()))
    assert torch.equal(logits(model), after) and trainable(model) == learns
    assert torch.equal(esft.ReferenceModel(model)(IDS).logits, logits(make_model()))
    with model.disable_adapter(), esft.base_values(model):
        assert torch.equal(logits(model), logits(make_model()))
    for name, param in model.named_parameters():
        if "lora_A" in name:
            param.requires_grad_(False)
    learns = trainable(model)
    with esft.base_values(model):
        pass
    assert torch.equal(logits(model), after) and trainable(model) == learns


def test_dpo_of_trl_has_the_base_as_reference(tmp_path, tiny_tokenizer):
    trl = pytest.importorskip("trl")
    runs = []
    for reference in (esft.ReferenceModel, lambda _: make_model()):
        model = esft.to_esft(make_model(), SHARED)
        settings = {"output_dir": str(tmp_path), "max_steps": 4, "per_device_train_batch_size": 2, "seed": 0}
        settings |= {"logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no"}
        args = trl.DPOConfig(**settings, learning_rate=1e-2, disable_tqdm=True, gradient_checkpointing=False)
        rows = [{"prompt": f"is it {i}?", "chosen": f" yes {i}", "rejected": " no" * (1 + i % 3)} for i in range(8)]
        set_seed(0)
        trainer = trl.DPOTrainer(
            model,
            reference(model),
            args,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tiny_tokenizer,
            peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
            callbacks=[esft.ESFTCallback()],
        )
        trainer.train()
        runs.append(trainer)
    found, wanted = ([entry["rewards/chosen"] for entry in run.state.log_history[:4]] for run in runs)
    assert found == pytest.approx(wanted, abs=1e-5) and losses(runs[0])[-1] < losses(runs[0])[0]
    assert trainable(runs[0].model) > of_lora(runs[0].model)
    params = dict(runs[1].model.named_parameters())
    for name, param in runs[0].model.named_parameters():
        torch.testing.assert_close(param, params[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [{"experts": EXPERTS}, SHARED])
def test_experts_that_peft_froze_are_noticed(config):
    model = with_lora(esft.to_esft(make_model(), config))
    assert trainable(model) == of_lora(model)
    with pytest.raises(ValueError, match=r"cannot train the experts: .* Call to_esft after get_peft_model"):
        train(model)
    model.train()
    logits(model)
    model.eval()(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(ValueError, match="been through to_esft"):
        esft.to_esft(model, {"experts": {"1": [5]}})
    train(esft.to_esft(model, config))
    values = esft.adapter_tensors(model)
    model.get_base_model().requires_grad_(False)
    assert esft.to_esft(model, config) is model
    assert all(torch.equal(values[name], tensor) for name, tensor in esft.adapter_tensors(model).items())
    with pytest.raises(ValueError, match="been through to_esft"):
        esft.to_esft(model, config)


def test_what_is_frozen_on_purpose_passes():
    model = esft.to_esft(make_model(), SHARED).requires_grad_(False).train()
    assert not model(input_ids=IDS, labels=IDS).loss.requires_grad  # a teacher
    layer = moe_layers(model)[2].trained.requires_grad_(True)
    model(input_ids=IDS, labels=IDS).loss.backward()  # one layer of two
    assert layer.down_proj.grad.any()
    lora = with_lora(esft.merge(model))
    train(lora)
    assert trainable(lora) == of_lora(lora)


def test_frozen_experts_are_noticed_in_gradient_checkpointing():
    for reentrant in (False, True):
        model = with_lora(esft.to_esft(make_model(), SHARED)).train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with pytest.raises(ValueError, match="cannot train the experts"):
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        grads = []
        for checkpointed in (True, False):
            one = both("peft first").train()
            one.enable_input_require_grads()
            if checkpointed:
                one.gradient_checkpointing_enable({"use_reentrant": reentrant})
            one(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
            grads.append({name: param.grad for name, param in one.named_parameters() if param.requires_grad})
        assert all(torch.equal(grad, grads[1][name]) and grad.any() for name, grad in grads[0].items())


def by_transformers(model):
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    return model


def with_prompt(model):
    return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


KINDS_OF_PEFT = {
    "add_adapter of transformers": by_transformers,
    "prompt tuning": with_prompt,
    "DoRA": functools.partial(with_lora, use_dora=True),
    "modules_to_save": functools.partial(with_lora, modules_to_save=["lm_head"]),
    "IA3": lambda model: peft.get_peft_model(
        model, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], init_ia3_weights=False)
    ),
}


@pytest.mark.parametrize("kind", KINDS_OF_PEFT)
def test_other_adapters_of_peft_go_beside_experts_as_well(kind):
    adapt, alone = KINDS_OF_PEFT[kind], trainable(esft.to_esft(make_model(), SHARED))
    model = adapt(esft.to_esft(make_model(), SHARED))
    with pytest.raises(ValueError, match="cannot train the experts"):
        train(model)
    for one in (esft.to_esft(model, SHARED), esft.to_esft(adapt(make_model()), SHARED)):
        of_peft = trainable(one) - alone
        before = {name: param.detach().clone() for name, param in one.named_parameters() if param.requires_grad}
        assert len(before) > len(alone) and trainable(one) >= alone
        train(one)
        assert not any(torch.equal(param, before[name]) for name, param in one.named_parameters() if name in before)
        esft.merge(one)
        assert kind == "prompt tuning" or trainable(one) == of_peft


def test_lora_beside_quantized_experts(tmp_path):
    model = esft.to_esft(with_lora(make_model()), SHARED, frozen_dtype="int8")
    train(model)
    with pytest.raises(ValueError, match="cannot save this model as a plain checkpoint"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, state_dict=dict(model.named_parameters()))
    esft.save_adapter(model, tmp_path / "experts")
    again = esft.to_esft(peft.PeftModel.from_pretrained(make_model(), tmp_path), SHARED, frozen_dtype="int8")
    assert torch.equal(logits(esft.add_adapter(again, tmp_path / "experts")), logits(model))


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("fused", [FUSED, FUSED[:1]])
def test_lora_on_the_fused_tensors_is_refused(fused):
    refused = pytest.raises(ValueError, match=r"cannot train .*experts: LoRA is on its fused tensors")
    for targets in ({"target_parameters": fused}, {"target_modules": ["down_proj"]}):
        with refused:
            esft.to_esft(with_lora(make_model(), **targets), SHARED)
    model = with_lora(esft.to_esft(make_model(), SHARED), target_parameters=fused)
    with refused:
        logits(model)
    with refused:
        esft.to_esft(model, SHARED)


def test_lora_on_the_fused_tensors_of_a_model_with_a_loaded_adapter(tmp_path):
    esft.save_adapter(train(esft.to_esft(make_model(), SHARED)), tmp_path)
    model = with_lora(esft.add_adapter(make_model(), tmp_path), target_parameters=FUSED)
    wanted = logits(with_lora(make_model(), target_parameters=FUSED))
    assert not torch.equal(logits(model), wanted)
    assert torch.equal(logits(esft.unload(model)), wanted) and trainable(model) == of_lora(model)
    assert not torch.equal(logits(esft.add_adapter(model, tmp_path)), wanted)


def test_lora_on_what_the_config_trains_is_refused(tmp_path):
    refused = pytest.raises(
        ValueError, match=r"cannot train .*shared_experts.*down_proj.*: an adapter of peft is on it"
    )
    for kind in (
        {"target_parameters": ["shared_experts.down_proj.weight"]},
        {"modules_to_save": ["shared_experts.down_proj"]},
    ):
        with refused:
            esft.to_esft(with_lora(make_model(), **kind), SHARED)
        model = with_lora(esft.to_esft(make_model(), SHARED), **kind)
        with refused:
            esft.to_esft(model, SHARED)
        with refused:
            esft.save_adapter(model, "nowhere")
        esft.to_esft(with_lora(make_model(), **kind), {"experts": EXPERTS})
        esft.save_adapter(esft.to_esft(make_model(), SHARED), tmp_path)
        model = with_lora(esft.add_adapter(make_model(), tmp_path), **kind)
        before = logits(model)
        with refused:
            esft.unload(model)
        assert torch.equal(logits(model), before) and esft.trained_config(model).shared_experts


def test_a_lora_adapter_is_not_merged_into_a_model_in_training(tmp_path):
    with_lora(make_model()).save_pretrained(tmp_path)
    refused = pytest.raises(ValueError, match=r"cannot merge the LoRA adapter .*: the model is in training, or holds")
    for model in (esft.to_esft(make_model(), SHARED), with_lora(make_model())):
        before, learns = logits(model), trainable(model)
        with refused:
            esft.add_adapter(model, tmp_path)
        assert torch.equal(logits(model), before) and trainable(model) == learns
    merged = esft.add_adapter(make_model(), tmp_path)
    with pytest.raises(ValueError, match=r"no adapter of experts\. .*A LoRA adapter is merged as it is added"):
        esft.merge(merged)


def test_lora_beside_a_router_leaves_the_note_of_the_base(tmp_path):
    model = make_model()
    rank = moe_layers(model)[1].num_experts  # a factor of it has the shape of a router
    lora = with_lora(model, r=rank, target_parameters=["shared_experts.down_proj.weight"])
    assert esft.base_note(lora.get_base_model()) == esft.base_note(make_model())
    esft.save_adapter(train(esft.to_esft(lora, {"experts": EXPERTS})), tmp_path)
    esft.add_adapter(make_model(), tmp_path)


# -------------------------------------------------------------------------------------------------- Trainer and TRL

ROWS = torch.randint(3, 128, (12, 9), generator=torch.Generator().manual_seed(0)).tolist()


def trainer_of(kind: str, folder, tokenizer, steps: int, **changes):
    settings = {"output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    settings |= {"logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "save_steps": 3, "seed": 0}
    settings |= {"disable_tqdm": True, "lr_scheduler_type": "linear", "warmup_steps": 1} | changes
    set_seed(0)
    if kind == "trl":
        trl = pytest.importorskip("trl")
        rows = datasets.Dataset.from_list([{"input_ids": ids} for ids in ROWS])
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
        args = trl.SFTConfig(**settings, max_length=32, gradient_checkpointing=False)
        model = esft.to_esft(make_model(dtype=torch.bfloat16), SHARED)
        data = {"train_dataset": rows, "eval_dataset": rows.select(range(4)), "processing_class": tokenizer}
        return trl.SFTTrainer(model=model, args=args, peft_config=config, callbacks=[esft.ESFTCallback()], **data)
    rows = [{"input_ids": ids, "labels": ids} for ids in ROWS]
    data = {"train_dataset": rows, "eval_dataset": rows[:4]}
    args = TrainingArguments(**settings)
    return Trainer(model=both(kind), args=args, callbacks=[esft.ESFTCallback()], **data)


KINDS = ["peft first", pytest.param("trl", marks=[] if importlib.util.find_spec("trl") else pytest.mark.skip)]


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_unbroken_one(kind, tmp_path, tiny_tokenizer):
    whole = trainer_of(kind, tmp_path / "whole", tiny_tokenizer, 6)
    start = {name: param.detach().clone() for name, param in whole.model.named_parameters() if param.requires_grad}
    assert {name.removeprefix("base_model.model.") for name in start} > of_lora(whole.model)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = trainer_of(kind, tmp_path / "resumed", tiny_tokenizer, 6)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    found, wanted = dict(resumed.model.named_parameters()), dict(whole.model.named_parameters())
    assert all(torch.equal(param, found[name]) for name, param in wanted.items())
    assert not any(torch.equal(wanted[name], tensor) for name, tensor in start.items())
    assert load_file(checkpoint / "model.safetensors").keys() == start.keys()
    loaded = esft.add_adapter(make_model(dtype=whole.model.dtype), checkpoint / "adapter")
    peft.PeftModel.from_pretrained(loaded, checkpoint)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_model_is_loaded_at_the_end(kind, tmp_path, tiny_tokenizer):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    keys = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, **best}
    trainer = trainer_of(kind, tmp_path, tiny_tokenizer, 4, **keys)
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(evaluated) > min(evaluated)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(evaluated), abs=1e-6)


def test_lora_on_the_fused_tensors_is_refused_as_a_trainer_is_made(tmp_path, tiny_tokenizer):
    model = with_lora(esft.to_esft(make_model(), SHARED), target_parameters=FUSED)
    with pytest.raises(ValueError, match="LoRA is on its fused tensors"):
        Trainer(model=model, args=TrainingArguments(str(tmp_path), report_to=[]), callbacks=[esft.ESFTCallback()])
