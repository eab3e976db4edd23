# Sourced by the scripts of this folder, from the root of the repository; it holds functions only.

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

# certify_all ENGINE PROGRAM: the embedded model under every scaling, and SmolLM2-135M under some where it is there.
certify_all() {
    local model=models/smollm2-135m spec some=()
    attended python benchmarks/engines/run.py "$1" --program "$2"
    if [[ ! -e $model/model.safetensors ]]; then
        echo "left out, $model is not there: python -m scaled_rope.texts.fetched_models fetch smollm2-135m --output $model"
        return 0
    fi
    for spec in default linear:4 ntk:4 yarn:4 yarn:4,ramp=rotations llama3:4; do some+=(--scaling "$spec"); done
    attended python benchmarks/engines/run.py "$1" --program "$2" --model "$model" --factor 4 --lengths 64,384 \
        "${some[@]}" --controls 2
}
