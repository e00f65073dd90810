#!/usr/bin/env bash
# Run the whole method on the small model, in a few minutes on two CPU cores or a GPU: install, score, select, train,
# evaluate, merge. It compares the recipe of docs/frontier.md with full fine-tuning, on one task and on general skills,
# prints a table and draws two pictures. The recipe trains 7 % of the parameters: the shared experts, and the best 5.5 %
# of the routed ones. --methods=esft-token trains by the paper's rule instead.
# With two GPUs, the recipe trains on two expert-parallel processes (another method with METHOD:ep_size=2). A second run
# of the command only shows the table. You can add any flag of scripts/pipeline.py and any training key.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh eval,plot
processes=$("$python" -c 'import torch; print(min(2, max(1, torch.cuda.device_count())))')
exec "$python" scripts/pipeline.py --nproc_per_node="$processes" --world_size="$processes" \
    --base_model_path=results/models/tiny --train_dataset=law --train_config=configs/tiny.yaml \
    --output_dir=results/runs/quickstart --methods=esft-gradient-global-shared,full \
    --seq_length=256 --n_sample_tokens=16384 --max_new_tokens=64 --eval_batch_size=64 \
    esft-gradient-global-shared:budget=0.0552 esft-gradient-global-shared:learning_rate=1e-3 \
    esft-gradient-global-shared:ep_size="$processes" full:learning_rate=5e-4 "$@"
