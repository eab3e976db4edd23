# Sourced by the shell scripts: PYTHON is the interpreter to use, and first on PATH for the commands of recipes.
if [[ -z "${PYTHON:-}" ]]; then
    if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
PYTHON=$(command -v "$PYTHON") || { echo "error: no Python here; run make demo, or set PYTHON" >&2; exit 2; }
[[ "$PYTHON" == /* ]] || PYTHON="$PWD/$PYTHON"
export PYTHON PATH="$(dirname "$PYTHON"):$PATH" TOKENIZERS_PARALLELISM=true
