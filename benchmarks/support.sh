#!/usr/bin/env bash
# Which versions of transformers, triton and numpy work: each combination gets an environment of its own, made by pip
# alone, in which the package is installed from its wheel and the tests of what depends on those versions are run.
#
#   ./benchmarks/support.sh                   all combinations that this machine has a Python for
#   ./benchmarks/support.sh oldest newest     some of them: oldest, newest, gpu-image
#
# oldest: the oldest transformers that setup.py allows. newest: that of constraints.txt. gpu-image: what GPU machines
# often have, with Python 3.12: the oldest transformers, torch 2.11, triton 3.6, numpy 2.5.
#
# An environment takes 1 to 2 minutes and 2 GB (5 GB where pip finds torch with CUDA only: PIP_EXTRA_INDEX_URL=
# https://download.pytorch.org/whl/cpu has torch without), its tests 5 to 10 minutes of one core. Environments are under
# SCALED_ROPE_CACHE, or else TMPDIR or /tmp, and are used again; remove the folder scaled-rope-support when done.
# PYTHON311 and PYTHON312 name the interpreters. Rows go to data/support_rows.jsonl; then
# `python benchmarks/support.py` writes them into docs/support.md.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ "${1:-}" == -* ]]; then sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; fi

unset PYTHONPATH PYTHONHOME # what they name would count as installed
checkout=$PWD
root=${SCALED_ROPE_CACHE:-${TMPDIR:-/tmp}}/scaled-rope-support
pinned() { sed -n "s/^$1==//p" constraints.txt; }
oldest=$(sed -n 's/^LEAST = .*"transformers": "\([^"]*\)".*/\1.0/p' scaled_rope/versions.py)
tests=(tests/patching tests/scaling tests/attention tests/kernels tests/benchmarks/test_gpu.py
    tests/evaluation/test_decoding.py tests/test_versions.py)

try() { # NAME PYTHON TRANSFORMERS TORCH TRITON NUMPY
    local name=$1 python=$2 folder=$root/$1 wheel
    if ! command -v "$python" >/dev/null; then
        echo "$name: left out, there is no $python here (PYTHON311, PYTHON312)" >&2
        return
    fi
    if [[ ! -e $folder/.ready ]]; then
        echo "$name: making $folder"
        "$python" -m venv --clear "$folder"
        # What depends on the versions in question is for pip to choose, the rest is as in constraints.txt.
        grep -viE '^(transformers|tokenizers|huggingface_hub|hf-xet|torch|setuptools|triton|numpy|scipy|pandas)==' constraints.txt >"$folder/constraints.txt"
        printf '%s\n' "transformers==$3" "torch==$4" "numpy==$6" >>"$folder/constraints.txt"
        "$folder/bin/python" -m pip wheel -q --no-deps -w "$folder/wheel" .
        wheel=$(echo "$folder"/wheel/scaled_rope-*.whl)
        "$folder/bin/python" -m pip install -q --no-compile -c "$folder/constraints.txt" "$wheel"
        # The environment is empty but for the wheel and what it asks for: the first thing that a user sees of it.
        (cd "$folder" && for words in methods "inspect $checkout/models/tiny-llama-256" "plan demo" \
            "export $checkout/models/tiny-llama-256 --for vllm --scaling yarn:8"; do
            ./bin/scaled-rope $words >"$folder/said.txt" || { echo "$name: scaled-rope $words failed" >&2; exit 1; }
        done)
        "$folder/bin/python" -m pip install -q --no-compile -c "$folder/constraints.txt" pytest hypothesis accelerate peft gguf liger-kernel
        "$folder/bin/python" -m pip install -q --no-compile --no-deps "triton==$5" # torch with CUDA wants another one
        touch "$folder/.ready"
    fi
    echo "$name: testing"
    env CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 PYTHONPATH="$checkout" "$folder/bin/python" -m pytest -q -p no:cacheprovider \
        --junitxml="$folder/report.xml" "${tests[@]}" >"$folder/log.txt" 2>&1 || true # the row says what failed
    PYTHONPATH="$checkout" "$folder/bin/python" benchmarks/support.py --record "$name" --report "$folder/report.xml"
}

[[ $# -gt 0 ]] || set -- oldest newest gpu-image
for combination in "$@"; do
    case $combination in
        oldest) try oldest "${PYTHON311:-python3.11}" "$oldest" "$(pinned torch)" "$(pinned triton)" "$(pinned numpy)" ;;
        newest) try newest "${PYTHON311:-python3.11}" "$(pinned transformers)" "$(pinned torch)" "$(pinned triton)" "$(pinned numpy)" ;;
        gpu-image) try gpu-image "${PYTHON312:-python3.12}" "$oldest" 2.11.0 3.6.0 '2.5.*' ;;
        *) echo "error: $combination is not allowed; oldest, newest or gpu-image" >&2; exit 2 ;;
    esac
done
