"""A model in torch.compile: one node per layer and no graph break, with eager's values and gradients."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

import esft
from deepseek.experts import moe_layers
from tests.helpers import make_model

pytestmark = pytest.mark.clients
DTYPES = [torch.float32, torch.bfloat16]
FAMILIES = ["deepseek_v2", "gpt_oss", "nemotron_h"]  # plain; transposed, interleaved and biased; without a gate
IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def prepared(family="deepseek_v2", dtype=torch.float32, seed=0, experts=(5, 2), **options):
    """Return a model that trains `experts` in every MoE layer but its last."""
    model = make_model(family, dtype, seed).train()
    return esft.to_esft(model, {"experts": dict.fromkeys(list(moe_layers(model))[:-1], experts)}, **options)


def compiled(model, nodes=None, backend=aot_eager):
    """Compile a model as one graph. `nodes` gets the number of nodes that are experts."""

    def count(graph, inputs):
        if nodes is not None:
            nodes.append(sum(node.target is torch.ops.esft.experts for node in graph.graph.nodes))
        return backend(graph, inputs)

    return torch.compile(model, backend=count if backend is aot_eager else backend, fullgraph=True)


def steps(model, call, n=3):
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


def assert_trains_like(model, call, eager, bits=True):
    (losses, grads), (wanted, expected) = steps(model, call), steps(eager, eager)
    assert grads.keys() == expected.keys() and all(grad.any() for grad in expected.values())
    assert losses == wanted and len(set(losses)) == 3
    assert all(torch.equal(grads[name], grad) for name, grad in expected.items())
    assert torch.equal(logits(call), logits(eager))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_node_per_layer_trains_as_eager(family, dtype):
    model, nodes = prepared(family, dtype), []
    call = compiled(model, nodes)
    assert_trains_like(model, call, prepared(family, dtype))
    assert nodes == [len(moe_layers(model))] * len(nodes) and not counters["graph_break"]
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.data.mul_(2)
    assert torch.equal(logits(call), logits(model))  # no value is frozen into the graph
