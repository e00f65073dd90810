"""Train the selected experts with accelerate, on one process or several: the losses are the same.

pip install accelerate
python docs/examples/score_and_select.py
python docs/examples/train_with_accelerate.py
torchrun --nproc-per-node=2 docs/examples/train_with_accelerate.py     # or `accelerate launch`, on GPUs
"""

import itertools
import json

import torch
from accelerate import Accelerator

from esft import ExpertConfig, load_base_model, save_adapter, to_esft


def read_sample(line: str, tokenizer) -> dict[str, torch.Tensor]:
    """Return one sample as tensors. Only the answer carries loss (a label of -100 carries none)."""
    messages = json.loads(line)["messages"]
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    input_ids = torch.tensor(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])
    return {"input_ids": input_ids, "labels": torch.cat([torch.full((len(prompt),), -100), input_ids[len(prompt) :]])}


def main(
    base: str = "results/models/tiny",
    data: str = "datasets/train/law.jsonl",
    experts: str = "results/runs/examples/law/experts.json",
    output: str = "results/runs/examples/adapter_of_accelerate",
    num_steps: int = 100,
    batch_size: int = 4,  # of all processes together
) -> list[float]:
    accelerator = Accelerator()
    accelerator.gradient_accumulation_steps = batch_size // accelerator.num_processes
    model, tokenizer = load_base_model(base, dtype="float32")
    to_esft(model, ExpertConfig.load(experts)).train()  # before `prepare`
    with open(data) as file:
        samples = [read_sample(line, tokenizer) for line in itertools.islice(file, num_steps * batch_size)]
    loader = torch.utils.data.DataLoader(samples)  # one by one, so every sample counts the same
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    losses = []
    for sample in loader:
        with accelerator.accumulate(model):
            loss = model(**sample).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses += accelerator.gather(loss.detach().reshape(1)).tolist()
    if accelerator.is_main_process:
        save_adapter(model, output)
    return torch.tensor(losses).reshape(num_steps, batch_size).mean(dim=1).tolist()


if __name__ == "__main__":
    main()
