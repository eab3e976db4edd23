#!/usr/bin/env bash
# Does plain transformers compute what `scaled-rope export --for transformers` says? Its server gives no
# log-probabilities, so a process that has transformers and nothing of this project holds the models.
#
#   ./benchmarks/engines/transformers.sh           5.24.0
#   ./benchmarks/engines/transformers.sh 4.57.6    another release: those before 5 read none of what is exported
#
# The environment takes 2 minutes and 1.5 GB, the embedded model 10 minutes of one core, SmolLM2-135M 15 more.
set -euo pipefail
cd "$(dirname "$0")/../.."
source ./environment.sh
source benchmarks/engines/environment.sh
usage "$@"
find_python

version=${1:-5.24.0}
engine_environment "transformers-$version" torch==2.13.0 "transformers==$version"
if [[ $version == 5.* ]]; then
    certify_all transformers "$engine/bin/python"
else # what it runs instead is what is to be named
    attended python benchmarks/engines/run.py transformers --program "$engine/bin/python" --scaling default --scaling yarn:8 ||
        true
fi
