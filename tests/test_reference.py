"""A model in training computes as its base while `base_values` is open, and is the same trained model afterwards."""

import functools

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import datasets
import esft
from tests.client_helpers import IDS, logits, state_of, trainable
from tests.helpers import BOTH, FAMILIES, assert_same_tensors, join_world, make_model, run_ranks

DTYPES = [torch.float32, torch.bfloat16]
EXPERTS = {"experts": {"1": [5, 2], "2": [7]}}
ALL = {**EXPERTS, **BOTH}


def moved(dtype=torch.float32, config=ALL, family="deepseek_v2", **changes):
    """A model whose trained values are all away from the base's."""
    model = esft.to_esft(make_model(family, dtype), config, **changes)
    torch.manual_seed(1)
    for param in trainable(model):
        param.data += 0.05 * torch.randn_like(param)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_values_are_the_base_s_while_it_is_open_and_the_trained_ones_afterwards(family, dtype):
    experts = {"experts": {"2": [7, 1]}} if family == "nemotron_h" else EXPERTS
    model = moved(dtype, {**experts, **BOTH}, family)
    after, kept = logits(model), state_of(model)
    params = [(param, param._version, param.data_ptr()) for param in trainable(model)]
    base = logits(make_model(family, dtype))
    assert not torch.equal(after, base)
    with esft.base_values(model):
        assert torch.equal(logits(model), base)
        assert_same_tensors(model.state_dict(), make_model(family, dtype).state_dict())
    assert torch.equal(logits(model), after)
    assert_same_tensors(model.state_dict(), kept)
    assert [(param, param._version, param.data_ptr()) for param in trainable(model)] == params


def test_an_error_inside_leaves_the_trained_values():
    model = moved()
    kept = state_of(model)
    with pytest.raises(KeyError), esft.base_values(model):
        raise KeyError
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        esft.ReferenceModel(model)(use_cache=False)
    assert_same_tensors(model.state_dict(), kept)


def test_a_loaded_adapter_makes_way_for_the_base_as_well(tmp_path):
    esft.save_adapter(moved(config=EXPERTS), tmp_path)
    model = esft.add_adapter(make_model(), tmp_path)
    after = logits(model)
    with esft.base_values(model):
        assert torch.equal(logits(model), logits(make_model()))
    assert torch.equal(logits(model), after)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_reference_between_a_forward_and_its_backward_changes_no_gradient(dtype, checkpointing):
    def gradients(between) -> list[torch.Tensor]:
        model = moved(dtype).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(IDS, labels=IDS, use_cache=False).loss
        between(model)
        loss.backward()
        return [param.grad for param in trainable(model)]

    wanted = gradients(lambda model: None)
    found = gradients(lambda model: esft.ReferenceModel(model)(IDS, use_cache=False))
    assert len(wanted) > 10 and all(map(torch.equal, found, wanted))


def log_probs(model, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None]).sum((1, 2))


def dpo_steps(model, reference, ids=IDS) -> list[torch.Tensor]:
    """Three steps of DPO by hand. The first half of the rows is preferred to the second."""
    optimizer, losses = torch.optim.AdamW(trainable(model), lr=1e-2), []
    for _ in range(3):
        policy = log_probs(model, ids)
        with torch.no_grad():
            chosen, rejected = (policy - log_probs(reference, ids)).chunk(2)
        ratios = policy - policy.detach() + torch.cat([chosen, rejected])
        loss = -nn.functional.logsigmoid(0.1 * torch.sub(*ratios.chunk(2))).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("dtype", DTYPES)
def test_dpo_is_that_with_a_whole_second_model(dtype):
    one, other = (esft.to_esft(make_model(dtype=dtype), ALL) for _ in range(2))
    found = dpo_steps(one, esft.ReferenceModel(one))
    wanted = dpo_steps(other, make_model(dtype=dtype))
    assert torch.stack(found).tolist() == torch.stack(wanted).tolist() and wanted[2] < wanted[0]
    assert_same_tensors(one.state_dict(), other.state_dict())


def test_a_reference_is_in_evaluation_mode_and_the_model_keeps_its_modes():
    model = moved(config=EXPERTS).train()
    model.lm_head.eval()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    modes = [module.training for module in model.modules()]
    output = esft.ReferenceModel(model)(IDS, use_cache=False).logits
    assert torch.equal(output, logits(make_model())) and not output.requires_grad
    assert [module.training for module in model.modules()] == modes


def test_a_reference_has_nothing_of_its_own():
    model = moved(config=EXPERTS)
    reference = esft.ReferenceModel(model)
    assert not list(reference.parameters()) and not list(reference.buffers()) and reference.config is model.config
    assert list(reference.modules()) == [reference]
    reference.to(torch.float64)
    assert model.dtype == torch.float32
    with pytest.raises(ValueError, match="cannot give the state of a reference model"):
        reference.state_dict()


def test_it_is_refused_where_the_base_is_not_known():
    with pytest.raises(ValueError, match="cannot use the base's values: they were not kept"):
        esft.ReferenceModel(esft.to_esft(make_model(), EXPERTS, keep_base=False))(IDS)
    with pytest.raises(ValueError, match="the model has no adapter"):
        esft.ReferenceModel(make_model())(IDS)


def sharded(rank: int) -> None:
    mesh = torch.distributed.init_device_mesh("cpu", (join_world().world_size,))
    model = esft.to_esft(make_model(), EXPERTS)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match="FSDP has sharded them"):
        esft.ReferenceModel(model)(IDS)


def test_it_is_refused_under_fsdp():
    run_ranks(2, sharded)


# ------------------------------------------------------------------------------------------------- programs of others

WRAPPERS = {
    "torch.compile": functools.partial(torch.compile, backend="eager"),
    "in place": lambda model: model.compile(backend="eager") or model,
}


@pytest.mark.clients
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_compiled_model_has_a_reference(name):
    model, base = moved(torch.bfloat16, EXPERTS), logits(make_model(dtype=torch.bfloat16))
    outer = WRAPPERS[name](model)
    after = logits(outer)
    assert torch.equal(esft.ReferenceModel(outer)(IDS, use_cache=False).logits, base)
    with esft.base_values(outer):
        assert torch.equal(logits(outer), base)
    assert torch.equal(logits(outer), after)


def under_ddp(rank: int) -> tuple[list, dict]:
    join_world()
    model = esft.to_esft(make_model(), EXPERTS)
    outer = nn.parallel.DistributedDataParallel(model)
    losses = dpo_steps(outer, esft.ReferenceModel(outer), IDS[rank::2])
    return torch.stack(losses).tolist(), state_of(model)


@pytest.mark.clients
def test_two_processes_of_ddp_have_a_reference():
    (one, found), (other, _) = run_ranks(2, under_ddp)
    model = esft.to_esft(make_model(), EXPERTS)
    wanted = torch.stack(dpo_steps(model, make_model()))
    assert (torch.tensor(one) + torch.tensor(other)).div(2).tolist() == pytest.approx(wanted.tolist(), abs=1e-5)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


PAIRS = [
    {"prompt": f"User: is it {i}?\n\nAssistant:", "chosen": f" yes {i}, it is.", "rejected": " no" * (1 + i % 3)}
    for i in range(12)
]


def trl_run(reference, folder, tokenizer, dtype, resume=None, **changes):
    trl = pytest.importorskip("trl")
    model = esft.to_esft(make_model(dtype=dtype), ALL)
    settings = {"output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    settings |= {"gradient_accumulation_steps": 2, "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False}
    settings |= {"save_strategy": "no", "disable_tqdm": True, "seed": 0, "router_aux_loss_coef": 0.0}
    args = trl.DPOConfig(**settings | {"gradient_checkpointing": False} | changes)
    rows = datasets.Dataset.from_list(PAIRS)
    trainer = trl.DPOTrainer(
        model,
        reference(model),
        args,
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        processing_class=tokenizer,
        callbacks=[esft.ESFTCallback()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, trainer.evaluate()


@pytest.mark.long
@pytest.mark.clients
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "changes", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=["", "checkpointing", "autocast"]
)
def test_dpo_of_trl_is_that_with_a_whole_reference(dtype, changes, tmp_path, tiny_tokenizer):
    whole, wanted = trl_run(lambda _: make_model(dtype=dtype), tmp_path, tiny_tokenizer, dtype, **changes)
    small, found = trl_run(esft.ReferenceModel, tmp_path, tiny_tokenizer, dtype, **changes)
    keys = ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"]
    for one, other in zip(small.state.log_history[:4], whole.state.log_history[:4], strict=True):
        assert [one[key] for key in keys] == pytest.approx([other[key] for key in keys], abs=1e-5)
    assert found["eval_loss"] == pytest.approx(wanted["eval_loss"], abs=1e-5) and wanted["eval_loss"] < 0.6
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(small.model.state_dict()[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.clients
def test_a_run_of_trl_that_goes_on_has_the_base_as_its_reference(tmp_path, tiny_tokenizer):
    run = {"tokenizer": tiny_tokenizer, "dtype": torch.float32, "save_strategy": "steps", "save_steps": 2}
    whole, wanted = trl_run(esft.ReferenceModel, tmp_path / "whole", **run)
    again, found = trl_run(
        esft.ReferenceModel, tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-2"), **run
    )
    keys = ["loss", "rewards/chosen", "rewards/margins"]
    one, other = ([[entry[key] for key in keys] for entry in t.state.log_history[2:4]] for t in (again, whole))
    assert one == other and found["eval_rewards/margins"] == wanted["eval_rewards/margins"] != 0
    assert_same_tensors(again.model.state_dict(), whole.model.state_dict())


@pytest.mark.clients
def test_a_reference_of_another_model_is_refused_in_a_sentence(tmp_path, tiny_tokenizer):
    def of_another(_):
        return esft.ReferenceModel(esft.to_esft(make_model(), ALL))

    with pytest.raises(ValueError, match=r"TRL trains another model\. Give ReferenceModel that one"):
        trl_run(of_another, tmp_path, tiny_tokenizer, torch.float32)


@pytest.mark.clients
def test_trl_can_neither_move_a_reference_nor_ask_it_for_its_weights(tmp_path, tiny_tokenizer):
    with pytest.raises(ValueError, match="cannot give the state of a reference model"):
        run = {"precompute_ref_log_probs": True}
        trl_run(esft.ReferenceModel, tmp_path, tiny_tokenizer, torch.float32, **run)
    models = []

    def reference(model):
        models.append(model)
        return esft.ReferenceModel(model)

    with pytest.raises(ValueError, match="zip"):
        run = {"sync_ref_model": True, "ref_model_sync_steps": 1, "learning_rate": 0.0}
        trl_run(reference, tmp_path, tiny_tokenizer, torch.float32, **run)
    assert_same_tensors(models[0].state_dict(), make_model().state_dict())


def grpo_run(reference, folder, tokenizer) -> tuple[list, dict]:
    trl = pytest.importorskip("trl")
    model = esft.to_esft(make_model(), ALL)
    settings = {"output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "num_generations": 4}
    settings |= {"learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "seed": 0}
    settings |= {"save_strategy": "no", "disable_tqdm": True, "max_completion_length": 8, "router_aux_loss_coef": 0.0}
    args = trl.GRPOConfig(**settings, beta=0.0, gradient_checkpointing=False)
    rows = datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in PAIRS])
    trainer = trl.GRPOTrainer(
        model, lambda completions, **_: [float(text.count("a")) for text in completions], args, rows,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.beta, trainer.ref_model = 0.5, reference(model)  # TRL would load a whole one
    torch.manual_seed(0)  # of the answers that are sampled
    trainer.train()
    return [entry["kl"] for entry in trainer.state.log_history if "kl" in entry], state_of(model)


@pytest.mark.clients
def test_grpo_of_trl_takes_it_too(tmp_path, tiny_tokenizer):
    trl = pytest.importorskip("trl")

    def whole(_):
        trl.trainer.utils.add_fused_lm_head(reference := make_model())
        return reference

    found, weights = grpo_run(esft.ReferenceModel, tmp_path, tiny_tokenizer)
    wanted, other = grpo_run(whole, tmp_path, tiny_tokenizer)
    assert found == pytest.approx(wanted, abs=1e-5) and wanted[-1] > 1e-3
    for name, tensor in other.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5)
