#!/usr/bin/env bash
# Train recipes of configs/ one after the other, each after the one that it starts from; what is finished is skipped,
# what was interrupted continues.
#
#   ./train.sh                  the demo: the embedded tiny model from 256 to 2048 tokens
#   ./train.sh NAME [NAME ...]  recipes by name
#   ./train.sh --list           the recipes
#
# SIGTERM and Ctrl-C are passed on and waited for; then nothing more is started and the exit code is 143 or 130.
#
# LAUNCH starts the training on several GPUs:
#   LAUNCH="accelerate launch --config_file configs/accelerate/zero3.yaml" ./train.sh llama-2-7b-64k
set -euo pipefail
cd "$(dirname "$0")"
source ./environment.sh
usage "$@"
refuse_blank LAUNCH
find_python
if [[ "${1:-}" == --list ]]; then
    python -m scaled_rope.recipes --list
    exit
fi

[[ $# -gt 0 ]] || set -- demo
refuse_unread "'$*'"
for wanted in "$@"; do # all names are read before anything is trained
    refuse_flag "$wanted" "flags are for finetune.py"
    python -m scaled_rope.recipes --pending -- "$wanted" >/dev/null
done
for wanted in "$@"; do
    pending=$(python -m scaled_rope.recipes --pending -- "$wanted")
    mapfile -t recipes <<<"${pending:-$wanted}" # a line each: names of files may have blanks
    for recipe in "${recipes[@]}"; do # a finished one is handed over too: finetune.py says so, and checks it
        read_recipe "$recipe"
        begin_step training
        attended ${LAUNCH:-python} finetune.py "$recipe"
        # A launcher may end with 0 for a run that was stopped and has saved its state.
        python -m scaled_rope.recipes --finished -- "$recipe" ||
            { echo "$recipe is not finished; the same command continues" >&2; exit 143; }
    done
done
