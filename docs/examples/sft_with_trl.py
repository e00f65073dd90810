"""Train the selected experts with TRL's SFTTrainer. Run it again after an interruption: it goes on exactly.

pip install trl
python docs/examples/score_and_select.py
python docs/examples/sft_with_trl.py
"""

from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from datasets import load_dataset
from esft import ESFTCallback, ExpertConfig, load_base_model, save_adapter, to_esft


def main(
    base: str = "results/models/tiny",
    data: str = "datasets/train/law.jsonl",
    experts: str = "results/runs/examples/law/experts.json",
    output: str = "results/runs/examples/adapter_of_sft",
    num_steps: int = 100,
    batch_size: int = 4,
) -> list[float]:
    model, tokenizer = load_base_model(base)
    to_esft(model, ExpertConfig.load(experts))

    rows = load_dataset("json", data_files=data, split="train")  # "messages"
    args = SFTConfig(
        output_dir=output,
        max_steps=num_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=2e-3,
        max_length=256,
        assistant_only_loss=False,  # true needs a chat template with {% generation %} marks
        router_aux_loss_coef=0.0,  # TRL adds it for MoE models; with frozen routers it only pulls at the experts
        gradient_checkpointing=False,
        bf16=False,  # the model is in bf16 already; autocast would round the routers
        save_steps=10,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[ESFTCallback()])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output))
    save_adapter(model, output)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
