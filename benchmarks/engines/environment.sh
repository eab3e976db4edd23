# Sourced first by the scripts of this folder: goes to the root of the repository, answers --help, finds PYTHON, and defines
# two functions. Rows go to data/engines.jsonl, or to ROWS=FILE.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/environment.sh"
usage "$@"
cd "$root"
find_python

# engine_environment NAME [PACKAGE==VERSION ...]: makes a virtual environment with these packages, once, and sets
# `engine` to its folder. They lie under SCALED_ROPE_CACHE, or else TMPDIR or /tmp, in scaled-rope-engines.
engine_environment() {
    engine=${SCALED_ROPE_CACHE:-${TMPDIR:-/tmp}}/scaled-rope-engines/$1
    if [[ -e $engine/.ready ]]; then return; fi
    echo "$1: making $engine"
    "${PYTHON311:-python3.11}" -m venv --clear "$engine"
    [[ $# -eq 1 ]] || "$engine/bin/python" -m pip install -q --no-compile "${@:2}"
    touch "$engine/.ready"
}

# certify_engine ENGINE PROGRAM [FLAG ...]: as the flags of run.py say, or else the embedded model under every scaling.
# Sets `failed` to the exit code where that is not 0.
failed=0
certify_engine() {
    attended python benchmarks/engines/run.py "$1" --program "$2" --output "${ROWS:-data/engines.jsonl}" "${@:3}" ||
        failed=$?
}

# certify_all ENGINE PROGRAM [FLAG ...]: the embedded model under every scaling, and SmolLM2-135M where it is there, with
# short prompts, since a pass of it is fifty times as much work. The flags are for the former.
certify_all() {
    local model=models/smollm2-135m
    certify_engine "$@"
    if [[ ! -e $model/model.safetensors ]]; then
        echo "left out, $model is not there: python -m scaled_rope.texts.fetched_models fetch smollm2-135m --output $model"
        return 0
    fi
    certify_engine "$1" "$2" --model "$model" --factor 4 --lengths 24,96 --controls 2
}
