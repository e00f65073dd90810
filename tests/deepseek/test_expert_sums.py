"""Compare the scores that look into experts, gradient and reap, with autograd and with a plain loop."""

import pytest
import torch
from torch import nn

from deepseek.experts import moe_layers
from deepseek.frozen import store_frozen
from deepseek.grouped_gemm import IMPLEMENTATION, REFERENCE
from deepseek.loading import keeps_documents_apart
from esft import ExpertScores, RouterCapture, merge, to_esft
from evaluation.expert_scoring import MaskedPack, count_routing, document_losses
from tests.helpers import FAMILIES, make_model
from training.data import Encoded, Pack, pack_of

LENGTHS = (9, 14, 5, 11)


def documents(seed: int = 0) -> list[Encoded]:
    """Documents of several lengths; the first three tokens of each have no label."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in LENGTHS]
    return [Encoded(one, [-100] * 3 + one[3:]) for one in ids]


def masked(*groups: list[int]) -> list[MaskedPack]:
    every = documents()
    packs = [pack_of(every, group, LENGTHS, range(len(every))) for group in groups]
    return [MaskedPack(one, [True] * len(one)) for one in packs]


def sums(model, packs, *extra: str) -> dict[str, torch.Tensor]:
    counts = list(count_routing(model, packs, extra))
    return {kind: sum(one.sums[kind] for one in counts) for kind in counts[0].sums}


def by_autograd(model) -> torch.Tensor:
    """(L, E): squared gradients of the fused tensors of every expert, a backward for each document."""
    layers, total = moe_layers(model), 0
    model.requires_grad_(True)
    for document in documents():
        model.zero_grad()
        ids = torch.tensor([document.input_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        nn.functional.cross_entropy(logits.float(), torch.tensor(document.labels[1:])).backward()
        rows = []
        for layer in layers.values():
            grads = [layer.tensor(name).grad for name in layer.tensor_names]
            rows.append(sum(grad.double().flatten(1).pow(2).sum(1) for grad in grads))
        total = total + torch.stack(rows)
    model.zero_grad()
    model.requires_grad_(False)
    return total


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-4) -> None:
    error = (found - wanted).abs().max() / wanted.max()
    assert error < tolerance and (wanted > 0).float().mean() > 0.5, error


def with_norms(model) -> None:
    """Put a norm after every expert, which makes each expert's output another one."""
    for layer in moe_layers(model).values():
        layer.module.has_post_expert_norm, layer.module.post_expert_norm = True, nn.RMSNorm(32)
        layer.module.post_expert_norm.weight.data.normal_(1, 0.3)


@pytest.mark.parametrize("family", [*FAMILIES, "norms"])
def test_squared_gradients_are_those_of_autograd(family):
    """In every layout; one backward over a pack, or over two, gives what a backward for each document gives."""
    model = make_model("qwen3_moe" if family == "norms" else family)
    if family == "norms":
        with_norms(model)
        model.set_experts_implementation(REFERENCE)
    wanted = by_autograd(model)
    one, two = masked([0, 1, 2, 3]), masked([2, 0], [3, 1])
    apart = [part for pack in one for part in pack.documents()]
    for packs in (one, two, apart):
        close(sums(model, packs, "gradient")["squares"], wanted)
    assert all(param.grad is None and not param.requires_grad for param in model.parameters())
    # of the whole pack as one document the squares would be others
    merged = Pack(one[0].pack.input_ids, one[0].pack.labels, list(range(sum(LENGTHS))), [0])
    other = sums(model, [MaskedPack(merged, [True] * len(merged))], "gradient")["squares"]
    assert (other - wanted).abs().max() > 0.1 * wanted.max()


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_rows_that_are_compared_a_few_at_a_time_give_the_same(rows, monkeypatch):
    model, packs = make_model(), masked([0, 1, 2, 3])
    whole = sums(model, packs, "gradient")["squares"]
    monkeypatch.setattr("deepseek.expert_sums.ROWS", rows)
    close(sums(model, packs, "gradient")["squares"], whole, 1e-6)


@pytest.mark.parametrize("family", [*FAMILIES, "norms"])
def test_reap_is_the_mean_of_gate_times_output_norm(family):
    model = make_model("qwen3_moe" if family == "norms" else family)
    if family == "norms":
        with_norms(model)
    packs = masked([0, 1, 2], [3])
    packs[0].mask[:20] = [False] * 20  # these tokens do not count
    layers, seen = moe_layers(model), []
    handles = [
        layer.module.register_forward_pre_hook(lambda _m, args, layer=layer: seen.append((layer, *args)))
        for layer in layers.values()
    ]
    found = ExpertScores.from_counts(next(count_routing(model, packs, ["reap"])))
    for handle in handles:
        handle.remove()
    model.set_experts_implementation(REFERENCE)
    apart = keeps_documents_apart(model)
    calls = seen[len(layers) :][: len(layers) * (1 if apart else 3)]  # the first forward is the test for packs
    tokens = {index: 0 for index in layers}
    total, slots = torch.zeros(len(layers), 8), torch.zeros(len(layers), 8)
    for layer, x_TD, ids_TK, weights_TK in calls:
        row, one = list(layers).index(layer.index), torch.ones(1, 1)
        for t, ids_K in enumerate(ids_TK.tolist()):
            if packs[0].mask[tokens[layer.index] + t]:
                for k, e in enumerate(ids_K):
                    out = layer.module(x_TD[t, None], torch.tensor([[e]]), one)
                    total[row, e] += weights_TK[t, k].item() * out.norm().item()
                    slots[row, e] += 1
        tokens[layer.index] += len(ids_TK)
    for row, layer in enumerate(layers):
        score_E = torch.tensor([found["reap"][layer][e] for e in range(8)])
        torch.testing.assert_close(score_E, total[row] / slots[row].clamp(min=1), rtol=1e-4, atol=1e-6)


def test_gradient_scores_are_shares_of_the_whole_model():
    counts = next(count_routing(make_model(), masked([0, 1, 2, 3]), ["gradient", "reap"]))
    scores = ExpertScores.from_counts(counts)
    assert scores.by_function.keys() == {"token", "gate", "gradient", "reap"}
    every = [score for score_E in scores["gradient"].values() for score in score_E.values()]
    assert sum(every) == pytest.approx(1) and max(every) < 1
    squares = counts.sums["squares"]
    assert scores["gradient"][2][3] == pytest.approx((squares[1, 3] / squares.sum()).item())


def test_routing_counts_do_not_change_by_what_else_is_measured():
    model, packs = make_model(), masked([0, 1], [2, 3])
    plain, more = sums(model, packs), sums(model, packs, "gradient", "reap", "prob")
    assert all(torch.equal(plain[kind], more[kind]) for kind in ("slots", "gates"))
    again = sums(model, packs, "gradient", "reap", "prob")
    assert all(torch.equal(more[kind], again[kind]) for kind in more)


def test_stored_and_reordered_experts_have_the_same_scores():
    """Experts in other storage, as an fp8 base has them, and experts in training, whose rows are in another order."""
    plain, packs = sums(make_model(), masked([0, 1, 2, 3]), "gradient", "reap"), masked([0, 1, 2, 3])
    model = make_model()
    for layer in moe_layers(model).values():
        store_frozen(layer, (), None, True)
    model.set_experts_implementation(IMPLEMENTATION)
    trained = to_esft(make_model(), {"experts": {"1": [5, 3], "2": [7]}})
    merged, with_lora = (to_esft(make_model(), {"experts": {"1": [5, 3]}}, lora_rank=2) for _ in range(2))
    for one in (merged, with_lora):
        for number, param in enumerate(param for param in one.parameters() if param.requires_grad):
            param.data += torch.randn(param.shape, generator=torch.Generator().manual_seed(number))
    changed = sums(merge(merged), packs, "gradient", "reap")
    assert (changed["norms"] - plain["norms"]).abs().max() > 0.1 * plain["norms"].max()
    for other, wanted in ((model, plain), (trained, plain), (with_lora, changed)):
        found = sums(other, packs, "gradient", "reap")
        close(found["squares"], wanted["squares"])
        close(found["norms"], wanted["norms"])


@pytest.mark.parametrize("kind", ["reap", "gradient"])
def test_a_process_with_some_experts_measures_none(kind):
    """The sums of a rank would lack the tokens that others sent, and the experts that others hold."""
    model = make_model()
    RouterCapture(model, **{kind: True})
    next(iter(moe_layers(model).values())).module.shard = "a placement"
    with pytest.raises(ValueError, match="cannot measure what experts do: a process has only some of them"):
        RouterCapture(model, **{kind: True})
    RouterCapture(model, prob=True)  # the routing is that of the rank's own tokens


def test_a_loop_of_ones_own_needs_a_backward():
    model, ids = make_model(), torch.tensor([documents()[0].input_ids])
    with RouterCapture(model, gradient=True) as capture, torch.no_grad():
        model(input_ids=ids)
    with pytest.raises(ValueError, match="cannot score layer 1: no backward reached its experts"):
        capture.counts()
    with RouterCapture(model, gradient=True) as capture:
        model(input_ids=ids, labels=ids).loss.backward()
    assert capture.counts().sums["squares"].sum() > 0
    assert all(param.grad is None and param.requires_grad for param in model.parameters())  # as before


def test_the_loss_of_a_document_is_its_mean():
    model, (one,) = make_model().requires_grad_(False), masked([0, 1, 2, 3])
    alone = [document_losses(model, part).item() for part in one.pack.documents()]
    assert document_losses(model, one.pack).tolist() == pytest.approx(alone, rel=1e-5)
    document = documents()[0]
    logits = model(input_ids=torch.tensor([document.input_ids])).logits[0, :-1]
    mean = nn.functional.cross_entropy(logits, torch.tensor(document.labels[1:]))
    ((first, _),) = [(loss, part) for loss, part in zip(alone, one.pack.documents()) if part.samples == [0]]
    assert first == pytest.approx(mean.item(), rel=1e-5)
