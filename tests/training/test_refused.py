"""What a run is refused for, before long work begins and before any file is changed."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from deepseek.files import write_json
from deepseek.shards import WEIGHTS
from tests.helpers import EXPERTS, arguments, fails, weights

SMALL = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


def row(*turns: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


@pytest.fixture(scope="module")
def bad(files, tmp_path_factory) -> Path:
    """A folder of data sets, models and expert configs that no run can use."""
    folder = tmp_path_factory.mktemp("bad")
    good, long = (row(("user", "is it?"), ("assistant", "yes " * times)) for times in (1, 60))
    folder.joinpath("oops.jsonl").write_text(f"{good}\n{{oops\n")
    folder.joinpath("role.jsonl").write_text(good + "\n" + row(("robot", "x"), ("assistant", "y")))
    folder.joinpath("empty.jsonl").write_text(good + "\n" + row(("user", "x"), ("assistant", "")))
    folder.joinpath("long.jsonl").write_text("\n".join([good] * 6 + [long]))
    folder.joinpath("file").touch()
    write_json(folder / "layer9.json", {"experts": {"9": [1]}})
    write_json(folder / "expert8.json", {"experts": {"1": [8]}})
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL, **HEADS))
    dense.save_pretrained(folder / "dense")
    for path in [*files.joinpath("m32").glob("*token*"), files / "m32" / "chat_template.jinja"]:
        shutil.copy(path, folder / "dense")
    shutil.copytree(files / "m32", folder / "bare", ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    shutil.copytree(files / "m32", folder / "fp8")
    config = json.loads((folder / "fp8" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    write_json(folder / "fp8" / "config.json", config)
    tensors = weights(folder / "fp8")
    in_fp8 = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in tensors.items()}
    save_file(in_fp8 | {f"{key}_scale_inv": torch.ones(1) for key in tensors}, folder / "fp8" / WEIGHTS)
    return folder


WRONG = [
    ({"train_dataset": "no.jsonl"}, "cannot find data set .*no.jsonl"),
    ({"train_dataset": "oops.jsonl"}, r"oops.jsonl:2: not valid JSON"),
    ({"train_dataset": "role.jsonl"}, r"role.jsonl:2.*role"),
    ({"train_dataset": "empty.jsonl"}, r"empty.jsonl:2"),
    ({"seq_length": 8}, "more than seq_length=8"),
    ({"train_dataset": "long.jsonl", "validation_fraction": 0, "eval_steps": None}, "sample 7 has"),
    ({"output_dir": "file/out"}, "cannot write"),
    ({"base_model_path": "dense"}, "dense model"),
    ({"base_model_path": "none"}, "no such folder"),
    ({"base_model_path": "bare"}, "cannot load model|tokenizer"),
    ({"base_model_path": "fp8", "method": "full"}, "by method full: it is stored in fp8"),
    ({"expert_config": "none.json"}, "no such expert config"),
    ({"expert_config": "layer9.json"}, "of layer 9"),
    ({"expert_config": "expert8.json"}, "names expert 8 of layer 1"),
    ({"expert_config": None, "method": "random"}, "needs --expert_config"),
    ({"eval_steps": 2, "validation_fraction": 0}, "needs a validation set"),
    ({"load_best_model_at_end": True, "save_steps": 3}, "not a round multiple"),
    ({"learning_rate": -1}, "Invalid learning rate"),
    ({"adam_beta1": 2}, "Invalid beta parameter"),
    ({"optim": "lomo"}, "install `lomo_optim`"),
    ({"optim": "ademamix", "save_opt_states": True}, "state1 cannot be split by expert"),
    ({"metric_for_best_model": "eval_accuracy", "load_best_model_at_end": True}, "gives the loss alone"),
    ({"torch_compile": True}, "torch.compile cannot trace"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_steps": None}, "requires an eval strategy"),
    ({"lr_scheduler_kwargs": '{"bogus": 1}'}, "unexpected keyword argument 'bogus'"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
    ({"report_to": "nonsense"}, "report_to=nonsense is not installed"),
    ({"learning_rat": 1}, "command line: unknown key 'learning_rat'"),
    pytest.param(
        {"device": "cuda"},
        "torch sees no GPU",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
    ),
]


@pytest.mark.parametrize("changes, text", WRONG)
def test_an_error_is_one_sentence_and_leaves_nothing_behind(files, bad, tmp_path, capsys, changes, text):
    paths = ("train_dataset", "output_dir", "base_model_path", "expert_config")
    changes = {key: bad / value if key in paths and value else value for key, value in changes.items()}
    message = fails(arguments(files, tmp_path / "out", **changes), capsys)
    assert re.search(text, message), message
    assert not (tmp_path / "out").exists()


def test_a_run_on_other_contents_is_another_run(files, start, capsys):
    config = start.folder / "experts.json"
    shutil.copy(files / "experts.json", config)
    start(expert_config=config)
    write_json(config, {**EXPERTS, "experts": {"1": [1]}})
    message = fails(arguments(files, start.folder / "out", expert_config=config), capsys)
    assert "differs in the content of expert_config)" in message


def test_an_output_folder_that_is_not_this_run_is_refused_untouched(files, start, capsys):
    out = start.folder / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "does not hold a run" in fails(arguments(files, out), capsys)
    assert "does not hold a run" in fails(arguments(files, out, overwrite=True), capsys)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "changes",
    [
        {"adam_beta1": 2.0},
        {"save_steps": 3, "load_best_model_at_end": True},
        {"frozen_dtype": "fp9"},
        {"method": "full", "frozen_dtype": "fp8"},
        {"ignore_data_skip": True},
        {"train_sampling_strategy": "group_by_length"},
    ],
)
def test_what_is_refused_late_removes_nothing(files, start, whole, capsys, changes):
    shutil.copytree(whole, start.folder / "out")
    before = {path: path.stat().st_mtime_ns for path in (start.folder / "out").rglob("*")}
    assert len(fails(arguments(files, start.folder / "out", overwrite=True, **changes), capsys)) > 20
    assert before == {path: path.stat().st_mtime_ns for path in (start.folder / "out").rglob("*")}
