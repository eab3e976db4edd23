#!/usr/bin/env bash
# Does llama.cpp's server compute what `scaled-rope export --for llama.cpp` says?
#
#   ./benchmarks/engines/llama_cpp.sh
#   LLAMA_SERVER=build/bin/llama-server ./benchmarks/engines/llama_cpp.sh     one that was built from source
#
# Without LLAMA_SERVER it is the server inside of the wheel of xllamacpp, 34 MB, which needs no compiler. The embedded model
# takes less than 20 minutes of a busy machine, SmolLM2-135M 4.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [[ -z ${LLAMA_SERVER:-} ]]; then
    engine_environment xllamacpp-2026.10.11549 xllamacpp==2026.10.11549
    LLAMA_SERVER=$engine/bin/python
fi
certify_all llama.cpp "$LLAMA_SERVER" --lengths 64,400 # three prompts of each, since it gives the next token alone
exit "$failed"
