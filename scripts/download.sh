#!/usr/bin/env bash
# Fetch what the authors of ESFT published: their base model, their adapters, their data.
#
#   bash scripts/download.sh base             the base, 31 GB, to results/models/ESFT-vanilla-lite
#   bash scripts/download.sh law intent ...   both adapters (token and gate scores) of each task, 3 to 5 GB each, to
#                                             results/checkpoints: law summary translation intent math code
#   bash scripts/download.sh adapters         both adapters of every task, to all_models/adapters/<score>/<task>, as
#                                             scripts/download_adapters.sh of the released repository does
#   bash scripts/download.sh data             training and evaluation files, to datasets/released
#
# DRY_RUN=1 before it prints the commands and runs none. After an interruption the same command continues. It needs
# `hf`, which comes with transformers, and for the data `curl`.
set -euo pipefail
cd "$(dirname "$0")/.."

run() { if [ -n "${DRY_RUN:-}" ]; then echo "$*"; else "$@"; fi; }
hf=.venv/bin/hf
[ -x "$hf" ] || hf=hf

[ $# -gt 0 ] || set -- --help
for what in "$@"; do
    case $what in
        base)  # without *.py: no code of a model is run here
            run "$hf" download deepseek-ai/ESFT-vanilla-lite --local-dir results/models/ESFT-vanilla-lite --exclude '*.py' ;;
        data)
            for file in {train,eval}/{intent,law,summary,translation}.jsonl; do
                to=datasets/released/$file
                [ ! -e "$to" ] || continue
                run curl --fail --location --silent --show-error --create-dirs --output "$to.part" \
                    "https://raw.githubusercontent.com/deepseek-ai/ESFT/main/datasets/$file"
                run mv "$to.part" "$to"
            done ;;
        adapters)
            for score in token gate; do
                for task in math code intent summary law translation; do
                    run "$hf" download "deepseek-ai/ESFT-$score-$task-lite" --include expert_cfg.json \
                        --include '*.safetensors*' --local-dir "all_models/adapters/$score/$task"
                done
            done ;;
        law | summary | translation | intent | math | code)
            for name in "ESFT-token-$what-lite" "ESFT-gate-$what-lite"; do
                run "$hf" download "deepseek-ai/$name" --local-dir "results/checkpoints/$name" \
                    --include expert_cfg.json --include '*.safetensors*'
            done ;;
        --help | -h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' scripts/download.sh ;;
        *) echo "error: cannot download '$what': there is nothing of that name. --help lists what there is." >&2; exit 2 ;;
    esac
done
