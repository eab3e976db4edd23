"""Certificates of models of this process: named right where anything can be told apart, never wrong."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scaled_rope.certificate.certify import Certificate, certify
from scaled_rope.certificate.hypotheses import Hypothesis, hypotheses
from scaled_rope.certificate.observed import Callables, Observed
from scaled_rope.certificate.reference import Predicted, Reference
from scaled_rope.errors import ConfigError
from scaled_rope.patching.loading import apply_scaling, load_model
from scaled_rope.scaling.record import RopeScaling
from tests.helpers.models import Make

L, N, VOCABULARY = 32, 96, 61


def make(seed: int = 0) -> LlamaForCausalLM:
    """A random model whose attention is sharp enough for positions to matter, with 32 positions."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCABULARY,
        max_position_embeddings=L,
        initializer_range=0.4,
        rope_theta=1000.0,
    )
    return LlamaForCausalLM(config).eval()


BASE = RopeScaling("default", original_max_position_embeddings=L, rope_theta=1000.0)


pytestmark = pytest.mark.filterwarnings("ignore:rope_theta")


def scaled(model: LlamaForCausalLM, spec: str) -> LlamaForCausalLM:
    apply_scaling(model, RopeScaling.from_spec(spec, BASE))
    return model


@pytest.fixture(scope="module")
def ids() -> list[int]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, VOCABULARY, (N,), generator=generator).tolist()


def certified(ids: list[int], claim: str, served: str, seed: int = 0, **options: object) -> Certificate:
    return certify(scaled(make(seed), claim), scaled(make(seed), served), ids, (24, N), raw={}, **options)


@pytest.mark.parametrize("claim", ["yarn:4", "linear:2", "ntk:4", "ntk-by-parts:4", "llama3:8,low_freq_factor=1,"
                                   "high_freq_factor=4", "yarn:4,beta_fast=8,beta_slow=2,mscale=0.7"])  # fmt: skip
def test_what_is_served_as_claimed_is_right(claim: str, ids: list[int]) -> None:
    found = certified(ids, claim, claim)
    assert (found.verdict, found.exit_code) == ("right", 0) and found.sentence.startswith("serves ")
    assert found.lengths[-1].claimed == pytest.approx(0, abs=1e-5) and found.lengths[-1].length == N
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("served", "name"),
    [
        ("default", "this model unscaled"),
        ("yarn:4,attention_factor=1", "yarn x4 without the attention factor"),
        ("yarn:4,attention_factor=1.29648054", "yarn x4 with the attention factor twice"),
        ("yarn:4,original_max_position_embeddings=64", "yarn x4 with L = 64 instead of 32"),
        ("yarn:4,original_max_position_embeddings=128", "yarn x4 with L = 128 instead of 32"),
        ("yarn:16", "yarn x4 with the factor applied twice (x16)"),
        ("yarn:4,rope_theta=10000", "yarn x4 with rope_theta=10000"),
        ("default,rope_theta=10000", "this model unscaled, with rope_theta=10000"),
        ("linear:4", "linear x4"),
    ],
)
def test_known_faults_are_named(served: str, name: str, ids: list[int]) -> None:
    if "attention_factor=1.2" in served:  # (0.1·ln 4 + 1)²
        served = f"yarn:4,attention_factor={(0.1 * math.log(4) + 1) ** 2!r}"
    found = certified(ids, "yarn:4", served)
    assert (found.verdict, found.exit_code) == ("other", 1), found.sentence
    assert found.names[0].startswith(name) and f"serves {name}" in found.sentence and "not yarn x4" in found.sentence


def test_constants_that_were_dropped_are_named(ids: list[int]) -> None:
    """As by llama.cpp, whose Llama reads none of those that its converter writes."""
    found = certified(ids, "yarn:4,beta_fast=8,beta_slow=4,mscale=0.7", "yarn:4")
    assert found.verdict == "other" and found.names[0].endswith("with YaRN's default constants"), found.sentence


def test_frequencies_that_stand_still_and_are_turned_are_named(ids: list[int]) -> None:
    found = certified(ids, "proportional:4,fraction=0.5", "default")
    assert found.names == ("this model unscaled, with every frequency turning",), found.sentence


def test_what_differs_beyond_the_target_alone_is_a_candidate(ids: list[int]) -> None:
    """An unscaled model up to L, the target of a dynamic scaling; prompts go beyond it."""
    found = certified(ids, "dynamic-ntk:4", "default", length=L)
    assert found.verdict == "other" and found.names[0].startswith("this model unscaled"), found.sentence


def test_a_window_in_all_layers_is_named(ids: list[int]) -> None:
    class Windowed(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, **options: object):  # type: ignore[no-untyped-def, override]
            length = input_ids.shape[1]
            away = torch.arange(length)[:, None] - torch.arange(length)
            hidden = torch.where((away < 0) | (away >= L), torch.finfo(torch.float32).min, 0.0)
            return super().forward(input_ids, attention_mask=hidden[None, None], **options)

    served = make()
    served = scaled(served, "yarn:4")
    served.__class__ = Windowed
    found = certify(scaled(make(), "yarn:4"), served, ids, (24, N), raw={})
    assert found.verdict == "other" and "window of 32 tokens" in found.names[0]
    short = certify(scaled(make(), "yarn:4"), served, ids, (8, 24), raw={})
    assert short.verdict == "right" and "window of 32 tokens" in " ".join(short.notes)  # nobody can tell


@pytest.mark.parametrize("types", [None, ["sliding_attention", "full_attention"]])
def test_a_model_with_sliding_windows_is_the_reference(
    types: list[str] | None, ids: list[int], tiny_model: Make, tmp_path: Path
) -> None:
    """Which `load_model` gives an attention that takes no mask of the window hypothesis."""
    if types is None:
        tiny_model("mistral", sliding_window=40).save_pretrained(tmp_path)
    else:
        tiny_model("qwen2", sliding_window=40, layer_types=types).save_pretrained(tmp_path)
    reference, served = load_model(str(tmp_path)), load_model(str(tmp_path), attn_implementation="eager")
    assert reference.config._attn_implementation == "sdpa_blocked"
    found = certify(reference, served, ids, (24, N))
    assert found.verdict == "right" and reference.config._attn_implementation == "sdpa_blocked"


def test_a_scaling_that_is_no_candidate_is_not_called_right(ids: list[int]) -> None:
    found = certified(ids, "yarn:4", "yarn:5.5")
    assert (found.verdict, found.exit_code) == ("unclear", 3) and "none of" in found.sentence
    named = certified(ids, "yarn:4", "yarn:5.5", more={"what it ran before": RopeScaling.from_spec("yarn:5.5", BASE)})
    assert named.verdict == "other" and named.names == ("what it ran before",)


def test_other_weights_are_not_taken_for_another_scaling(ids: list[int]) -> None:
    found = certify(scaled(make(0), "yarn:4"), scaled(make(1), "yarn:4"), ids, (24, N), raw={})
    assert found.verdict == "unclear" and "prompts of one token" in found.sentence


def test_a_server_in_bfloat16_is_told_by_its_dtype(ids: list[int]) -> None:
    reference = scaled(make(), "yarn:4")
    for served, verdict in (("yarn:4", "right"), ("default", "other"), ("yarn:4,attention_factor=1", "other")):
        found = certify(reference, scaled(make(), served).to(torch.bfloat16), ids, (24, N), raw={})
        assert found.dtype == "bfloat16" and found.verdict == verdict, (served, found.sentence)
    told = certify(reference, scaled(make(), "yarn:4").to(torch.bfloat16), ids, (24, N), raw={}, dtype="bfloat16")
    assert told.verdict == "right"


def test_two_callables(ids: list[int]) -> None:
    """A trainer and its rollout engine: do they compute the same?"""

    def logits(model: LlamaForCausalLM, last: bool = False):  # type: ignore[no-untyped-def]
        def call(tokens: list[int]) -> torch.Tensor:
            with torch.inference_mode():
                rows = model(torch.tensor([tokens])).logits[0]
            return rows[-1] if last else rows

        return call

    one, other = logits(scaled(make(), "yarn:4")), logits(scaled(make(), "default"))
    assert certify(one, logits(scaled(make(), "yarn:4")), ids, (24, N)).verdict == "right"
    assert certify(one, logits(scaled(make(), "yarn:4"), last=True), ids, (24, N)).verdict == "right"
    assert certify(one, other, ids, (24, N)).verdict == "unclear"  # not the same, and nothing says what it is
    assert certify(scaled(make(), "yarn:4"), other, ids, (24, N), raw={}).names[0].startswith("this model unscaled")


def test_the_trainers_model_is_left_alone(ids: list[int]) -> None:
    model = scaled(make(), "yarn:4")
    before = copy.deepcopy(model.state_dict())
    logits = model(torch.tensor([ids])).logits
    certify(model, scaled(make(), "default"), ids, (24, N), raw={})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model(torch.tensor([ids])).logits, logits)


def test_what_cannot_be_certified(ids: list[int]) -> None:
    model = scaled(make(), "yarn:4")
    for options, message in (
        ({"lengths": (1, 5)}, "at least 2 tokens"),
        ({"lengths": (500,)}, "is beyond the text"),
        ({"claim": "rerope,window=8"}, "changes attention itself"),
        ({"claim": "yarn:4,attention_temperature=log"}, "with attention_temperature=log multiplies queries"),
    ):
        with pytest.raises(ConfigError, match=message):
            certify(model, model, ids, **options)
    with pytest.raises(ConfigError, match=r"returned \[7, 3\] for 1 tokens"):
        certify(model, lambda tokens: torch.zeros(1, 7, 3), ids, (24, N))
    with pytest.raises(ConfigError, match="must be a server, a model, or a callable"):
        certify(model, 5, ids)
    callables = Callables(lambda tokens: torch.zeros(len(tokens), 3), "an engine")
    callables.max_length = N
    with pytest.raises(ConfigError, match=f"lengths {N} is not allowed; an engine takes {N} tokens, answer included"):
        certify(model, callables, ids)  # without lengths too


SPECS = ["default", "linear:2", "linear:4", "linear:4.1", "ntk:2", "ntk:4", "ntk:4.02", "ntk-by-parts:4", "yarn:2",
         "yarn:4", "yarn:4.001", "yarn:4.05", "yarn:4,attention_factor=1", "yarn:4,attention_factor=1.14",
         "yarn:4,beta_fast=16", "yarn:4,beta_fast=8,beta_slow=2", "yarn:4,original_max_position_embeddings=64",
         "yarn:4,truncate=false", "yarn:4,rope_theta=1001", "yarn:8", "yarn:16", "default,rope_theta=10000",
         "default,rope_theta=1000.5"]  # fmt: skip


class _Kept(Reference):
    """A reference that keeps a model per scaling, because patching takes ten times as long as a pass of this model."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__(model)
        self.kept: dict[str, Reference] = {}
        self.rounded_ones: dict[str, Reference] = {}

    def of(self, scaling: RopeScaling) -> Reference:
        key = repr(scaling)
        if key not in self.kept:
            self.kept[key] = Reference(copy.deepcopy(self.model))
        return self.kept[key]

    def predict(self, hypothesis: Hypothesis, observed: Observed) -> Predicted:
        return self.of(hypothesis.scaling).predict(hypothesis, observed)

    def rounded(self, dtype: str) -> Reference:
        if dtype not in self.rounded_ones:
            self.rounded_ones[dtype] = _Kept(super().rounded(dtype).model)
        return self.rounded_ones[dtype]


@pytest.mark.parametrize("pairs", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_random_pairs_of_served_and_claimed(pairs: int) -> None:
    """Those further apart than five times the noise are all named right, nearer ones right or unclear, never wrong."""
    draw = random.Random(0)
    reference = _Kept(make(5))
    served: dict[tuple[str, bool], LlamaForCausalLM] = {}
    named = unclear = 0
    for trial in range(pairs):
        claim = draw.choice(SPECS)
        actual = draw.choice(SPECS) if trial % 4 else claim
        short = trial % 3 == 0  # a server in bfloat16
        if (actual, short) not in served:
            model = scaled(make(5), actual)
            served[actual, short] = model.to(torch.bfloat16) if short else model
        text = [draw.randrange(1, VOCABULARY) for _ in range(N)]
        claimed, truth = (RopeScaling.from_spec(spec, BASE) for spec in (claim, actual))
        more = {"the one served": truth}
        found = certify(reference, served[actual, short], text, (16, N), claim=claimed, raw={}, more=more)
        off, noise = _distance(reference, claimed, truth, text), max(row.noise for row in found.lengths)
        if found.verdict == "unclear":
            unclear += 1
            assert off < 5 * noise, (claim, actual, off / noise, found.sentence)
            continue
        named += 1
        same = off < 1e-5  # beta_fast=16 and 32 are one table here
        assert found.verdict == ("right" if same else "other"), (claim, actual, off / noise, found.sentence)
        if not same:  # the served one, under whichever of its names
            known = hypotheses(claimed, 16, N, {}, more)
            true = next(one.name for one in known if "the one served" in (one.name, *one.also) or one.scaling == truth)
            assert true in found.names, (claim, actual, found.sentence)
    assert named > 0.75 * pairs and unclear > 0.025 * pairs, (named, unclear)


def _distance(reference: _Kept, one: RopeScaling, other: RopeScaling, text: list[int]) -> float:
    """Root mean square difference of the log-probabilities of the likeliest tokens, in nats, over the longer prompt."""
    every = tuple(np.arange(VOCABULARY) for _ in text)
    asked = Observed(tuple(text), tuple(range(len(text))), every, ())
    rows = [np.stack(reference.predict(Hypothesis("", scaling), asked)) for scaling in (one, other)]
    top = np.argsort(-rows[1])[:, :20]
    return float(np.sqrt(np.mean((np.take_along_axis(rows[0], top, 1) - np.take_along_axis(rows[1], top, 1)) ** 2)))
