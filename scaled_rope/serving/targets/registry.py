"""The programs that a scaling can be exported for. A new one is a module with a `TARGET`, a row here, and its name in
`scaled_rope.flags.serving.TARGETS`.
"""

from __future__ import annotations

from scaled_rope.serving.targets import exllamav3, hf, llama_cpp, mlx, ollama, sglang, trainers, vllm
from scaled_rope.serving.targets.common import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        hf.TARGET,
        vllm.TARGET,
        sglang.TARGET,
        llama_cpp.TARGET,
        mlx.TARGET,
        exllamav3.TARGET,
        ollama.TARGET,
        trainers.TRL,
        trainers.VERL,
    )
}
"""By name."""
