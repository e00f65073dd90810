"""What a run is refused for, before long work begins and before any file is changed."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from deepseek.files import write_json
from deepseek.shards import WEIGHTS
from esft import ExpertConfig
from tests.helpers import EXPERTS, arguments, fails, make_model, noisy_adapter, tensors_of

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
    folder.joinpath("twice.yaml").write_text("seed: 1\nlr: 1e-3\nseed: 2\n")
    folder.joinpath("inner.yaml").write_text("lr_scheduler_kwargs: {min_lr: 1, min_lr: 2}\n")
    folder.joinpath("alias.yaml").write_text("lr_scheduler_kwargs: &a {x: 1}\noptim_args: *a\n")
    folder.joinpath("deep.yaml").write_text("{a: " * 3000)
    folder.joinpath("deep.json").write_text("[" * 200_000)
    folder.joinpath("deep.jsonl").write_text(f"{good}\n{'[' * 200_000}\n")
    folder.joinpath("huge.jsonl").write_text(f'{good}\n{{"messages": {"9" * 5000}}}\n')
    for name in ("pipe.yaml", "pipe.jsonl"):
        os.mkfifo(folder / name)
    folder.joinpath("link.yaml").symlink_to("nothing")
    folder.joinpath("loop").symlink_to("loop")
    changes = {"many": {"num_experts_per_tok": 9}, "none_routed": {"num_experts_per_tok": 0}}
    changes |= {"tall": {"num_hidden_layers": 10**6}, "wide": {"n_routed_experts": 10**9}, "piped": {}}
    changes |= {"routing": {"topk_method": "null"}, "dropping": {"attention_dropout": 7.0}}
    templates = {"dividing": "{{ 1 / 0 }}", "counting": "{{ range(9 ** 9) }}"}
    templates |= {"recursing": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"}
    for name in changes | templates:
        shutil.copytree(files / "m32", folder / name)
        config = json.loads((files / "m32" / "config.json").read_text())
        write_json(folder / name / "config.json", config | changes.get(name, {}))
        if name in templates:
            (folder / name / "chat_template.jinja").write_text(templates[name])
    (folder / "piped" / "tokenizer_config.json").unlink()
    os.mkfifo(folder / "piped" / "tokenizer_config.json")
    write_json(folder / "layer9.json", {"experts": {"9": [1]}})
    write_json(folder / "expert8.json", {"experts": {"1": [8]}})
    write_json(folder / "shared.json", {"experts": {"1": []}, "shared_experts": True})
    make_model("qwen3_moe").save_pretrained(folder / "qwen")
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL, **HEADS))
    dense.save_pretrained(folder / "dense")
    for path in [*files.joinpath("m32").glob("*token*"), files / "m32" / "chat_template.jinja"]:
        shutil.copy(path, folder / "dense")
        shutil.copy(path, folder / "qwen")
    shutil.copytree(files / "m32", folder / "bare", ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    shutil.copytree(files / "m32", folder / "fp8")
    config = json.loads((folder / "fp8" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    write_json(folder / "fp8" / "config.json", config)
    tensors = tensors_of(folder / "fp8")
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
    ({"expert_config": "shared.json", "base_model_path": "qwen"}, "names shared experts, and this model has none"),
    ({"expert_config": "shared.json", "base_model_path": "qwen", "method": "random"}, "nothing would be trained"),
    ({"expert_config": None, "method": "random"}, "needs --expert_config"),
    ({"eval_steps": 2, "validation_fraction": 0}, "needs a validation set"),
    ({"load_best_model_at_end": True, "save_steps": 3}, "not a round multiple"),
    ({"learning_rate": -1}, "Invalid learning rate"),
    ({"adam_beta1": 2}, "Invalid beta parameter"),
    ({"optim": "lomo"}, "optim=lomo does not train fused experts"),
    ({"optim": "ademamix", "save_opt_states": True}, "state1 cannot be split by expert"),
    ({"learning_rate": "nan"}, "learning_rate=nan is not a finite number"),
    ({"learning_rate": "1e400"}, "learning_rate=inf is not a finite number"),
    ({"seq_length": 10**23}, "seq_length=1000.*is not a finite number below"),
    ({"save_steps": "nan"}, "save_steps=nan is not a finite number"),
    ({"max_grad_norm": "-inf"}, "max_grad_norm=-inf is not a finite number"),
    ({"ddp_timeout": 10**12}, "ddp_timeout=1000.*is not a finite number below"),
    ({"seed": -1}, "seed=-1 is below 0"),
    ({"adam_beta1": -1}, "Invalid beta parameter"),
    ({"dataloader_num_workers": -1}, "num_workers"),
    ({"dataloader_prefetch_factor": 2}, "prefetch_factor"),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"power": "x"}'}, "unsupported operand"),
    ({"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": '{"timescale": -1}'}, "division by zero"),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"power": ' + "[" * 9999}, "lr_scheduler_kwargs="),
    ({"parallelism_config": 3}, "parallelism_config"),
    ({"expert_scores_dir": "nowhere"}, "expert_scores_dir=nowhere is not there"),
    ({"train_config": "twice.yaml"}, r"twice.yaml: .* \(the key 'seed' is there twice\)"),
    ({"train_config": "inner.yaml"}, r"inner.yaml: .* \(the key 'min_lr' is there twice\)"),
    ({"train_config": "alias.yaml"}, r"alias.yaml: .* \(\*a stands for another value"),
    ({"train_config": "deep.yaml"}, r"deep.yaml: .*recursion"),
    ({"train_config": "pipe.yaml"}, r"cannot read .*pipe.yaml: it is not a file, but a pipe"),
    (
        {"train_config": "link.yaml"},
        r"cannot read .*link.yaml: no such file \(.*link.yaml is a link that leads nowhere",
    ),
    ({"train_config": "layer9.json/x"}, r"cannot read .*layer9.json/x"),
    ({"train_dataset": "pipe.jsonl"}, r"cannot find data set .*pipe.jsonl' \(it is a pipe or a device\)"),
    ({"train_dataset": "deep.jsonl"}, r"deep.jsonl:2: not valid JSON \(.*recursion"),
    ({"train_dataset": "huge.jsonl"}, r"huge.jsonl:2: not valid JSON \(Exceeds the limit"),
    ({"expert_config": "deep.json"}, r"cannot read .*deep.json: not valid JSON"),
    ({"expert_config": "pipe.yaml"}, r"cannot read .*pipe.yaml: no such expert config.* \(it is a pipe or a device\)"),
    ({"output_dir": "link.yaml"}, r"cannot write .*link.yaml: it is a link that leads nowhere"),
    ({"output_dir": "loop"}, r"cannot write .*loop: it is a link that leads nowhere"),
    (
        {"base_model_path": "many"},
        r"cannot load model .*many': num_experts_per_tok is 9 in its config.json, not 1 to 8",
    ),
    ({"base_model_path": "none_routed"}, r"num_experts_per_tok is 0 in its config.json, not 1 to 8"),
    ({"base_model_path": "tall"}, r"num_hidden_layers is 1000000 in its config.json, not 1 to 10000"),
    ({"base_model_path": "wide"}, r"the number of experts is 1000000000 in its config.json, not 1 to 65536"),
    ({"base_model_path": "routing"}, r"cannot run model .*routing': UnboundLocalError: .* in its config.json"),
    ({"base_model_path": "dropping"}, r"cannot run model .*dropping': .*dropout probability"),
    ({"base_model_path": "piped"}, r"cannot read .*tokenizer_config.json: it is not a file, but a pipe"),
    ({"base_model_path": "dividing"}, r"data.jsonl:1: cannot use the chat template: .* \(division by zero\)"),
    ({"base_model_path": "recursing"}, r"data.jsonl:1: cannot use the chat template: .* \(maximum recursion"),
    ({"base_model_path": "counting"}, r"data.jsonl:1: cannot use the chat template: .*Range too big"),
    ({"metric_for_best_model": "eval_accuracy", "load_best_model_at_end": True}, "gives the loss alone"),
    ({"torch_compile": True}, "torch.compile would compile"),
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
    paths = ("train_dataset", "output_dir", "base_model_path", "expert_config", "train_config")
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


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_a_run_on_the_experts_of_another_adapter_is_another_run(files, start, capsys, lora_rank):
    adapter = start.folder / "adapter"
    noisy_adapter(make_model(), ExpertConfig({1: (1, 2)}), adapter, lora_rank=lora_rank)
    start(expert_config=adapter)
    shutil.rmtree(adapter)
    noisy_adapter(make_model(), ExpertConfig({1: (1, 3)}), adapter, lora_rank=lora_rank)
    message = fails(arguments(files, start.folder / "out", expert_config=adapter), capsys)
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
