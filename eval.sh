#!/usr/bin/env bash
# Evaluate recipes of configs/, or measure a table or figure of the paper; then a report. Rows that are there already are
# not measured again.
#
#   ./eval.sh                    the demo
#   ./eval.sh NAME [NAME ...]    recipes by name, or table1 to table6, figure1, figure5, figure6
#   ./eval.sh long [BASE TUNED ...]   what a model and its base can do with long texts, see below
#   ./eval.sh NAME -- FLAGS ...  with more flags of the evaluators, which come last and so win
#   ./eval.sh --list             the names
#
# A recipe: its base under each of the recipe's scalings without training, then what training made of it; perplexity with
# its control, which CONTROL in the environment sets (off, window=W, …). Exit code 1 where its verdict does not hold.
# A table or figure of the paper: each of its models by the paper's protocol, both from data/paper.json, and with the
# control of perplexities if CONTROL is set (trained, window=W, …; tables 1, 2, 4 and 6, figures 1, 5 and 6). In the
# environment, MODELS replaces the models (a list separated by blanks), DATASET the text, OUTPUT the file of rows;
# PUBLISHED is a copy of the released CSV files, for the report:
#   MODELS=models/tiny-llama-256 DATASET=standin:sotu ./eval.sh table2 -- --lengths 256,512 --dataset-min-tokens 512
# long: perplexity with its control, passkeys and RULER at the same lengths, and a report. The first model is the base and is
# measured as it is, the others with the scalings that they carry; a model alone also under SCALING (yarn:4). Without models
# it is the embedded one. In the environment: MODELS; LENGTHS (the trained length and its doubles, up to what the models are
# for); TASKS (ruler; the embedded model: ruler-offline); LIMIT, prompts of each task and length (100; embedded: 10); DATASET
# (standin:books), OUTPUT. Flags after -- go to eval/harness.py; with --plan, only what RULER will take is printed:
#   LENGTHS=256,512 LIMIT=2 ITERATIONS=4 WINDOWS=3 ./eval.sh long
#   MODELS="meta-llama/Llama-2-7b-hf out/llama-2-7b-32k/model" ./eval.sh long -- --plan
# A variable that nothing of what is named reads is refused.
# LAUNCH starts the evaluators on several GPUs:
#   LAUNCH="torchrun --nproc-per-node 8" ./eval.sh table2
set -euo pipefail
cd "$(dirname "$0")"
source ./environment.sh
usage "$@"
refuse_blank MODELS TASKS DATASET OUTPUT PUBLISHED CONTROL LENGTHS LIMIT ITERATIONS WINDOWS SCALING LAUNCH
find_python
if [[ "${1:-}" == --list ]]; then
    python -m scaled_rope.recipes --list
    python -m scaled_rope.report.paper --list
    exit
fi

names=()
while [[ $# -gt 0 && "$1" != -- ]]; do
    refuse_flag "$1" "flags of the evaluators follow after --"
    names+=("$1")
    shift
done
[[ $# -eq 0 ]] || shift
extra=("$@")
rows=${OUTPUT:-out/paper/rows.jsonl} # of the paper's tables
tables=() failed=()

recipe() { # NAME
    local trained rows spec code name=$1 whose=()
    read_recipe "$1" table{1..6} figure{1,5,6}
    if [[ ${#perplexity[@]} -eq 0 && ${#passkey[@]} -eq 0 ]]; then
        echo "error: recipe '$1' has no \`evaluate\` section in configs/$1.yaml" >&2
        exit 2
    fi
    trained=$output_dir/model
    if [[ -z "$model" && ! -d "$trained" ]]; then # it begins with random weights
        echo "error: recipe '$1' has no model to measure yet; train it first: ./train.sh $1" >&2
        exit 2
    fi
    rows=$output_dir/rows.jsonl
    measure() { # EVALUATOR FLAGS...: the base, then the trained model where it exists; the recipe's flags come later
        local evaluator=$1 what=$1
        local -n flags=$1 scalings=$1_scalings others=$1_zero_shot others_scalings=$1_zero_shot_scalings
        shift
        [[ ${#flags[@]} -gt 0 ]] || return 0
        if [[ $evaluator == passkey ]]; then what=passkeys; fi
        if [[ ${#scalings[@]} -gt 0 ]]; then
            whose=(--base "$model")
            begin_step "$what before training"
            attended ${LAUNCH:-python} "eval/$evaluator.py" -m "$model" "${scalings[@]}" "$@" "${flags[@]}" "${extra[@]}" --output "$rows"
        fi
        if [[ ${#others_scalings[@]} -gt 0 ]]; then
            whose=(--base "$model")
            begin_step "$what of scalings without training"
            attended ${LAUNCH:-python} "eval/$evaluator.py" -m "$model" "${others_scalings[@]}" "${others[@]}" "${extra[@]}" --output "$rows"
        fi
        if [[ -d "$trained" ]]; then
            begin_step "$what after training"
            attended ${LAUNCH:-python} "eval/$evaluator.py" -m "$trained" "$@" "${flags[@]}" "${extra[@]}" --output "$rows"
        fi
    }
    measure perplexity --control "${CONTROL:-trained}"
    measure passkey

    begin_step report
    if [[ -f "$output_dir/train_log.jsonl" ]]; then report+=(--train-log "$output_dir/train_log.jsonl"); fi
    # A verdict that does not hold fails this script in the end: then the page is there, and other recipes are measured.
    rm -f "$output_dir/report.html"
    # What was not measured is not named: a base where training began with random weights, a model before its training.
    if [[ -d "$trained" ]]; then whose+=(--finetuned "$trained"); fi
    attended python eval/report.py "$rows" "${whose[@]}" --output "$output_dir" "${report[@]}" ||
        { code=$? && [[ $code -eq 1 && "${report[*]}" == *--verdict* && -f "$output_dir/report.html" ]] || exit "$code"
          failed+=("$name: the verdict, see $output_dir/report.html"); }
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
        MODELS="${models[*]}" OUTPUT="$rows" attended env -u DATASET -u CONTROL -u PUBLISHED ./eval-harness.sh -- "${extra[@]}" ||
            check "$1" $?
    else
        for model in "${models[@]}"; do
            echo "$1: $evaluator of $model"
            attended ${LAUNCH:-python} "eval/$evaluator.py" -m "$model" "${data[@]}" "${flags[@]}" "${extra[@]}" --output "$rows" ||
                check "$1: $model" $?
        done
    fi
    tables+=(--table "$table")
}

long() { # MODEL ...
    local models=("$@") embedded=models/tiny-llama-256 launch=${LAUNCH:-python} rows model lengths tasks limit under reads report=() measured=" "
    if [[ ${#models[@]} -eq 0 && -n "${MODELS:-}" ]]; then read -r -d '' -a models <<<"$MODELS" || true; fi
    [[ ${#models[@]} -gt 0 ]] || models=("$embedded")
    reads=(TASKS DATASET OUTPUT CONTROL LENGTHS LIMIT ITERATIONS WINDOWS SCALING)
    if [[ $# -eq 0 ]]; then refuse_unread "'long'" MODELS "${reads[@]}"; else refuse_unread "'long MODEL ...'" "${reads[@]}"; fi
    if [[ ${#models[@]} -gt 1 && -n "${SCALING:-}" ]]; then
        echo "error: SCALING=$SCALING is not allowed with several models, which have scalings of their own; only with one" >&2
        exit 2
    fi
    refuse_empty model "${models[@]}"
    rows=${OUTPUT:-out/long/rows.jsonl}
    if [[ "${models[*]}" == "$embedded" ]]; then tasks=ruler-offline limit=10; else tasks=ruler limit=100; fi
    tasks=${TASKS:-$tasks} limit=${LIMIT:-$limit}
    tasks=${tasks// /,}
    [[ "$limit" =~ ^[1-9][0-9]*$ ]] || { echo "error: LIMIT=$limit is not allowed; at least 1 prompt" >&2; exit 2; }
    under=()
    if [[ ${#models[@]} -eq 1 ]]; then under=(--scaling default --scaling "${SCALING:-yarn:4}"); fi
    lengths=${LENGTHS:-}
    if [[ -z $lengths ]]; then
        lengths=$(python -m scaled_rope.evaluation.default_lengths "${models[@]/#/--model=}" "${under[@]}")
    fi

    measure() { # EVALUATOR FLAGS...: every model
        local evaluator=$1 model code as
        shift
        for model in "${models[@]}"; do
            as=("${under[@]}")
            if [[ ${#models[@]} -gt 1 && "$model" == "${models[0]}" ]]; then as=(--scaling default); fi
            echo "long: $evaluator of $model"
            code=0
            attended $launch "eval/$evaluator.py" -m "$model" "${as[@]}" "$@" --output "$rows" || code=$?
            if [[ $code -eq 2 ]]; then exit 2; fi # bad input, which has been said
            if [[ $code -eq 0 ]]; then measured+="$model "; else check "long: $evaluator of $model" "$code"; fi
        done
    }
    if [[ " ${extra[*]} " == *" --plan "* ]]; then
        launch=python
        measure harness --tasks "$tasks" --lengths "$lengths" --limit "$limit" "${extra[@]}"
        return
    fi
    measure perplexity --control "${CONTROL:-trained}" --dataset "${DATASET:-standin:books}" --windows "${WINDOWS:-12}" --lengths "$lengths"
    measure passkey --lengths "$lengths" --iterations "${ITERATIONS:-20}"
    measure harness --tasks "$tasks" --lengths "$lengths" --limit "$limit" "${extra[@]}"
    [[ -f "$rows" ]] || return 0
    if [[ "$measured" == *" ${models[0]} "* ]]; then report=(--base "${models[0]}"); fi
    if [[ ${#models[@]} -eq 2 && "$measured" == *" ${models[1]} "* ]]; then report+=(--finetuned "${models[1]}"); fi
    attended python eval/report.py "$rows" "${report[@]}" --title "Long texts" --output "$(dirname "$rows")"
}

reads_of() { # ASSIGNMENTS of a table or figure: the variables that its evaluator reads beside MODELS, OUTPUT and PUBLISHED
    local model evaluator table models data flags
    eval "$1"
    if [[ $evaluator == harness ]]; then echo TASKS; fi
    if [[ $evaluator == perplexity ]]; then echo CONTROL; fi
    if [[ ${#data[@]} -gt 0 ]]; then echo DATASET; fi
}

check() { # WHAT CODE: a model that fails leaves the others their results
    [[ $2 -ne 130 ]] || exit 130 # interrupted
    failed+=("$1")
}

[[ ${#names[@]} -gt 0 ]] || names=(demo)
if [[ "${names[0]}" == long ]]; then
    long "${names[@]:1}"
    names=()
fi
readable=() # the variables that one of the names reads
for name in "${names[@]}"; do # all names are read before anything is measured
    case $name in
        table[0-9]* | figure[0-9]*)
            assignments=$(python -m scaled_rope.report.paper "$name" --shell)
            readable+=(MODELS OUTPUT PUBLISHED $(reads_of "$assignments"))
            ;;
        *)
            python -m scaled_rope.recipes --shell --also table{1..6} figure{1,5,6} -- "$name" >/dev/null
            for given in MODELS DATASET OUTPUT; do
                if [[ -n "${!given:-}" ]]; then
                    echo "error: $given=${!given} is not allowed with recipe '$name', which says it itself" >&2
                    exit 2
                fi
            done
            readable+=(CONTROL)
            ;;
    esac
done
if [[ ${#names[@]} -gt 0 ]]; then refuse_unread "'${names[*]}'" "${readable[@]}"; fi
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
