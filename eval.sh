#!/usr/bin/env bash
# Evaluate a recipe: its base under every method without fine-tuning, and what training made of it, as far as that is
# there; then tables, plots and, for the demo, the verdict. Cells that were measured before are not measured again.
#
#   ./eval.sh                the demo: models/tiny-llama-256 and out/demo/model
#   ./eval.sh NAME           the recipe configs/NAME.yaml
#   ./eval.sh --list         the recipes
#
# Variables: PYTHON (default .venv/bin/python), TEXT (held-out documents), WINDOWS (per document), LENGTHS (tokens),
# ITERATIONS (passkeys per length).
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-.venv/bin/python}

if [[ ${1:-} == --list ]]; then
  exec "$python" -m scaled_rope.recipes --list
fi
name=${1:-demo}
field() { "$python" -m scaled_rope.recipes "$name" --field "$1"; }

out=$(field output_dir)
base=$(field model)
scaling=$(field scaling)
target=$(field sequence_length)
factor=${scaling##*:}
factor=${factor%%,*}
step=$((target / 4))

text=${TEXT:-data/cache/books/heldout}
if [[ $text == data/cache/books/heldout ]]; then
  "$python" -m scaled_rope.corpora fetch books --output data/cache/books
fi

# Twice the target: half of it shows what holds, the other half how it breaks.
contexts=$((step / 2)),$step,$((2 * step)),$((3 * step)),$target,$((6 * step)),$((8 * step))
prompts=$((step / 2)),$step,$((2 * step)),$target,$((8 * step))

measure() {
  "$python" eval/perplexity.py "$@" --dataset "$text" --windows "${WINDOWS:-12}" \
    --lengths "${LENGTHS:-$contexts}" --output "$out/rows.jsonl"
  "$python" eval/passkey.py "$@" --iterations "${ITERATIONS:-10}" \
    --lengths "${LENGTHS:-$prompts}" --output "$out/rows.jsonl"
}

if [[ -n $base && -n $factor ]]; then
  measure -m "$base" --scaling default --scaling "linear:$factor" --scaling "ntk:$factor" \
    --scaling "ntk-by-parts:$factor" --scaling "yarn:$factor" --scaling dynamic-yarn
fi
if [[ -d $out/model ]]; then
  measure -m "$out/model"
fi

report=(--output "$out" --title "$name")
if [[ -f $out/train_log.jsonl ]]; then
  report+=(--train-log "$out/train_log.jsonl")
fi
if [[ $name == demo && -d $out/model ]]; then
  report+=(--verdict demo)
fi
"$python" eval/report.py "$out/rows.jsonl" "${report[@]}"
