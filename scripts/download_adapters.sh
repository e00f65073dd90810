#!/usr/bin/env bash
# Fetch the published base model and its adapters: those of both scores for each task, or some tasks only.
#
#   bash scripts/download_adapters.sh [--dry_run] [--base | --no_base] [--score=token|gate] [TASK ...]
#
#   TASK          law, summary, translation, intent, math, code (default: all six)
#   --score=S     the adapters selected by token or by gate scores only (default: both)
#   --base        the base model only; --no_base leaves it out (it has 31 GB, an adapter 3 to 5 GB)
#   --dry_run     print the commands, run none
#
# To results/models/ESFT-vanilla-lite and results/checkpoints/ESFT-<score>-<task>-lite; MODELS and ADAPTERS in the
# environment name other folders. What is there already is not fetched again, and after an interruption the same command
# goes on; a file stands under its name when all of it is there. It needs huggingface_hub's `hf`, which comes with
# transformers; to fetch from a mirror, set its HF_ENDPOINT.
set -euo pipefail
cd "$(dirname "$0")/.."

MODELS=${MODELS:-results/models}
ADAPTERS=${ADAPTERS:-results/checkpoints}
OWNER=deepseek-ai
BASE=ESFT-vanilla-lite
TASKS=(law summary translation intent math code)

fail() {
    echo "error: $1" >&2
    exit 2
}

dry_run='' base=yes scores=(token gate) tasks=()
for argument in "$@"; do
    case $argument in
        -h | --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' scripts/download_adapters.sh
            exit ;;
        --dry_run) dry_run=yes ;;
        --base) base=only ;;
        --no_base) base='' ;;
        --score=token | --score=gate) scores=("${argument#*=}") ;;
        --score*) fail "$argument: give --score=token or --score=gate" ;;
        -*) fail "unrecognized flag $argument; --help explains the flags" ;;
        *)
            case " ${TASKS[*]} " in
                *" $argument "*) tasks+=("$argument") ;;
                *) fail "there is no published adapter of the task '$argument'; there are ${TASKS[*]}" ;;
            esac ;;
    esac
done
if [ "$base" = only ] && [ ${#tasks[@]} -gt 0 ]; then fail "--base fetches the base only: leave out ${tasks[*]}"; fi
if [ ${#tasks[@]} = 0 ]; then tasks=("${TASKS[@]}"); fi

hf=.venv/bin/hf
if [ ! -x "$hf" ]; then hf=$(command -v hf || true); fi
if [ -z "$hf" ]; then
    [ -n "$dry_run" ] || fail "there is no hf command: python -m pip install -c constraints.txt huggingface_hub"
    hf=hf
fi

fetch() { # repository, folder, files to leave out ...
    local repository=$1 folder=$2
    shift 2
    local command=("$hf" download "$OWNER/$repository" --local-dir "$folder/$repository" "$@")
    if [ -n "$dry_run" ]; then
        echo "${command[*]}"
        return
    fi
    echo "$OWNER/$repository -> $folder/$repository"
    "${command[@]}" || fail "$OWNER/$repository could not be fetched; where there is no network, fetch it elsewhere with\
 \`hf download $OWNER/$repository\` and copy the folder to $folder/$repository. The same command goes on from here"
}

if [ -n "$base" ]; then fetch "$BASE" "$MODELS" --exclude '*.py'; fi # nothing of a model's own code is run here
if [ "$base" != only ]; then
    for task in "${tasks[@]}"; do
        for score in "${scores[@]}"; do
            fetch "ESFT-$score-$task-lite" "$ADAPTERS" --include expert_cfg.json --include '*.safetensors*'
        done
    done
fi
