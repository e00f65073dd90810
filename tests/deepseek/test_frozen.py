"""Test frozen experts in fp8, int8, nf4 or host memory.

Training is the same as on the dequantized values. Reading a checkpoint stores one layer after the other. Checkpoints in
block-scaled fp8 keep their bytes.
"""

import copy
import json
import re
import shutil
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import esft
from deepseek import frozen, partial_loading
from deepseek.experts import moe_layers
from deepseek.frozen import Storage, dequantize, freeze_experts, quantize, thaw_experts
from deepseek.loading import load_base_model
from tests.helpers import FAMILIES, make_model

IDS = torch.arange(3, 83).view(2, 40)
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
KINDS = [None, "fp8", "int8", pytest.param("nf4", marks=needs_bitsandbytes)]


def some_experts(model) -> esft.ExpertConfig:
    """Return a config of two experts in every MoE layer but the second."""
    return esft.ExpertConfig({layer: () if n == 1 else (5, 2) for n, layer in enumerate(moe_layers(model))})


# ---- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, error", [("fp8", 0.04), ("int8", 0.01), pytest.param("nf4", 0.12, marks=needs_bitsandbytes)]
)
@pytest.mark.parametrize("shape", [(3, 128, 256), (2, 48, 200), (1, 130, 64)])
def test_values_come_back_nearly(kind, error, shape):
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None, None]
    weight[0, :2] = 0
    back = dequantize(quantize(weight, kind), kind, weight.shape, torch.float32)
    assert (back[0, :2] == 0).all()
    for got, wanted in zip(back, weight):
        assert 0 < (got - wanted).norm() / wanted.norm() < error
    whole = quantize(weight, kind)
    for e in range(shape[0]):  # an expert is stored by itself
        assert all(torch.equal(a[e].view(torch.uint8), b[0].view(torch.uint8))
                   for a, b in zip(whole, quantize(weight[e : e + 1], kind)))  # fmt: skip
    again = quantize(back, kind)
    assert torch.equal(dequantize(again, kind, weight.shape, torch.float32), back) or kind == "fp8"


def test_fp8_takes_a_byte_and_a_scale_per_block():
    values, scale = quantize(torch.randn(2, 256, 130), "fp8")
    assert values.dtype == torch.float8_e4m3fn and values.shape == (2, 256, 130)
    assert scale.dtype == torch.float32 and scale.shape == (2, 2, 2)
    assert values.float().abs().amax() == 448


@needs_bitsandbytes
def test_nf4_blocks_may_go_over_rows():
    weight = torch.randn(2, 8, 24)
    back = dequantize(quantize(weight, "nf4"), "nf4", weight.shape, torch.float32)
    flat = dequantize(quantize(weight.view(2, 3, 64), "nf4"), "nf4", torch.Size((2, 3, 64)), torch.float32)
    assert torch.equal(back, flat.view(2, 8, 24))
    with pytest.raises(ValueError, match="multiple of 64 entries, these have 5 x 5"):
        quantize(torch.randn(1, 5, 5), "nf4")


def test_nf4_without_its_library_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    told = r"frozen_dtype=nf4: cannot import bitsandbytes: .*pip install -e '\.\[quant\]'.* pip install bitsandbytes "
    with pytest.raises(ValueError, match=told):
        quantize(torch.randn(1, 8, 8), "nf4")


# ---- the same training as on the values that are stored --------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_on_the_stored_values(family, kind):
    model, config = make_model(family), some_experts(make_model(family))
    plain = copy.deepcopy(model)
    before = model(IDS).logits
    esft.to_esft(model, config, keep_base=False, frozen_dtype=kind, offload_frozen=True)
    for ours, theirs in zip(moe_layers(model).values(), moe_layers(plain).values()):
        store = ours.frozen
        assert len(ours.module.down_proj) == store.kept == len(store.order_e) - len(store.stored["down_proj"][0])
        for name in ours.weight_names:
            for row in range(store.kept, len(store.order_e)):
                theirs.tensor(name).data[store.order_e[row]] = store.rows(name, row, row + 1, torch.float32)[0]
    esft.to_esft(plain, config, keep_base=False)
    out, wanted = (one(IDS, labels=IDS) for one in (model, plain))
    assert torch.equal(out.logits, wanted.logits)
    assert torch.equal(out.logits, before) == (kind is None)
    out.loss.backward()
    wanted.loss.backward()
    grads, expected = ({n: p.grad for n, p in one.named_parameters() if p.requires_grad} for one in (model, plain))
    assert grads.keys() == expected.keys() and len(grads) >= 2
    for name, grad in expected.items():
        assert grad.abs().sum() > 0 and torch.equal(grads[name], grad), name
    model.set_experts_implementation("esft_reference")
    assert torch.allclose(model(IDS).logits, wanted.logits, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_moves_the_trained_rows_and_no_stored_byte(kind):
    model = make_model(dtype=torch.bfloat16)
    esft.to_esft(model, some_experts(model), keep_base=False, frozen_dtype=kind, offload_frozen=kind is None)
    held = {index: copy.deepcopy(layer.frozen.stored) for index, layer in moe_layers(model).items()}
    kept = {index: layer.module.down_proj.data.clone() for index, layer in moe_layers(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    model(IDS)
    for index, layer in moe_layers(model).items():
        assert layer.module.down_proj.dtype == torch.bfloat16
        assert torch.equal(layer.module.down_proj.data, kept[index]) == (not len(kept[index]))
        for name, stored in layer.frozen.stored.items():
            for now, before in zip(stored, held[index][name]):
                assert torch.equal(now.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_casts_and_copies_leave_the_bytes(kind):
    model = make_model()
    esft.to_esft(model, some_experts(model), frozen_dtype=kind, offload_frozen=kind is None)
    logits = model(IDS).logits
    copied = copy.deepcopy(model)
    cast = copy.deepcopy(model).bfloat16()
    for other in (copied, cast):
        for a, b in zip(moe_layers(model).values(), moe_layers(other).values()):
            for name in a.weight_names:
                assert all(torch.equal(x.view(torch.uint8), y.view(torch.uint8))
                           for x, y in zip(a.frozen.stored[name], b.frozen.stored[name]))  # fmt: skip
    assert torch.equal(copied(IDS).logits, logits)
    assert 0 < (cast(IDS).logits - logits).abs().mean() < 0.1 * logits.abs().mean()


def test_an_adapter_that_is_refused_leaves_the_storage_as_it_is(tmp_path):
    model, donor = make_model(), make_model()
    esft.to_esft(donor, esft.ExpertConfig({1: (7, 0)}), keep_base=False)
    esft.save_adapter(donor, tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    tensors.popitem()
    save_file(tensors, tmp_path / "adapter.safetensors")
    for layer in moe_layers(model).values():
        freeze_experts(layer, (), "int8")
    with pytest.raises(ValueError, match="is missing"):
        esft.add_adapter(model, tmp_path)
    assert [layer.frozen.kept for layer in moe_layers(model).values()] == [0, 0]


def test_what_is_stored_is_not_stored_otherwise():
    model = make_model()
    for layer in moe_layers(model).values():
        freeze_experts(layer, (), "int8")
    for asked in ({"frozen_dtype": "fp8"}, {"offload_frozen": True}):
        with pytest.raises(ValueError, match="are stored as int8 already"):
            esft.to_esft(model, some_experts(model), **asked)
    esft.to_esft(model, some_experts(model), frozen_dtype="int8")


def test_the_adapter_is_saved_and_nothing_else_can_be(tmp_path):
    model = make_model()
    config = some_experts(model)
    esft.to_esft(model, config, frozen_dtype="int8")
    logits = model(IDS).logits
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.1)
    trained = model(IDS).logits
    esft.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="Save the adapter and merge it on disk"):
        esft.merge(model)
    with pytest.raises(ValueError, match="as a plain checkpoint"):
        model.save_pretrained(tmp_path / "model")
    assert torch.equal(esft.unload(model)(IDS).logits, logits)
    assert torch.equal(esft.add_adapter(model, tmp_path / "adapter")(IDS).logits, trained)
    base = make_model()
    esft.add_adapter(base, tmp_path / "adapter")  # the base's other experts are not int8
    assert not torch.equal(base(IDS).logits, trained)


def test_thawed_experts_compute_with_the_same_values(tmp_path):
    donor = make_model(seed=1)
    esft.to_esft(donor, esft.ExpertConfig({1: (7, 0), 2: (3,)}), keep_base=False)
    esft.save_adapter(donor, tmp_path)
    cfg = json.loads((tmp_path / "expert_cfg.json").read_text())
    (tmp_path / "expert_cfg.json").write_text(json.dumps({**cfg, "base": {}}))
    model = make_model()
    for layer in moe_layers(model).values():
        freeze_experts(layer, (4,), "int8")
    model.set_experts_implementation("esft")
    before = model(IDS).logits
    for layer in moe_layers(model).values():
        thaw_experts(layer, (4, 6, 1))
        assert layer.frozen.kept == 3 and len(layer.module.gate_up_proj) == 3
    assert torch.equal(model(IDS).logits, before)
    esft.add_adapter(model, tmp_path)
    assert not torch.equal(model(IDS).logits, before)
    esft.unload(model)
    assert torch.equal(model(IDS).logits, before)
    esft.to_esft(model, some_experts(model))
    assert torch.equal(model(IDS).logits, before)


# ---- while a checkpoint is read --------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, tiny_tokenizer):
    """Return a function that saves a model of a family in several files, and returns its folder."""

    def save(family: str):
        make_model(family).save_pretrained(tmp_path / family, max_shard_size="50KB")
        tiny_tokenizer.save_pretrained(tmp_path / family)
        return tmp_path / family

    return save


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_reading_is_as_storing_afterwards(saved, family, kind, monkeypatch):
    unstored, total = [], {}

    def counted(layer, *args):
        layers = moe_layers(total["model"]).values()
        full = [one for one in layers if not one.frozen and one.module.down_proj.device.type != "meta"]
        unstored.append(len(full))
        freeze_experts(layer, *args)

    original = partial_loading.load_and_freeze
    watched = lambda model, *args: original(total.setdefault("model", model), *args)  # noqa: E731
    monkeypatch.setattr(partial_loading, "load_and_freeze", watched)
    monkeypatch.setattr(partial_loading, "freeze_experts", counted)
    folder = saved(family)
    keep = {layer: ids for layer, ids in some_experts(make_model(family)).experts.items()}
    model, _ = load_base_model(folder, frozen=Storage(kind, keep=keep))
    assert unstored == [1] * len(keep)  # one layer's experts at a time are there in full
    other, _ = load_base_model(folder)
    for index, layer in moe_layers(other).items():
        freeze_experts(layer, keep[index], kind)
    other.set_experts_implementation("esft")
    assert torch.equal(model(IDS).logits, other(IDS).logits)
    esft.to_esft(model, {"experts": {str(layer): list(ids) for layer, ids in keep.items()}}, keep_base=False)
    assert sum(p.requires_grad for p in model.parameters()) >= 2


def test_a_rank_stores_its_experts_only(saved):
    folder = saved("deepseek_v2")
    whole, _ = load_base_model(folder)
    local = {1: [0, 3, 5], 2: [1, 2]}
    model, _ = load_base_model(folder, experts=local, frozen=Storage("int8", keep={1: [3, 7]}))
    module = moe_layers(model)[1].module
    assert len(module.down_proj) == 1 and torch.equal(module.down_proj[0], moe_layers(whole)[1].module.down_proj[3])
    full = quantize(moe_layers(whole)[1].module.down_proj.data, "int8")
    for row, expert in ((1, 0), (2, 5)):
        assert module.frozen.order_e[row] == local[1].index(expert)
        assert torch.equal(module.frozen.stored["down_proj"][0][row - 1], full[0][expert])


def test_a_checkpoint_that_lacks_an_expert_is_refused(saved):
    folder = saved("qwen3_moe")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    gone = next(key for key in index if ".experts.3.up_proj" in key)
    tensors = load_file(folder / index[gone])
    tensors.pop(gone)
    save_file(tensors, folder / index[gone], metadata={"format": "pt"})
    with pytest.raises(ValueError, match="experts"):
        load_base_model(folder, frozen=Storage("int8"))


# ---- checkpoints in block-scaled fp8 ---------------------------------------------------------------------------------

BLOCKY = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128, "n_routed_experts": 4}
BLOCKY |= {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}


def per_entry(scale, shape, block):
    """Repeat scales (blocks down, blocks across) to (rows, columns)."""
    scale = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return scale[: shape[0], : shape[1]]


def in_fp8(folder, target, block=(128, 128), but=()):
    """Write a checkpoint like DeepSeek-V3's. Return its tensors, and the same dequantized to bf16.

    Matrices are in e4m3, except for those of layers `but`. Every block has an inverse scale, a larger one than needed.
    """
    shutil.copytree(folder, target)
    tensors, stands_for, skipped = {}, {}, ["lm_head", *(f"model.layers.{layer}.mlp.experts" for layer in but)]
    for key, value in load_file(folder / "model.safetensors").items():
        stands_for[key] = value
        if not re.search(r"(_proj|_proj_with_mqa)\.weight$", key) or any(one in key for one in skipped):
            tensors[key] = value
            continue
        down, across = (-(-size // edge) for size, edge in zip(value.shape, block))
        padded = torch.nn.functional.pad(
            value.float(), (0, across * block[1] - value.shape[1], 0, down * block[0] - len(value))
        )
        scale = padded.view(down, block[0], across, block[1]).abs().amax((1, 3)) / 448 * 1.3
        whole = per_entry(scale, value.shape, block)
        tensors[key], tensors[f"{key}_scale_inv"] = (value.float() / whole).to(torch.float8_e4m3fn), scale
        stands_for[key] = (tensors[key].float() * whole).bfloat16()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block,
                                     "activation_scheme": "dynamic", "modules_to_not_convert": skipped}  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))
    return tensors, stands_for


LAYOUTS = {
    "whole blocks": {},
    "one layer in bf16": {"but": (2,)},
    "other blocks than ours": {"block": (64, 128)},
    "experts of partial blocks": {"moe_intermediate_size": 192},
}


@pytest.fixture(params=LAYOUTS)
def fp8(tmp_path, tiny_tokenizer, request):
    """Return (folder, its tensors, the dequantized model in bf16, whether the bytes of its experts can be kept).

    In each, kv_a_proj_with_mqa has 136 rows: a block of 128 and a part of one. transformers alone misreads that.
    """
    layout = dict(LAYOUTS[request.param])
    width = layout.pop("moe_intermediate_size", 128)
    make_model("deepseek_v3", torch.bfloat16, **{**BLOCKY, "moe_intermediate_size": width}).save_pretrained(
        tmp_path / "bf16"
    )
    tiny_tokenizer.save_pretrained(tmp_path / "bf16")
    tensors, stands_for = in_fp8(tmp_path / "bf16", tmp_path / "fp8", **layout)
    shutil.copytree(tmp_path / "bf16", tmp_path / "plain")
    save_file(stands_for, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    plain.set_experts_implementation("grouped_mm")
    return tmp_path / "fp8", tensors, plain, request.param == "whole blocks"


def test_an_fp8_checkpoint_is_held_as_it_is(fp8, recwarn):
    folder, tensors, plain, whole = fp8
    model, _ = load_base_model(folder)
    rounded = [str(warning.message) for warning in recwarn if "are rounded to it" in str(warning.message)]
    assert bool(rounded) == (not whole)
    assert model.dtype == torch.bfloat16 and not getattr(model.config, "quantization_config", None)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters()):
        assert ".experts." in name or torch.equal(ours, theirs), name
    module = moe_layers(model)[1].module
    values, scale = module.frozen.stored["gate_up_proj"]
    if whole:
        name = "model.layers.1.mlp.experts.3.up_proj.weight"
        assert torch.equal(values[3, 128:].view(torch.uint8), tensors[name].view(torch.uint8))
        assert torch.equal(scale[3, 1:], tensors[f"{name}_scale_inv"])
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    else:
        out, wanted = model(IDS).logits, plain(IDS).logits
        assert not torch.equal(out, wanted) and (out - wanted).norm() < 0.2 * wanted.norm()
    unstored = moe_layers(plain)[1]
    assert module.frozen.nbytes() < 1.01 * sum(unstored.tensor(name).numel() for name in unstored.weight_names)


def test_experts_of_an_fp8_checkpoint_are_trained(fp8, tmp_path):
    folder, _, plain, whole = fp8
    config = esft.ExpertConfig({1: (3, 0), 2: (1,)})
    model, _ = load_base_model(folder, frozen=Storage("fp8", keep=config.experts))
    assert torch.equal(moe_layers(model)[1].module.down_proj[1], moe_layers(plain)[1].module.down_proj[3])
    esft.to_esft(model, config, keep_base=False)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    later, _ = load_base_model(folder)  # and those of one that was opened without a word about them
    esft.to_esft(later, config)
    assert torch.equal(later(IDS).logits, model(IDS).logits) == whole  # else they were stored anew before
    esft.save_adapter(model, tmp_path / "adapter")
    esft.add_adapter(load_base_model(folder)[0], tmp_path / "adapter")


def test_another_quantization_is_refused(tmp_path, tiny_tokenizer):
    make_model().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {key.replace(".weight", ".qweight"): t.int() for key, t in tensors.items()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match="is quantized as gptq, which cannot be trained on"):
        load_base_model(tmp_path)


def test_chunks_do_not_change_a_bit(monkeypatch):
    model = make_model()
    esft.to_esft(model, some_experts(model), frozen_dtype="int8")
    logits = model(IDS).logits
    for size in (1, 3, 64):
        monkeypatch.setattr(frozen, "CHUNK", size)
        assert torch.equal(model(IDS).logits, logits)


@pytest.mark.parametrize("trained", [False, True])
def test_another_implementation_is_refused(trained):
    """It would look for the rows of all experts in the fused tensors."""
    model = make_model()
    for layer in moe_layers(model).values():
        freeze_experts(layer, (1,), "int8")
    model.set_experts_implementation("esft")
    wanted = model(IDS).logits
    if trained:
        esft.to_esft(model, some_experts(model))
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(ValueError, match="'grouped_mm': their rows are in another order"):
        model(IDS)
    model.set_experts_implementation("esft")
    assert trained or torch.equal(model(IDS).logits, wanted)
