#!/usr/bin/env bash
# Does plain transformers compute what `scaled-rope export --for transformers` says? Its server gives no
# log-probabilities, so a process that has transformers and nothing of this project holds the models.
#
#   ./benchmarks/engines/transformers.sh           5.24.0
#   ./benchmarks/engines/transformers.sh 4.57.6    another release: those before 5 read the older keys alone
#
# The environment takes 2 minutes and 1.5 GB, the embedded model 3 minutes, SmolLM2-135M 2 more.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

version=${1:-5.24.0}
engine_environment "transformers-$version" torch==2.13.0 "transformers==$version"
if [[ $version == 5.* ]]; then
    certify_all transformers "$engine/bin/python"
else # right where `export` writes the older keys too; for all others that the model runs unscaled is to be named
    certify_engine transformers "$engine/bin/python" --controls 0
fi
exit "$failed"
