# Sourced by the shell scripts. PYTHON is the interpreter to use; `python` means it, in the commands of recipes too, and
# programs installed beside it (accelerate) come first on PATH.
if [[ -z "${PYTHON:-}" ]]; then
    if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
found=$(command -v "$PYTHON") || { echo "error: PYTHON=$PYTHON is no program; run make demo, or set PYTHON" >&2; exit 2; }
if [[ "$found" == /* ]]; then PYTHON=$found; else PYTHON=$PWD/$found; fi
python() { "$PYTHON" "$@"; }
export -f python
export PYTHON PATH="$(dirname "$PYTHON"):$PATH" TOKENIZERS_PARALLELISM=true
