#!/usr/bin/env bash
# Kill, starve and damage small runs, and count how they end: about three hours of one core at low priority. It can be
# ended at any time; the same command continues. `--help` lists the flags; docs/reliability.md has the counts.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD
exec nice -n 10 "${PYTHON:-python}" benchmarks/campaign.py "$@"
