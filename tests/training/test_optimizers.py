"""Every optimizer that docs/optimizers.md offers: it trains, it resumes by expert id, and its states have that size."""

import json
import re

import pytest
import torch

import train
from deepseek.experts import moe_layers
from esft import ExpertConfig, to_esft
from tests.helpers import (
    EXPERTS,
    ROOT,
    arguments,
    config_of,
    fails,
    losses,
    make_model,
    run_ranks,
    tensors_of,
)
from training.checkpoints import load_states, save_states
from training.config import training_arguments
from training.memory import OPTIMIZERS
from training.optimizers import keep_experts_apart, optimizer_class

PAGE = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
TABLE = [
    line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| `") and line.count("|") == 6
][1:]
SCHEDULE_FREE = {"lr_scheduler_type": "constant"}
ROWS = {name: row for row in TABLE for name in re.findall(r"`(\w+)`", row[0])}
BY_EXPERT = [name for name in ROWS if name != "adafactor"]  # its updates depend on all experts of a process
WIDE = {"hidden_size": 64, "intermediate_size": 80, "num_local_experts": 32}  # a bias of 32 experts has 8-bit blocks
FEW, MANY = (3, 5), tuple(range(30))


def trained(ids: tuple[int, ...], optim: str, files) -> tuple:
    """(model whose layer 1 trains these experts, its optimizer as a run makes it)."""
    keys = SCHEDULE_FREE if optim.startswith("schedule_free") else {}
    args = training_arguments(config_of(files, files / "none", optim=optim, save_opt_states=True, **keys))
    model = to_esft(make_model("gpt_oss", **WIDE), ExpertConfig({1: ids}))
    kind, settings = optimizer_class(args, model)
    optimizer = kind([p for p in model.parameters() if p.requires_grad], **settings)
    keep_experts_apart(optimizer, model)
    if keys:
        optimizer.train()
    return model, optimizer


def step(model, optimizer, seed: int) -> None:
    """One step, with gradients of an expert that depend on its id alone."""
    for param in moe_layers(model)[1].trained.parameters():
        rows = [torch.Generator().manual_seed(100 * seed + id) for id in moe_layers(model)[1].trained.expert_ids]
        param.grad = torch.stack([torch.randn(param.shape[1:], generator=row) for row in rows])
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()


def values(model, ids=FEW) -> dict:
    return {(id, key): view.clone() for id in ids for key, view in moe_layers(model)[1].expert_views(id).items()}


FAST = {"adamw_torch_fused", "muon", "adamw_8bit", "lion_8bit", "schedule_free_adamw"}


@pytest.mark.parametrize("optim", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in BY_EXPERT])
def test_states_go_by_expert_id(files, tmp_path, optim):
    """An expert has the states that it has alone, to the bit, and goes on with them among other experts."""
    need = re.sub(r"\W", "", ROWS[optim][2])
    pytest.importorskip(need) if need else None
    many, of_many = trained(MANY, optim, files)
    few, of_few = trained(FEW, optim, files)
    for seed in range(6):  # RAdam takes no step before its sixth
        step(many, of_many, seed)
        step(few, of_few, seed)
    for folder, pair in (("many", (many, of_many)), ("few", (few, of_few))):
        (tmp_path / folder).mkdir()
        save_states(*pair, tmp_path / folder, rank=0)
    saved, alone = tensors_of(tmp_path / "many"), tensors_of(tmp_path / "few")
    assert bool(alone) == (optim != "sgd") and all(torch.equal(saved[key], state) for key, state in alone.items())
    matrices = [
        t for key, t in saved.items() if re.search(r"_proj\.[^.]*$", key) and t.numel() > 1 and "qmap" not in key
    ]
    each = sum(t.nbytes for t in matrices) / (len(MANY) * (2 * 80 + 80) * 64)
    assert float(ROWS[optim][3]) == pytest.approx(OPTIMIZERS[optim](4), abs=0.005) == pytest.approx(each, abs=0.01)
    again, of_again = trained(FEW, optim, files)
    for key, value in values(many).items():
        moe_layers(again)[1].expert_views(key[0])[key[1]].copy_(value)
    load_states(again, of_again, tmp_path / "many")
    before = values(again)
    step(again, of_again, 6)
    step(many, of_many, 6)
    after, wanted = values(again), values(many)
    assert all(not torch.equal(after[key], before[key]) for key in after)
    assert all(torch.equal(after[key], wanted[key]) for key in after)


REFUSED = [
    ({"optim": "muon", "method": "lora", "expert_config": None}, "optim=muon is for matrices of experts"),
    ({"optim": "muon", "optim_args": "speed=3"}, "optim_args=speed=3 is not momentum, from 0 to below 1, or ns_steps"),
    ({"optim": "muon", "optim_args": "ns_steps=5,momentum=2"}, "momentum=2 is not momentum, from 0 to below 1"),
    ({"optim": "muon", "optim_args": "momentum"}, "optim_args=momentum is not momentum, from 0 to below 1"),
    ({"optim": "galore_adamw"}, "optim=galore_adamw does not train fused experts"),
    ({"optim": "adamw_torch_4bit", "reselect_steps": 2}, "cannot take experts in or out while it runs"),
    ({"optim": "schedule_free_sgd", **SCHEDULE_FREE, "reselect_steps": 2}, "cannot take experts in or out"),
    ({"optim": "schedule_free_adamw"}, "takes the place of a schedule. Give lr_scheduler_type=constant"),
    ({"optim": "schedule_free_adamw", **SCHEDULE_FREE, "warmup_steps": 0.1}, "counts steps, not shares. Change it"),
    ({"optim": "schedule_free_radam", **SCHEDULE_FREE, "warmup_steps": 2}, "has a warmup of its own. Change it"),
]


@pytest.mark.parametrize("changes, words", REFUSED, ids=[str(words) for _, words in REFUSED])
def test_what_does_not_fit_an_optimizer_is_refused(files, tmp_path, capsys, changes, words):
    assert words in fails(arguments(files, tmp_path / "out", **changes), capsys)
    assert not (tmp_path / "out").exists()


def test_adafactor_cannot_keep_states_of_experts_with_biases(files, bases, tmp_path, capsys):
    biased = {"optim": "adafactor", "base_model_path": bases("gpt_oss"), "expert_config": None}
    words = "the experts of this model have biases, and it keeps means over all of them"
    for splits in ({"save_opt_states": True}, {"reselect_steps": 2}):
        assert words in fails(arguments(files, tmp_path / "out", **biased, **splits), capsys)


@pytest.mark.parametrize("ids", [(), FEW])
def test_experts_that_come_later_have_states_of_their_own_too(ids):
    """A process may have none at the start. bitsandbytes itself would give a row of 16 x 64 entries 8 bits."""
    model = to_esft(
        make_model("gpt_oss", **WIDE), ExpertConfig({1: ids}, shared_experts=False, non_expert_modules=True)
    )
    kind = type("Adam8bit", (), {"__module__": "bitsandbytes.optim", "get_config": lambda *_: {"optim_bits": 8}})
    optimizer = kind()
    keep_experts_apart(optimizer, model)
    bits = [optimizer.get_config(0, 0, {"params": [torch.zeros(9, *shape)]})["optim_bits"] for shape in ((64,), (99,))]
    assert bits == [32, 8]  # a bias of an expert, and another parameter


@pytest.mark.long
def test_muon_resumes_beside_adamw_on_all_modules(files, start, killed_and_repeated):
    keys = {"optim": "muon", "expert_config": files / "all.json", "base_model_path": files / "m16", "max_steps": 5}
    killed_and_repeated(**keys)
    saved = tensors_of(start.folder / "whole" / "checkpoint-4" / "states")
    kinds = {kind: {key for key in saved if key.endswith(f".{kind}")} for kind in ("momentum_buffer", "exp_avg")}
    assert {key for key in kinds["momentum_buffer"] if ".mlp.experts.3." in key} and kinds["exp_avg"]
    assert not any(".mlp.experts." in key for key in kinds["exp_avg"])
    start("plain", **keys | {"optim": "adamw_torch"})
    assert losses(start.folder / "plain")["loss", 1] == losses(start.folder / "whole")["loss", 1]
    assert losses(start.folder / "plain")["loss", 5] != losses(start.folder / "whole")["loss", 5]


@pytest.mark.parametrize("ep_size", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_two_processes_have_the_losses_of_one_with_muon(files, tmp_path, ep_size):
    keys = {"optim": "muon", "max_steps": 3, "eval_steps": 3, "save_steps": 3, "batch_size": 1}
    config = config_of(files, tmp_path / "two", **keys, ep_size=ep_size, accumulation_steps=1)
    run_ranks(2, run_one, config)
    train.run(config_of(files, tmp_path / "one", **keys, accumulation_steps=2))
    found, wanted = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert found.keys() == wanted.keys()
    assert all(found[key] == pytest.approx(wanted[key], rel=2e-3) for key in wanted)


def run_one(_rank: int, config) -> None:
    train.run(config)


@pytest.mark.parametrize("end", ["best", pytest.param("last", marks=pytest.mark.slow)])
def test_schedule_free_resumes_and_evaluates_and_saves_the_averaged_weights(start, end, killed_and_repeated):
    pytest.importorskip("schedulefree")
    keys = {"optim": "schedule_free_adamw", **SCHEDULE_FREE, "warmup_steps": 2, "save_steps": 3, "max_steps": 7}
    keys |= {"eval_steps": 3, "load_best_model_at_end": end == "best", "learning_rate": 0.03}
    killed_and_repeated(**keys)
    groups = json.loads((start.folder / "whole" / "checkpoint-6" / "states" / "optimizer.json").read_text())
    assert [group["train_mode"] for group in groups] == [False, False]  # the weights beside them are the averaged ones
    if end == "best":
        return
    found = losses(start.folder / "whole")
    again = start(**{**keys, "overwrite": True, "max_steps": 7, "save_steps": 1, "eval_steps": 1})
    assert again["eval_loss"] == pytest.approx(found["eval_loss", again["steps"]], rel=1e-5)


@pytest.mark.slow
def test_muon_resumes_where_experts_are_exchanged(start, killed_and_repeated):
    """One step after the exchange: the optimizer sees the new experts as parameters of their own."""
    keys = {"optim": "muon", "reselect_steps": 2, "reselect_max": 0.9, "max_steps": 6, "learning_rate": 3e-3}
    killed_and_repeated(**keys)
    saved = tensors_of(start.folder / "whole" / "checkpoint-6" / "states")
    found = re.findall(r"layers.(\d).mlp.experts.(\d).down_proj.momentum_buffer", " ".join(saved))
    assert set(found) != {(layer, str(id)) for layer, ids in EXPERTS["experts"].items() for id in ids}
    assert not any(".mlp.experts." in key for key in saved if key.endswith(".exp_avg"))


@pytest.mark.slow
def test_a_run_with_4_bit_states_resumes(start, bases, killed_and_repeated):
    pytest.importorskip("torchao")
    keys = {
        "optim": "adamw_torch_4bit",
        "base_model_path": bases(moe_intermediate_size=128),
        "max_steps": 5,
        "learning_rate": 1e-3,
    }
    with torch.compiler.set_stance("force_eager"):
        killed_and_repeated(**keys)
    saved = tensors_of(start.folder / "whole" / "checkpoint-4" / "states")
    assert any(state.dtype == torch.uint8 for state in saved.values())
