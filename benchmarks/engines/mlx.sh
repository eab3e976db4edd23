#!/usr/bin/env bash
# Does MLX, on a CPU under Linux, compute what a config.json for transformers says? `export` has no words of its own for it.
#
#   ./benchmarks/engines/mlx.sh
#
# The environment takes a minute and 1 GB.
set -euo pipefail
cd "$(dirname "$0")/../.."
source ./environment.sh
source benchmarks/engines/environment.sh
usage "$@"
find_python

engine_environment mlx-lm-0.32.2 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
attended python benchmarks/engines/run.py mlx --program "$engine/bin/python" || true
