"""Passes of patched models: steps of dynamic scaling, and failures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from scaled_rope.patching.cache_argument import NAMES
from scaled_rope.patching.pass_hooks import Passes
from scaled_rope.patching.patch import patch_model
from tests.helpers.caches import ORIGINAL, SAME, distance, one_layer, refused, through_cache, whole
from tests.helpers.models import VOCABULARY, Make


def test_a_pass_that_fails_leaves_nothing_behind(tiny_model: Make, text: Tensor) -> None:
    model = one_layer(tiny_model)
    patch_model(model, "dynamic-yarn")
    wanted = whole(model, text)
    with pytest.raises(IndexError):
        model(torch.full_like(text, VOCABULARY), use_cache=True)
    assert torch.equal(whole(model, text), wanted)
    model.train()
    model.gradient_checkpointing_enable()
    model(text, labels=text).loss.backward()  # with a cache, says the config; checkpointing makes none


@torch.no_grad()
def counted(model: Any, ids: Tensor, ends: list[int], **more: Any) -> tuple[Tensor, int]:
    """Logits through a cache, and how many tokens the layers were given in all."""
    tokens = 0

    def count(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal tokens
        tokens += (args[0] if args else kwargs["hidden_states"]).shape[1]

    base = model.base_model
    hook = (base.h if hasattr(base, "h") else base.layers)[0].register_forward_pre_hook(count, with_kwargs=True)
    logits = through_cache(model, ids, ends, **more)
    hook.remove()
    return logits, tokens


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "falcon", "gpt_oss"])
def test_steps_equal_whole_passes_at_their_scale(tiny_model: Make, text: Tensor, family: str) -> None:
    # Deep models too: the cache is made anew, so nothing of another scale is left in it.
    model, static = tiny_model(family), tiny_model(family)
    patch_model(model, "dynamic-yarn,dynamic_step=1.5")
    ends = [20, *range(21, 81)]
    found, tokens = counted(model, text, ends)
    for length in (20, 32, 33, 48, 49, 72, 73, 80):
        scale = 1.0
        while scale * ORIGINAL < length:
            scale *= 1.5
        patch_model(static, f"yarn:{scale}")
        assert distance(found[:, length - 1], whole(static, text[:, :length])[:, -1]) < SAME
    # Steps begin at 33, 49 and 73 tokens: 80 read once, and what was there each time read again.
    assert tokens == 80 + 32 + 48 + 72
    # With steps by a factor of r no more than T/(1 - 1/r) tokens are read again in T.
    assert tokens - 80 < 80 / (1 - 1 / 1.5)


def test_rows_step_by_their_own_length(tiny_model: Make, text: Tensor) -> None:
    model = tiny_model()
    patch_model(model, "dynamic-yarn,dynamic_step=1.5")
    padded = text.clone()
    padded[0, :10] = 0
    mask = (torch.arange(60)[None] >= torch.tensor([[10], [0]])).long()
    with torch.no_grad():
        cache, rows = None, []
        for start, end in ((0, 20), *((t, t + 1) for t in range(20, 60))):
            output: Any = model(padded[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
            cache = output.past_key_values
            rows.append(output.logits)
    found = torch.cat(rows, dim=1)
    for row, first in ((0, 10), (1, 0)):
        for end in (32, 40, 43, 49, 59, 60):
            alone = whole(model, text[row : row + 1, first:end])
            assert distance(found[row, end - 1], alone[0, -1]) < SAME


def test_a_cache_is_made_anew_in_pieces_with_progress(
    tiny_model: Make, text: Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scaled_rope.patching.pass_hooks.PIECE", 7)
    monkeypatch.setattr("scaled_rope.patching.pass_hooks._PATIENCE", 0)
    monkeypatch.setattr("scaled_rope.progress._SECONDS", 0)
    model = tiny_model()
    patch_model(model, "dynamic-yarn,dynamic_step=2")
    found = through_cache(model, text, [30, 33, 40])
    assert distance(found[:, 30:], whole(model, text[:, :40])[:, 30:]) < SAME
    err = capsys.readouterr().err
    assert "keys again, scale 2 23 %" in err  # 7 of 30 tokens


@torch.no_grad()
def test_steps_read_any_cache_until_the_scale_changes(tiny_model: Make, text: Tensor) -> None:
    model = tiny_model()
    foreign: Any = model(text[:, :30], use_cache=True).past_key_values
    wanted = whole(model, text[:, :32])
    patch_model(model, "dynamic-yarn,dynamic_step=2")
    for t in (30, 31):
        found: Any = model(text[:, t : t + 1], past_key_values=foreign)
        assert distance(found.logits[:, 0], wanted[:, t]) < SAME
    refused(lambda: model(text[:, 32:33], past_key_values=foreign), "from scale 1 to 2", "DynamicCache")


class Paged:
    """Like the cache of continuous batching, which does not say how many tokens it holds."""


@pytest.mark.parametrize("spec", ["dynamic-yarn", "dynamic-yarn,dynamic_step=2", "rerope,window=10"])
def test_continuous_batching_is_refused(tiny_model: Make, text: Tensor, spec: str) -> None:
    model = tiny_model()
    patch_model(model, spec)
    for name in NAMES:
        refused(lambda name=name: model.base_model(text, **{name: Paged()}), "cannot be used with a Paged", "generate")


def test_a_static_scaling_leaves_continuous_batching_alone(tiny_model: Make, text: Tensor) -> None:
    model = tiny_model()
    patch_model(model, "yarn:2")
    with pytest.raises(AttributeError, match="Paged"):  # from the model, which asks this one for more
        model.base_model(text, past_key_values=Paged())


def test_compiled_passes_learn_what_is_written(tiny_model: Make, text: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    patch_model(model, "rerope,window=10")
    wanted = whole(model, text[:, :20])
    passes = next(iter(model.base_model._forward_pre_hooks.values())).__self__
    assert isinstance(passes, Passes)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not passes._skipped()
    monkeypatch.undo()
    cache = StaticCache(config=model.config, max_cache_len=40)
    assert distance(through_cache(model, text[:, :20], [12, 13, 20], cache), wanted) < SAME
    patch_model(model, "yarn:2")
    passes = next(iter(model.base_model._forward_pre_hooks.values())).__self__
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert passes._skipped()
