"""A model in torch.compile: one node per layer and no graph break, with eager's values and gradients, bit for bit."""

import copy
import pickle
from types import MethodType

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from transformers.integrations.moe import grouped_mm_experts_forward

import esft
from deepseek.experts import moe_layers
from tests.helpers import make_model

pytestmark = [pytest.mark.long, pytest.mark.clients]
slow = pytest.mark.slow
DTYPES = [torch.float32, torch.bfloat16]
IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def prepared(family="deepseek_v2", dtype=torch.float32, seed=0, **options):
    """Return a model that trains two experts in every MoE layer but its last."""
    model = make_model(family, dtype, seed).train()
    return esft.to_esft(model, {"experts": dict.fromkeys(list(moe_layers(model))[:-1], (5, 2))}, **options)


def compiled(model, nodes=None):
    """Compile a model as one graph. `nodes` gets the number of its nodes that are experts."""

    def count(graph, inputs):
        if nodes is not None:
            nodes.append([node.target for node in graph.graph.nodes].count(torch.ops.esft.experts))
        return aot_eager(graph, inputs)

    return torch.compile(model, backend=count, fullgraph=True)


def steps(model, call, n=2):
    """Train with AdamW. Return the losses and the last gradients."""
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    losses = []
    for _ in range(n):
        optimizer.zero_grad()
        loss = call(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: param.grad for name, param in model.named_parameters() if param.requires_grad}


def logits(call):
    with torch.no_grad():
        return call(input_ids=IDS, use_cache=False).logits


def assert_trains_like(eager, model, call):
    (losses, grads), (wanted, expected) = steps(model, call), steps(eager, eager)
    assert losses == wanted and losses[0] != losses[1]
    assert grads.keys() == expected.keys() and all(grad.any() for grad in expected.values())
    assert all(torch.equal(grads[name], grad) for name, grad in expected.items())


@pytest.mark.parametrize(
    "family, dtype, options",
    [
        pytest.param("deepseek_v2", torch.float32, {}, marks=slow),
        ("gpt_oss", torch.bfloat16, {}),  # transposed, interleaved and biased
        pytest.param("gpt_oss", torch.float32, {"lora_rank": 3}, marks=slow),
        pytest.param("deepseek_v2", torch.bfloat16, {}, marks=slow),
        pytest.param("deepseek_v2", torch.bfloat16, {"lora_rank": 4}, marks=slow),
        pytest.param("gpt_oss", torch.float32, {}, marks=slow),
        pytest.param("nemotron_h", torch.float32, {}, marks=slow),  # without a gate
        pytest.param("nemotron_h", torch.float32, {"lora_rank": 8}, marks=slow),
        pytest.param("qwen3_moe", torch.bfloat16, {}, marks=slow),
    ],
)
def test_one_node_per_layer_trains_as_eager(family, dtype, options):
    model, nodes = prepared(family, dtype, **options), []
    call = compiled(model, nodes)
    assert_trains_like(prepared(family, dtype, **options), model, call)
    assert set(nodes) == {len(moe_layers(model))} and not counters["graph_break"]
    for param in model.parameters():
        if param.requires_grad:
            param.data.mul_(2)
    assert torch.equal(logits(call), logits(model))  # no value is frozen into the graph


@slow
@pytest.mark.parametrize("kind", ["fp8", "int8", None])
def test_frozen_experts_in_other_storage(kind):
    eager, model = (prepared(frozen_dtype=kind, offload_frozen=kind is None) for _ in range(2))
    assert_trains_like(eager, model, compiled(model))


@slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_experts_and_all_else_after_a_cast(dtype):
    config = {"experts": {"1": [5, 2]}, "shared_experts": True, "non_expert_modules": True}
    eager, model = (esft.to_esft(make_model(dtype=dtype).train(), config) for _ in range(2))
    assert_trains_like(eager, model, compiled(model))
    eager, model = (prepared().to(dtype) for _ in range(2))
    assert_trains_like(eager, model, compiled(model))
    assert {param.dtype for param in model.parameters() if param.requires_grad} == {torch.float32}


@slow
@pytest.mark.parametrize("one_graph", [True, False])
def test_activation_checkpointing(one_graph):
    """transformers makes the embeddings require a gradient, which breaks the graph by itself."""
    eager, model = prepared(), prepared()
    for one in (eager, model):
        one.activation_checkpointing_enable()
        if one_graph:
            one.disable_input_require_grads()
    assert_trains_like(eager, model, torch.compile(model, backend="aot_eager", fullgraph=one_graph))
    assert one_graph != bool(counters["graph_break"])


@slow
def test_layer_by_layer_and_in_place():
    for parts in (lambda model: model.model.layers, lambda model: [model]):
        eager, model = prepared(), prepared()
        for part in parts(model):
            part.compile(backend="aot_eager", fullgraph=True)
        assert_trains_like(eager, model, model)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_the_experts_alone(fullgraph):
    layer = moe_layers(prepared())[1].module
    tokens, ids, weights = torch.randn(6, 32), torch.randint(0, 8, (6, 3)), torch.rand(6, 3)
    call = torch.compile(layer, backend="aot_eager", fullgraph=fullgraph)
    for _ in range(2):
        assert torch.equal(call(tokens, ids, weights), layer(tokens, ids, weights))


@slow
def test_a_graph_that_breaks_within_a_layer():
    model = prepared()
    block = model.model.layers[1].mlp
    block.register_forward_pre_hook(torch.compiler.disable(lambda *_: None))
    block.experts.register_forward_pre_hook(torch.compiler.disable(lambda *_: None))
    call = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(logits(call), logits(model))
    assert counters["graph_break"]


@slow
def test_each_model_of_a_process_computes_with_its_own_experts():
    """Compiled code is shared by all models of a class. A copy must not compute with the first model's weights."""
    models = [prepared(seed=0), prepared(seed=1)]
    models += [copy.deepcopy(models[0]), pickle.loads(pickle.dumps(models[1]))]
    for model in models[2:]:
        for param in model.parameters():
            if param.requires_grad:
                param.data.mul_(1.5)
    found = [logits(call) for call in [compiled(model) for model in models]]
    assert all(torch.equal(found[n], logits(model)) for n, model in enumerate(models))
    assert not any(torch.equal(found[a], found[b]) for a in range(4) for b in range(a))


@slow
def test_a_model_without_trained_experts_and_captured_routing():
    model, nodes = make_model(), []
    wanted = logits(model)
    model.set_experts_implementation("esft")
    assert torch.equal(logits(compiled(model, nodes)), wanted) and nodes == [2]
    model = prepared()
    counted = []
    for call in (model, torch.compile(model, backend="aot_eager")):
        with esft.RouterCapture(model) as capture:
            logits(call)
        counted.append(capture.counts().sums["slots"])
    assert torch.equal(*counted)


@slow
def test_unequal_lengths():
    call = compiled(model := prepared())
    for length in (5, 9, 17, 30):
        ids = torch.randint(3, 128, (2, length))
        assert torch.equal(call(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@slow
@pytest.mark.parametrize("how", ["another implementation", "a replaced forward"])
def test_another_forward_is_refused(how):
    model = prepared()
    call = torch.compile(model, backend="aot_eager")
    logits(call)
    if how == "another implementation":
        model.set_experts_implementation("grouped_mm")
    else:
        module = model.model.layers[1].mlp.experts
        module.forward = MethodType(grouped_mm_experts_forward, module)
    with pytest.raises(ValueError, match=r"'grouped_mm': their rows|something replaced the forward"):
        logits(call)


@slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_inductor_trains_as_eager_within_rounding(dtype):
    eager, model = prepared(dtype=dtype), prepared(dtype=dtype)
    (losses, grads), (wanted, expected) = steps(model, torch.compile(model, fullgraph=True)), steps(eager, eager)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert losses == pytest.approx(wanted, rel=tolerance) and losses[1] < losses[0]
    for name, grad in expected.items():
        assert (grads[name] - grad).norm() <= 10 * tolerance * grad.norm() and grad.any(), name
