"""Train the selected experts in a loop of your own, and save the adapter.

python docs/examples/score_and_select.py
python docs/examples/train_with_a_plain_loop.py
"""

import itertools
import json

import torch

from esft import ExpertConfig, load_base_model, save_adapter, to_esft


def read_sample(line: str, tokenizer) -> dict[str, torch.Tensor]:
    """Return one sample as tensors of batch size 1. Only the answer carries loss (a label of -100 carries none)."""
    messages = json.loads(line)["messages"]
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    input_ids = torch.tensor([tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]])
    labels = input_ids.clone()
    labels[:, : len(prompt)] = -100
    return {"input_ids": input_ids, "labels": labels}


def main(
    base: str = "results/models/tiny",
    data: str = "datasets/train/law.jsonl",
    experts: str = "results/runs/examples/law/experts.json",
    output: str = "results/runs/examples/adapter",
    num_steps: int = 100,
    batch_size: int = 4,
) -> list[float]:
    torch.manual_seed(0)
    model, tokenizer = load_base_model(base, dtype="float32")
    to_esft(model, ExpertConfig.load(experts))  # these experts have a gradient now, and nothing else
    trained = [param for param in model.parameters() if param.requires_grad]
    print(f"{sum(param.numel() for param in trained):,} trained parameters")

    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
    losses = []
    with open(data) as file:
        samples = [read_sample(line, tokenizer) for line in itertools.islice(file, num_steps * batch_size)]
    model.train()
    for step in range(num_steps):
        batch = samples[step * batch_size : (step + 1) * batch_size]
        loss = sum(model(**sample).loss for sample in batch) / batch_size
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}")
    save_adapter(model, output)
    return losses


if __name__ == "__main__":
    main()
