"""Prefer one answer to another (DPO), on selected experts, with TRL's DPOTrainer.

A row holds a prompt, the chosen answer, and the rejected one. The reference of DPO is the base: the same model with the
base's values put in for a moment. So no second model is held.

pip install trl
python docs/examples/score_and_select.py
python docs/examples/dpo_with_trl.py
"""

import itertools
import json

from trl import DPOConfig, DPOTrainer

from datasets import Dataset
from esft import ExpertConfig, ReferenceModel, load_base_model, save_adapter, to_esft


def main(
    base: str = "results/models/tiny",
    data: str = "datasets/train/law.jsonl",
    experts: str = "results/runs/examples/law/experts.json",
    output: str = "results/runs/examples/adapter_of_dpo",
    num_steps: int = 20,
    batch_size: int = 4,
) -> list[float]:
    model, tokenizer = load_base_model(base)
    to_esft(model, ExpertConfig.load(experts))

    with open(data) as file:
        pairs = [json.loads(line)["messages"] for line in itertools.islice(file, num_steps * batch_size)]
    rejected = [{"role": "assistant", "content": "I cannot tell."}]  # your own data has better ones
    rows = [{"prompt": pair[:1], "chosen": pair[1:], "rejected": rejected} for pair in pairs]

    args = DPOConfig(
        output_dir=output,
        max_steps=num_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=5e-4,
        max_length=256,
        router_aux_loss_coef=0.0,  # the routers are frozen
        gradient_checkpointing=False,
        bf16=False,  # the model is in bf16 already; autocast would round the routers
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    dataset = Dataset.from_list(rows)
    trainer = DPOTrainer(model, ReferenceModel(model), args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    save_adapter(model, output)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
