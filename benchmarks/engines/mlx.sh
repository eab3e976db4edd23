#!/usr/bin/env bash
# Does MLX, on a CPU under Linux, compute what `scaled-rope export` says?
#
#   ./benchmarks/engines/mlx.sh
#
# The environment takes a minute and 1 GB, the models 10 to 15 minutes. A process that has mlx-lm and nothing of this
# project holds them.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

engine_environment mlx-lm-0.32.2 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
certify_all mlx "$engine/bin/python"
exit "$failed"
