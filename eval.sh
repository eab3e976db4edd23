#!/usr/bin/env bash
# Evaluate recipes of configs/, or measure a table or figure of the paper; then a report. Rows that are there already are
# not measured again.
#
#   ./eval.sh                    the demo
#   ./eval.sh NAME [NAME ...]    recipes by name, or table1 to table6, figure1, figure5, figure6
#   ./eval.sh NAME -- FLAGS ...  with more flags of the evaluators, which come last and so win
#   ./eval.sh --list             the names
#
# A recipe: its base under each of the recipe's scalings without training, then what training made of it; perplexity with
# its control, which CONTROL in the environment sets (off, window=W, …).
# A table or figure of the paper: each of its models by the paper's protocol, both from data/paper.json, and with the
# control of perplexities if CONTROL is set (trained, window=W, …; tables 1, 2, 4 and 6, figures 1, 5 and 6). In the
# environment, MODELS replaces the models (a list separated by blanks), DATASET the text, OUTPUT the file of rows;
# PUBLISHED is a copy of the released CSV files, for the report:
#   MODELS=models/tiny-llama-256 DATASET=standin:sotu ./eval.sh table2 -- --lengths 256,512 --dataset-min-tokens 512
# LAUNCH starts the evaluators on several GPUs:
#   LAUNCH="torchrun --nproc-per-node 8" ./eval.sh table2
set -euo pipefail
cd "$(dirname "$0")"
source ./environment.sh
usage "$@"
find_python
if [[ "${1:-}" == --list ]]; then
    python -m scaled_rope.recipes --list
    python -m scaled_rope.report.paper --list
    exit
fi

names=()
while [[ $# -gt 0 && "$1" != -- ]]; do
    names+=("$1")
    shift
done
[[ $# -eq 0 ]] || shift
extra=("$@")
rows=${OUTPUT:-out/paper/rows.jsonl} # of the paper's tables
tables=() failed=()

recipe() { # NAME
    local trained rows under=() spec code name=$1
    read_recipe "$1" table{1..6} figure{1,5,6}
    if [[ ${#perplexity[@]} -eq 0 && ${#passkey[@]} -eq 0 ]]; then
        echo "error: recipe '$1' has no \`evaluate\` section in configs/$1.yaml" >&2
        exit 2
    fi
    trained=$output_dir/model
    rows=$output_dir/rows.jsonl
    for spec in "${scalings[@]}"; do under+=(--scaling "$spec"); done

    measure() { # EVALUATOR FLAGS...: the base, then the trained model where it exists
        local evaluator=$1
        shift
        echo "$name: $evaluator of $model"
        attended ${LAUNCH:-python} "eval/$evaluator.py" -m "$model" "${under[@]}" "$@" "${extra[@]}" --output "$rows"
        if [[ -d "$trained" ]]; then
            echo "$name: $evaluator of $trained"
            attended ${LAUNCH:-python} "eval/$evaluator.py" -m "$trained" "$@" "${extra[@]}" --output "$rows"
        fi
    }
    [[ ${#perplexity[@]} -eq 0 ]] || measure perplexity --control "${CONTROL:-trained}" "${perplexity[@]}"
    [[ ${#passkey[@]} -eq 0 ]] || measure passkey "${passkey[@]}"

    if [[ -f "$output_dir/train_log.jsonl" ]]; then report+=(--train-log "$output_dir/train_log.jsonl"); fi
    # A verdict of FAIL is a result, not a failure of this script: then the page is there.
    rm -f "$output_dir/report.html"
    attended python eval/report.py "$rows" --base "$model" --finetuned "$trained" --output "$output_dir" "${report[@]}" ||
        { code=$? && [[ $code -eq 1 && "${report[*]}" == *--verdict* && -f "$output_dir/report.html" ]] || exit "$code"; }
}

paper() { # NAME
    local assignments model evaluator table models data flags
    assignments=$(python -m scaled_rope.report.paper "$1" --shell)
    eval "$assignments"
    [[ -z "${MODELS:-}" ]] || read -r -d '' -a models <<<"$MODELS" || true
    if [[ -n "${DATASET:-}" && ${#data[@]} -gt 0 ]]; then data=(--dataset "$DATASET"); fi
    # The paper has no control; its tables of perplexity get one where CONTROL asks for it.
    if [[ $evaluator == perplexity && -n "${CONTROL:-}" ]]; then flags+=(--control "$CONTROL"); fi
    if [[ $evaluator == harness ]]; then
        MODELS="${models[*]}" OUTPUT="$rows" attended ./eval-harness.sh -- "${extra[@]}" || check "$1" $?
    else
        for model in "${models[@]}"; do
            echo "$1: $evaluator of $model"
            attended ${LAUNCH:-python} "eval/$evaluator.py" -m "$model" "${data[@]}" "${flags[@]}" "${extra[@]}" --output "$rows" ||
                check "$1: $model" $?
        done
    fi
    tables+=(--table "$table")
}

check() { # WHAT CODE: a model that fails leaves the others their results
    [[ $2 -ne 130 ]] || exit 130 # interrupted
    failed+=("$1")
}

[[ ${#names[@]} -gt 0 ]] || names=(demo)
for name in "${names[@]}"; do # all names are read before anything is measured
    case $name in
        table[0-9]* | figure[0-9]*) python -m scaled_rope.report.paper "$name" --shell >/dev/null ;;
        *) python -m scaled_rope.recipes "$name" --shell --also table{1..6} figure{1,5,6} >/dev/null ;;
    esac
done
for name in "${names[@]}"; do
    case $name in
        table[0-9]* | figure[0-9]*) paper "$name" ;;
        *) recipe "$name" ;;
    esac
done
if [[ ${#tables[@]} -gt 0 && -f "$rows" ]]; then
    attended python eval/report.py "$rows" "${tables[@]}" --title "The paper beside what was measured" ${PUBLISHED:+--published "$PUBLISHED"} --output "$(dirname "$rows")"
fi
if [[ ${#failed[@]} -gt 0 ]]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
