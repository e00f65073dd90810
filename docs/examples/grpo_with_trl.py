"""Reinforce what earns a reward (GRPO), on selected experts, with TRL's GRPOTrainer.

The model answers each question several times, and answers with more reward become more likely. There is no reference.

pip install trl
python docs/examples/score_and_select.py
python docs/examples/grpo_with_trl.py
"""

import itertools
import json

from trl import GRPOConfig, GRPOTrainer

from datasets import Dataset
from esft import ExpertConfig, load_base_model, save_adapter, to_esft


def reward(prompts: list[list[dict]], completions: list[list[dict]], **_) -> list[float]:
    """Return for each answer how many words of its question it takes up (up to 8 of them, which earn 1)."""
    shared = [set(q[-1]["content"].split()) & set(a[0]["content"].split()) for q, a in zip(prompts, completions)]
    return [min(1.0, len(words) / 8) for words in shared]


def main(
    base: str = "results/models/tiny",
    data: str = "datasets/train/law.jsonl",
    experts: str = "results/runs/examples/law/experts.json",
    output: str = "results/runs/examples/adapter_of_grpo",
    num_steps: int = 30,
    batch_size: int = 32,
) -> list[dict]:
    model, tokenizer = load_base_model(base)
    to_esft(model, ExpertConfig.load(experts))
    with open(data) as file:
        rows = [{"prompt": json.loads(line)["messages"][:1]} for line in itertools.islice(file, 500)]

    args = GRPOConfig(
        output_dir=output,
        max_steps=num_steps,
        per_device_train_batch_size=batch_size,
        num_generations=8,  # answers to each question
        max_completion_length=32,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        router_aux_loss_coef=0.0,  # TRL adds it for MoE models; with frozen routers it only pulls at the experts
        gradient_checkpointing=False,
        bf16=False,  # the model is in bf16 already; autocast would round the routers
        logging_steps=1,
        save_strategy="no",
    )
    trainer = GRPOTrainer(model, reward, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    save_adapter(model, output)
    return [entry for entry in trainer.state.log_history if "reward" in entry]


if __name__ == "__main__":
    main()
