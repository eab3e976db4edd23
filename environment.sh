# Sourced by train.sh and eval.sh. PYTHON is the interpreter to use; `python` means it, in the commands of recipes too, and
# programs installed beside it (accelerate) come first on PATH.
if [[ -z "${PYTHON:-}" ]]; then
    if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
found=$(command -v "$PYTHON") || { echo "error: PYTHON=$PYTHON is no program; run make demo, or set PYTHON" >&2; exit 2; }
if [[ "$found" == /* ]]; then PYTHON=$found; else PYTHON=$PWD/$found; fi
"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("transformers") is None)' ||
    { echo "error: $PYTHON has no transformers; run make demo first, or pip install -e '.[train]' there" >&2; exit 2; }
python() { "$PYTHON" "$@"; }
export -f python
export PYTHON PATH="$(dirname "$PYTHON"):$PATH" TOKENIZERS_PARALLELISM=true

# read_recipe NAME: sets model, output_dir, prepare, scalings, perplexity, passkey and report, and builds the recipe's
# data (each command does nothing when its output is there).
read_recipe() {
    local assignments command
    assignments=$(python -m scaled_rope.recipes "$1" --shell)
    eval "$assignments"
    for command in "${prepare[@]}"; do
        bash -euo pipefail -c "$command" </dev/null
    done
}
