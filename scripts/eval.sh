#!/usr/bin/env bash
# Evaluate a model with an adapter on all GPUs of a node (eval_multigpu.py); with ADAPTER= the base alone.
#
#   MODEL=deepseek-ai/DeepSeek-V2-Lite DATA=translation bash scripts/eval.sh [flag of eval_multigpu.py ...]
set -euo pipefail
cd "$(dirname "$0")/.."

# What to set, in the environment:
MODEL=${MODEL:-results/models/tiny}              # folder or hub id of the base model
DATA=${DATA:-law}                                # names in datasets/eval, paths or hub ids, separated by commas
case $MODEL in results/models/tiny) length=64 ;; *) length=512 ;; esac
name=$(basename "${DATA%%,*}" .jsonl)
ADAPTER=${ADAPTER-results/checkpoints/$name}     # its folder, or nothing
OUTPUT=${OUTPUT:-results/completions/$name.jsonl}  # written: answers with scores, and a summary beside them
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-$length}        # of an answer
GPUS_PER_RANK=${GPUS_PER_RANK:-1}                # GPUs that hold one model together
NPROC=${NPROC:-}                                 # models at a time (default: as many as the GPUs hold, or one)

if [ -x .venv/bin/python ]; then ESFT_PYTHON=${ESFT_PYTHON:-.venv/bin/python}; fi  # as it is; made where it is missing
source scripts/environment.sh eval,plot
NPROC=${NPROC:-$("$python" -c "import torch; print(max(1, torch.cuda.device_count() // $GPUS_PER_RANK))")}
command=("$python" eval_multigpu.py --base_model_path="$MODEL" --eval_dataset="$DATA" --output_path="$OUTPUT"
    --max_new_tokens="$MAX_NEW_TOKENS" --world_size="$NPROC" --gpus_per_rank="$GPUS_PER_RANK")
if [ -n "$ADAPTER" ] && [ ! -d "$ADAPTER" ]; then
    echo "error: no adapter folder $ADAPTER: give ADAPTER=<the output folder of training>, or ADAPTER= for the base alone" >&2
    exit 2
fi
[ -z "$ADAPTER" ] || command+=(--adapter_dir="$ADAPTER")
exec "${command[@]}" "$@"
