#!/usr/bin/env bash
# Fetch the training and evaluation data that the method's authors released with their code.
#
#   bash scripts/download_datasets.sh [--dry_run] [TASK ...]
#
#   TASK          intent, law, summary, translation (default: all four)
#   --dry_run     print the commands, run none
#
# To datasets/released/train/<task>.jsonl and datasets/released/eval/<task>.jsonl, beside this project's own data of the
# same names; DATASETS in the environment names another folder. Files that are there are not fetched again, and after an
# interruption the same command goes on; a file stands under its name when all of it is there. It needs curl.
set -euo pipefail
cd "$(dirname "$0")/.."

DATASETS=${DATASETS:-datasets/released}
SOURCE=https://raw.githubusercontent.com/deepseek-ai/ESFT/main/datasets
TASKS=(intent law summary translation)

fail() {
    echo "error: $1" >&2
    exit 2
}

dry_run='' tasks=()
for argument in "$@"; do
    case $argument in
        -h | --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' scripts/download_datasets.sh
            exit ;;
        --dry_run) dry_run=yes ;;
        -*) fail "unrecognized flag $argument; --help explains the flags" ;;
        *)
            case " ${TASKS[*]} " in
                *" $argument "*) tasks+=("$argument") ;;
                *) fail "there is no released data of the task '$argument'; there are ${TASKS[*]}" ;;
            esac ;;
    esac
done
if [ ${#tasks[@]} = 0 ]; then tasks=("${TASKS[@]}"); fi
[ -n "$dry_run" ] || command -v curl > /dev/null || fail "there is no curl: install it"

for split in train eval; do
    for task in "${tasks[@]}"; do
        file=$DATASETS/$split/$task.jsonl
        if [ -e "$file" ]; then
            echo "$file is there"
            continue
        fi
        command=(curl --fail --location --silent --show-error --retry 3 --connect-timeout 20 --output "$file.part"
            "$SOURCE/$split/$task.jsonl")
        if [ -n "$dry_run" ]; then
            echo "${command[*]}"
            continue
        fi
        mkdir -p "$(dirname "$file")"
        echo "$SOURCE/$split/$task.jsonl -> $file"
        if ! "${command[@]}"; then
            rm -f "$file.part"
            rmdir -p "$(dirname "$file")" 2> /dev/null || true # what is empty
            fail "$SOURCE/$split/$task.jsonl could not be fetched; where there is no network, fetch it elsewhere and\
 copy it to $file. The same command goes on from here"
        fi
        mv "$file.part" "$file"
    done
done
