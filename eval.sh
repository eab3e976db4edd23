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

for recipe in "${@:-demo}"; do
    read_recipe "$recipe"
    if [[ ${#perplexity[@]} -eq 0 && ${#passkey[@]} -eq 0 ]]; then
        echo "error: recipe '$recipe' has no \`evaluate\` section in configs/$recipe.yaml" >&2
        exit 2
    fi
    trained=$output_dir/model
    rows=$output_dir/rows.jsonl
    under=()
    for spec in "${scalings[@]}"; do under+=(--scaling "$spec"); done

    measure() { # EVALUATOR FLAGS...: the base, then the trained model where it exists
        local evaluator=$1
        shift
        echo "$recipe: $evaluator of $model"
        python "eval/$evaluator.py" -m "$model" "${under[@]}" "$@" --output "$rows"
        if [[ -d "$trained" ]]; then
            echo "$recipe: $evaluator of $trained"
            python "eval/$evaluator.py" -m "$trained" "$@" --output "$rows"
        fi
    }
    [[ ${#perplexity[@]} -eq 0 ]] || measure perplexity "${perplexity[@]}"
    [[ ${#passkey[@]} -eq 0 ]] || measure passkey "${passkey[@]}"

    if [[ -f "$output_dir/train_log.jsonl" ]]; then report+=(--train-log "$output_dir/train_log.jsonl"); fi
    python eval/report.py "$rows" --base "$model" --finetuned "$trained" --output "$output_dir" "${report[@]}"
done
