"""Train attention by LoRA beside the selected experts, save both, and merge both into a plain checkpoint.

pip install trl peft
python docs/examples/score_and_select.py
python docs/examples/lora_beside_esft.py
"""

from peft import LoraConfig, PeftModel, get_peft_model
from trl import SFTConfig, SFTTrainer

from datasets import load_dataset
from esft import ESFTCallback, ExpertConfig, add_adapter, load_base_model, merge, save_adapter, to_esft


def main(
    base: str = "results/models/tiny",
    data: str = "datasets/train/law.jsonl",
    experts: str = "results/runs/examples/law/experts.json",
    output: str = "results/runs/examples/lora_beside_esft",
    num_steps: int = 100,
    batch_size: int = 4,
) -> list[float]:
    model, tokenizer = load_base_model(base)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"))
    to_esft(model, ExpertConfig.load(experts))  # last, because peft freezes all that it finds
    model.print_trainable_parameters()

    args = SFTConfig(
        output_dir=output,
        max_steps=num_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=2e-3,
        max_length=256,
        router_aux_loss_coef=0.0,  # the routers are frozen
        gradient_checkpointing=False,
        bf16=False,  # the model is in bf16 already; autocast would round the routers
        save_steps=50,  # such a checkpoint holds both
        disable_tqdm=True,
    )
    rows = load_dataset("json", data_files=data, split="train")  # "messages"
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[ESFTCallback()])
    trainer.train()
    model.save_pretrained(f"{output}/lora")
    save_adapter(model, f"{output}/experts")

    loaded = PeftModel.from_pretrained(load_base_model(base)[0], f"{output}/lora")
    add_adapter(loaded, f"{output}/experts")
    merge(loaded).merge_and_unload().save_pretrained(f"{output}/merged")
    tokenizer.save_pretrained(f"{output}/merged")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
