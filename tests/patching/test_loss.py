"""Losses without whole logits against the textbook way."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
)

from scaled_rope import patch_model
from scaled_rope.errors import ConfigError
from scaled_rope.patching import loss
from scaled_rope.patching.loss import IGNORE, hidden_states, resolve_loss, shared_hidden_states, token_nll
from tests.helpers.models import Make
from tests.helpers.small_models import full_nll


@pytest.mark.parametrize("chunk", [None, 1, 7, 96])
def test_token_nll_and_its_gradients_are_those_of_whole_logits(
    tiny_model: Make, tokens: torch.Tensor, chunk: int | None
) -> None:
    targets = tokens.roll(-1, dims=1)
    targets[0, -5:] = IGNORE
    weights = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0))
    losses, gradients = [], []
    for function in (full_nll, lambda *args: token_nll(*args, chunk=chunk)):
        model = tiny_model(tie_word_embeddings=True)
        loss = function(model, tokens, targets)
        (loss * weights).sum().backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert losses[1].dtype == torch.float32 and losses[1].shape == tokens.shape
    assert torch.all(losses[1][targets == IGNORE] == 0)
    # Losses of a few nats, gradients summed over 91 targets: float32 noise of a different order of summation.
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-5)
    for ours, reference in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()))


def test_token_nll_never_holds_more_logits_than_a_chunk(
    tiny_model: Make, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = tiny_model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    token_nll(model, tokens, tokens, chunk=10).sum().backward()
    assert max(seen) == 10
    # Once forward, and once more in the backward pass, which begins with the last: that one is still there.
    full, last = divmod(tokens.numel(), 10)
    forward = [10] * full + [last] * (last > 0)
    assert seen == forward + forward[-2::-1]


def test_token_nll_with_positions(tiny_model: Make, tokens: torch.Tensor) -> None:
    model = tiny_model()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens) * 2
    expected = F.cross_entropy(model(tokens, position_ids=positions).logits.transpose(1, 2), tokens, reduction="none")
    torch.testing.assert_close(token_nll(model, tokens, tokens, positions), expected, rtol=1e-6, atol=1e-5)
    assert not torch.allclose(token_nll(model, tokens, tokens), expected, atol=1e-2)


SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0)),
        lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    ],
    ids=["softcap", "logit_scale"],
)
def test_post_processed_logits_are_reproduced(make: Callable[[], PreTrainedModel], tokens: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = make().eval()
    expected = full_nll(model, tokens, tokens)
    torch.testing.assert_close(token_nll(model, tokens, tokens), expected, rtol=1e-5, atol=1e-5)
    plain = F.cross_entropy(model.lm_head(hidden_states(model, tokens)).transpose(1, 2), tokens, reduction="none")
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_base_model_alone_is_refused(tiny_model: Make, tokens: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="causal language model"):
        token_nll(tiny_model().model, tokens, tokens)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_what_sequences_share_is_read_once(tiny_model: Make, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(1, 60, (40,), generator=generator)
    sequences = []
    for common in (10, 10, 31, 40):  # the second repeats the first but for its end; the last is a prefix of nothing
        ids = whole.clone()
        ids[common:] = torch.randint(1, 60, (40 - common,), generator=generator)
        sequences.append(ids)
    sequences.insert(1, sequences[0])
    starts = [38, 38, 20, 39, 39]
    read = []
    forward = model.model.forward

    def counting(*args: Any, **given: Any) -> Any:
        read.append(given["input_ids"].shape[1])
        return forward(*args, **given)

    monkeypatch.setattr(model.model, "forward", counting)
    found = list(shared_hidden_states(model, sequences, starts, chunk))
    for ids, start, hidden in zip(sequences, starts, found, strict=True):
        expected = hidden_states(model, ids[None])[:, start:]
        # Float32 sums in another order, through two layers: 1e-6 of states of about 1.
        torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    counted = sum(read) - sum(40 for _ in sequences)  # without the passes of the comparison
    assert counted == 40 + (40 - 38) + (40 - 10) + (40 - 10) + (40 - 31)


@pytest.mark.parametrize("chunk", [5, None])
def test_whole_logits_give_the_same(tiny_model: Make, tokens: torch.Tensor, chunk: int | None) -> None:
    model, seen = tiny_model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    whole = token_nll(model, tokens, tokens, chunk=chunk, loss="whole")
    assert seen == [tokens.numel()]
    torch.testing.assert_close(whole, token_nll(model, tokens, tokens, chunk=chunk), rtol=1e-6, atol=1e-5)


def test_what_cannot_be_fused_is_refused_and_auto_takes_another(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(loss, "package_version", lambda name: "0.8.5")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(loss, "triton_lacks", lambda device: "a C compiler")
    assert resolve_loss("auto", gpu) == "chunked" and resolve_loss("fused", gpu) == "fused"
    monkeypatch.setattr(loss, "triton_lacks", lambda device: "")
    assert resolve_loss("auto", gpu) == "fused" and resolve_loss("auto", cpu) == "chunked"
    assert resolve_loss("auto", gpu, tiny_model()) == "fused"
    assert [resolve_loss(name, gpu) for name in ("chunked", "whole")] == ["chunked", "whole"]
    model = tiny_model()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    for given, message in (
        ((gpu, model), "a plain linear layer, this is Sequential; use chunked"),
        ((gpu, tiny_model("gemma2", final_logit_softcapping=2.0)), "logits without a soft cap"),
    ):
        assert resolve_loss("auto", *given) == "chunked"
        with pytest.raises(ConfigError, match=message):
            resolve_loss("fused", *given)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_loss("fused", cpu) == "fused"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match="'fused' needs a CUDA GPU, this is cpu"):
        resolve_loss("fused", cpu)
    monkeypatch.setattr(loss, "package_version", lambda name: "0.8.4")
    with pytest.raises(ConfigError, match=r"needs liger-kernel 0\.8\.5 or newer: pip install"):
        resolve_loss("fused", gpu)
    assert resolve_loss("auto", gpu) == "chunked"


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {}), ("mistral", {"sliding_window": 9}), ("qwen3", {"sliding_window": 9}), ("gpt_neox", {})],
)
@pytest.mark.parametrize("start", [0, 20, 47])
def test_pieces_of_a_window_are_the_window(
    tiny_model: Callable[..., PreTrainedModel], tokens: torch.Tensor, family: str, settings: dict[str, Any], start: int
) -> None:
    model = tiny_model(family, **settings)
    patch_model(model, "yarn:4")
    with torch.inference_mode():
        whole = token_nll(model, tokens, tokens)
        assert whole.shape == tokens.shape
        for size in (7, 16, 47, 48, 100):
            pieces = token_nll(model, tokens, tokens, start=start, prefill_chunk=size)
            # Attention over a cache sums in another order: float32 noise of losses of a few nats.
            torch.testing.assert_close(pieces, whole[:, start:], rtol=1e-5, atol=1e-5)
        positions = torch.arange(48).expand_as(tokens) * 2
        torch.testing.assert_close(
            token_nll(model, tokens, tokens, positions, prefill_chunk=11),
            token_nll(model, tokens, tokens, positions),
            rtol=1e-5,
            atol=1e-5,
        )


def test_only_scored_positions_reach_the_head(tiny_model: Callable[..., PreTrainedModel], tokens: torch.Tensor) -> None:
    model, seen = tiny_model(), []
    head = next(module for name, module in model.named_modules() if name.endswith("lm_head"))
    head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:-1].numel()))
    for prefill in (None, 10):
        seen.clear()
        with torch.inference_mode():
            token_nll(model, tokens, tokens, start=40, prefill_chunk=prefill)
        assert sum(seen) == 2 * 8
