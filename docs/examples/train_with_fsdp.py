"""Train the selected experts with FSDP2, torch's `fully_shard`: each process holds a part of every tensor.

python docs/examples/score_and_select.py
torchrun --nproc-per-node=2 docs/examples/train_with_fsdp.py
"""

import itertools
import json

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

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
    output: str = "results/runs/examples/adapter_of_fsdp",
    num_steps: int = 100,
    batch_size: int = 4,  # of all processes together
) -> list[float]:
    model, tokenizer = load_base_model(base, dtype="float32")
    to_esft(model, ExpertConfig.load(experts)).train()  # before `fully_shard`
    for module in (*model.model.layers, model):
        fully_shard(module)  # joins the processes, and moves the parameters to this one's GPU
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)

    losses, rank, world_size = [], dist.get_rank(), dist.get_world_size()
    with open(data) as file:
        samples = [read_sample(line, tokenizer) for line in itertools.islice(file, num_steps * batch_size)]
    for step in range(num_steps):
        batch = samples[step * batch_size : (step + 1) * batch_size][rank::world_size]
        loss = sum(model(**sample).loss for sample in batch) / len(batch)
        loss.backward()  # gradients are averaged over the processes
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total := loss.detach().clone())
        losses.append(total.item() / world_size)
    save_adapter(model, output)  # on all processes: each of them gets the whole adapter
    return losses


if __name__ == "__main__":
    main()
