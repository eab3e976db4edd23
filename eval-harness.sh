#!/usr/bin/env bash
# The benchmarks of the paper's table 3 over a list of models. Rows that are there already are not measured again.
#
#   ./eval-harness.sh                          every model of the table (data/paper.json)
#   ./eval-harness.sh MODEL [MODEL ...]        others (directories or hub names)
#   ./eval-harness.sh MODEL -- --scaling yarn:8 --limit 100 --offline
#                                              with flags of eval/harness.py
#   ./eval-harness.sh --list                   models and tasks
#
# MODELS, TASKS and OUTPUT may also be set in the environment, as lists separated by blanks; a list without a word is
# refused. A model or task that fails leaves the others their results, and is named in the end.
set -euo pipefail
cd "$(dirname "$0")"
source ./environment.sh
refuse_blank MODELS TASKS OUTPUT LAUNCH

TASKS=${TASKS:-"arc_challenge hellaswag mmlu truthfulqa_mc2"}
OUTPUT=${OUTPUT:-out/eval-harness/rows.jsonl}

given=() list=
while [[ $# -gt 0 && "$1" != -- ]]; do
    case $1 in
        --list) list=yes ;;
        -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;;
        *)
            refuse_flag "$1" "flags of eval/harness.py follow after --"
            refuse_empty model "$1"
            given+=("$1")
            ;;
    esac
    shift
done
if [[ -z $list ]]; then # a listing measures nothing
    if [[ ${#given[@]} -gt 0 ]]; then refuse_unread "'MODEL ...'" TASKS OUTPUT; else refuse_unread eval-harness.sh MODELS TASKS OUTPUT; fi
fi
[[ $# -eq 0 ]] || shift
flags=("$@")
set --
find_python
models=("${given[@]}")
if [[ ${#models[@]} -eq 0 && -n "${MODELS:-}" ]]; then read -r -d '' -a models <<<"$MODELS" || true; fi
if [[ ${#models[@]} -eq 0 ]]; then
    assignments=$(python -m scaled_rope.report.paper table3 --shell)
    models=($(eval "$assignments" && printf '%s\n' "${models[@]}"))
fi
read -r -d '' -a tasks <<<"$TASKS" || true

if [[ -n $list ]]; then
    printf 'model  %s\n' "${models[@]}"
    printf 'task   %s\n' "${tasks[@]}"
    exit
fi

failed=()
for model in "${models[@]}"; do
    for task in "${tasks[@]}"; do
        echo "$model: $task"
        attended ${LAUNCH:-python} eval/harness.py -m "$model" --tasks "$task" --output "$OUTPUT" "${flags[@]}" || {
            [[ $? -ne 130 ]] || exit 130 # interrupted
            failed+=("$model: $task")
        }
    done
done
if [[ ${#failed[@]} -gt 0 ]]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
