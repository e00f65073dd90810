#!/usr/bin/env bash
# Convert a model to GGUF with llama.cpp's converter, and check that every expert matrix in it is exact.
#
#   LLAMA_CPP=path/to/llama.cpp bash scripts/export_gguf.sh MODEL OUT.gguf [flag of the converter ...]
#
# MODEL is the folder of a checkpoint, such as one that scripts/merge_adapter.py wrote. OUT.gguf is as exact as MODEL:
# bf16 stays bf16. A file that fails the check is not written. Quantize OUT.gguf afterwards, with llama-quantize.
# LLAMA_CPP is a checkout of llama.cpp (git clone https://github.com/ggml-org/llama.cpp). Its converter knows
# tokenizers by a hash; for one of your own, see convert_hf_to_gguf_update.py there.
set -euo pipefail

stop() { echo "error: cannot convert: $1" >&2; exit 2; }
[ $# -ge 2 ] || stop "MODEL and OUT.gguf are missing. Give both."
[ -n "${LLAMA_CPP:-}" ] || stop "LLAMA_CPP is not set. Set it to a checkout of llama.cpp."
model=$(realpath -m "$1") out=$(realpath -m "$2") converter=$(realpath -m "$LLAMA_CPP")/convert_hf_to_gguf.py
shift 2
cd "$(dirname "$0")/.."
[ -f "$converter" ] || stop "there is no $converter. Set LLAMA_CPP to a checkout of llama.cpp."
[ ! -e "$out" ] || stop "$out is there already. Give another path."
source scripts/environment.sh eval,plot,gguf
"$python" -c 'import gguf' 2>/dev/null ||
    stop "the package gguf is missing. Install it: pip install -e '.[gguf]' -c constraints.txt"

outtype=$("$python" scripts/check_gguf.py --base_model_path="$model")
mkdir -p "$(dirname "$out")"
part=$(dirname "$out")/.$(basename "$out")
trap 'rm -f "$part"' EXIT
"$python" "$converter" "$model" --outfile "$part" --outtype "$outtype" "$@"
"$python" scripts/check_gguf.py --base_model_path="$model" --gguf="$part"
mv "$part" "$out"
echo "$out"
