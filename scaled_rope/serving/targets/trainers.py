"""TRL and verl: one config.json for the trainer, which is transformers, and for its rollouts, which are vLLM.

Reinforcement learning goes wrong where the two compute different scalings, so the words are those that both compute the
same numbers from.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

from scaled_rope.flags.serving import EXPORT_FILES
from scaled_rope.serving.targets import hf, vllm
from scaled_rope.serving.targets.common import Expressed, Restated, ServedModel, Target

_TRAINER, _ROLLOUT = "trainer", "rollout"
_SAME_FOLDER = "trainer and rollout engine must be started with the same folder, whose config.json has these keys"
_TRL_NOTES = (
    _SAME_FOLDER,
    "model_init_kwargs reach the trainer alone: TRL starts vLLM with the folder and no overrides",
)
_VERL_NOTES = (
    _SAME_FOLDER,
    "override_config cannot say it: verl sets the keys of a dictionary as attributes, which rope_parameters has not",
    "for the FSDP engine; the Megatron engine takes the factor of any rope_scaling for linear interpolation",
    "for rollouts by vLLM; for SGLang see --for sglang",
)


def express(request: ServedModel, file: str, notes: tuple[str, ...]) -> Iterator[Expressed]:
    """vLLM's words for a config.json, with a fragment of the trainer's own settings."""
    for words in vllm.express(request):
        text = _FRAGMENTS[file].format(length=request.length)
        yield Expressed(words.given, words.config, (), (*notes, *words.notes), files={file: text})


def read(request: ServedModel, words: Expressed) -> Iterator[dict[str, Any]]:
    """The printed config.json as transformers and as vLLM read it."""
    for given in hf.read(request, words):
        yield {_TRAINER: given}
    yield {_ROLLOUT: vllm.given_in_file(json.loads(json.dumps(words.config)))}


def restate(request: ServedModel, words: Expressed, length: int) -> Restated:
    """The numbers that the one or the other computes; see `hf.restate` and `vllm.restate`."""
    if _TRAINER in words.given:
        return Restated(*hf.numbers_in_transformers(request, words.given[_TRAINER], length))
    rollout = Expressed(words.given[_ROLLOUT], words.config)
    return vllm.restate(request, rollout, length)


_FRAGMENTS = {
    "trl.yaml": (
        "# trl grpo --config trl.yaml; with vllm_mode server: trl vllm-serve --model DIR --max_model_len {length}\n"
        "model_name_or_path: DIR\n"
        "use_vllm: true\n"
        "vllm_mode: colocate\n"
        "vllm_max_model_length: {length}\n"
    ),
    "verl.yaml": (
        "actor_rollout_ref:\n  model:\n    path: DIR\n  rollout:\n    name: vllm\n    max_model_len: {length}\n"
    ),
}


def _target(name: str, title: str, version: str, notes: tuple[str, ...], command: str) -> Target:
    file = EXPORT_FILES[name]
    return Target(
        name=name,
        title=title,
        version=version,
        express=functools.partial(express, file=file, notes=notes),
        read=read,
        restate=restate,
        known=vllm.TARGET.known,
        older="vLLM 0.11, transformers 4",
        command=command,
        static=vllm.TARGET.static,
        config_place="in DIR/config.json",
        basis=(
            f"read from the source of {title} {version}, not run; its trainer is the installed transformers, and its "
            f"rollouts are restated from vLLM {vllm.TARGET.version}"
        ),
        package=name,
        package_version=version,
    )


TRL = _target("trl", "TRL", "1.16.0", _TRL_NOTES, "trl grpo --config trl.yaml")
VERL = _target("verl", "verl", "0.9.1", _VERL_NOTES, "python -m verl.trainer.main_ppo, with the settings of verl.yaml")
