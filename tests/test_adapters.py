"""Test adapters: trained, saved, added, merged and unloaded, and every kind of wrong one refused."""

import copy
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deepseek.experts import moe_layers
from esft import (
    ExpertConfig,
    adapter_tensors,
    add_adapter,
    base_note,
    load_esft_model,
    merge,
    save_adapter,
    to_esft,
    unload,
)
from tests.client_helpers import take_steps
from tests.helpers import BOTH, FAMILIES, make_model

IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
DTYPES = [torch.float32, torch.bfloat16]


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def bits(model):
    return copy.deepcopy(model.state_dict())


def assert_bits(model, wanted):
    found = model.state_dict()
    assert list(found) == list(wanted)
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]), name


def train(model, config, steps=2):
    """Return the model after a few real steps on `config`."""
    take_steps(to_esft(model, config), IDS, steps, lr=0.03)
    return model


def first_and_last(model):
    layers = list(moe_layers(model))
    return {layers[0]: (5, 2), layers[-1]: (0,)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return (base, folder of an adapter with experts 5, 2 of layer 1 and 0 of layer 2). Copy both before changes."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(train(make_model(), ExpertConfig({1: (5, 2), 2: (0,)})), folder)
    return make_model(), folder


@pytest.fixture
def folder(trained, tmp_path):
    """Return a copy of the adapter, to be spoiled."""
    for path in trained[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


# ------------------------------------------------------------------------------------------------------ the good life


@pytest.mark.parametrize("flags", [{}, BOTH], ids=["experts", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_merged_and_adapted_are_one_model(family, dtype, flags, tmp_path):
    """Compare the bits of logits and state dicts, of what save_pretrained wrote, and of the base after unload."""
    make_model(family, dtype, tie_word_embeddings=family == "mixtral").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    start, before = bits(base), logits(base)
    model = train(copy.deepcopy(base), ExpertConfig(first_and_last(base), **flags))
    wanted = logits(model)
    assert not torch.equal(wanted, before)
    save_adapter(model, tmp_path / "adapter")
    state = bits(model)
    model.save_pretrained(tmp_path / "trained")

    merged = merge(copy.deepcopy(model))
    assert not hasattr(merged, "_esft") and merged.config._experts_implementation == "grouped_mm"
    assert torch.equal(logits(merged), wanted)
    assert_bits(merged, state)
    merged.save_pretrained(tmp_path / "merged")

    adapted = add_adapter(base, tmp_path / "adapter")
    assert torch.equal(logits(adapted), wanted)
    assert_bits(adapted, state)
    adapted.save_pretrained(tmp_path / "adapted")
    for one in (unload(adapted), unload(model)):
        assert torch.equal(logits(one), before)
        assert_bits(one, start)

    for name in ("trained", "merged", "adapted"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert loaded.dtype == dtype
        assert torch.equal(logits(loaded), wanted), name
        files = load_file(tmp_path / name / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep_base", [True, False])
def test_released_format(dtype, keep_base, tmp_path):
    """There is one tensor per expert and projection, in the released names and the model's dtype."""
    model = to_esft(make_model(dtype=dtype), ExpertConfig({1: (5, 2), 2: ()}, **BOTH), keep_base=keep_base)
    save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "expert_cfg.json"]
    tensors = load_file(tmp_path / "adapter.safetensors")
    routed = {name: tuple(tensor.shape) for name, tensor in tensors.items() if ".mlp.experts." in name}
    shapes = {"gate_proj": (16, 32), "up_proj": (16, 32), "down_proj": (32, 16)}
    assert routed == {f"model.layers.1.mlp.experts.{e}.{p}.weight": s for e in (2, 5) for p, s in shapes.items()}
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    rest = {name for name in model.state_dict() if ".experts." not in name}
    assert tensors.keys() - routed.keys() == {name for name in rest if name in dict(make_model().named_parameters())}
    written = json.loads((tmp_path / "expert_cfg.json").read_text())
    assert written["experts"] == {"1": [5, 2], "2": []} and written["shared_experts"] is True
    assert torch.equal(
        tensors["model.layers.1.mlp.experts.5.down_proj.weight"],
        make_model(dtype=dtype).model.layers[1].mlp.experts.down_proj[5],
    )


@pytest.mark.parametrize("config", ["released", "foreign note"])
def test_published_adapters_have_no_prefix_and_no_base(trained, folder, config):
    base, original = trained
    tensors = load_file(folder / "adapter.safetensors")
    (folder / "adapter.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:4], names[4:])):
        save_file({name.removeprefix("model."): tensors[name] for name in part}, folder / f"{number}.safetensors")
    cfg = json.loads((folder / "expert_cfg.json").read_text())
    cfg = {**cfg, "base": "deepseek-ai/some-model"} if config == "foreign note" else {"experts": cfg["experts"]}
    (folder / "expert_cfg.json").write_text(json.dumps(cfg))
    found = bits(add_adapter(copy.deepcopy(base), folder))
    assert_bits(add_adapter(copy.deepcopy(base), original), found)
    with pytest.raises(AssertionError):
        assert_bits(base, found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss"])
def test_switching_restores_exactly(family, dtype, tmp_path):
    model = make_model(family, dtype)
    start, last = bits(model), max(moe_layers(model))
    states = {}
    for name, config in {"a": ExpertConfig({last: (1, 2)}), "b": ExpertConfig({last: (2, 7)}, **BOTH)}.items():
        save_adapter(train(model, config), tmp_path / name)
        states[name] = bits(model)
        assert_bits(unload(model), start)
    for name in ("a", "b", "a"):
        assert_bits(add_adapter(model, tmp_path / name), states[name])
        assert_bits(unload(model), start)
    with pytest.raises(AssertionError):
        assert_bits(model, states["a"])
    with pytest.raises(ValueError, match="no adapter"):
        unload(model)


def test_disjoint_adapters_add_up_and_overlapping_ones_are_refused(tmp_path):
    base = make_model()
    start, parts = bits(base), {"a": {1: (3, 1)}, "b": {1: (0,), 2: (3,)}, "c": {1: (4,), 2: (3, 5)}}
    for name, experts in parts.items():
        save_adapter(train(base, ExpertConfig(experts)), tmp_path / name)
        unload(base)
    a, b = (bits(add_adapter(copy.deepcopy(base), tmp_path / name)) for name in "ab")
    model = add_adapter(add_adapter(base, tmp_path / "a"), tmp_path / "b")
    key = "model.layers.{}.mlp.experts.down_proj"
    union = bits(model)
    for layer, source in ((1, a), (2, b)):
        wanted = source[key.format(layer)].clone()
        if layer == 1:
            wanted[0] = b[key.format(1)][0]
        assert torch.equal(union[key.format(layer)], wanted)
    with pytest.raises(ValueError, match=r"adapter .*/c: model\.layers\.2\.mlp\.experts\.3\.\w+_proj\.weight is held"):
        add_adapter(model, tmp_path / "c")
    assert_bits(model, union)
    save_adapter(model, tmp_path / "both")
    assert_bits(unload(model), start)
    assert_bits(add_adapter(model, tmp_path / "both"), union)


def test_an_adapter_is_where_training_goes_on(tmp_path):
    """A model that trains the same experts takes it into masters and fused rows. One with others refuses it."""
    for dtype in DTYPES:
        config = ExpertConfig({1: (5, 2)}, **BOTH)
        model = train(make_model(dtype=dtype), config)
        save_adapter(model, tmp_path)
        wanted, saved = logits(model), adapter_tensors(model)
        fresh = to_esft(make_model(dtype=dtype), config)
        assert not torch.equal(logits(fresh), wanted)
        add_adapter(fresh, tmp_path)
        assert torch.equal(logits(fresh), wanted)
        assert all(torch.equal(tensor, saved[name]) for name, tensor in adapter_tensors(fresh).items())
        assert_bits(unload(fresh), bits(make_model(dtype=dtype)))
        other = to_esft(make_model(dtype=dtype), ExpertConfig({1: (5, 3)}, **BOTH))
        before = bits(other)
        with pytest.raises(ValueError, match="other experts than this model trains"):
            add_adapter(other, tmp_path)
        assert_bits(other, before)


def test_no_such_adapter(tmp_path):
    (tmp_path / "somewhere").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"nowhere: no such expert config or adapter \(did you mean 'somewhere'\?\)"
    ):
        add_adapter(make_model(), tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("files", "mend"),
    [
        (["model.safetensors"], "no expert_cfg.json.*adapter.safetensors.*adapter_config.json"),
        (["summary.json"], "expert scores.*generate_expert_config"),
        (["config.json", "checkpoint-9/config.json"], "whole model: give it as --base_model_path"),
        (["checkpoint-9/expert_cfg.json", "checkpoint-10/expert_cfg.json"], "give .*checkpoint-10\\.$"),
        (["checkpoint-9/expert_cfg.json", "checkpoint-best/expert_cfg.json"], "give .*checkpoint-9\\.$"),
        (["checkpoint-best/expert_cfg.json"], "no expert_cfg.json.*adapter.safetensors.*adapter_config.json"),
    ],
)
def test_a_folder_without_an_adapter(files, mend, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=mend):
        add_adapter(make_model(), tmp_path)


def test_load_esft_model(tiny_model_dir, trained):
    model, tokenizer = load_esft_model(tiny_model_dir, trained[1])
    assert torch.equal(logits(model), logits(add_adapter(make_model(), trained[1])))
    assert not torch.equal(logits(model), logits(make_model()))
    assert tokenizer.eos_token == "<eos>" and not model.training


def test_without_the_bases_values_unload_says_so():
    model = to_esft(make_model(), ExpertConfig({1: (5,)}), keep_base=False)
    with pytest.raises(ValueError, match="keep_base=True"):
        unload(model)
    assert torch.equal(logits(merge(model)), logits(make_model()))


# ---------------------------------------------------------------------------------------------------- the wrong ones


def rewrite(folder, change):
    """Change the tensors of the adapter in `folder`."""
    tensors = load_file(folder / "adapter.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter.safetensors")


def edit_config(folder, change):
    config = json.loads((folder / "expert_cfg.json").read_text())
    change(config)
    (folder / "expert_cfg.json").write_text(json.dumps(config))


def truncate(folder):
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def twice(folder):
    (folder / "again.safetensors").write_bytes((folder / "adapter.safetensors").read_bytes())


DOWN = "model.layers.1.mlp.experts.5.down_proj.weight"
SPOILED = {
    "a missing projection": (lambda f: rewrite(f, lambda t: t.pop(DOWN)), rf"{DOWN} is missing"),
    "an extra expert": (
        lambda f: rewrite(f, lambda t: t.update({DOWN.replace("5", "6"): t[DOWN].clone()})),
        r"experts\.6\.down_proj\.weight is not in its expert_cfg.json",
    ),
    **{
        f"keys with {prefix} before them": (
            lambda f, prefix=prefix: rewrite(f, lambda t: [t.update({prefix + key: t.pop(key)}) for key in list(t)]),
            rf"{prefix}.*experts.* is not in its expert_cfg.json.*names are like model\.layers\.1\.",
        )
        for prefix in ("base_model.model.", "module.", "model.")
    },
    "an expert that is nowhere": (
        lambda f: rewrite(f, lambda t: t.update({DOWN.replace("5", "9"): t[DOWN].clone()})),
        r"experts\.9\.down_proj",
    ),
    "another shape": (
        lambda f: rewrite(f, lambda t: t.update({DOWN: t[DOWN].T.contiguous()})),
        rf"{DOWN} has shape \(16, 32\).*\(32, 16\)",
    ),
    "not a number": (lambda f: rewrite(f, lambda t: t[DOWN].view(-1)[3:4].fill_(torch.nan)), f"{DOWN} has values that"),
    "truncated": (truncate, r"adapter\.safetensors: missing, damaged or truncated"),
    "empty file": (lambda f: (f / "adapter.safetensors").write_bytes(b""), r"adapter\.safetensors: missing, damaged"),
    "a tensor twice": (twice, r"twice \(adapter\.safetensors, again\.safetensors\)"),
    "no tensors": (lambda f: (f / "adapter.safetensors").unlink(), r"is missing \(\*\.safetensors\)"),
    "whole numbers": (
        lambda f: rewrite(f, lambda t: t.update({DOWN: t[DOWN].long()})),
        rf"{DOWN} has shape \(32, 16\) in I64, .*\(32, 16\) in F64, F32, F16, BF16",
    ),
    "no config": (lambda f: (f / "expert_cfg.json").unlink(), "no expert_cfg.json"),
    "a config of more experts": (
        lambda f: edit_config(f, lambda c: c["experts"].update({"2": [0, 4]})),
        "experts.4.*missing",
    ),
    "a config of more layers": (lambda f: edit_config(f, lambda c: c["experts"].update({"7": [0]})), "layer 7"),
    "a config of other experts": (lambda f: edit_config(f, lambda c: c["experts"].update({"1": [5, 8]})), "expert 8"),
    "a config with a switch": (
        lambda f: edit_config(f, lambda c: c.update(shared_experts=True)),
        "shared_experts.*missing",
    ),
    "another model type": (lambda f: edit_config(f, lambda c: c["base"].update(model_type="olmoe")), "a olmoe model"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_adapter_is_refused(how, folder, trained):
    spoil, message = SPOILED[how]
    spoil(folder)
    model = copy.deepcopy(trained[0])
    before = bits(model)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        add_adapter(model, folder)
    assert_bits(model, before)
    add_adapter(model, trained[1])  # nothing is left behind that would refuse the good one
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        add_adapter(model, folder)
    assert_bits(unload(model), before)


def other_routers():
    model = make_model()
    model.model.layers[2].mlp.gate.weight.data[0, 0] += 0.01
    return model


WRONG = {
    "other routers": (other_routers, "routers' weights differ"),
    "other weights": (lambda: make_model(seed=1), "routers' weights differ"),
    "fewer layers": (lambda: make_model(num_hidden_layers=2), "expert 0 of layer 2.*layers are 1 to 1"),
    "more layers": (lambda: make_model(num_hidden_layers=4), "routers' weights differ"),
    "fewer experts": (lambda: make_model(n_routed_experts=4), "expert 5 of layer 1"),
    "more experts": (lambda: make_model(n_routed_experts=16), "routers' weights differ"),
    "another family": (lambda: make_model("mixtral"), "deepseek_v2 model, this one is mixtral"),
}


@pytest.mark.parametrize("which", WRONG)
def test_a_wrong_base_is_refused(which, trained):
    make, message = WRONG[which]
    model = make()
    before = bits(model)
    with pytest.raises(ValueError, match=f"adapter .*{message}"):
        add_adapter(model, trained[1])
    assert_bits(model, before)
    assert not hasattr(model, "_esft")


def test_a_wrong_base_is_refused_by_shape_where_no_fingerprint_is_known(folder):
    edit_config(folder, lambda config: config.pop("base"))
    model = make_model(moe_intermediate_size=8)
    before = bits(model)
    with pytest.raises(ValueError, match=r"down_proj\.weight has shape \(32, 16\) in F32, this model's is \(32, 8\)"):
        add_adapter(model, folder)
    assert_bits(model, before)


def test_the_fingerprint_is_the_same_in_bf16(trained):
    """A base loaded in bf16 is still the base. The fp32 adapter is rounded to its dtype."""
    model = add_adapter(make_model(dtype=torch.bfloat16), trained[1])
    assert model.dtype == torch.bfloat16 and not torch.equal(logits(model), logits(make_model(dtype=torch.bfloat16)))


def test_a_lora_adapter_is_merged(tmp_path):
    """The merged base gives the logits of the peft model that was saved, for comparison with `method: lora`."""
    peft = pytest.importorskip("peft")
    model, base = make_model(), make_model()
    fused = [f"{layer.name}.{tensor}" for layer in moe_layers(model).values() for tensor in layer.weight_names]
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=fused))
    with torch.no_grad():
        for name, param in lora.named_parameters():
            if "lora_" in name:
                param.normal_(std=0.1)
    expected = logits(lora.eval())
    lora.save_pretrained(tmp_path / "lora")
    before = logits(base)
    other = {"base": {**base_note(base), "router": "another", "model_type": base.config.model_type, "name": "another"}}
    (tmp_path / "lora" / "base.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"cannot merge the LoRA .*trained on another base model \(another\): "):
        add_adapter(base, tmp_path / "lora")
    (tmp_path / "lora" / "base.json").unlink()  # one that peft made has none
    for prefix in ("module.", "base_model.model."):
        shutil.copytree(tmp_path / "lora", tmp_path / prefix)
        path = tmp_path / prefix / "adapter_model.safetensors"
        save_file({prefix + key: tensor for key, tensor in load_file(path).items()}, path)
        with pytest.raises(ValueError, match=r"cannot merge the LoRA .* is not in both its files and this model"):
            add_adapter(base, tmp_path / prefix)
        assert torch.equal(logits(base), before)
    merged = add_adapter(base, tmp_path / "lora")
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-2)


def test_without_peft_a_lora_adapter_is_refused_in_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "peft", None)
    told = r"^cannot merge the LoRA adapter .*: cannot import peft: .* pip install peft elsewhere$"
    with pytest.raises(ValueError, match=told):
        add_adapter(make_model(), tmp_path)


@pytest.mark.parametrize("noted", [True, False])
def test_a_base_with_the_same_routers_and_other_weights(noted, tmp_path):
    """It is refused by load_esft_model and by add_adapter; not where the adapter has no note of the weights."""
    make_model().save_pretrained(tmp_path / "base")
    model = train(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), ExpertConfig({1: (5,)}))
    save_adapter(model, tmp_path / "adapter")
    make_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16", max_shard_size="50KB")  # the same base
    add_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "bf16"), tmp_path / "adapter")
    merge(model).save_pretrained(tmp_path / "base")
    if noted:
        with pytest.raises(
            ValueError, match=r"adapter: it was trained on another base model: the weights differ\. Give"
        ):
            add_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    else:
        edit_config(tmp_path / "adapter", lambda config: config["base"].pop("weights"))
        add_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
