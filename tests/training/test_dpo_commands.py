"""What stands around a run of method dpo: scores, selection, memory, quantized experts, and other commands."""

import json

import pytest
import torch

import esft
import eval_multigpu
import train
from deepseek.files import write_json, write_jsonl
from deepseek.loading import model_of
from evaluation.expert_scoring import SampleSettings, sample_packs
from scripts import report, show_data
from tests.helpers import EXPERTS, ROOT, make_model
from training.memory import Estimator, MemorySettings

ROWS = [
    {"prompt": f"is it {i}?", "chosen": f"yes {i}, it is", "rejected": " ".join(["no"] * (1 + i % 4)), "score": i}
    for i in range(12)
]


@pytest.fixture
def prefs(tmp_path) -> dict:
    write_jsonl(tmp_path / "prefs.jsonl", ROWS)
    keys = {"method": "dpo", "train_dataset": tmp_path / "prefs.jsonl", "seq_length": 80, "eval_steps": None}
    return {**keys, "validation_fraction": 0, "save_steps": None, "max_steps": 2}


@pytest.mark.parametrize("changes", [{}, {"skip_template_tokens": True}])
def test_experts_are_scored_on_the_conversations_with_the_chosen_answers(prefs, tmp_path, tiny_tokenizer, changes):
    plain = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
    write_jsonl(tmp_path / "plain.jsonl", plain)
    found, wanted = (
        sample_packs(SampleSettings(str(tmp_path / name), seq_length=80, **changes), tiny_tokenizer)
        for name in ("prefs.jsonl", "plain.jsonl")
    )
    assert found == wanted and len(found) > 1


def test_without_an_expert_config_experts_are_scored_and_selected_first(prefs, start, monkeypatch):
    ran = []

    def run_command(words):
        flags = dict(word.removeprefix("--").split("=", 1) for word in words[1:])
        ran.append((words[0].rpartition("/")[2], flags["eval_dataset"], flags.get("strategy")))
        if "output_path" in flags:
            write_json(flags["output_path"], EXPERTS)

    monkeypatch.setattr("training.first_selection.run_command", run_command)
    with pytest.warns(UserWarning, match=r"not trained on, .*: score \(12x\)"):
        start(**prefs, expert_config=None, budget=0.1, strategy="global")
    data = str(prefs["train_dataset"])
    assert ran == [("get_expert_scores.py", data, None), ("generate_expert_config.py", data, "global")]
    assert esft.trained_config(esft.add_adapter(make_model(), start.folder / "out")).experts == {
        1: (3, 5),
        2: (0, 6, 2),
    }


@pytest.mark.slow
def test_the_preference_data_of_this_repository_are_learned(tmp_path):
    files = {"model": ROOT / "results/models/tiny", "data": ROOT / "datasets/preferences/law.jsonl"}
    keys = {"method": "dpo", "seq_length": 512, "epochs": 2, "batch_size": 1, "learning_rate": 2e-3, "device": "cpu"}
    keys |= {**files, "output_dir": tmp_path / "out", "validation_fraction": 0.1, "disable_tqdm": True}
    result = train.main([f"{key}={value}" for key, value in keys.items()])
    assert result["eval_loss"] < 0.2 and result["eval_rewards/accuracies"] > 0.9
    assert result["eval_rewards/chosen"] > 0 > result["eval_rewards/rejected"]


@pytest.mark.parametrize("keys", [{"frozen_dtype": "fp8"}, {"frozen_dtype": "int8", "offload_frozen": True}])
def test_the_reference_of_a_quantized_model_is_that_model(prefs, start, keys):
    result = start(**prefs, **keys, verify_frozen=True, batch_size=12)
    history = json.loads((start.folder / "out" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["rewards/margins"] == 0 < history[1]["rewards/margins"] and result["frozen_verified"]


def test_a_run_is_evaluated_and_reported_as_any_other(prefs, start, capsys):
    keys = {"validation_fraction": 0.25, "eval_steps": 1}
    start(**{**prefs, **keys})
    out = start.folder / "out"
    eval_multigpu.main([f"--model={out}", "--max_new_tokens=2", "--device=cpu"])
    asked = [json.loads(line)["prompt"] for line in (out / "held_out.jsonl").read_text().splitlines()]
    assert len(asked) == 3 and set(asked) < {row["prompt"] for row in ROWS}
    report.main([str(out)])
    assert "dpo" in (out / "report.html").read_text()


def test_both_answers_of_a_pair_are_shown(prefs, files, capsys):
    with pytest.warns(UserWarning, match=r"score \(12x\)"):
        show_data.main([str(prefs["train_dataset"]), f"--model={files / 'm32'}", "--n_samples=1", "--seq_length=32"])
    told = capsys.readouterr().out
    assert "prefs.jsonl:1, chosen: " in told and "prefs.jsonl:1, rejected: " in told and "jsonl:2" not in told
    assert "Assistant:⟦ yes 0, it is<eos>⟧" in told and "Assistant:⟦ no<eos>⟧" in told
    assert "12 pairs, " in told and "longer than seq_length 32: 12" in told


def test_memory_is_that_of_esft_with_the_base_s_rows_and_the_trained_values_once_more(files):
    empty = model_of(make_model().config)
    config = esft.ExpertConfig.from_dict({**EXPERTS, "shared_experts": True})
    trained = sum(view.numel() for view in esft.adapter_views(make_model(), config).values())
    for device, dtype in (("cuda", "bfloat16"), ("cpu", "float32")):
        of_esft, of_dpo = (Estimator(empty, method, config) for method in ("esft", "dpo"))
        s = MemorySettings(seq_length=64, dtype=dtype, device=device)
        one, other = of_esft.estimate(s), of_dpo.estimate(s)
        base = trained * getattr(torch, dtype).itemsize
        assert other.host - one.host == (base if device == "cuda" else 0)
        assert other.experts - one.experts == (0 if device == "cuda" else base)
        assert other.transient - one.transient == max(0, 4 * trained - one.activations)
        short = MemorySettings(seq_length=2, dtype=dtype, device=device, activation_checkpointing=True)
        one, other = of_esft.estimate(short), of_dpo.estimate(short)
        assert other.transient - one.transient == 4 * trained - one.activations > 0
