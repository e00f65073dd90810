#!/usr/bin/env bash
# From a task's data to an adapter: score the experts, select some, train them (train.py). Of several GPUs each holds
# the whole model; where it does not fit, scripts/train_ep.sh is for the training.
#
#   bash scripts/train.sh                                     # the miniature, two minutes on two CPU cores
#   MODEL=deepseek-ai/DeepSeek-V2-Lite DATA=translation bash scripts/train.sh [flag or key=value of train.py ...]
#
# The same command again goes on where the training was broken off.
set -euo pipefail
cd "$(dirname "$0")/.."

# What to set, in the environment:
MODEL=${MODEL:-results/models/tiny}              # folder or hub id of the base model
DATA=${DATA:-law}                                # a name in datasets/train, a path or a hub id
case $MODEL in
    results/models/tiny) preset=tiny length=256 tokens=16384 ;;
    *) preset=base length=4096 tokens=131072 ;;
esac
name=$(basename "$DATA" .jsonl)
CONFIG=${CONFIG:-configs/$preset.yaml}           # keys of the training
OUTPUT=${OUTPUT:-results/checkpoints/$name}      # written: the adapter
SCORE=${SCORE:-token}                            # what experts are selected by: token | gate
TOP_P=${TOP_P:-}                                 # the best until their scores sum to this (default: 0.2, for gate 0.1)
EXPERT_CONFIG=${EXPERT_CONFIG:-results/expert_configs/$name.json}  # written: the selected experts
SCORES=${SCORES:-}                               # folder of scores made before (default: they are made)
SEQ_LENGTH=${SEQ_LENGTH:-$length}                # of the sequences to score on, in tokens
SAMPLE_TOKENS=${SAMPLE_TOKENS:-$tokens}          # how many tokens to score on
NPROC=${NPROC:-}                                 # processes (default: one per GPU, or one)

if [ -x .venv/bin/python ]; then ESFT_PYTHON=${ESFT_PYTHON:-.venv/bin/python}; fi  # as it is; made where it is missing
source scripts/environment.sh eval,plot
NPROC=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}

if [ -z "$SCORES" ]; then
    SCORES=results/expert_scores/$name
    "$python" scripts/expert/get_expert_scores.py --base_model_path="$MODEL" --eval_dataset="$DATA" \
        --output_dir="$SCORES" --seq_length="$SEQ_LENGTH" --n_sample_tokens="$SAMPLE_TOKENS" --world_size="$NPROC"
fi
"$python" scripts/expert/generate_expert_config.py --eval_dataset="$DATA" --expert_scores_dir="$SCORES" \
    --output_path="$EXPERT_CONFIG" --score_function="$SCORE" ${TOP_P:+--top_p="$TOP_P"}
command=("$python")
if [ "$NPROC" -gt 1 ]; then
    command+=(-m torch.distributed.run --standalone --nproc-per-node="$NPROC")
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + NPROC - 1) / NPROC))}  # torchrun would give a process one
fi
exec "${command[@]}" train.py --base_model_path="$MODEL" --train_dataset="$DATA" --expert_config="$EXPERT_CONFIG" \
    --train_config="$CONFIG" --output_dir="$OUTPUT" --save_opt_states "$@"
