"""Parameters that belong to one method each."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest

from scaled_rope import RopeScaling
from scaled_rope.errors import ConfigError
from tests.helpers.records import LISTS


def test_params_are_canonical():
    plain = RopeScaling("llama3", 8.0, 8192)
    spelled_out = RopeScaling("llama3", 8, 8192, params={"low_freq_factor": 1, "high_freq_factor": 4})
    assert spelled_out == plain and hash(spelled_out) == hash(plain)
    assert spelled_out.params == {} and spelled_out.to_dict() == plain.to_dict()
    assert plain.method_params.high_freq_factor == 4.0

    whole = RopeScaling("longrope", 4, 64, params={"short_factor": (1, 2), "long_factor": [4, np.float32(8)]})
    assert whole.params == {"short_factor": [1.0, 2.0], "long_factor": [4.0, 8.0]}
    assert {type(value) for values in whole.params.values() for value in values} == {float}
    clipped = RopeScaling("cope", params={"clip": np.int64(20), "theta": None})
    assert json.dumps(clipped.to_dict()) == '{"method": "cope", "params": {"clip": 20}}'
    assert type(RopeScaling("abf", params={"theta": 500000}).params["theta"]) is float

    given = deepcopy(LISTS)
    scaling = RopeScaling("longrope", 4.0, 64, params=given)
    given["short_factor"].append(3.0)  # a record does not share what it was made from
    assert scaling.params == LISTS
    assert scaling != replace(scaling, params=LISTS | {"long_factor": [1.0, 1.0, 1.0, 1.0]})


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("rerope", "window is missing"),
        ("rerope:512", "window is missing"),
        ("rerope,window=0", "window=0: must be a whole number, at least 1"),
        ("rerope,window=2.5", "window=2.5: must be a whole number"),
        ("rerope,window=32", "window=32: must be below the trained length, 32 tokens"),
        ("rerope,window=8,logn=2", "logn=2: must be true or false"),
        ("leaky-rerope,window=8,k=1", "k=1: must be a finite number above 1"),
        ("leaky-rerope,window=8,k=1e300", r"k=1e\+300: must be a finite number above 1 and at most 1e\+09"),
        ("self-extend,group=1,window=8", "group=1: must be a whole number, at least 2"),
        ("dpe,groups=4,window=8", "groups=4: must be a list with a number for each group of pairs"),
        ("dpe,groups=4+0,window=8", "groups holds 0: must be whole numbers, at least 1"),
        ("dpe,groups=4+1.5,window=8", "groups holds 1.5: must be whole numbers, at least 1"),
        ("dpe,groups=1+1,window=8", r"groups=\[1, 1\]: must hold a number above 1"),
        ("dpe,groups=4+2,window=32", "window=32: must be below the trained length, 32 tokens"),
        ("dual-chunk,chunk=32", "chunk=32: must be below the trained length, 32 tokens"),
        ("dynamic-rerope,window=8", "method 'rerope' has no dynamic form"),
        ("rerope,window=8,resonance=true", "resonance=True: not for method 'rerope'"),
        ("rerope,window=8,attention_factor=2", "attention_factor=2.0: not for method 'rerope'"),
    ],
)
def test_parameters_that_cannot_be(spec: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RopeScaling.from_spec(spec, RopeScaling("default", original_max_position_embeddings=32))
