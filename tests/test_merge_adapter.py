"""scripts/merge_adapter.py against merging in memory, for the ways in which checkpoints spell their experts."""

import json
import shutil
import sys

import pytest
import torch
from conftest import FAMILIES, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deepseek.experts import find_experts
from esft import ExpertConfig, adapter_views, merge, save_adapter, to_esft
from scripts import merge_adapter as script

BOTH = {"shared_experts": True, "non_expert_modules": True}
SHARD = "30KB"


def noisy_adapter(model, config, folder):
    """Save an adapter of `config` whose tensors all differ from the model's; returns the trained model."""
    torch.manual_seed(1)
    to_esft(model, config)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(torch.randn_like(param) * 0.1)
    save_adapter(model, folder)
    return model


def tensors_of(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def files_of(folder):
    return {path.name: sorted(load_file(path)) for path in sorted(folder.glob("*.safetensors"))}


def assert_same_tensors(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]), name


@pytest.fixture
def parts(tmp_path, tiny_tokenizer):
    """(base folder in shards, adapter folder, output folder) of a deepseek_v2."""
    model = make_model()
    model.save_pretrained(tmp_path / "base", max_shard_size=SHARD)
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    noisy_adapter(model, ExpertConfig({1: (5, 2), 2: (7,)}), tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", tmp_path / "out"


@pytest.mark.parametrize("flags", [{}, BOTH], ids=["experts", "all"])
@pytest.mark.parametrize("original", [True, False], ids=["split", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_merging_in_memory(family, original, flags, tmp_path):
    """Every tensor bit for bit; same shards as the base; and the result is a model with the trained model's logits."""
    save = {"max_shard_size": SHARD, "save_original_format": original}
    dtype = torch.bfloat16 if flags else torch.float32
    make_model(family, dtype, tie_word_embeddings=bool(flags)).save_pretrained(tmp_path / "raw")
    AutoModelForCausalLM.from_pretrained(tmp_path / "raw").save_pretrained(tmp_path / "base", **save)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    first, *_, last = find_experts(model)
    noisy_adapter(model, ExpertConfig({first: (5, 2), last: (0,)}, **flags), tmp_path / "adapter")
    merge(model).save_pretrained(tmp_path / "wanted", **save)
    script.merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found, base = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "base")
    assert_same_tensors(found, tensors_of(tmp_path / "wanted"))
    with pytest.raises(AssertionError):
        assert_same_tensors(found, base)
    assert len(files_of(tmp_path / "base")) > 2 and files_of(tmp_path / "out") == files_of(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_one_file_and_what_lies_beside_it(parts, tiny_tokenizer):
    """A checkpoint of one file; tokenizer and metadata are copied, other weights and the card are not."""
    base, adapter, out = parts
    tensors = tensors_of(base)
    for path in [*base.glob("*.safetensors*")]:
        path.unlink()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt", "note": "mine"})
    for name in ("pytorch_model.bin", "README.md"):
        (base / name).write_text("of the base")
    (base / "sub").mkdir()
    (base / "sub" / "chat.jinja").write_text("x")
    out.mkdir()  # empty: as good as none
    assert script.merge_adapter(base, adapter, out) == 9
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    wanted = {str(path.relative_to(base)) for path in base.rglob("*") if path.is_file()}
    assert names == wanted - {"pytorch_model.bin", "README.md"} | {"merged_from.json"}
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    with script.open_shard(out / "model.safetensors") as file:
        assert file.metadata() == {"format": "pt", "note": "mine"}
    assert_same_tensors(tensors_of(base), tensors)
    changed = {name for name, tensor in tensors_of(out).items() if not torch.equal(tensor, tensors[name])}
    assert changed == set(adapter_views(make_model(), ExpertConfig({1: (5, 2), 2: (7,)})))


def test_overwrite_replaces_what_a_merge_left_and_nothing_else(parts):
    base, adapter, out = parts
    script.merge_adapter(base, adapter, out)
    before = tensors_of(out)
    with pytest.raises(ValueError, match="exists already"):
        script.merge_adapter(base, adapter, out)
    shutil.rmtree(adapter)
    model = AutoModelForCausalLM.from_pretrained(base)
    noisy_adapter(model, ExpertConfig({1: (0,)}), adapter)
    script.merge_adapter(base, adapter, out, overwrite=True)
    changed = {name for name, tensor in tensors_of(out).items() if not torch.equal(tensor, before[name])}
    assert len(changed) == 9 + 3
    (out / script.NOTE).unlink()
    with pytest.raises(ValueError, match="exists already"):
        script.merge_adapter(base, adapter, out, overwrite=True)


def test_the_bases_dtype_decides(parts):
    base, adapter, out = parts
    make_model(dtype=torch.bfloat16).save_pretrained(base, max_shard_size=SHARD)
    script.merge_adapter(base, adapter, out)
    name = "model.layers.2.mlp.experts.7.up_proj.weight"
    found, fp32 = tensors_of(out), tensors_of(adapter)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert torch.equal(found[name], fp32[name].bfloat16())


def test_a_tied_tensor_stored_twice_is_written_twice(tmp_path):
    model = make_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    noisy_adapter(model, ExpertConfig({}, non_expert_modules=True), tmp_path / "adapter")
    script.merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(found["model.embed_tokens.weight"], model.lm_head.weight)


def other_base(**changes):
    def spoil(base, adapter, out):
        shutil.rmtree(base)
        make_model(**changes).save_pretrained(base)

    return spoil


def drop(name):
    return lambda base, adapter, out: next(base.glob(name)).unlink()


def without_a_tensor(base, adapter, out):
    index = json.loads((base / script.INDEX).read_text())
    index["weight_map"].pop("model.layers.1.mlp.experts.5.up_proj.weight")
    (base / script.INDEX).write_text(json.dumps(index))


def of_another_shape(base, adapter, out):
    """Base and adapter of two widths, and the base's config of the adapter's."""
    shutil.rmtree(adapter)
    other = make_model(moe_intermediate_size=8)
    noisy_adapter(other, ExpertConfig({1: (5,)}), adapter)
    (adapter / "expert_cfg.json").write_text('{"experts": {"1": [5]}}')
    other.config.save_pretrained(base)


def occupied(base, adapter, out):
    out.mkdir()
    (out / "precious").write_text("x")


def cut(folder, name):
    def spoil(base, adapter, out):
        path = next({"base": base, "adapter": adapter}[folder].glob(name))
        path.write_bytes(path.read_bytes()[:100])

    return spoil


REFUSED = {
    "output exists": (occupied, "out: exists already"),
    "no such base": (lambda base, adapter, out: shutil.rmtree(base), r"base: no config\.json"),
    "no such adapter": (lambda base, adapter, out: shutil.rmtree(adapter), "adapter .*: no such folder"),
    "no config": (drop("config.json"), r"no config\.json"),
    "no weights": (drop(script.INDEX), "neither model.safetensors nor"),
    "a shard is missing": (drop("*-00002-of-*"), "model-00002-of-.*missing"),
    "a shard is cut": (cut("base", "*2-of-*.safetensors"), "2-of.*damaged"),
    "the adapter is cut": (cut("adapter", "*.safetensors"), "adapter.safetensors is damaged"),
    "a tensor is missing": (without_a_tensor, r"does not hold model\.layers\.1\.mlp\.experts\.5\.up_proj\.weight"),
    "another shape": (
        of_another_shape,
        r"_proj\.weight of the base has shape .*16.*, the adapter's is .*8",
    ),
    "other routers": (other_base(seed=1), "routers' weights differ"),
    "fewer layers": (other_base(num_hidden_layers=2), "layer 2"),
    "fewer experts": (other_base(n_routed_experts=4), "expert 5 of layer 1"),
    "another family": (other_base(family="mixtral"), "deepseek_v2 model, this one is mixtral"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_refuses_and_writes_nothing(how, parts):
    spoil, message = REFUSED[how]
    spoil(*parts)
    before = sorted(path.name for path in parts[2].parent.iterdir())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        script.merge_adapter(*parts)
    assert sorted(path.name for path in parts[2].parent.iterdir()) == before
    assert not parts[2].exists() or [path.name for path in parts[2].iterdir()] == ["precious"]


def test_a_failure_half_way_leaves_nothing(parts, monkeypatch):
    written = []

    def fail(tensors, target, **_):
        written.append(target)
        if len(written) == 2:
            raise OSError("disk full")
        save_file(tensors, target)

    monkeypatch.setattr(script, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        script.merge_adapter(*parts)
    assert sorted(path.name for path in parts[2].parent.iterdir()) == ["adapter", "base"]


def test_command(parts, monkeypatch, capsys):
    base, adapter, out = map(str, parts)
    monkeypatch.setattr(
        sys, "argv", ["x", f"--base_model_path={base}", f"--adapter_dir={adapter}", f"--output_dir={out}"]
    )
    script.run_cli(script.main)
    assert "9 tensors" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        script.run_cli(script.main)
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {out}: exists already")
