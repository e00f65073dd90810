"""Tools of torch that copy, average or shard parameters find the true values in them."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import esft
from tests.client_helpers import IDS, take_steps
from tests.helpers import join_world, make_model, run_ranks

pytestmark = pytest.mark.clients
DTYPES = [torch.float32, torch.bfloat16]
CONFIG = {"experts": {"1": [5, 2], "2": [7]}}


def trained(model) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("evaluated", [False, True])
def test_an_average_of_weights_is_what_the_formula_gives(dtype, evaluated):
    model = esft.to_esft(make_model(dtype=dtype), CONFIG)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    wanted = None
    for _ in range(3):
        take_steps(model, IDS, 1)
        average.update_parameters(model)
        now = trained(model)
        wanted = now if wanted is None else {name: 0.5 * wanted[name] + 0.5 * now[name] for name in now}
        if evaluated:
            average.module(IDS)
    found = trained(average.module)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)
        assert not torch.equal(value, now[name])
    fused = average.module.model.layers[1].mlp.experts
    average.module(IDS)
    assert torch.equal(fused.down_proj[:2], fused.trained.down_proj.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copy_goes_half_way_when_it_is_told_to(dtype):
    """As a reference model follows the policy: every parameter of the one is interpolated towards the other's."""
    model = esft.to_esft(make_model(dtype=dtype), CONFIG)
    reference = copy.deepcopy(model)
    before = trained(reference)
    take_steps(model, IDS, 1)
    with torch.no_grad():
        for one, other in zip(reference.parameters(), model.parameters()):
            one.lerp_(other, 0.5)
    after = trained(model)
    for name, value in trained(reference).items():
        torch.testing.assert_close(value, (before[name] + after[name]) / 2)
    reference(IDS)
    assert trained(reference).keys() == after.keys()


def sharded(rank: int, dtype: torch.dtype) -> tuple[list, dict, dict, dict]:
    """Train on a share of the rows under FSDP2. Return losses, state dict, adapter, and the state dict loaded anew."""
    ranks = join_world()
    model = esft.to_esft(make_model(dtype=dtype), CONFIG)
    mesh = torch.distributed.init_device_mesh("cpu", (ranks.world_size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = torch.stack(take_steps(model, IDS.chunk(ranks.world_size)[rank]))
    dist.all_reduce(losses)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    adapter = esft.adapter_tensors(model)
    with pytest.raises(ValueError, match="cannot use ESFTCallback: FSDP"):
        esft.ESFTCallback().on_train_begin(None, None, None, model=model)
    set_model_state_dict(model, make_model(dtype=dtype).state_dict(), options=StateDictOptions(full_state_dict=True))
    again = esft.adapter_tensors(model)
    return (losses / ranks.world_size).tolist(), state, adapter, again


@pytest.mark.parametrize("dtype", DTYPES)
def test_fsdp_trains_the_chosen_rows_and_gives_whole_state_dicts(dtype):
    base = make_model(dtype=dtype)
    alone = esft.to_esft(make_model(dtype=dtype), CONFIG)
    losses = torch.stack(take_steps(alone, IDS)).tolist()
    (found, state, adapter, again), (_, _, other, _) = run_ranks(2, sharded, dtype)
    assert found == pytest.approx(losses, rel=1e-6 if dtype == torch.float32 else 2e-2) and losses[2] < losses[0]
    assert list(state) == list(base.state_dict())
    views = esft.adapter_views(base, esft.ExpertConfig.from_dict(CONFIG))
    base.load_state_dict(state)
    assert adapter.keys() == other.keys() == views.keys()
    for name, tensor in adapter.items():
        assert torch.equal(views[name], tensor) and torch.equal(tensor, other[name])
    frozen = make_model(dtype=dtype)
    start = {
        name: view.clone() for name, view in esft.adapter_views(frozen, esft.ExpertConfig.from_dict(CONFIG)).items()
    }
    assert all(torch.equal(start[name], tensor) for name, tensor in again.items())
    for name, view in views.items():
        assert not torch.equal(view, start[name])
        view.copy_(start[name])
    wanted = frozen.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in base.state_dict().items())


# ------------------------------------------------------------------------------------------------------------- wrappers


@pytest.fixture
def one_process(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def with_lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "q_b_proj"]))


WRAPPERS = {
    "DDP": nn.parallel.DistributedDataParallel,
    "torch.compile": functools.partial(torch.compile, backend="eager"),
    "peft": with_lora,
}
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9, [0, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 9])


def counts(model, call):
    with torch.no_grad(), esft.RouterCapture(model) as capture:
        call()
    return capture.counts()


@pytest.mark.parametrize("name", WRAPPERS)
def test_an_adapter_is_saved_from_and_put_into_a_wrapped_model(name, one_process, tmp_path):
    model = esft.to_esft(make_model(), CONFIG)
    take_steps(model, IDS, 1)
    esft.save_adapter(model, tmp_path / "plain")
    wrapped = WRAPPERS[name](model)
    esft.save_adapter(wrapped, tmp_path / "wrapped")
    assert (tmp_path / "plain" / "adapter.safetensors").read_bytes() == (
        tmp_path / "wrapped" / "adapter.safetensors"
    ).read_bytes()
    fresh = make_model()
    outer = WRAPPERS[name](fresh.train())
    assert esft.add_adapter(outer, tmp_path / "wrapped") is outer
    assert torch.equal(fresh.eval()(IDS).logits, model(IDS).logits)
    assert esft.unload(outer) is outer and torch.equal(fresh(IDS).logits, make_model()(IDS).logits)


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("captured", ["outer", "inner"])
def test_padding_is_not_counted_in_a_wrapped_model(name, captured, one_process):
    wanted = counts(model := make_model(), lambda: model(IDS, attention_mask=MASK))
    assert wanted.tokens == MASK.sum() < MASK.numel()
    inner = make_model()
    outer = WRAPPERS[name](inner.requires_grad_(True))
    found = counts(outer if captured == "outer" else inner, lambda: outer(IDS, attention_mask=MASK))
    assert found.tokens == wanted.tokens and torch.equal(found.sums["slots"], wanted.sums["slots"])


def test_padding_is_not_counted_below_the_head_or_while_answers_are_generated():
    model = make_model()
    wanted = counts(model, lambda: model(IDS, attention_mask=MASK))
    below = counts(model, lambda: model.model(IDS, attention_mask=MASK))
    assert torch.equal(below.sums["slots"], wanted.sums["slots"])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = counts(model, lambda: model.generate(IDS, attention_mask=MASK, **options))
    assert found.tokens == wanted.tokens + 3 * len(IDS)


def test_padding_is_not_counted_where_embeddings_or_ready_masks_are_given():
    model = make_model()
    wanted = counts(model, lambda: model(IDS, attention_mask=MASK))
    embeds = model.get_input_embeddings()(IDS).detach()
    found = counts(model, lambda: model(input_ids=None, inputs_embeds=embeds, attention_mask=MASK))
    assert torch.equal(found.sums["slots"], wanted.sums["slots"])
    causal = torch.ones(1, 1, IDS.shape[1], IDS.shape[1], dtype=torch.bool).tril()
    assert counts(model, lambda: model(IDS, attention_mask=causal)).tokens == IDS.numel()
