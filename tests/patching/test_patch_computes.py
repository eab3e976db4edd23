"""Whether an unpatched model computes what its config says."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor

from scaled_rope import RopeScaling, patch_model
from scaled_rope.patching.base_model import base_model
from scaled_rope.patching.layer_tables import TableForm
from scaled_rope.patching.patch import _state_of, computes, lost_part
from tests.helpers.families import ALL, CHANGED, SAME, WITHOUT_WORDS, distance, logits, record, vanilla_settings
from tests.helpers.models import LAYER_TYPES, PLAIN, Make
from tests.helpers.optional import nested_parameters


@pytest.mark.parametrize("family", ALL)
def test_computes_goes_by_what_is_computed(tiny_model: Make, tokens: Tensor, family: str) -> None:
    plain = tiny_model(family)
    own = record(plain, "default")
    for method in ("default", "linear", "yarn"):
        if method in WITHOUT_WORDS.get(family, ()):
            continue
        scaling = record(plain, method)
        vanilla = tiny_model(family, **vanilla_settings(plain, method))
        assert computes(vanilla, scaling)
        assert computes(vanilla, own) == (method == "default")
        assert not computes(vanilla, record(plain, "longrope"))  # of the text at hand it knows nothing
    # The trap: a config that is changed after loading changes nothing.
    if family == "phimoe":
        return  # its rotary module reads its config in every pass
    before = logits(plain, tokens)
    for name, value in vanilla_settings(plain, "yarn").items():
        setattr(plain.config, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Mistral's constants
        assert RopeScaling.from_config(plain.config) == record(plain, "yarn")
    assert torch.equal(logits(plain, tokens), before)
    assert computes(plain, own) and not computes(plain, record(plain, "yarn"))


def test_gpt_oss_computes_the_yarn_of_its_family(tiny_model: Make, tokens: Tensor) -> None:
    model = tiny_model("gpt_oss", rope_parameters=None, max_position_embeddings=4096)
    own = RopeScaling.from_config(model.config)
    assert (own.method, own.factor, own.truncate, own.rope_theta) == ("yarn", 32.0, False, 1.5e5)
    before = logits(model, tokens)
    assert computes(model, own)
    report = patch_model(model, own)
    assert report.native and distance(logits(model, tokens), before) < SAME
    patch_model(model, "default")
    assert distance(logits(model, tokens), before) > CHANGED


def test_computes_is_not_sure_of_a_module_that_switches(tiny_model: Make) -> None:
    # Up to L this one has the frequencies and the factor of an unscaled model.
    longrope = {"factor": 4.0, "attention_factor": 1.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {**PLAIN, "rope_type": "longrope", "original_max_position_embeddings": 32, **longrope}
    assert not computes(tiny_model(rope_parameters=rope), RopeScaling("default", original_max_position_embeddings=32))
    rope = {**PLAIN, "rope_type": "dynamic", "factor": 2.0}
    assert not computes(tiny_model(rope_parameters=rope), RopeScaling("default", original_max_position_embeddings=32))


@nested_parameters
def test_a_flat_scaling_on_olmo_3_is_dropped_and_we_say_so(tiny_model: Make, tokens: Tensor) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 32}
    plain = tiny_model("olmo3")
    own = record(plain, "default")
    model = tiny_model("olmo3", rope_parameters=dict(yarn))
    assert distance(logits(model, tokens), logits(plain, tokens)) == 0
    assert computes(model, own) and not computes(model, record(plain, "yarn"))
    raw = {**plain.config.to_dict(), "rope_parameters": yarn}
    with pytest.warns(UserWarning, match="not nested per layer type: transformers drops it"):
        assert RopeScaling.from_config(raw) == own


@nested_parameters
def test_truncate_counts_outside_the_layer_types_only(tiny_model: Make, tokens: Tensor) -> None:
    # With these bounds the ramp's ends are not whole; with the default ones truncation would change little.
    options = {"beta_fast": 2.0, "beta_slow": 0.1}
    plain = tiny_model("gemma3_text", rope_parameters={name: dict(PLAIN) for name in LAYER_TYPES})
    yarn = {**PLAIN, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **options}
    rounded, unrounded = (RopeScaling("yarn", 4.0, 32, **options, **more) for more in ({}, {"truncate": False}))
    inside = {"sliding_attention": PLAIN, "full_attention": {**yarn, "truncate": False}}
    outside = {"sliding_attention": PLAIN, "full_attention": yarn, "truncate": False}
    for rope, computed in ((inside, rounded), (outside, unrounded)):
        model = tiny_model("gemma3_text", rope_parameters=rope, max_position_embeddings=128)
        assert computes(model, computed)
        assert computes(model, rounded) != computes(model, unrounded)
        patched = copy.deepcopy(plain)
        # Unrounded ends cannot be said in a layer type, so that is left to our own words.
        assert patch_model(patched, computed).native == (computed is rounded)
        assert distance(logits(patched, tokens), logits(model, tokens)) < SAME
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read = RopeScaling.from_config({**model.config.to_dict(), "rope_parameters": rope})
        assert (read.truncate is False) == (computed is unrounded)
        assert any("has no effect" in str(one.message) for one in caught) == (computed is rounded)


@pytest.mark.parametrize("family", ALL)
def test_a_patch_is_whole_in_every_family_and_copy(tiny_model: Make, family: str) -> None:
    for spec in ("yarn:4", "dynamic-yarn:2"):
        model = tiny_model(family)
        assert lost_part(model) == ""
        patch_model(model, spec)
        for one in (model, copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16), model.to("meta")):
            assert lost_part(one) == ""
        state = _state_of(model)
        assert state is not None
        place = state.unpatched.places[0]
        place.put(base_model(model), place.module)
        assert place.path in lost_part(model)


def test_our_own_failing_is_not_another_computation(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(rope_parameters={**PLAIN, "rope_type": "dynamic", "factor": 2.0})
    own = RopeScaling.from_config(model.config)
    assert computes(model, own, by_length=True)

    def fail(*args: object) -> None:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(TableForm, "frequencies", fail)
    with pytest.raises(ZeroDivisionError, match="a bug of ours"):
        computes(model, own, by_length=True)
