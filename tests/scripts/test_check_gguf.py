"""scripts/check_gguf.py and export_gguf.sh: every expert matrix of a GGUF file is exact, or the file is refused."""

import os
import subprocess
import sys

import pytest
import torch

from deepseek.experts import moe_layers
from scripts import check_gguf as script
from tests.helpers import make_model, refused
from utils import ROOT

gguf = pytest.importorskip("gguf")

TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
UP = "blk.1.ffn_up_exps.weight"


def stacked(model) -> dict[str, torch.Tensor]:
    """The experts of a model as llama.cpp names and stacks them: (E, F, D) and (E, D, F), biases (E, F) and (E, D)."""
    found = {}
    for layer in moe_layers(model).values():
        views = [layer.expert_views(expert) for expert in range(layer.num_experts)]
        for projection in views[0]:
            name, kind = projection.split("_proj.")
            found[f"blk.{layer.index}.ffn_{name}_exps.{kind}"] = torch.stack([one[projection] for one in views])
    return found


def write_gguf(path, tensors, kind=None):
    """Write tensors in their own dtype, or as the type `kind`."""
    writer = gguf.GGUFWriter(path, "deepseek2")
    for name, tensor in tensors.items():
        form = gguf.GGMLQuantizationType[kind or TYPES[tensor.dtype]]
        data = gguf.quants.quantize(tensor.float().numpy(), form)
        writer.add_tensor(name, data, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def made(tmp_path):
    """(checkpoint in bf16, its experts by their names in a GGUF file, the path of a GGUF file to write)."""
    model = make_model(dtype=torch.bfloat16)
    moe_layers(model)[1].expert_views(4)["up_proj.weight"][0, 0] = 0.0
    model.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    return tmp_path / "model", stacked(model), tmp_path / "m.gguf"


@pytest.mark.parametrize(
    ("family", "dtype", "matrices"),
    [
        ("deepseek_v2", torch.bfloat16, 2 * 8 * 3),
        ("mixtral", torch.float16, 3 * 8 * 3),
        ("gpt_oss", torch.float32, 3 * 8 * 3 * 2),  # and biases
        ("nemotron_h", torch.bfloat16, 2 * 8 * 2),
    ],
)
def test_all_experts_are_compared(family, dtype, matrices, tmp_path, capsys):
    model = make_model(family, dtype=dtype)
    model.save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "m.gguf", stacked(model))
    words = [f"--model={tmp_path / 'model'}"]
    script.main([*words, f"--gguf={tmp_path / 'm.gguf'}"])
    assert capsys.readouterr().out == f"all {matrices} matrices of experts are exact, in {TYPES[dtype]}\n"
    script.main(words)
    assert capsys.readouterr().out == f"{TYPES[dtype].lower()}\n"


def test_a_wider_type_is_exact_and_a_narrower_one_is_not(made):
    model, experts, path = made
    write_gguf(path, experts, "F32")
    assert script.check_experts(model, path) == {"F32": 48}
    write_gguf(path, experts, "F16")  # bf16 has more exponents
    with pytest.raises(ValueError, match=r"m\.gguf: expert 0 of .* Convert it again with --outtype=bf16"):
        experts[UP][0, 0, 0] = 1e-30
        write_gguf(path, {**experts, UP: experts[UP]}, "F16")
        script.check_experts(model, path)


def flip_a_bit(experts):
    experts[UP].view(torch.int16)[5, 3, 2] ^= 1


def swap_two_experts(experts):
    experts[UP][[2, 6]] = experts[UP][[6, 2]].clone()


def negative_zero(experts):
    """The number is equal, and its bits are not."""
    experts[UP][4, 0, 0] = -0.0


@pytest.mark.parametrize(
    ("change", "expert", "more"), [(flip_a_bit, 5, 0), (swap_two_experts, 2, 1), (negative_zero, 4, 0)]
)
def test_one_wrong_expert_is_named(change, expert, more, made, capsys):
    model, experts, path = made
    change(experts)
    write_gguf(path, experts)
    words = f"expert {expert} of {UP} has other numbers", f"so have {more} more of 48 matrices"
    refused(capsys, script.main, [f"--model={model}", f"--gguf={path}"], *words)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda made: write_gguf(made[2], {k: v for k, v in made[1].items() if k != UP}), f"it has no {UP}"),
        (lambda made: write_gguf(made[2], {**made[1], UP: made[1][UP][:4]}), rf"{UP} is BF16 of shape \(4, 16, 64\)"),
        (lambda made: write_gguf(made[2], made[1], "Q8_0"), r"is quantized \(Q8_0\)"),
        (lambda made: made[2].write_bytes(b"GGUF" + b"\xff" * 64), "cannot use .*m.gguf"),
        (lambda made: None, "no such file"),
    ],
)
def test_a_file_that_cannot_be_compared(spoil, message, made):
    model, experts, path = made
    if message.startswith("is quantized"):
        made[1].update({name: torch.zeros(8, 32, 32) for name in experts})  # a width that Q8_0 takes
    spoil(made)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        script.check_experts(model, path)


def test_without_the_package_nothing_is_compared(made, monkeypatch, capsys):
    model, experts, path = made
    write_gguf(path, experts)
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(capsys, script.main, [f"--model={model}", f"--gguf={path}"], "cannot import gguf", ".[gguf]")


# ------------------------------------------------------------------------------------------------------ export_gguf.sh


def export(*words, llama_cpp="") -> subprocess.CompletedProcess:
    env = {**os.environ, "ESFT_PYTHON": sys.executable, "LLAMA_CPP": str(llama_cpp), "OMP_NUM_THREADS": "1"}
    command = ["bash", ROOT / "scripts" / "export_gguf.sh", *words]
    return subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=300)


def test_what_cannot_be_converted_is_refused_at_once(tmp_path):
    (tmp_path / "convert_hf_to_gguf.py").touch()
    (tmp_path / "there.gguf").write_bytes(b"mine")
    for words, llama_cpp, message in [
        (["m"], tmp_path, "MODEL and OUT.gguf are missing"),
        (["m", tmp_path / "o.gguf"], "", "LLAMA_CPP is not set"),
        (["m", tmp_path / "o.gguf"], tmp_path / "x", f"there is no {tmp_path}/x/convert_hf_to_gguf.py"),
        (["m", tmp_path / "there.gguf"], tmp_path, "there.gguf is there already"),
    ]:
        done = export(*words, llama_cpp=llama_cpp)
        assert done.returncode == 2 and done.stderr.startswith("error: cannot convert: "), done
        assert message in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "there.gguf").read_bytes() == b"mine" and not (tmp_path / "o.gguf").exists()


CONVERTER = """
import shutil, sys
assert sys.argv[1].endswith("model") and sys.argv[2] == "--outfile" and sys.argv[4:] == ["--outtype", "bf16", "--x"]
shutil.copy({source!r}, sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [False, True])
def test_a_file_is_written_only_if_it_is_exact(damaged, made, tmp_path):
    """A converter that writes a file made before stands in for llama.cpp's."""
    model, experts, path = made
    if damaged:
        flip_a_bit(experts)
    write_gguf(path, experts)
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py").write_text(CONVERTER.format(source=str(path)))
    done = export(model, tmp_path / "out" / "o.gguf", "--x", llama_cpp=tmp_path / "llama.cpp")
    left = [file.name for file in (tmp_path / "out").iterdir()]
    if damaged:
        assert done.returncode == 2 and f"expert 5 of {UP}" in done.stderr and left == []
    else:
        assert done.returncode == 0 and "all 48 matrices of experts are exact, in BF16" in done.stdout
        assert left == ["o.gguf"] and (tmp_path / "out" / "o.gguf").read_bytes() == path.read_bytes()


def test_numbers_are_compared_by_their_bits():
    one = torch.tensor([1.0, float("inf"), 0.0])
    assert script.same_numbers(one, one.clone()) and script.same_numbers(one, one.bfloat16())
    assert not script.same_numbers(one, torch.tensor([1.0, float("inf"), -0.0]))
    assert not script.same_numbers(torch.tensor([1.0]).half(), torch.tensor([1.0 + 2**-20]))
