"""Whatever goes wrong while a model is patched leaves it as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from scaled_rope import patch_model, unpatch_model
from scaled_rope.patching import patch

STEPS = ("_watch_passes", "hook_layers", "write_config", "let_save", "remarks")


class Broken(Exception):
    pass


def facts(model: Any) -> tuple[Any, ...]:
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    config = {name: str(getattr(model.config, name, None)) for name in ("rope_parameters", "max_position_embeddings")}
    return type(model.model.rotary_emb), hooks, config, type(model.config), model.config._attn_implementation


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("before", [None, "linear:2", "dynamic-yarn"])
@pytest.mark.parametrize("spec", ["yarn:4", "self-extend,group=4,window=8"])
def test_a_failure_leaves_the_model_as_it_was(
    tiny_model: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    before: str | None,
    spec: str,
) -> None:
    model = tiny_model("llama").eval()
    ids = torch.arange(3, 40)[None]
    plain, untouched = model(input_ids=ids).logits, facts(model)
    if before is not None:
        patch_model(model, before)
    was, there = model(input_ids=ids).logits, facts(model)

    calls: list[int] = []

    def fail(*_: Any, **__: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise Broken

    original = getattr(patch, step)
    with monkeypatch.context() as change:
        change.setattr(patch, step, lambda *given, **more: fail() or original(*given, **more))
        if step == "write_config" and before is not None:
            with pytest.raises(Broken):  # within the return to the former state, which comes before
                patch_model(model, spec)
            return
        else:
            with pytest.raises(Broken):
                patch_model(model, spec)
            assert facts(model) == there
            assert torch.equal(model(input_ids=ids).logits, was)
    if before is not None:
        unpatch_model(model)
    assert facts(model) == untouched
    assert torch.equal(model(input_ids=ids).logits, plain)


@pytest.mark.parametrize("window", ["8", {}, [1]])
def test_a_window_that_is_no_number_is_not_compared(tiny_model: Callable[..., PreTrainedModel], window: object) -> None:
    model = tiny_model("llama")
    model.config.sliding_window = window
    assert patch_model(model, "yarn:4").notes == ()
