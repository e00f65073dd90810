"""Families of models through the programs of others: TRL trains the chosen experts, and lm-eval finds them again."""

import pytest
import torch

import datasets
import esft
from tests.client_helpers import chosen, moved, state_of
from tests.helpers import make_model

pytestmark = [pytest.mark.clients, pytest.mark.slow]
EXPERTS = {"experts": {"1": [5, 2, 0], "2": [7, 3, 4]}}
TEXTS = [f"what is it? it is {number}, yes" for number in range(16)]
FAMILIES = ["qwen3_moe", "olmoe", "mixtral", "gpt_oss", "deepseek_v3"]


def train(model, tokenizer, folder) -> list[float]:
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        max_length=64,
        router_aux_loss_coef=0.0,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
    )
    rows = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def evaluate(model, tokenizer, folder) -> dict:
    """What lm-eval says of a model: its choices, and the likelihoods of all answers."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [{"text": text[:-3], "choices": ["yes", "no."], "label": number % 2} for number, text in enumerate(TEXTS)]
    datasets.Dataset.from_list(rows).to_json(folder / "rows.jsonl")
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
    }
    task |= {"test_split": "test", "output_type": "multiple_choice", "doc_to_text": "text", "doc_to_target": "label"}
    lm = HFLM(model, tokenizer=tokenizer, batch_size=4, softmax_dtype="float32", trust_remote_code=False)
    found = simple_evaluate(
        lm, tasks=[task | {"doc_to_choice": "choices"}], task_manager=TaskManager(include_defaults=False)
    )
    likelihoods = [answer for sample in found["samples"]["mine"] for answer in sample["filtered_resps"]]
    return {"acc": found["results"]["mine"]["acc,none"], "likelihoods": likelihoods}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_trained_by_trl_and_found_again_by_lm_eval(family, tmp_path, tiny_tokenizer):
    for library in ("trl", "lm_eval"):
        pytest.importorskip(library)
    model = make_model(family)
    before = state_of(model)
    losses = train(esft.to_esft(model, EXPERTS), tiny_tokenizer, tmp_path)
    assert losses[-1] < 0.95 * losses[0]
    after = state_of(model)
    assert moved(before, after) <= chosen(EXPERTS) and len(moved(before, after)) >= 5  # one may get no token

    esft.save_adapter(model, tmp_path / "adapter")
    fresh = esft.add_adapter(make_model(family), tmp_path / "adapter")
    ids = torch.arange(3, 35).reshape(2, 16)
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, model.eval()(ids).logits)
    base = evaluate(make_model(family), tiny_tokenizer, tmp_path)
    adapted = evaluate(fresh, tiny_tokenizer, tmp_path)
    esft.merge(fresh).save_pretrained(tmp_path / "merged")
    merged = type(fresh).from_pretrained(tmp_path / "merged")
    assert evaluate(merged, tiny_tokenizer, tmp_path) == adapted != base
    assert moved(after, merged.state_dict()) == set()
