"""Test which files of a checkpoint are read, and tensors that are read and written in place."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import esft
from deepseek.frozen import Storage
from deepseek.loading import empty_model, load_base_model, load_config
from deepseek.shards import INDEX, TORCH_INDEX, WEIGHTS, Shard, reserve, stored_tensors
from scripts import merge_adapter as script
from tests.helpers import SHARD, assert_same_tensors, make_model, noisy_adapter, tensors_of

IDS = torch.arange(3, 12)[None]


def test_a_file_is_reserved_filled_and_read_row_by_row(tmp_path):
    torch.manual_seed(0)
    tensors = {"a": torch.randn(3).bfloat16(), "b": torch.randn(4, 2, 3), "c": torch.randn(5).double()}
    names = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
    path = tmp_path / "x.safetensors"
    reserve(path, {key: (names[tensor.dtype], list(tensor.shape)) for key, tensor in tensors.items()})
    assert not any(tensor.any() for tensor in load_file(path).values())
    with Shard(path, "r+b") as shard:
        assert all((shard.start + e["data_offsets"][0]) % tensors[k].itemsize == 0 for k, e in shard.header.items())
        for key in "ac":
            shard.write(key, tensors[key])
        for row in (2, 0, 3):
            shard.write("b", tensors["b"][row], row)
        assert torch.equal(shard.read("b", 3), tensors["b"][3]) and not shard.read("b", 1).any()
    tensors["b"][1] = 0
    assert_same_tensors(load_file(path), tensors)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x\.safetensors: missing, damaged or truncated"):
        Shard(path)


@pytest.fixture
def base(tmp_path, tiny_tokenizer):
    """Return the folder of a bf16 model in shards."""
    make_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size=SHARD)
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def assert_read_alike(base, folder, **options):
    """What is loaded from `base` and what a merge writes of it agree, outside the merged expert. Return the model."""
    model, _ = load_base_model(base, **options)
    noisy_adapter(load_base_model(base)[0], esft.ExpertConfig({1: (5,)}), folder / "adapter")
    script.merge_adapter(base, [folder / "adapter"], folder / "out")
    merged, _ = load_base_model(folder / "out")
    script.unmerge(folder / "out", folder / "again")
    again, _ = load_base_model(folder / "again")
    assert not torch.equal(merged(IDS).logits, model(IDS).logits)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    return model


@pytest.mark.parametrize("frozen", [None, Storage()], ids=["whole", "layer by layer"])
@pytest.mark.parametrize("metadata", ["none", None, []])
def test_an_index_without_metadata(metadata, frozen, base, tmp_path):
    wanted, _ = load_base_model(base)
    edit(base / INDEX, lambda index: index.pop("metadata") if metadata == "none" else index.update(metadata=metadata))
    model = assert_read_alike(base, tmp_path, frozen=frozen)
    assert torch.equal(model(IDS).logits, wanted(IDS).logits)
    assert model.config.name_or_path == model.name_or_path == str(base)


def test_a_single_file_beside_an_index_is_what_is_read(base, tmp_path):
    """transformers reads the single file. A merge reads that too, and leaves out the index, which a server may read."""
    make_model(dtype=torch.bfloat16, seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, base)
    with pytest.warns(UserWarning, match=rf"holds {WEIGHTS} and {INDEX}. {WEIGHTS} is read"):
        model = assert_read_alike(base, tmp_path)
    wanted = {seed: make_model(dtype=torch.bfloat16, seed=seed).lm_head.weight for seed in (0, 1)}
    assert torch.equal(model.lm_head.weight, wanted[1]) and not torch.equal(wanted[0], wanted[1])
    assert {one.file for one in stored_tensors(tmp_path / "out").values()} == {WEIGHTS}
    assert not (tmp_path / "out" / INDEX).exists()
    (base / WEIGHTS).unlink()
    assert torch.equal(load_base_model(base)[0].lm_head.weight, wanted[0])


def quantize_weights(base):
    for path in base.glob("*.safetensors"):
        tensors = {key: t.to(torch.float8_e4m3fn) if "experts.3." in key else t for key, t in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})


def quantize_config(base, **method):
    method = method or {"quant_method": "fp8", "weight_block_size": [128, 128]}
    edit(base / "config.json", lambda config: config.update(quantization_config=method))


@pytest.mark.parametrize("open_it", [load_base_model, empty_model, lambda base: script.open_base(base)])
@pytest.mark.parametrize(
    "spoil, message",
    [
        (quantize_config, "it is quantized as fp8 by its config.json, but not its weights. Remove"),
        (
            lambda base: quantize_config(base, quant_method="bitsandbytes", load_in_4bit=True),
            "quantized as bitsandbytes by its",
        ),
        (
            lambda base: [quantize_weights(base), quantize_config(base)],
            r"experts\.3\.\w+\.weight is quantized as fp8, but its scales are missing",
        ),
        (quantize_weights, r"experts\.3\.\w+\.weight is quantized \(F8_E4M3\), but config.json does not say how"),
    ],
)
def test_a_config_that_does_not_say_how_weights_are_stored_is_refused(spoil, message, open_it, base):
    open_it(base)
    spoil(base)
    with pytest.raises(ValueError, match=message):
        open_it(base)


def test_a_model_in_the_hub_cache_is_checked_too(base, monkeypatch):
    """It is refused once its files are there."""
    snapshot = base.parent / "models--org--tiny" / "snapshots" / "0123abcd"
    shutil.copytree(base, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(base.parent))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    wanted, _ = load_base_model(base)
    model, _ = load_base_model("org/tiny")
    assert torch.equal(model(IDS).logits, wanted(IDS).logits)
    edit(snapshot / INDEX, lambda index: index.pop("metadata"))
    assert torch.equal(load_base_model("org/tiny")[0](IDS).logits, wanted(IDS).logits)
    quantize_weights(snapshot)
    with pytest.raises(ValueError, match=r"is quantized \(F8_E4M3\), but config.json does not say how"):
        load_base_model("org/tiny")


@pytest.mark.parametrize("index", [{}, {"metadata": {}}, {"weight_map": {}}])
def test_an_index_without_files_is_refused(index, base):
    (base / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"cannot read .*{INDEX}: it has no weight_map"):
        load_base_model(base)


def test_files_in_a_folder_of_their_own(base, tmp_path):
    """transformers opens what the index names, below the model's folder."""
    files = [path.name for path in base.glob("*.safetensors")]
    wanted, _ = load_base_model(base)
    (base / "weights").mkdir()
    for name in files:
        (base / name).rename(base / "weights" / name)
    edit(
        base / INDEX,
        lambda index: index["weight_map"].update({k: f"weights/{v}" for k, v in index["weight_map"].items()}),
    )
    model = assert_read_alike(base, tmp_path)
    assert torch.equal(model(IDS).logits, wanted(IDS).logits)
    assert sorted(path.name for path in (tmp_path / "out" / "weights").iterdir()) == sorted(files)
    edit(base / INDEX, lambda index: index["weight_map"].update({"x": f"../base/weights/{files[0]}"}))
    with pytest.raises(ValueError, match=r"it names \.\./base/weights/.*, which is not in its folder"):
        load_base_model(base)


@pytest.mark.parametrize("name", ["../other/x", "/etc/x", "a/../../x", ".."])
@pytest.mark.parametrize("index", [INDEX, TORCH_INDEX])
def test_no_index_leads_out_of_its_folder_in_loading_and_in_merging(index, name, base, tmp_path):
    """Neither that of safetensors nor that of torch's own files."""
    if index == TORCH_INDEX:
        (base / INDEX).rename(base / index)
    edit(base / index, lambda content: content["weight_map"].update({"x": f"./{next(base.glob('*-of-*')).name}"}))
    stays_inside = [load_base_model, empty_model, script.open_base] if index == INDEX else [empty_model]
    for read in stays_inside:
        read(base)
    edit(base / index, lambda content: content["weight_map"].update({"x": name}))
    for read in (load_base_model, empty_model, load_config, script.open_base):
        with pytest.raises(ValueError, match=rf"cannot read .*{index}: it names .*, which is not in its folder"):
            read(base)


def test_keys_without_the_leading_model(base, tmp_path):
    wanted, _ = load_base_model(base)
    tensors = {key.removeprefix("model."): tensor for key, tensor in tensors_of(base).items()}
    (base / INDEX).unlink()
    save_file(tensors, base / WEIGHTS, {"format": "pt"})
    model = assert_read_alike(base, tmp_path)
    assert torch.equal(model(IDS).logits, wanted(IDS).logits)
    assert tensors_of(tmp_path / "out").keys() == tensors.keys()
