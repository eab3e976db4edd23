#!/usr/bin/env bash
# What did not fit into gpu_first.sh: all shapes, lengths, methods and variants, in the order of what they are worth.
#
#   ./benchmarks/gpu_second.sh OUT           goes on from OUT/gpu.jsonl; run it again for what is still missing
#
# Arguments and variables are those of gpu_first.sh; the time limit is 480 seconds here.
set -euo pipefail
if [[ $# -lt 1 || "$1" == -* ]]; then sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 2; fi
export PLAN=second SECONDS_AT_MOST=${SECONDS_AT_MOST:-480}
exec bash "$(dirname "$0")/gpu_first.sh" "$@"
