#!/usr/bin/env bash
# Evaluate recipes of configs/: the base under each of the recipe's scalings without training, then what training made
# of it, then a report. Rows that are there already are not measured again.
#
#   ./eval.sh                  the demo
#   ./eval.sh NAME [NAME ...]  recipes by name
#   ./eval.sh --list           the recipes
set -euo pipefail
cd "$(dirname "$0")"
source ./environment.sh

if [[ "${1:-}" == --list ]]; then
    exec "$PYTHON" -m scaled_rope.recipes --list
fi

for recipe in "${@:-demo}"; do
    field() { "$PYTHON" -m scaled_rope.recipes "$recipe" --field "$1"; }
    base=$(field model)
    output=$(field output_dir)
    scalings=()
    for spec in $(field evaluate.scalings); do scalings+=(--scaling "$spec"); done

    for evaluator in perplexity passkey; do
        flags=$(field "evaluate.$evaluator")
        eval "flags=($flags)"
        echo "$recipe: $evaluator of $base"
        "$PYTHON" "eval/$evaluator.py" -m "$base" "${scalings[@]}" "${flags[@]}" --output "$output/rows.jsonl"
        if [[ -d "$output/model" ]]; then
            echo "$recipe: $evaluator of $output/model"
            "$PYTHON" "eval/$evaluator.py" -m "$output/model" "${flags[@]}" --output "$output/rows.jsonl"
        fi
    done

    flags=$(field evaluate.report)
    eval "flags=($flags)"
    [[ ! -f "$output/train_log.jsonl" ]] || flags+=(--train-log "$output/train_log.jsonl")
    "$PYTHON" eval/report.py "$output/rows.jsonl" --base "$base" --finetuned "$output/model" --output "$output" "${flags[@]}"
done
