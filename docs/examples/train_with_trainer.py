"""Train the selected experts with the Trainer of transformers, and save the adapter.

python docs/examples/score_and_select.py
python docs/examples/train_with_trainer.py
"""

import itertools
import json

from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from esft import ExpertConfig, load_base_model, save_adapter, to_esft


def main(
    base: str = "results/models/tiny",
    data: str = "datasets/train/law.jsonl",
    experts: str = "results/runs/examples/law/experts.json",
    output: str = "results/runs/examples/adapter_of_trainer",
    num_steps: int = 100,
    batch_size: int = 4,
) -> list[float]:
    model, tokenizer = load_base_model(base, dtype="float32")
    to_esft(model, ExpertConfig.load(experts))  # Trainer optimizes what requires a gradient: these experts

    samples = []
    with open(data) as file:
        for line in itertools.islice(file, num_steps * batch_size):
            messages = json.loads(line)["messages"]
            input_ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
            prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)
            ignored = len(prompt["input_ids"])
            samples.append({"input_ids": input_ids, "labels": [-100] * ignored + input_ids[ignored:]})

    args = TrainingArguments(
        output_dir=output,
        max_steps=num_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=2e-3,
        logging_steps=10,
        save_strategy="no",
        disable_tqdm=True,
    )
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    trainer = Trainer(model=model, args=args, train_dataset=samples, data_collator=collator)
    trainer.train()
    save_adapter(trainer.model, output)  # a few percent of the model; trainer.save_model() would write all of it
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
