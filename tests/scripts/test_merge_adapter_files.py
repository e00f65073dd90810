"""scripts/merge_adapter.py: which bytes of a checkpoint it writes, in how much memory and with how many files."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from deepseek import checkpoint_files
from deepseek.files import read_json, write_json
from deepseek.shards import Shard
from esft import ExpertConfig
from scripts import merge_adapter as script
from tests.helpers import assert_same_tensors, hashes, make_model, noisy_adapter, tensors_of
from utils import ROOT


def merge_parts(parts, **options):
    base, adapter, out = parts
    return script.merge_adapter(base, [adapter], out, **options)


@pytest.mark.parametrize("dtype, word", [(torch.float32, torch.int32), (torch.bfloat16, torch.int16)])
def test_every_bit_counts(dtype, word, parts):
    """NaNs of whatever payload and sign, infinities, -0 and subnormals in the base; the latter two in the adapter."""
    base, adapter, out = parts
    for number, path in enumerate([*sorted(base.glob("*.safetensors")), adapter / "adapter.safetensors"]):
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
        generator = torch.Generator().manual_seed(number)
        for name in [name for name in tensors if ".experts." in name]:
            limits = torch.iinfo(word)
            bits = torch.randint(limits.min, limits.max, tensors[name].shape, generator=generator, dtype=word)
            exponent = torch.tensor(0x7F800000 if word == torch.int32 else 0x7F80, dtype=word)
            if path.parent == base:
                bits[::2] |= exponent  # infinite or NaN
            else:
                bits[(bits & exponent) == exponent] &= ~exponent  # subnormal
            tensors[name] = bits.view(dtype)
        save_file(tensors, path, {"format": "pt"})
    merge_parts(parts)
    found, wanted = tensors_of(out), tensors_of(adapter)
    before = tensors_of(base)["model.layers.1.mlp.experts.5.up_proj.weight"]
    assert before.isnan().any() and len(before[before.isnan()].view(word).unique()) > 50
    assert all(torch.equal(found[name].view(word), tensor.view(word)) for name, tensor in wanted.items())
    script.unmerge(out, out.with_name("again"))
    assert hashes(out.with_name("again")) == hashes(base)


def test_a_file_whose_tensors_are_not_aligned(parts):
    """The header of the base's file and the adapter's one byte longer than a multiple of 8: as good as any other."""
    base, adapter, out = parts
    merge_parts(parts)
    wanted = tensors_of(out)
    shutil.rmtree(out)
    for path in [*base.glob("*.safetensors"), *adapter.glob("*.safetensors")]:
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        path.write_bytes((size + 1).to_bytes(8, "little") + content[8 : 8 + size] + b" " + content[8 + size :])
        with Shard(path) as shard:
            assert all((shard.start + entry["data_offsets"][0]) % 4 for entry in shard.header.values())
    merge_parts(parts)
    found = {}
    for path in out.glob("*.safetensors"):
        with Shard(path) as shard:
            found |= {key: shard.read(key) for key in shard.header}
    assert_same_tensors(found, wanted)
    script.unmerge(out, out.with_name("again"))
    assert hashes(out.with_name("again")) == hashes(base)


def test_a_read_only_snapshot_of_a_hub_cache(parts):
    """Its files are links to blobs, and nothing in it is writable. Copies are, so merge and unmerge can be repeated."""
    base, _adapter, out = parts
    (base / "templates").mkdir()
    (base / "templates" / "rag.jinja").write_text("rag")
    before, blobs = hashes(base), base.with_name("blobs")
    blobs.mkdir()
    for number, path in enumerate(path for path in base.rglob("*") if path.is_file()):
        path.rename(blobs / str(number)).chmod(0o444)
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    for path in (base / "templates", base):
        path.chmod(0o555)
    merge_parts(parts)
    merge_parts(parts, overwrite=True)
    script.unmerge(out, out.with_name("again"))
    base.chmod(0o755)
    (base / "templates").chmod(0o755)
    for folder in (out, out.with_name("again")):
        assert (folder / "templates" / "rag.jinja").read_text() == "rag"
        for path in (folder, *folder.rglob("*")):
            assert path.stat().st_mode & 0o200 and not path.is_symlink(), path
    assert hashes(out.with_name("again")) == before != hashes(out)


def test_hard_links_are_for_files_that_do_not_change(parts):
    base, _adapter, out = parts
    before = hashes(base)
    merge_parts(parts, hard_links=True)
    same = {path.name: path.samefile(base / path.name) for path in out.glob("*.safetensors")}
    changed = {name for name, digest in hashes(out).items() if digest != before[name]}
    assert changed and {name for name, linked in same.items() if not linked} == changed < same.keys()
    assert hashes(base) == before
    assert not any(path.samefile(base / path.name) for path in out.glob("*.json") if path.name != script.NOTE)
    script.unmerge(out, out.with_name("again"), hard_links=True)
    assert hashes(out.with_name("again")) == before


def test_hard_links_fall_back_to_copies(parts, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    merge_parts(parts, hard_links=True)
    assert not any(path.samefile(parts[0] / path.name) for path in parts[2].glob("*.safetensors"))
    assert len(hashes(parts[2])) == len(hashes(parts[0]))


def test_only_the_bytes_of_the_adapter_differ(parts):
    """Header, order and all other bytes of every file are the base's."""
    base, adapter, out = parts
    merge_parts(parts)
    keys = set(tensors_of(adapter))
    for path in base.glob("*.safetensors"):
        a, b = bytearray(path.read_bytes()), bytearray((out / path.name).read_bytes())
        assert len(a) == len(b)
        with Shard(path) as shard:
            for key in keys & shard.header.keys():
                begin, end = (shard.start + offset for offset in shard.header[key]["data_offsets"])
                assert a[begin:end] != b[begin:end]
                a[begin:end] = b[begin:end] = bytes(end - begin)
        assert a == b


def test_few_files_are_open_at_once(parts, tmp_path):
    """However many tensors an adapter has: here 48 and their files, under a limit of 40 more than are open already."""
    base, _adapter, out = parts
    every = tuple(range(8))
    noisy_adapter(AutoModelForCausalLM.from_pretrained(base), ExpertConfig({1: every, 2: every}), tmp_path / "all")
    assert len(tensors_of(tmp_path / "all")) == 48
    used = len(list(Path("/dev/fd").iterdir()))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, hard))
    try:
        script.merge_adapter(base, [tmp_path / "all"], out)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert_same_tensors(
        {key: tensors_of(out)[key] for key in tensors_of(tmp_path / "all")}, tensors_of(tmp_path / "all")
    )


MEASURE = r"""
import re, sys
from pathlib import Path
from scripts.merge_adapter import merge_adapter

def peak(name, held=0):
    data = bytes([1]) * held
    merge_adapter(folder / name, [folder / f"{name}-adapter"], folder / f"{name}-{held}-out")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

folder, size = Path(sys.argv[1]), int(sys.argv[2])
print(peak("small"), peak("large"), peak("small", held=size))
"""


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_peak_memory_is_a_fraction_of_a_shard(parts, tmp_path):
    """Bytes that one process has resident at most, after a merge of a few KB, one of shards of some 55 MB, and one that
    holds as much as a shard in memory, which the measure has to see. The adapter has 17 MB, an expert 0.8 MB."""
    parts[0].rename(tmp_path / "small")
    parts[1].rename(tmp_path / "small-adapter")
    large = {"hidden_size": 256, "moe_intermediate_size": 256, "n_routed_experts": 32, "num_hidden_layers": 8}
    model = make_model(**large)
    model.save_pretrained(tmp_path / "large", max_shard_size="60MB")
    noisy_adapter(model, ExpertConfig({layer: (0, 5, 9) for layer in range(1, 8)}), tmp_path / "large-adapter")
    sizes = [path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors")]
    assert len(sizes) >= 3 and max(sizes) > 50e6
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(max(sizes))]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ, cwd=ROOT)
    least, peak, held = map(int, done.stdout.split())
    print(f"{len(sizes)} shards, the largest of {max(sizes) / 1e6:.1f} MB: {(peak - least) / 1e6:.1f} MB at most")
    assert peak - least < 0.2 * max(sizes)
    assert held - peak > 0.6 * max(sizes)


def test_a_layout_that_is_none_of_the_known_is_refused_by_name(parts, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "SELECTS", ())
    with pytest.raises(ValueError, match=r"cannot find down_proj.weight of model.layers.1.mlp.experts"):
        merge_parts(parts)
    assert not parts[2].exists()


@pytest.mark.parametrize("config", [{"eos_token_id": 7, "top_k": 3}, {"eos_token_id": [7, 9]}, None])
def test_generation_stops_at_what_training_taught(config, parts):
    """The merge's generation config names the end of answers. The unmerge gives back what the base has."""
    base, adapter, out = parts
    path = base / "generation_config.json"
    path.unlink(missing_ok=True)
    if config:
        write_json(path, config)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    write_json(adapter / "run.json", {"end_token_ids": [7, 11]})
    merge_parts(parts)
    merged = read_json(out / path.name)
    assert {7, 11} <= set(merged["eos_token_id"])
    kept = {key: value for key, value in (config or {}).items() if key != "eos_token_id"}
    assert kept.items() <= merged.items()  # what else the base's file says is still there
    assert GenerationConfig.from_pretrained(out).eos_token_id == merged["eos_token_id"]
    script.unmerge(out, out.with_name("again"))
    assert {path.name: path.read_bytes() for path in out.with_name("again").iterdir()} == before


def test_a_generation_config_that_names_the_end_stays_as_it_is(parts):
    base, adapter, out = parts
    path = base / "generation_config.json"
    path.write_text('{"eos_token_id":[11,7]}')
    write_json(adapter / "run.json", {"end_token_ids": [7]})
    merge_parts(parts)
    assert (out / path.name).read_bytes() == path.read_bytes()
