#!/usr/bin/env bash
# Do SGLang's rotary modules compute what `scaled-rope export --for sglang` says? Its server needs a GPU; its tables of
# cosines and sines are made on a CPU and put into a model of transformers, by a process that has nothing of this project.
#
#   ./benchmarks/engines/sglang.sh
#
# The environment takes 2 minutes and 1.5 GB, the embedded model 2 minutes.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

engine_environment sglang-0.5.23 torch==2.13.0 transformers==5.24.0 msgspec==0.23.0 requests==2.34.2 triton==3.9.0
"$engine/bin/python" -m pip install -q --no-compile --no-deps sglang==0.5.23 # its requirements are CUDA's
certify_all sglang "$engine/bin/python"
exit "$failed"
