# Sourced by the shell scripts. PYTHON is the interpreter to use; `python` means it, in the commands of recipes too, and
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
