"""deepseek/fingerprint.py: other weights are another base, and the same weights stored otherwise are the same base."""

import json
import math
import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deepseek import fingerprint
from deepseek.fingerprint import SAMPLE, base_note, checkpoint_note, difference
from deepseek.loading import empty_model
from deepseek.shards import INDEX, Shard
from esft import merge, to_esft
from tests.helpers import EXPERTS, make_model, tensors_of


@pytest.fixture
def base(tmp_path):
    """A bf16 model in one file."""
    make_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def store(folder, tensors):
    """Write the weights of a folder anew, in one file."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def other(folder, there):
    return difference(checkpoint_note(folder), checkpoint_note(there))


def in_shards(folder):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("*.safetensors"))) > 5


def in_fp32(folder):
    store(folder, {key: tensor.float() for key, tensor in tensors_of(folder).items()})


def in_fp64(folder):
    store(folder, {key: tensor.double() for key, tensor in tensors_of(folder).items()})


def without_the_prefix(folder):
    store(folder, {key.removeprefix("model."): tensor for key, tensor in tensors_of(folder).items()})


def with_a_copy(folder):
    tensors = tensors_of(folder)
    store(folder, tensors | {"a.tied.copy": tensors["model.embed_tokens.weight"].clone()})


@pytest.mark.parametrize("stored", [in_shards, in_fp32, in_fp64, without_the_prefix, with_a_copy])
def test_the_same_weights_stored_otherwise(stored, base, tmp_path):
    shutil.copytree(base, tmp_path / "copy")
    stored(tmp_path / "copy")
    assert other(tmp_path / "copy", base) is None
    assert checkpoint_note(base)["weights"].startswith("values:")


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.experts.6.down_proj.weight",
        "model.layers.2.mlp.shared_experts.gate_proj.weight",
        "model.layers.2.self_attn.kv_b_proj.weight",
    ],
)
def test_a_changed_tensor_is_another_base(name, base, tmp_path):
    shutil.copytree(base, tmp_path / "copy")
    tensors = tensors_of(base)
    store(tmp_path / "copy", tensors | {name: tensors[name] * 1.01})
    assert other(tmp_path / "copy", base) == "the weights differ"
    store(tmp_path / "copy", tensors)
    assert other(tmp_path / "copy", base) is None


def test_tensors_that_traded_places_or_are_gone(base, tmp_path):
    shutil.copytree(base, tmp_path / "copy")
    tensors = tensors_of(base)
    a, b = (f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in (0, 1))
    for changed in (tensors | {a: tensors[b], b: tensors[a]}, {key: t for key, t in tensors.items() if key != a}):
        store(tmp_path / "copy", changed)
        assert other(tmp_path / "copy", base)


def to_fp8(folder, block=(16, 16), factor=1.0):
    """Store the experts in fp8 with a scale for each block. Return what they stand for."""
    tensors = tensors_of(folder)
    stands_for = dict(tensors)
    for key in [key for key in tensors if ".experts." in key]:
        rows, columns = tensors[key].shape
        torch.manual_seed(rows)
        scale = factor * (0.5 + torch.rand(math.ceil(rows / block[0]), math.ceil(columns / block[1]))) / 100
        whole = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
        fp8 = (tensors[key].float() / whole).to(torch.float8_e4m3fn)
        tensors |= {key: fp8, f"{key}_scale_inv": scale}
        stands_for[key] = (fp8.float() * whole).bfloat16()
    store(folder, tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(block)}
    (folder / "config.json").write_text(json.dumps(config))
    return stands_for


@pytest.mark.parametrize("block", [(16, 16), (12, 20)])
def test_a_checkpoint_in_fp8_and_what_it_stands_for(block, base, tmp_path):
    shutil.copytree(base, tmp_path / "fp8")
    stands_for = to_fp8(tmp_path / "fp8", block)
    store(base, stands_for)
    assert other(tmp_path / "fp8", base) is None
    tensors = tensors_of(tmp_path / "fp8")
    for suffix in ("", "_scale_inv"):
        key = f"model.layers.2.mlp.experts.4.up_proj.weight{suffix}"
        store(tmp_path / "fp8", tensors | {key: (tensors[key].float() * 2).to(tensors[key].dtype)})
        assert other(tmp_path / "fp8", base) == "the weights differ"


def test_a_packed_format_is_compared_with_itself_alone(base, tmp_path):
    tensors = tensors_of(base)
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    blocks = torch.randint(0, 255, (8, 5000), dtype=torch.uint8)
    for name, packed in (("a", blocks), ("b", blocks), ("c", blocks.flip(0))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        store(tmp_path / name, tensors | {"model.layers.1.mlp.experts.gate_up_proj_blocks": packed})
    assert other(tmp_path / "a", tmp_path / "b") is None is other(tmp_path / "a", base)
    assert other(tmp_path / "a", tmp_path / "c") == "the weights differ"


def test_what_is_not_known_is_not_compared(base, tmp_path):
    note = checkpoint_note(base)
    assert checkpoint_note("") == checkpoint_note(tmp_path / "none") == checkpoint_note("org/none") == {}
    in_shards(base)
    assert checkpoint_note(base)["weights"] == note["weights"]
    shutil.move(next(base.glob("model-00002*")), tmp_path)
    assert checkpoint_note(base) == {}  # loading says what is missing
    (base / INDEX).unlink()
    assert checkpoint_note(base) == {} and difference({}, note) is None is difference(note, {})


def test_a_config_that_repeats_a_key_is_read_as_transformers_reads_it(base):
    before, config = checkpoint_note(base), base / "config.json"
    config.write_text(config.read_text().replace("{", '{"use_cache": true, ', 1))
    assert config.read_text().count('"use_cache"') == 2 and empty_model(base).config.use_cache
    assert checkpoint_note(base) == before


@pytest.mark.parametrize("weights", ["abc", "", None, 7, "values:"])
def test_a_note_of_another_form_is_not_an_error(weights, base):
    here = checkpoint_note(base)
    found = difference(here, {"weights": weights}), difference({"weights": weights}, here)
    assert found == (("the weights differ",) * 2 if weights == "values:" else (None, None))


def test_a_damaged_file_is_named(base):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"cannot read .*model\.safetensors: missing, damaged or truncated"):
        checkpoint_note(base)


def test_few_bytes_are_read_of_a_large_tensor(base, monkeypatch):
    store(base, {"large": torch.randn(700, 4000, dtype=torch.bfloat16), "small": torch.randn(7), "one": torch.ones(())})
    read, original = [], Shard.read_bytes

    def read_bytes(*args):
        read.append(original(*args))
        return read[-1]

    monkeypatch.setattr(Shard, "read_bytes", read_bytes)
    before = checkpoint_note(base)
    assert sum(map(len, read)) == 2 * 4 * SAMPLE + 4 * 7 + 4
    tensors = load_file(base / "model.safetensors")
    tensors["large"][-1, -1] += 1  # the last entry is in the sample
    store(base, tensors)
    assert difference(checkpoint_note(base), before)


def test_the_revision_of_a_hub_model(base, tmp_path, monkeypatch):
    """Other weights at another revision are named with it. Another revision with the same weights is the same base."""
    repo = tmp_path / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    for revision in ("aaaa", "bbbb", "cccc"):
        shutil.copytree(base, repo / "snapshots" / revision)
    make_model(seed=1).save_pretrained(repo / "snapshots" / "cccc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    notes = {}
    for revision in ("aaaa", "bbbb", "cccc"):
        (repo / "refs" / "main").write_text(revision)
        notes[revision] = checkpoint_note("org/tiny")
        assert notes[revision]["revision"] == revision
    assert difference(notes["aaaa"], notes["bbbb"]) is None is difference(notes["aaaa"], checkpoint_note(base))
    assert difference(notes["cccc"], notes["aaaa"]) == "the weights differ (revision aaaa, this one is cccc)"
    (repo / "snapshots" / "cccc" / "model.safetensors").unlink()  # not fetched yet
    assert checkpoint_note("org/tiny") == {"revision": "cccc"}
    assert "another revision (revision aaaa" in difference(checkpoint_note("org/tiny"), notes["aaaa"])


def test_the_note_follows_the_model(base):
    """It is that of the files from which a model was read; a merged model is not what the files hold."""
    model = AutoModelForCausalLM.from_pretrained(base)
    note = base_note(model)
    assert note["weights"] == checkpoint_note(base)["weights"] == base_note(empty_model(base))["weights"]
    assert "weights" not in base_note(make_model())
    assert "weights" not in base_note(merge(to_esft(model, EXPERTS)))


def test_files_are_read_once_until_they_change(tmp_path, monkeypatch):
    make_model().save_pretrained(tmp_path)
    first, read = checkpoint_note(tmp_path), []
    monkeypatch.setattr(
        fingerprint, "_sample", lambda *args, sample=fingerprint._sample: read.append(1) or sample(*args)
    )
    assert checkpoint_note(tmp_path) == first and not read
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert checkpoint_note(tmp_path) != first and read
