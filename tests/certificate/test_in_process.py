"""Models of this process as sources: what they are asked, and what they cannot do."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPTJConfig, GPTJForCausalLM

from scaled_rope.certificate.certify import certify
from scaled_rope.certificate.in_process import as_source
from scaled_rope.errors import ConfigError

VOCABULARY = 31


class Llm:
    """What certificates use of vLLM's `LLM`: a table of logits by token for a model."""

    def __init__(self, **config: Any) -> None:
        told = {"max_model_len": 50, "max_logprobs": 20, "logprobs_mode": "raw_logprobs"} | config
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(**told))
        self.logs = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
        self.dropped = 0
        self.refusal: type[Exception] = ValueError

    def __call__(self, ids: list[int]) -> torch.Tensor:
        return self.logs[ids]

    def generate(self, prompts: Any, options: Any, use_tqdm: bool) -> Any:
        ids = prompts[0]["prompt_token_ids"][self.dropped :]
        if len(ids) == 13:
            raise self.refusal("13 tokens bring bad luck.\nAsk for another number.")

        def row(token: int) -> dict[int, Any]:
            values, tokens = self.logs[token].topk(options.logprobs)
            return {int(t): SimpleNamespace(logprob=float(v)) for t, v in zip(tokens, values, strict=True)}

        after = SimpleNamespace(logprobs=[row(ids[-1])])
        before = [None, *(row(token) for token in ids[:-1])]
        return [SimpleNamespace(prompt_token_ids=ids, prompt_logprobs=before, outputs=[after])]


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.SamplingParams = lambda **options: SimpleNamespace(**options)  # type: ignore[attr-defined]
    exceptions = ModuleType("vllm.exceptions")
    exceptions.VLLMClientError = type("VLLMClientError", (Exception,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.exceptions", exceptions)


def test_an_engine_of_vllm_gives_its_log_probabilities() -> None:
    engine = Llm()
    found = as_source(engine).observe([5, 6, 7], [0, 2])
    assert found.positions == (0, 2) and len(found.tokens[0]) == 20
    assert np.allclose(found.logs[1], engine.logs[7].topk(20).values)
    assert certify(lambda ids: engine.logs[ids], engine, list(range(30)), (8, 24)).verdict == "right"


@pytest.mark.parametrize(("most", "given"), [(5, 5), (-1, 20), (100, 20)])
def test_an_engine_of_vllm_with_another_limit_of_log_probabilities(most: int, given: int) -> None:
    assert len(as_source(Llm(max_logprobs=most)).observe([5, 6], [1]).tokens[0]) == given


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_logprobs": 0}, "has max_logprobs=0"),
        ({"logprobs_mode": "raw_logits"}, "has logprobs_mode='raw_logits': must be 'raw_logprobs'"),
    ],
)
def test_an_engine_of_vllm_that_gives_none(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        as_source(Llm(**config))


def test_prompts_that_an_engine_of_vllm_does_not_take() -> None:
    """One line each, before anything is asked where the engine says its limit."""
    engine, ids = Llm(), list(range(30)) * 2
    for lengths in ((8, 50), None):  # an answer of one token more is 51
        with pytest.raises(ConfigError, match="is not allowed; vLLM in this process takes 50 tokens, answer included"):
            certify(lambda ids: engine.logs[ids], engine, ids, lengths)
    assert certify(lambda ids: engine.logs[ids], engine, ids, (8, 49)).verdict == "right"
    for engine.refusal in (ValueError, sys.modules["vllm.exceptions"].VLLMClientError):
        with pytest.raises(ConfigError, match="refuses a prompt of 13 tokens: 13 tokens bring bad luck.$"):
            certify(lambda ids: engine.logs[ids], engine, ids, (8, 13))
    engine.dropped = 1
    with pytest.raises(ConfigError, match="read 1 tokens where 2 were sent; it adds or drops some"):
        as_source(engine).observe([5, 6], [1])


def test_a_model_whose_table_of_angles_ends() -> None:
    torch.manual_seed(0)
    config = GPTJConfig(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=16)
    model = GPTJForCausalLM(config).eval()
    ids = [3, 5, 7] * 8
    assert certify(lambda tokens: model(torch.tensor([tokens])).logits, model, ids, (8, 16)).verdict == "right"
    with pytest.raises(
        ConfigError, match="lengths 24 is not allowed; a GPTJForCausalLM with max_position_embeddings=16"
    ):
        certify(lambda tokens: torch.zeros(len(tokens), VOCABULARY), model, ids, (8, 24))
    with pytest.raises((IndexError, RuntimeError)):  # a token that it does not have is no matter of lengths
        certify(lambda tokens: torch.zeros(len(tokens), VOCABULARY), model, [99] * 24, (8, 12))
