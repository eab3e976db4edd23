"""Whatever a config, dictionary or spec holds: a record or one clear line, and no key that is silently ignored.

Examples are the same on every run. To search further:
`FUZZ_EXAMPLES=20000 python -m pytest tests/test_fuzz.py --hypothesis-seed=random`
"""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st

from scaled_rope import METHODS, ConfigError, RopeScaling, compute_rope
from scaled_rope.scaling.frequencies import compute_rope_batch
from scaled_rope.scaling.hf_config import CUSTOM_ROPE_TYPE, NATIVE, RECORD_KEY
from scaled_rope.scaling.record import LayerPlan

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "250"))
fuzz = settings(
    max_examples=EXAMPLES,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
# Remarks are part of what is tested here; as warnings they would only be noise.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

HEAD_DIM = 8
FAMILIES = [
    "llama",
    "mistral",
    "gemma3_text",
    "olmo3",
    "gpt_neox",
    "gpt_oss",
    "phi3",
    "cohere",
    "cohere2",
    "phimoe",
    "hunyuan_v1_dense",
    "minimax_m2",
    "mistral4",
    "unheard-of",
]
LAYER_TYPES = ["full_attention", "sliding_attention"]
RELEASED = ["dynamic-yarn", "dynamic-linear", "ntk-by-parts", "su"]

numbers = st.one_of(
    st.floats(), st.integers(), st.sampled_from([10**400, -(10**400), 2**63, 0, -1, 1, True, 5e-324, 1e308])
)
scalars = st.one_of(
    st.none(), st.booleans(), numbers, st.text(max_size=6), st.sampled_from(["yarn", "8", "1e4", "\n", ""])
)
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
lengths = st.sampled_from([32, 256, 4096])
divisors = st.lists(st.floats(0.5, 40), min_size=HEAD_DIM // 2, max_size=HEAD_DIM // 2)
PLAUSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "factor": st.floats(1, 64) | st.integers(1, 64),
    "original_max_position_embeddings": lengths,
    "rope_theta": st.sampled_from([500.0, 1e4, 5e5, 10000]),
    "partial_rotary_factor": st.sampled_from([0.5, 1.0]),
    "attention_factor": st.floats(0.5, 2),
    "beta_fast": st.floats(8, 128),
    "beta_slow": st.floats(0.25, 4),
    "mscale": st.floats(0.1, 2),
    "mscale_all_dim": st.floats(0.1, 2),
    "truncate": st.booleans(),
    "low_freq_factor": st.floats(0.5, 2),
    "high_freq_factor": st.floats(3, 8),
    "short_factor": divisors,
    "long_factor": divisors,
    "finetuned": st.booleans(),
}
PARAMS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "part-ntk": {
        "linear_above": st.floats(0.1, 1),
        "ntk_above": st.floats(1.1, 2),
        "blend_above": st.floats(0.5, 4),
        "keep_above": st.floats(5, 64),
    },
    "llama3": {"low_freq_factor": st.floats(0.1, 2), "high_freq_factor": st.floats(2.5, 64)},
    "longrope": {"short_factor": divisors, "long_factor": divisors},
    "abf": {"theta": st.floats(2, 1e9)},
    "ntk-mixed": {"exponent": st.floats(0.01, 5)},
    "proportional": {"fraction": st.floats(0.01, 1)},
    "cope": {"clip": st.integers(1, 5), "theta": st.floats(2, 1e9)},
    "hardclip": {"clip": st.integers(1, 5), "theta": st.floats(2, 1e9)},
}
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "factor": st.floats(1, 1e9) | st.integers(1, 100) | st.just(1),
    "original_max_position_embeddings": st.integers(1, 2**53) | lengths,
    "rope_theta": st.floats(1, 1e30, exclude_min=True) | st.integers(2, 10**7),
    "partial_rotary_factor": st.floats(0.01, 1) | st.just(0.5),
    "dynamic": st.booleans(),
    "attention_factor": st.floats(1e-6, 1e6),
    "resonance": st.booleans(),
    "beta_fast": st.floats(1e-6, 1e9) | st.floats(8, 128),
    "beta_slow": st.floats(1e-6, 1e9) | st.floats(0.1, 4),
    "mscale": st.floats(0, 1e5),
    "ramp": st.sampled_from(["dimension", "rotations"]),
    "truncate": st.booleans(),
    "extrapolation_factor": st.floats(0, 1),
    "attention_temperature": st.sampled_from(["log", "llama4", "ministral"]),
}


def mostly(usual: st.SearchStrategy[Any], other: st.SearchStrategy[Any] = junk) -> st.SearchStrategy[Any]:
    return st.integers(0, 5).flatmap(lambda draw: other if draw == 5 else usual)


def some_of(strategies: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=strategies)


@st.composite
def records(draw: st.DrawFn) -> RopeScaling:
    """Any record that can be constructed."""
    method = draw(st.sampled_from([name for name, row in METHODS.items() if row.kind == "frequency"]))
    row = METHODS[method]
    shared = (
        "original_max_position_embeddings",
        "rope_theta",
        "partial_rotary_factor",
        "resonance",
        "attention_temperature",
    )
    values = draw(some_of({name: FIELDS[name] for name in FIELDS if name in row.fields or name in shared}))
    if row.needs_original or values.get("dynamic") or "attention_temperature" in values:
        values.setdefault("original_max_position_embeddings", 4096)
    if "attention_temperature" in values:
        values["temperature_slope"] = draw(st.floats(0, 1000))
    values["params"] = draw(some_of(PARAMS.get(method, {})))
    if row.params_type is not None:
        for name in ("short_factor", "long_factor", "theta") if method in ("longrope", "abf") else ():
            if name in PARAMS[method]:
                values["params"].setdefault(name, draw(PARAMS[method][name]))
    try:
        return RopeScaling(method, **values)
    except ConfigError as error:
        assume("\n" in str(error))  # the only fields that exclude each other: two betas, ramp and truncate
        raise


@st.composite
def rope_dictionaries(draw: st.DrawFn) -> dict[str, Any]:
    """A RoPE dictionary that makes sense, or did before up to two of its keys were changed."""
    rope_type = draw(st.sampled_from([*NATIVE, *RELEASED, CUSTOM_ROPE_TYPE]))
    if rope_type == CUSTOM_ROPE_TYPE:
        rope = draw(records()).to_dict()
    else:
        rope = sensible(draw, rope_type)
    rope |= draw(
        st.sampled_from([{"rope_type": rope_type}, {"type": rope_type}, {"rope_type": rope_type, "type": "yarn"}])
    )
    keys = st.sampled_from(
        [*PLAUSIBLE, "rope_type", "type", "method", "params", "mrope_section", "dynamic", "attn_factor", "alpha"]
    )
    return rope | draw(mostly(st.just({}), st.dictionaries(keys | st.text(max_size=5), junk, min_size=1, max_size=2)))


def sensible(draw: st.DrawFn, rope_type: str) -> dict[str, Any]:
    """The keys of one rope type, without its name, with values that it takes."""
    like = {"dynamic-linear": "linear", "dynamic-yarn": "yarn", "ntk-by-parts": "yarn", "su": "longrope"}
    keys = set(NATIVE[like.get(rope_type, rope_type)].keys)
    if rope_type == "ntk-by-parts":
        keys -= {"attention_factor", "mscale", "mscale_all_dim"}
    elif rope_type == "dynamic-yarn":
        keys -= {"mscale", "mscale_all_dim"}
    required = keys & {"factor", "short_factor", "long_factor"}
    optional = keys - required | {"rope_theta", "partial_rotary_factor"}
    optional |= {"finetuned"} if rope_type in RELEASED else set()
    return draw(
        st.fixed_dictionaries(
            {key: PLAUSIBLE[key] for key in sorted(required)} | {"original_max_position_embeddings": lengths},
            optional={key: PLAUSIBLE[key] for key in sorted(optional)},
        )
    )


@st.composite
def configs(draw: st.DrawFn) -> Any:
    """A model's config as a dictionary or an object, or a RoPE dictionary alone; often a little broken."""
    ropes = mostly(rope_dictionaries())
    layers = st.dictionaries(st.sampled_from(LAYER_TYPES), ropes, min_size=1)
    beside = st.dictionaries(
        st.sampled_from(["truncate", "rope_theta", "factor", "chunked_attention"]), junk, max_size=1
    )
    nested = st.builds(dict.__or__, layers, mostly(st.just({}), beside))
    carried = mostly(st.builds(RopeScaling.to_dict, records()))
    plans = some_of({"layers": mostly(st.dictionaries(st.sampled_from(LAYER_TYPES), carried)), "drop_layers": junk})
    usual = {
        "model_type": st.sampled_from(FAMILIES),
        "max_position_embeddings": lengths,
        "original_max_position_embeddings": lengths,
        "rope_theta": PLAUSIBLE["rope_theta"],
        "partial_rotary_factor": PLAUSIBLE["partial_rotary_factor"],
        "rotary_pct": PLAUSIBLE["partial_rotary_factor"],
        "rope_local_base_freq": PLAUSIBLE["rope_theta"],
        "layer_types": st.lists(st.sampled_from(LAYER_TYPES)),
        "head_dim": st.just(HEAD_DIM),
        "hidden_size": st.just(64),
        "num_attention_heads": st.just(8),
        "rope_scaling": st.one_of(ropes, nested),
        "rope_parameters": st.one_of(ropes, nested),
        RECORD_KEY: st.one_of(carried, plans),
    }
    config: dict[str, Any] = draw(some_of(usual)) | draw(mostly(st.just({}), some_of(dict.fromkeys(usual, junk))))
    kind = draw(st.sampled_from(["dictionary", "dictionary", "object", "alone", "text"]))
    if kind == "object":
        return SimpleNamespace(**({"model_type": None} | config))
    if kind == "alone":
        return draw(st.one_of(ropes, nested))
    if kind == "text":
        return {"model_type": "outer", "text_config": config, **draw(st.sampled_from([{}, {"rope_theta": 7.5}]))}
    return config


def one_line(make: Any, *args: Any) -> Any:
    """Return the result of `make`, or None after a ConfigError of one line; any other exception is a failure."""
    try:
        return make(*args)
    except ConfigError as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < 2000, text
        return None


def use(scaling: RopeScaling) -> None:
    """Everything that a record promises."""
    assert scaling == RopeScaling.from_dict(json.loads(json.dumps(scaling.to_dict())))
    assert scaling == pickle.loads(pickle.dumps(scaling)) == copy.deepcopy(scaling)
    assert scaling.label and "\n" not in scaling.label and "\n" not in repr(scaling)
    assert scaling.max_position_embeddings is None or scaling.max_position_embeddings >= 1
    for seq_len in (None, 1, 100_000):
        computed = one_line(compute_rope, scaling, HEAD_DIM, seq_len)
        if computed is None:  # the width does not fit, whatever the length
            assert one_line(compute_rope, scaling, HEAD_DIM, 1) is None
            continue
        inv_freq, factor = computed
        assert inv_freq.isfinite().all() and (inv_freq >= 0).all() and 0 < factor < math.inf
        if seq_len is not None:
            rows, factors = compute_rope_batch(scaling, HEAD_DIM, torch.tensor([seq_len]))
            # Two roundings to float32, whose smallest number is 2^-149.
            torch.testing.assert_close(rows[0], inv_freq, rtol=2**-22, atol=2**-148)
            assert factors.isfinite().all() and factors.item() == pytest.approx(factor, rel=1e-6)


def write_and_read(scaling: RopeScaling) -> None:
    """What is written to a config comes back: as the record, or where transformers has words, as its numbers."""
    for dialect in ("rope_parameters", "rope_scaling"):
        for head_dim in (None, HEAD_DIM):
            written = one_line(scaling.to_config, head_dim)
            if written is None:  # NTK-aware for a width that it does not fit
                assert head_dim is not None and scaling.method == "ntk"
                continue
            said = json.loads(json.dumps(written))
            if dialect == "rope_scaling":
                said["type"] = said["rope_type"]
                del said["rope_theta"]
            config = {dialect: said, "rope_theta": written["rope_theta"]}
            note(f"{config}")
            again = RopeScaling.from_config(config)
            if written["rope_type"] == CUSTOM_ROPE_TYPE:
                assert again == scaling
                continue
            assert scaling.is_native(head_dim)
            computed = one_line(compute_rope, scaling, HEAD_DIM, 9999)
            if computed is None:
                assert one_line(compute_rope, again, HEAD_DIM, 9999) is None
                continue
            inv_freq, factor = compute_rope(again, HEAD_DIM, 9999)
            # b' is computed by torch in the one and written by Python in the other: a rounding may move.
            torch.testing.assert_close(inv_freq, computed[0], rtol=2**-22, atol=2**-148)
            assert factor == pytest.approx(computed[1], rel=1e-12)


@fuzz
@given(records())
def test_every_record_can_be_used_written_and_read(scaling):
    use(scaling)
    write_and_read(scaling)


@fuzz
@given(configs(), st.none() | st.sampled_from([*LAYER_TYPES, "chunked_attention", ""]))
def test_a_config_gives_a_record_or_one_line(config, layer_type):
    before = copy.deepcopy(config)
    scaling = one_line(RopeScaling.from_config, config, layer_type)
    if scaling is not None:
        use(scaling)
        write_and_read(scaling)
    plan = one_line(LayerPlan.from_config, config)
    if plan is not None:
        for each in plan.layers.values():
            use(each)
        assert all(index >= 0 for index in plan.drop_layers)
    assert repr(config) == repr(before)  # reading changes nothing; as text, because nan is not itself


names = [*PLAUSIBLE, "rope_type", "type", "rope_parameters", "rope_scaling", "text_config", "model_type", RECORD_KEY]
keys_of_any_kind = st.sampled_from(names) | st.text(max_size=3) | st.integers() | st.none()


@fuzz
@given(st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(keys_of_any_kind, inner), max_leaves=12))
def test_anything_gives_a_record_or_one_line(value):
    for read in (RopeScaling.from_config, RopeScaling.from_dict, LayerPlan.from_config):
        if read == RopeScaling.from_dict and not isinstance(value, dict):
            continue
        result = one_line(read, value)
        if isinstance(result, RopeScaling):
            use(result)


@fuzz
@given(
    st.sampled_from([*METHODS, "unheard-of"]),
    st.dictionaries(st.sampled_from([*FIELDS, "dynamic_step", "params", "window"]), junk, max_size=3),
    st.dictionaries(
        st.sampled_from([name for params in PARAMS.values() for name in params]) | st.text(), junk, max_size=2
    ),
)
def test_fields_give_a_record_or_one_line(method, values, params):
    scaling = one_line(RopeScaling.from_dict, {"method": method, "params": params} | values)
    if scaling is not None:
        use(scaling)


@fuzz
@given(
    st.sampled_from(["", "dynamic-", "dynamic-dynamic-"]),
    st.sampled_from([*METHODS, "none", "unscaled", "ntk-by-part", ""]),
    st.sampled_from(["", ":", ":8", ":1e3", ":1e400", ":-2", ":nan", ":8:8"]),
    st.lists(
        st.tuples(
            st.sampled_from(
                [*FIELDS, *(name for params in PARAMS.values() for name in params), "params", "method", ""]
            ),
            st.sampled_from(
                ["", "1", "true", "2.5", "1e+5", "1+2", "1+1.5+2e+1+3", "+", "1+", "nan", "rotations", "²", "_"]
            )
            | st.text(max_size=4),
        ),
        max_size=3,
    ),
    st.text(max_size=3),
)
def test_a_spec_gives_a_record_or_one_line(prefix, method, factor, options, end):
    text = ",".join([prefix + method + factor, *(f"{key}={value}" for key, value in options)]) + end
    scaling = one_line(RopeScaling.from_spec, text, RopeScaling("default", 1.0, 4096, 5e5))
    if scaling is not None:
        use(scaling)


IGNORED_WITHOUT_A_WORD = {
    "finetuned": "only says how a checkpoint came to be; only two types of the released code read it",
}


@st.composite
def sensible_configs(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any], str | None]:
    """(config, the RoPE dictionary inside it, the layer type that it is for); nothing in it is wrong."""
    rope_type = draw(st.sampled_from([*NATIVE, *RELEASED]))
    rope = sensible(draw, rope_type) | {draw(st.sampled_from(["rope_type", "type"])): rope_type}
    if rope_type == "yarn":
        # truncate=False is what differs from the default
        rope = {key: value for key, value in rope.items() if key != "truncate" or not value}
    config = draw(
        st.fixed_dictionaries(
            {"model_type": st.sampled_from(FAMILIES)},
            optional={key: PLAUSIBLE[key] for key in ("rope_theta", "original_max_position_embeddings")}
            | {"max_position_embeddings": lengths},
        )
    )
    layer_type = draw(st.sampled_from([None, None, *LAYER_TYPES]))
    dialect = draw(st.sampled_from(["rope_parameters", "rope_scaling"]))
    if layer_type is None:
        config[dialect] = rope
    else:
        config[dialect] = {name: rope if name == layer_type else {"rope_type": "default"} for name in LAYER_TYPES}
    return config, rope, layer_type


@fuzz
@given(
    sensible_configs(), st.text(max_size=8) | st.sampled_from([*PLAUSIBLE, "attn_factor", "dynamic", "window"]), scalars
)
def test_a_key_that_is_not_known_is_an_error(given_config, key, value):
    config, rope, layer_type = given_config
    taken = {*PLAUSIBLE, "rope_type", "type"} & {*rope}
    rope_type = rope.get("rope_type", rope.get("type"))
    native = NATIVE.get({"su": "longrope", "dynamic-linear": "linear"}.get(rope_type, rope_type), NATIVE["yarn"])
    known = {*native.keys, "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "finetuned"}
    assume(key not in taken | known | {"rope_type", "type"})
    assume(value is not None)  # null says that nothing is set
    assume(
        config["model_type"] not in ("gemma3_text", "olmo3") or layer_type
    )  # there flat parameters count for nothing
    read = one_line(RopeScaling.read_config, config, layer_type)
    rope[key] = value
    with pytest.raises(ConfigError, match="unknown key"):
        RopeScaling.from_config(config, layer_type)
    assert read is None or read[0]


@fuzz
@given(sensible_configs(), st.data())
def test_a_number_that_changes_is_seen_or_remarked_on(given_config, data):
    """Change one number in a RoPE dictionary: the record changes, or a remark names the key, or it is an error."""
    config, rope, layer_type = given_config
    read = one_line(RopeScaling.read_config, config, layer_type)
    assume(read is not None)
    changeable = sorted(key for key, value in rope.items() if isinstance(value, int | float | list))
    key = data.draw(st.sampled_from(changeable))
    if key in IGNORED_WITHOUT_A_WORD:
        return
    if key in ("mscale", "mscale_all_dim") and read[0].factor == 1:
        return  # both are multiplied by ln(s)
    old = rope[key]
    if isinstance(old, bool):
        rope[key] = not old
    elif isinstance(old, list):
        rope[key] = [old[0] * 1.5, *old[1:]]
    else:
        rope[key] = data.draw(PLAUSIBLE[key].filter(lambda value: value != old))
    again = one_line(RopeScaling.read_config, config, layer_type)
    if again is not None and again[0] == read[0]:
        assert any(key in remark.text or remark.code == "flat-parameters" for remark in again[1] + read[1]), key


def ropes_outside() -> st.SearchStrategy[Any]:
    return st.sampled_from([{"rope_type": "yarn", "factor": 4.0}, {"type": "nonsense"}, {"factor": "x"}])


PATHS = [["text_config"], ["thinker_config", "text_config"], ["vlm_config", "text_config"], ["llm_config"]]


@fuzz
@given(
    sensible_configs(), st.sampled_from(PATHS), some_of({"rope_theta": st.just(7.5), "rope_scaling": ropes_outside()})
)
def test_a_text_part_is_read_wherever_it_is(given_config, path, outside):
    config, _, layer_type = given_config
    read = one_line(RopeScaling.read_config, config, layer_type)
    composite = config
    for name in reversed(path):
        composite = {"model_type": "outer", "vision_config": {"rope_theta": 3.0}, name: composite}
    again = one_line(RopeScaling.read_config, outside | composite, layer_type)
    assert (again is None) == (read is None)
    if read is not None:
        assert again[0] == read[0]
        remarks = [remark for remark in again[1] if remark not in read[1]]
        assert sorted(remark.text.split()[0] for remark in remarks) == sorted(outside)
        assert {remark.code for remark in remarks} <= {"outside-text"}


@fuzz
@given(sensible_configs(), st.lists(st.integers(1, 64), min_size=3, max_size=4), st.booleans())
def test_axes_of_a_multimodal_model_change_nothing(given_config, sections, interleaved):
    config, rope, layer_type = given_config
    read = one_line(RopeScaling.read_config, config, layer_type)
    axes = {"mrope_section": sections} | ({"mrope_interleaved": True} if interleaved else {})
    rope |= axes
    again = one_line(RopeScaling.read_config, config, layer_type)
    assert (again is None) == (read is None)
    if read is not None:
        assert again[0] == read[0]
        if config["model_type"] not in ("gemma3_text", "olmo3") or layer_type:  # these drop flat parameters
            assert all(any(name in remark.text for remark in again[1]) for name in axes)


@fuzz
@given(
    st.sampled_from(["hunyuan_v1_dense", "phimoe", "minimax_m2", "mistral4", "deepseek_v3"]),
    st.dictionaries(
        st.sampled_from(["alpha", "short_mscale", "long_mscale", "mscale", "mscale_all_dim", "llama_4_scaling_beta"]),
        junk,
    ),
    rope_dictionaries(),
    some_of({"rotary_dim": junk, "head_dim": mostly(st.just(HEAD_DIM)), "qk_rope_head_dim": junk}),
)
def test_keys_of_families_give_a_record_or_one_line(family, keys, rope, sizes):
    config = {"model_type": family, "max_position_embeddings": 4096, "rope_scaling": rope | keys} | sizes
    scaling = one_line(RopeScaling.from_config, config)
    if scaling is not None:
        use(scaling)
