"""Passkeys: one pass against greedy decoding, shared prefills, and prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from scaled_rope import RopeScaling
from scaled_rope.evaluation import passkey_evaluator
from scaled_rope.patching.loading import apply_scaling
from scaled_rope.patching.patch import patched_scaling
from scaled_rope.scaling.frequencies import at_length
from tests.helpers.small_models import (
    TRAINED,
    new_model,
    tokenizer,  # noqa: F401
)

SPECS = ("default", "linear:2", "dynamic-yarn")


@pytest.fixture(scope="module")
def memoriser(tokenizer: PreTrainedTokenizerFast) -> tuple[LlamaForCausalLM, list[Any]]:
    """A model that was overfitted, under each of `SPECS`, to half of 6 prompts, and the prompts."""
    prompts = passkey_evaluator.make_prompts(tokenizer, 2 * TRAINED, 6, "grid", seed=0)
    model = new_model()
    own = RopeScaling.from_config(model.config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    sequences = torch.tensor([prompt.input_ids + prompt.answer_ids for prompt in prompts[::2]])
    answer = len(prompts[0].answer_ids)
    for step in range(90):
        scaling = RopeScaling.from_spec(SPECS[step % len(SPECS)], own)
        apply_scaling(model, at_length(scaling, len(prompts[0].input_ids)))
        logits = model(sequences[:, :-1], use_cache=False).logits[:, -answer:]
        loss = F.cross_entropy(logits.transpose(1, 2), sequences[:, -answer:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), prompts


def greedy(model: LlamaForCausalLM, prompt: list[int], steps: int) -> list[int]:
    """Decode without a cache, at whatever scaling the model has."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(steps):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("spec", [*SPECS, "yarn:2", "dynamic-linear"])
def test_one_pass_agrees_with_greedy_decoding(memoriser: tuple[LlamaForCausalLM, list[Any]], spec: str) -> None:
    model, prompts = memoriser
    apply_scaling(model, RopeScaling("default", original_max_position_embeddings=TRAINED))
    scaling = RopeScaling.from_spec(spec, RopeScaling.from_config(model.config))
    apply_scaling(model, scaling)
    scored = [outcome for batch in passkey_evaluator.score(model, prompts, scaling, 4) for outcome in batch]
    decoded = []
    for prompt in prompts:
        # Greedy decoding sees the scale of its first step, where the sequence is the prompt.
        length = len(prompt.input_ids)
        fixed = scaling
        if scaling.dynamic:
            fixed = RopeScaling(scaling.method, factor=length / TRAINED, original_max_position_embeddings=TRAINED)
            assert patched_scaling(model) == fixed  # not the scale at the end of the answer
        apply_scaling(model, fixed)
        answer = greedy(model, prompt.input_ids, len(prompt.answer_ids))
        if not scaling.dynamic:
            ids = torch.tensor([prompt.input_ids])
            made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(answer), do_sample=False)
            assert made[0, length:].tolist() == answer
        decoded.append(answer == prompt.answer_ids)
    assert scored == decoded
    if spec in SPECS:  # what it was trained on is right, the rest is not
        assert scored == [True, False] * 3


@pytest.mark.parametrize("depths", ["grid", "random"])
@pytest.mark.parametrize("spec", ["default", "linear:2", "yarn:2", "dynamic-yarn", "rerope,window=16"])
def test_shared_prefill_decides_alike(
    memoriser: tuple[LlamaForCausalLM, list[Any]], tokenizer: PreTrainedTokenizerFast, spec: str, depths: str
) -> None:
    model, prompts = memoriser
    if depths == "random":
        prompts = prompts + passkey_evaluator.make_prompts(tokenizer, 2 * TRAINED, 5, "random", seed=3)
    apply_scaling(model, RopeScaling("default", original_max_position_embeddings=TRAINED))
    scaling = RopeScaling.from_spec(spec, RopeScaling.from_config(model.config))
    apply_scaling(model, scaling)
    each = [
        outcome
        for prompt in prompts
        for batch in passkey_evaluator.score(model, [prompt], scaling, 1)
        for outcome in batch
    ]
    assert [outcome for _, outcome in sorted(passkey_evaluator.score_shared(model, prompts, scaling))] == each


def test_prompts_follow_from_the_seed_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    def make(length: int = 128, n: int = 5, depths: str = "random", seed: int = 1) -> list[Any]:
        return passkey_evaluator.make_prompts(tokenizer, length, n, depths, seed)

    assert make(n=3) == make(n=5)[:3]
    assert [prompt.key for prompt in make(seed=2)] != [prompt.key for prompt in make()]
    for prompt in make():
        assert len(prompt.input_ids) + len(prompt.answer_ids) == 128
    # As rows of earlier runs have them (seed 42, 256 tokens).
    assert [prompt.key for prompt in make(length=256, n=3, seed=42)] == [32454, 76753, 37628]
    needles = passkey_evaluator.make_prompts(tokenizer, 256, 3, "random", 42, wording="needle")
    assert [prompt.key for prompt in needles] == [32454, 76753, 37628]
    grid = [prompt.depth for prompt in make(length=512, depths="grid")]
    # A depth is realised in whole filler tokens, of which there are more than 300 here.
    assert grid == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=1 / 300)
