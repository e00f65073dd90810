"""Test a rank with some of the experts: what it reads of a checkpoint, and how ranks make one adapter."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import esft
from deepseek.expert_parallel import connect_experts, gather_to_first
from deepseek.experts import moe_layers
from deepseek.loading import load_base_model
from deepseek.placement import place_layers
from tests.helpers import FAMILIES, RANK_TIMEOUT, assert_near, join_world, make_model, run_ranks

DENSE = {"shared_experts": True, "non_expert_modules": True}


# ---- reading a checkpoint --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, changes",
    [*((family, {}) for family in FAMILIES), ("mixtral", {"tie_word_embeddings": True, "num_local_experts": 12})],
)
def test_a_rank_reads_and_holds_its_experts_only(bases, family, changes):
    base = bases(family, **changes)
    whole, _ = load_base_model(base)
    layers = moe_layers(whole)
    fused = {f"{layer.name}.{tensor}": index for index, layer in layers.items() for tensor in layer.tensor_names}
    shards = [load_file(path) for path in base.glob("*.safetensors")]
    expert_bytes = sum(whole.get_parameter(name).nbytes for name in fused)
    dense_bytes = sum(tensor.nbytes for shard in shards for tensor in shard.values()) - expert_bytes
    assert len(shards) > 2 and dense_bytes > 0
    for ep_size in (1, 2, 4):
        placements = place_layers({index: layer.num_experts for index, layer in layers.items()}, {}, ep_size)
        for rank in range(ep_size):
            local = {layer: list(placement[rank]) for layer, placement in placements.items()}
            model, _ = load_base_model(base, experts=local)
            assert model.read_bytes == dense_bytes + expert_bytes // ep_size
            assert type(model) is type(whole)
            assert local == {index: layer.local_ids for index, layer in moe_layers(model).items()}
            wanted = {name: p[local[fused[name]]] if name in fused else p for name, p in whole.named_parameters()}
            assert wanted.keys() == dict(model.named_parameters()).keys()
            for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
                assert torch.equal(tensor, wanted[name] if name in wanted else whole.get_buffer(name)), name


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_experts_of_any_number_are_read_in_bf16(bases, family):
    whole, _ = load_base_model(bases(family), dtype="bfloat16")
    local = dict(zip(moe_layers(whole), ([6], range(8), [5, 1, 0])))
    model, _ = load_base_model(bases(family), dtype="bfloat16", experts=local)
    rows = {
        f"{layer.name}.{tensor}": sorted(local[index])
        for index, layer in moe_layers(model).items()
        for tensor in layer.tensor_names
    }
    wanted = dict(itertools.chain(whole.named_parameters(), whole.named_buffers()))
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        other = wanted[name][rows[name]] if name in rows else wanted[name]
        assert torch.equal(tensor, other) and tensor.dtype == other.dtype, name


def test_a_checkpoint_that_is_not_whole_is_refused_for_some_experts_too(bases, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(bases(), folder)
    local = {1: [0, 1], 2: [4, 5]}
    for path in folder.glob("*.safetensors"):
        tensors = {key: t for key, t in load_file(path).items() if "layers.2.mlp.experts.3." not in key}
        save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.2.mlp.experts.\w+ has 7 tensors in the checkpoint for 8"):
        load_base_model(folder, experts=local)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save(make_model().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"read \*\.safetensors only"):
        load_base_model(folder, experts=local)


# ---- adapters --------------------------------------------------------------------------------------------------------


def bring_together(rank: int) -> list:
    own = {
        f"{rank} matrix": torch.full((2, 3), rank + 0.5).T,
        f"{rank} bf16": torch.arange(5, dtype=torch.bfloat16) + rank,
        f"{rank} number": torch.tensor(rank),
        f"{rank} nothing": torch.empty(0, 4),
        "of all": torch.tensor([rank]),
    }
    return [own, *(gather_to_first(own, join_world().with_experts(ep_size, RANK_TIMEOUT)) for ep_size in (1, 2, 4))]


@pytest.mark.long
def test_tensors_of_a_replica_come_to_the_first_rank():
    owns, *gathered = zip(*run_ranks(4, bring_together))
    for ep_size, found in zip((1, 2, 4), gathered):
        assert found[1:] == ({}, {}, {})
        wanted = {}
        for own in reversed(owns[:ep_size]):  # of all: the lowest rank's
            wanted |= own
        assert found[0].keys() == wanted.keys()
        for name, tensor in found[0].items():
            assert tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name]), name


ADAPTED = {"experts": {"1": [5], "2": [6, 0, 3]}, **DENSE}
ADAPTED_IDS = torch.arange(3, 23).view(2, 10)


def train_a_little(model) -> None:
    """Change what is trained, each expert by another amount."""
    for layer in moe_layers(model).values():
        for param in layer.trained.parameters() if layer.trained else ():
            param.data += torch.tensor(layer.trained.expert_ids).view(-1, *[1] * (param.ndim - 1)) / 100 + 0.01
    routed = {id(param) for layer in moe_layers(model).values() for param in layer.module.parameters()}
    for param in model.parameters():
        if param.requires_grad and id(param) not in routed:
            param.data += 0.01


def save_and_add(rank: int, base: Path, folder: Path, dtype: str) -> dict:
    """Write an adapter on ranks, and add those that one process wrote to `folder`."""
    ranks = join_world().with_experts(2, RANK_TIMEOUT)
    placements = {1: ((0, 1, 2, 7), (3, 4, 5, 6)), 2: ((0, 2, 4, 6), (1, 3, 5, 7))}
    local = {layer: placement[ranks.expert_rank] for layer, placement in placements.items()}

    def fresh(experts: dict):
        model, _ = load_base_model(base, dtype=dtype, experts=local)
        if experts:
            esft.to_esft(model, experts, keep_base=False)
        connect_experts(model, placements, {int(key): ids for key, ids in experts.get("experts", {}).items()}, ranks)
        return model

    def logits(model):
        with torch.no_grad():
            return model(ADAPTED_IDS, use_cache=False).logits.float()

    model = fresh(ADAPTED)
    train_a_little(model)
    tensors = gather_to_first(esft.adapter_tensors(model), ranks)
    if ranks.rank == 0:
        esft.save_adapter(model, folder / "ranks", tensors)
    found = {"gathered": len(tensors), "trained": logits(model)}
    found["added"] = logits(esft.add_adapter(fresh({}), folder / "one"))
    found["added in training"] = logits(esft.add_adapter(fresh(ADAPTED), folder / "one"))
    model = fresh({})
    before = {name: param.clone() for name, param in model.state_dict().items()}
    for name in ("cut", "strange"):
        try:
            esft.add_adapter(model, folder / name)
            esft.unload(model)
        except ValueError as error:
            found[name] = str(error)
    esft.unload(esft.add_adapter(model, folder / "one"))
    found["unloaded"] = all(torch.equal(param, before[name]) for name, param in model.state_dict().items())
    return found


@pytest.mark.parametrize("world, dtype", [(2, "float32"), (4, "bfloat16")])
def test_an_adapter_of_ranks_is_that_of_one_process(bases, tmp_path, world, dtype):
    model, _ = load_base_model(bases(), dtype=dtype)
    with torch.no_grad():
        base_logits = model(ADAPTED_IDS, use_cache=False).logits.float()
        esft.to_esft(model, ADAPTED, keep_base=False)
        train_a_little(model)
        wanted = model(ADAPTED_IDS, use_cache=False).logits.float()
    esft.save_adapter(model, tmp_path / "one")
    tensors, lost = esft.adapter_tensors(model), "model.layers.2.mlp.experts.3.up_proj.weight"  # of rank 1
    for name, changed in (
        ("cut", {key: tensor for key, tensor in tensors.items() if key != lost}),
        ("strange", tensors | {lost.replace(".3.", ".4."): tensors[lost].clone()}),
    ):
        shutil.copytree(tmp_path / "one", tmp_path / name)
        save_file(changed, tmp_path / name / "adapter.safetensors")

    found = run_ranks(world, save_and_add, bases(), tmp_path, dtype)
    one, ranks = (tmp_path / name for name in ("one", "ranks"))
    assert (one / "expert_cfg.json").read_text() == (ranks / "expert_cfg.json").read_text()
    written, by_one = (load_file(folder / "adapter.safetensors") for folder in (ranks, one))
    assert written.keys() == by_one.keys()
    assert all(
        torch.equal(written[name], tensor) and written[name].dtype == tensor.dtype for name, tensor in by_one.items()
    )
    assert [rank["gathered"] for rank in found] == [len(by_one)] + [0] * (world - 1)
    tolerance = 5e-6 if dtype == "float32" else 0.02
    assert (wanted - base_logits).abs().max() > 10 * tolerance * wanted.abs().max()
    for rank, mine in enumerate(found):
        for how in ("trained", "added", "added in training"):
            assert_near(f"{how}, rank {rank}", mine[how], wanted, tolerance)
        assert mine["unloaded"]
        assert f"{lost} is missing" in mine["cut"]
        assert "experts.4.up_proj.weight is not in its expert_cfg.json" in mine["strange"]
