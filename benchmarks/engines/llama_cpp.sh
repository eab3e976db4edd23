#!/usr/bin/env bash
# Does llama.cpp's server compute what `scaled-rope export --for llama.cpp` says? It is built from the source inside of
# llama-cpp-python, whose commit is the one that export's words are for.
#
#   ./benchmarks/engines/llama_cpp.sh
#
# cmake, ninja and a C++ compiler are needed. The build takes an hour of one core, the embedded model 10 minutes.
# JOBS is the number of compilers at once (default: 1).
set -euo pipefail
cd "$(dirname "$0")/../.."
source ./environment.sh
source benchmarks/engines/environment.sh
usage "$@"
find_python

engine_environment llama-cpp-python-0.3.36
server=$engine/build/bin/llama-server
if [[ ! -x $server ]]; then
    "$engine/bin/python" -m pip download -q --no-deps --no-binary llama-cpp-python -d "$engine" llama-cpp-python==0.3.36
    tar -xzf "$engine"/llama_cpp_python-0.3.36.tar.gz -C "$engine"
    cmake -G Ninja -S "$engine/llama_cpp_python-0.3.36/vendor/llama.cpp" -B "$engine/build" -DCMAKE_BUILD_TYPE=Release \
        -DCMAKE_CXX_FLAGS_RELEASE="-O1 -DNDEBUG" -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_UI=OFF -DLLAMA_OPENSSL=OFF -DBUILD_SHARED_LIBS=OFF >/dev/null
    attended ninja -C "$engine/build" -j "${JOBS:-1}" llama-server
fi
certify_all llama.cpp "$server"
