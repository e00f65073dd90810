"""scripts/merge_adapter.py: only what the adapters hold changes, a merge is undone, several adapters are merged."""

import json
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deepseek.shards import INDEX, Shard
from esft import ExpertConfig, adapter_views, add_adapter, merge, unload
from scripts import merge_adapter as script
from tests.helpers import BOTH, SHARD, assert_same_tensors, hashes, make_model, noisy_adapter, tensors_of


def everything_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def merge_parts(parts, **options):
    base, adapter, out = parts
    return script.merge_adapter(base, [adapter], out, **options)


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
    assert script.merge_adapter(base, [adapter], out) == 9
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    wanted = {str(path.relative_to(base)) for path in base.rglob("*") if path.is_file()}
    kept = {"merged_from.json", "replaced/adapter.safetensors", "replaced/expert_cfg.json"}
    assert names == wanted - {"pytorch_model.bin", "README.md"} | kept
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "mine"}
    assert_same_tensors(tensors_of(base), tensors)
    changed = {name for name, tensor in tensors_of(out).items() if not torch.equal(tensor, tensors[name])}
    assert changed == set(adapter_views(make_model(), ExpertConfig({1: (5, 2), 2: (7,)})))


def test_overwrite_replaces_what_a_merge_left_and_nothing_else(parts):
    base, adapter, out = parts
    script.merge_adapter(base, [adapter], out)
    before = tensors_of(out)
    with pytest.raises(ValueError, match=r"exists already.*--overwrite"):
        script.merge_adapter(base, [adapter], out)
    shutil.rmtree(adapter)
    model = AutoModelForCausalLM.from_pretrained(base)
    noisy_adapter(model, ExpertConfig({1: (0,)}), adapter)
    script.merge_adapter(base, [adapter], out, overwrite=True)
    changed = {name for name, tensor in tensors_of(out).items() if not torch.equal(tensor, before[name])}
    assert len(changed) == 9 + 3
    (out / script.NOTE).unlink()
    with pytest.raises(ValueError, match="exists already"):
        script.merge_adapter(base, [adapter], out, overwrite=True)


def grow(path):
    path.write_bytes(path.read_bytes() + b" ")


OWN = {
    "a file": lambda out: (out / "notes.txt").write_text("mine"),
    "a card": lambda out: (out / "README.md").write_text("mine"),
    "a hidden file": lambda out: (out / ".env").write_text("mine"),
    "in a folder of the merge": lambda out: (out / script.REPLACED / "mine.json").write_text("{}"),
    "in a folder of its own": lambda out: ((out / "a" / "b").mkdir(parents=True), (out / "a/b/c").write_text("mine")),
    "a link that leads nowhere": lambda out: (out / "link").symlink_to("nowhere"),
    "a link to a folder": lambda out: (out / "link").symlink_to(out.parent),
    "other weights": lambda out: (out / "more.safetensors").write_bytes(b"mine"),
    "an edited file": lambda out: grow(out / "tokenizer_config.json"),
    "a note of an older merge": lambda out: (out / script.NOTE).write_text("{}"),
}


@pytest.mark.parametrize("what", OWN)
def test_overwrite_does_not_touch_files_of_the_user(what, parts):
    base, adapter, out = parts
    script.merge_adapter(base, [adapter], out)
    OWN[what](out)
    before = everything_in(out.parent)
    with pytest.raises(ValueError, match=r"cannot overwrite .* so the merge did not write it\. Move it away"):
        script.merge_adapter(base, [adapter], out, overwrite=True)
    assert everything_in(out.parent) == before


def test_a_merge_that_changes_nothing_is_told(parts, tmp_path, capsys):
    base, adapter, out = parts
    script.merge_adapter(base, [adapter], out)
    assert "note:" not in capsys.readouterr().err
    script.merge_adapter(out, [adapter], tmp_path / "again")
    assert f"note: {out} holds the weights of the adapter already: nothing changed" in capsys.readouterr().err
    script.unmerge(tmp_path / "again", tmp_path / "back")
    assert "note:" not in capsys.readouterr().err


def test_the_bases_dtype_decides(parts):
    base, adapter, out = parts
    make_model(dtype=torch.bfloat16).save_pretrained(base, max_shard_size=SHARD)
    script.merge_adapter(base, [adapter], out)
    name = "model.layers.2.mlp.experts.7.up_proj.weight"
    found, fp32 = tensors_of(out), tensors_of(adapter)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert torch.equal(found[name], fp32[name].bfloat16())


def other_base(**changes):
    def spoil(base, adapter, out):
        shutil.rmtree(base)
        make_model(**changes).save_pretrained(base)

    return spoil


def drop(name):
    return lambda base, adapter, out: next(base.glob(name)).unlink()


def without_a_tensor(base, adapter, out):
    for path in base.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({name: tensor for name, tensor in tensors.items() if name != UP}, path, {"format": "pt"})


def fewer_experts_than_its_config_says(base, adapter, out):
    """A fused checkpoint whose tensors have too few rows."""
    shutil.rmtree(base)
    make_model().save_pretrained(base, save_original_format=False)
    tensors = load_file(base / "model.safetensors")
    fused = {key: t[:4].contiguous() for key, t in tensors.items() if ".experts." in key}
    save_file(tensors | fused, base / "model.safetensors", {"format": "pt"})


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


def retype(folder, dtype, name="model.layers.1.mlp.experts.5.up_proj.weight"):
    """Store one tensor of a folder in another dtype."""

    def spoil(base, adapter, out):
        for path in {"base": base, "adapter": adapter}[folder].glob("*.safetensors"):
            tensors = load_file(path)
            if name in tensors:
                save_file({**tensors, name: tensors[name].to(dtype)}, path, {"format": "pt"})

    return spoil


def change_adapter(change):
    def spoil(base, adapter, out):
        tensors = load_file(adapter / "adapter.safetensors")
        change(tensors)
        save_file(tensors, adapter / "adapter.safetensors")

    return spoil


UP = "model.layers.1.mlp.experts.5.up_proj.weight"


def lora(base, adapter, out):
    (adapter / "expert_cfg.json").rename(adapter / "adapter_config.json")


def cut(folder, name):
    def spoil(base, adapter, out):
        path = next({"base": base, "adapter": adapter}[folder].glob(name))
        path.write_bytes(path.read_bytes()[:100])

    return spoil


REFUSED = {
    "output exists": (occupied, "cannot write .*out: it exists already"),
    "no such base": (lambda base, adapter, out: shutil.rmtree(base), "base.: no such folder"),
    "no such adapter": (lambda base, adapter, out: shutil.rmtree(adapter), "adapter: no such expert config or adapter"),
    "no config": (drop("config.json"), r"no config\.json"),
    "no weights": (drop(INDEX), "neither model.safetensors nor"),
    "a shard is missing": (drop("*-00002-of-*"), "model-00002-of-.*missing"),
    "a shard is cut": (cut("base", "*2-of-*.safetensors"), "2-of.*damaged"),
    "the adapter is cut": (cut("adapter", "*.safetensors"), "adapter.safetensors: missing, damaged"),
    "a tensor is missing": (without_a_tensor, f"does not hold {UP}"),
    "too few rows": (fewer_experts_than_its_config_says, r"experts\.\w+ of the base: it is F32 of shape \(4, "),
    "another shape": (of_another_shape, r"of shape .*8.* into .*_proj\.weight of the base: it is F32 of shape .*16"),
    "a damaged LoRA": (lora, "cannot merge the LoRA adapter"),
    "a missing projection": (change_adapter(lambda t: t.pop(UP)), rf"{UP} is missing"),
    "an extra expert": (
        change_adapter(lambda t: t.update({UP.replace("5", "6"): t[UP].clone()})),
        r"experts\.6\.up_proj\.weight is not in its expert_cfg",
    ),
    "an adapter of whole numbers": (retype("adapter", torch.int8), rf"{UP} has shape .* in I8, this .* in F64, F32"),
    "a base in fp8": (
        retype("base", torch.float8_e4m3fn),
        r"experts.*weight is quantized \(F8_E4M3\), but config.json",
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
        merge_parts(parts)
    assert sorted(path.name for path in parts[2].parent.iterdir()) == before
    assert not parts[2].exists() or [path.name for path in parts[2].iterdir()] == ["precious"]


def test_a_failure_half_way_leaves_nothing(parts, monkeypatch):
    written, write = [], Shard.write

    def fail(self, *args):
        written.append(self.path)
        if len(written) == 5:
            raise OSError("disk full")
        write(self, *args)

    monkeypatch.setattr(Shard, "write", fail)
    before = everything_in(parts[0])
    with pytest.raises(OSError, match="disk full"):
        merge_parts(parts)
    assert sorted(path.name for path in parts[2].parent.iterdir()) == ["adapter", "base"]
    assert everything_in(parts[0]) == before


def test_command(parts, monkeypatch, capsys):
    base, adapter, out = map(str, parts)
    monkeypatch.setattr(
        sys, "argv", ["x", f"--base_model_path={base}", f"--adapter_dir={adapter}", f"--output_dir={out}"]
    )
    script.run_cli(script.main)
    assert "9 tensors" in capsys.readouterr().out
    script.main(["--unmerge", f"--base_model_path={out}", f"--output_dir={out}-again"])
    assert hashes(parts[0]) == hashes(parts[2].with_name("out-again"))
    with pytest.raises(SystemExit, match="2"):
        script.run_cli(script.main)
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: cannot write {out}: it exists already")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter_dir=a", "--unmerge"], "not allowed with argument --adapter_dir"),
        ([], "one of the arguments --adapter_dir --unmerge is required"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.parse_args(["--base_model_path=b", "--output_dir=o", *flags])
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ taken out again


def test_what_was_replaced_is_an_adapter_of_the_merged_model(parts):
    """Added to the merged model, as any adapter, it gives the base's logits; merged by hand it unmerges."""
    base, _adapter, out = parts
    merge_parts(parts)
    ids = torch.arange(3, 12)[None]
    model, wanted = AutoModelForCausalLM.from_pretrained(out), AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        merged = model(ids).logits
        assert torch.equal(add_adapter(model, out / "replaced")(ids).logits, wanted(ids).logits)
        assert torch.equal(unload(model)(ids).logits, merged) and not torch.equal(merged, wanted(ids).logits)
    script.merge_adapter(out, [out / "replaced"], out.with_name("by hand"))
    assert hashes(out.with_name("by hand")) == hashes(base)
    assert hashes(out.with_name("by hand") / "replaced") != hashes(out / "replaced")


def test_unmerging_writes_the_base_and_no_more(parts):
    base, _adapter, out = parts
    merge_parts(parts)
    script.unmerge(out, out.with_name("again"))
    assert everything_in(out.with_name("again")) == everything_in(base)


def test_an_unmerge_undoes_the_last_merge_also_where_that_trained_the_routers(parts, tmp_path):
    _base, _adapter, out = parts
    merge_parts(parts)
    noisy_adapter(AutoModelForCausalLM.from_pretrained(out), ExpertConfig({1: (2,)}, **BOTH), tmp_path / "second")
    script.merge_adapter(out, [tmp_path / "second"], tmp_path / "out2")
    script.unmerge(tmp_path / "out2", tmp_path / "once")
    assert hashes(tmp_path / "once") == hashes(out) != hashes(tmp_path / "out2")
    with pytest.raises(ValueError, match=r"cannot unmerge .*once"):
        script.unmerge(tmp_path / "once", tmp_path / "twice")
    with pytest.raises(ValueError, match="another base model"):  # its routers are not those of the second merge
        script.merge_adapter(out, [tmp_path / "out2" / "replaced"], tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_an_adapter_that_is_no_number_is_refused(parts):
    tensors = load_file(parts[1] / "adapter.safetensors")
    tensors[UP].view(-1)[5] = torch.inf
    save_file(tensors, parts[1] / "adapter.safetensors")
    with pytest.raises(ValueError, match=f"cannot use adapter .*: {UP} has values that are not finite"):
        merge_parts(parts)
    assert not parts[2].exists()


def test_a_base_in_bf16_comes_back_from_an_adapter_in_fp32(parts):
    make_model(dtype=torch.bfloat16).save_pretrained(parts[0], max_shard_size=SHARD)
    merge_parts(parts)
    kept = tensors_of(parts[2] / "replaced")
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16} and len(kept) == 9
    assert {tensor.dtype for tensor in tensors_of(parts[1]).values()} == {torch.float32}
    script.unmerge(parts[2], parts[2].with_name("again"))
    assert hashes(parts[2].with_name("again")) == hashes(parts[0])


def test_without_what_was_replaced_there_is_no_way_back(parts):
    _base, adapter, out = parts
    merge_parts(parts, keep_replaced=False)
    merged = hashes(out)
    assert not (out / "replaced").exists()
    for folder in parts:
        with pytest.raises(ValueError, match="cannot unmerge"):
            script.unmerge(folder, out.with_name("again"))
    merge_parts(parts, overwrite=True)
    assert hashes(out) == merged
    with pytest.raises(ValueError, match="it is the base itself"):
        script.merge_adapter(out, [adapter], out, overwrite=True)
    shutil.rmtree(out / "replaced")
    (out / "replaced").mkdir()
    with pytest.raises(FileNotFoundError, match="replaced: it is not an adapter"):
        script.unmerge(out, out.with_name("again"))
    assert not out.with_name("again").exists() and hashes(out) == merged


# --------------------------------------------------------------------------------------------------------- many of them


@pytest.fixture
def several(tmp_path):
    """A base and adapters a, b, c, d; a and b are disjoint, c shares experts with both, d and e have shared experts."""
    make_model().save_pretrained(tmp_path / "base", max_shard_size=SHARD)
    configs = {
        "a": ExpertConfig({1: (3, 1)}),
        "b": ExpertConfig({1: (0,), 2: (3,)}),
        "c": ExpertConfig({1: (1, 4, 3, 0), 2: (3, 5)}),
        "d": ExpertConfig({2: (6,)}, shared_experts=True),
        "e": ExpertConfig({2: (7,)}, shared_experts=True),
    }
    for name, config in configs.items():
        noisy_adapter(make_model(), config, tmp_path / name)
    return tmp_path


def test_disjoint_adapters_are_merged_together(several):
    paths = [several / name for name in "abd"]
    script.merge_adapter(several / "base", paths, several / "out")
    model = make_model()
    for path in paths:
        add_adapter(model, path)
    merge(model).save_pretrained(several / "wanted", max_shard_size=SHARD)
    assert_same_tensors(tensors_of(several / "out"), tensors_of(several / "wanted"))
    note = json.loads((several / "out" / "merged_from.json").read_text())
    assert note["adapter_dir"] == [str(path) for path in paths]
    kept = ExpertConfig.load(several / "out" / "replaced")
    assert kept == ExpertConfig({1: (3, 1, 0), 2: (3, 6)}, shared_experts=True)
    script.unmerge(several / "out", several / "again")
    assert hashes(several / "again") == hashes(several / "base")


def test_adapters_that_share_something_are_refused_with_a_report(several, monkeypatch, capsys):
    """Per pair and layer the experts, and other parameters by name; exit code 2, nothing written."""
    before = sorted(path.name for path in several.iterdir())
    names = [str(several / name) for name in "abcde"]
    command = [f"--base_model_path={several / 'base'}", f"--output_dir={several / 'out'}", "--adapter_dir", *names]
    with pytest.raises(SystemExit, match="2"):
        script.run_cli(lambda: script.main(command))
    *report, error = capsys.readouterr().err.splitlines()
    a, b, c, d, e = names
    shared = [
        f"    model.layers.{n}.mlp.shared_experts.{p}_proj.weight" for n in (1, 2) for p in ("down", "gate", "up")
    ]
    assert report == [
        f"{a} and {c} both hold",
        "    layer 1: experts 1, 3",
        f"{b} and {c} both hold",
        "    layer 1: experts 0",
        "    layer 2: experts 3",
        f"{d} and {e} both hold",
        *shared,
    ]
    assert error.startswith("error: cannot merge adapters that hold the same") and f"{a} and {c} (6 tensors)" in error
    assert sorted(path.name for path in several.iterdir()) == before


def test_one_wrong_adapter_of_several_is_named(several):
    (several / "b" / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"adapter .*/b: .*adapter\.safetensors: missing, damaged"):
        script.merge_adapter(several / "base", [several / "a", several / "b"], several / "out")
    assert not (several / "out").exists()
