"""llama.cpp's server out of the wheel of xllamacpp, started with flags of `llama-server`; `starting.py` starts it.

    python benchmarks/engines/llama_cpp_server.py -m MODEL.gguf --port 8080 [--rope-scaling yarn ...]

It imports nothing of this project. The wheel's bindings take no metadata (`--override-kv`): that must be in the GGUF.
"""

from __future__ import annotations

import argparse
import importlib
import threading


def main() -> None:
    llama = importlib.import_module("xllamacpp")  # not in this project's environment
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add = parser.add_argument
    add("-m", dest="model", required=True)
    add("--host", default="127.0.0.1")
    add("--port", type=int, required=True)
    add("-t", dest="threads", type=int, default=1)
    add("-c", dest="n_ctx", type=int, default=0)
    add("-np", dest="n_parallel", type=int, default=1)
    add("-ctk", dest="cache_type_k", default="f16")
    add("-ctv", dest="cache_type_v", default="f16")
    add("-fa", dest="flash_attention", choices=("off", "auto"), default="auto")
    add("--rope-scaling", choices=("none", "linear", "yarn"))
    add("--rope-scale", type=float)
    add("--rope-freq-base", type=float)
    add("--yarn-orig-ctx", type=int)
    for name in ("--yarn-ext-factor", "--yarn-beta-fast", "--yarn-beta-slow"):
        add(name, type=float)
    args = parser.parse_args()

    params = llama.CommonParams()
    params.model.path, params.hostnames, params.port = args.model, [args.host], args.port
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    params.n_ctx, params.n_parallel = args.n_ctx, args.n_parallel
    for name in ("cache_type_k", "cache_type_v"):
        setattr(params, name, getattr(llama.ggml_type, f"GGML_TYPE_{getattr(args, name).upper()}"))
    if args.flash_attention == "off":
        params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if args.rope_scaling:
        kinds = llama.llama_rope_scaling_type
        params.rope_scaling_type = getattr(kinds, f"LLAMA_ROPE_SCALING_TYPE_{args.rope_scaling.upper()}")
    if args.rope_scale is not None:
        params.rope_freq_scale = 1 / args.rope_scale
    for name in ("rope_freq_base", "yarn_orig_ctx", "yarn_ext_factor", "yarn_beta_fast", "yarn_beta_slow"):
        if getattr(args, name) is not None:
            setattr(params, name, getattr(args, name))
    server = llama.Server(params)
    print(server.listening_address, flush=True)
    threading.Event().wait()  # the server has threads of its own


if __name__ == "__main__":
    main()
