"""The commands of the authors' repository run here as they stand. Their flags are quoted; some values are smaller."""

import json
import os
import shutil

import pytest
import yaml

import eval_multigpu
import train
from esft import ExpertConfig
from scripts.expert import generate_expert_config, get_expert_scores
from tests.helpers import ROOT

MODEL = ROOT / "results" / "models" / "tiny"
TASKS = ("intent", "summary", "law", "translation")
CONFIG = {  # every key of its configs/base.yaml
    **{"seed": 5934875, "seq_length": 256, "per_device_batch_size": 1, "n_device": 8, "optim": "adamw_torch_fused"},
    **{"steps": 1, "learning_rate": 0.00001, "weight_decay": 0.1, "warmup_steps": 0, "logging_steps": 10},
    **{"adam_beta1": 0.9, "adam_beta2": 0.95, "random_concat_ratio": 0.2, "eval_steps": 1, "save_steps": 1},
    **{"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0, "ep_size": 2},
}
SCORE = """--eval_dataset=translation --base_model_path={model} --output_dir=results/expert_scores/translation
    --n_sample_tokens=1024 --world_size=4 --gpus_per_rank=2"""
SELECT = """--eval_datasets=intent,summary,law,translation --expert_scores_dir=results/expert_scores
    --output_dir=results/expert_configs --score_function=token --top_p=0.2"""
TRAIN = """--base_model_path={model} --expert_config=results/expert_configs/translation.json
    --train_dataset=translation --train_config=configs/base.yaml --output_dir=all_models/adapters/token/translation
    --wandb_api_key=s3cret"""
EVALUATE_ONE = """--eval_dataset=translation --base_model_path={model}
    --adapter_dir=all_models/adapters/token/translation --output_path=results/completions/one/translation.jsonl
    --openai_api_key=s3cret"""
EVALUATE = """--eval_datasets=intent,summary,law,translation --base_model_path={model}
    --adapter_dir=all_models/adapters/token --output_dir=results/completions/token --max_new_tokens=4
    --openai_api_key=s3cret --eval_batch_size=2 --world_size=1 --gpus_per_rank=2"""


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Run a command on the tiny model and the CPU, in an empty folder. On a CPU bfloat16 would be slow."""
    monkeypatch.chdir(tmp_path)
    for key in ("OPENAI_API_KEY", "WANDB_API_KEY"):
        monkeypatch.setenv(key, "old")  # restored after the test

    def call(module, words: str, *more: str):
        return module.main([*words.format(model=MODEL).split(), "--device=cpu", "--dtype=float32", *more])

    return call


def test_the_released_commands_run_one_after_the_other(call, tmp_path, capsys):
    call(get_expert_scores, SCORE)
    for task in TASKS[:3]:
        shutil.copytree("results/expert_scores/translation", f"results/expert_scores/{task}")
    generate_expert_config.main(SELECT.split())
    configs = [ExpertConfig.load(f"results/expert_configs/{task}.json") for task in TASKS]
    assert all(config == configs[0] for config in configs) and configs[0].experts.keys() == {1, 2, 3, 4}

    os.mkdir("configs")
    with open("configs/base.yaml", "w") as file:
        yaml.safe_dump(CONFIG, file)
    capsys.readouterr()
    results = call(train, TRAIN, "n_train_samples=100")
    assert results["steps"] == 1 and os.environ["WANDB_API_KEY"] == "s3cret"
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(told) == 4 and all(
        any(word in line for line in told) for word in ("ep_size", "n_device", "wandb", "random")
    )

    for task in TASKS[:3]:
        shutil.copytree("all_models/adapters/token/translation", f"all_models/adapters/token/{task}")
    (one,) = call(eval_multigpu, EVALUATE_ONE, "--n_samples=2", "--max_new_tokens=4")
    summaries = call(eval_multigpu, EVALUATE, "--n_samples=2")
    assert [summary["dataset"] for summary in summaries] == list(TASKS)
    assert summaries[3]["mean"] == one["mean"] and os.environ["OPENAI_API_KEY"] == "s3cret"
    for task in TASKS:
        lines = (tmp_path / "results" / "completions" / "token" / f"{task}.jsonl").read_text().splitlines()
        assert len(lines) == 2 and {"example", "score"} <= json.loads(lines[0]).keys()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20 and not [path for path in written if b"s3cret" in path.read_bytes()]
