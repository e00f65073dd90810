"""Find the experts that a task uses: score them on samples of the task, select the best, save both files.

python docs/examples/score_and_select.py
"""

import itertools
import json
from pathlib import Path

import torch

from esft import ExpertConfig, ExpertScores, RouterCapture, load_base_model, select_experts


def main(
    base: str = "results/models/tiny",
    data: str = "datasets/train/law.jsonl",
    output: str = "results/runs/examples/law",
    num_samples: int = 64,
) -> ExpertConfig:
    model, tokenizer = load_base_model(base, dtype="float32")
    with open(data) as file:
        samples = [json.loads(line)["messages"] for line in itertools.islice(file, num_samples)]

    with RouterCapture(model) as capture, torch.no_grad():  # hooks count where the tokens go
        for messages in samples:
            model(**tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True))
    scores = ExpertScores.from_counts(capture.counts(), dataset=data)
    config = select_experts(scores, score_function="token", top_p=0.2)

    for layer, experts in config.experts.items():
        share = sum(scores["token"][layer][expert] for expert in experts)
        print(f"layer {layer}: experts {list(experts)} take {share:.0%} of the routed tokens")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    scores.save(folder / "summary.json")
    (folder / "experts.json").write_text(json.dumps(config.to_dict(), indent=2))
    return config


if __name__ == "__main__":
    main()
