"""What is read from configs of published models, and which traps are found in them."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from scaled_rope import ConfigError, RopeScaling, compute_rope, patch_model
from scaled_rope.cli import main
from scaled_rope.serving.inspect_config import inspect
from scaled_rope.serving.repair import repair
from tests.helpers.families import REFUSALS
from tests.helpers.published_configs import (
    COHERE2,
    DEEPSEEK,
    FALCON,
    GEMMA3,
    LLAMA,
    LLAMA3,
    MISTRAL,
    OLMO3,
    PHI3,
    PHI35_MOE,
    PUBLISHED,
    PYTHIA,
    QWEN,
    REMOTE,
    SMOLLM3,
    written,
    yarn,
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_set_off_what_they_should_and_nothing_else(name: str):
    config, label, codes = PUBLISHED[name]
    report = inspect(config)
    assert report.scaling is not None and report.scaling.label.startswith(label)
    assert set(report.codes) == codes, report.text()
    assert report.exit_code == 0
    assert len(report.dimensions) == report.head_dim * report.scaling.partial_rotary_factor / 2


def scaled(base: dict[str, Any], **rope: Any) -> dict[str, Any]:
    return base | {"rope_scaling": rope}


NEW = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
STATIC = "static-scaling"
WIDE = {"max_position_embeddings": 32768}

# A trap -> (config, the code of the trap, its level, codes that come along).
TRAPS: dict[str, tuple[dict[str, Any], str, str, set[str]]] = {
    "factor times L is below max_position_embeddings": (
        scaled(LLAMA | {"max_position_embeddings": 65536}, **yarn(8.0, 4096)),
        "length-mismatch",
        "warning",
        {STATIC},
    ),
    "factor times L is above max_position_embeddings": (
        scaled(LLAMA | {"max_position_embeddings": 16384}, **yarn(8.0, 4096)),
        "length-mismatch",
        "warning",
        {STATIC},
    ),
    "factor counts twice: L missing, max_position_embeddings extended": (
        scaled(LLAMA | {"max_position_embeddings": 65536}, **yarn(16.0, None)),
        "factor-twice",
        "warning",
        {STATIC},
    ),
    "factor counts twice: L is max_position_embeddings": (
        scaled(LLAMA | WIDE, **yarn(8.0, 32768)),
        "undeclared-length",
        "warning",
        {STATIC},
    ),
    "L missing": (scaled(LLAMA, **yarn(8.0, None)), "no-original", "warning", {STATIC}),
    "L missing, position interpolation": (
        scaled(LLAMA, type="linear", factor=8.0),
        "unknown-original",
        "info",
        {STATIC},
    ),
    "factor counts twice, position interpolation": (
        scaled(LLAMA | WIDE, type="linear", factor=8.0),
        "factor-twice",
        "warning",
        {STATIC},
    ),
    "theta missing, known family": (scaled(NEW | WIDE, **yarn(8.0, 4096)), "family-theta", "info", {STATIC}),
    "theta missing, unknown family": (
        scaled(NEW | WIDE | {"model_type": "llamoid"}, **yarn(8.0, 4096)),
        "no-theta",
        "warning",
        {STATIC, "unknown-family"},
    ),
    "theta dropped: rope_scaling replaces the dictionary that held it": (
        NEW | WIDE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": yarn(8.0, 4096)},
        "theta-dropped",
        "error",
        {STATIC, "both-dialects", "family-theta"},
    ),
    "theta twice": (
        LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "two-values",
        "warning",
        set(),
    ),
    "both dialects, which disagree": (
        LLAMA | WIDE | {"rope_scaling": yarn(8.0, 4096), "rope_parameters": yarn(4.0, 4096)},
        "both-dialects",
        "warning",
        {STATIC},
    ),
    "both dialects, which agree": (
        LLAMA | WIDE | {"rope_scaling": yarn(8.0, 4096), "rope_parameters": yarn(8.0, 4096) | {"rope_theta": 1e4}},
        "both-dialects",
        "info",
        {STATIC},
    ),
    "type and rope_type disagree": (
        scaled(LLAMA, type="yarn", rope_type="linear", factor=8.0),
        "two-values",
        "warning",
        {STATIC, "unknown-original"},
    ),
    "a Mistral without the constants": (
        scaled(MISTRAL | {"sliding_window": None, "max_position_embeddings": 65536}, **yarn(8.0, 8192)),
        "mistral-llama-constants",
        "warning",
        {STATIC},
    ),
    "mscale alone": (scaled(LLAMA | WIDE, **yarn(8.0, 4096, mscale=0.7)), "lone-mscale", "warning", {STATIC}),
    "mscale_all_dim alone, where the model's code reads it": (
        DEEPSEEK | {"rope_scaling": yarn(40, 4096, mscale_all_dim=1.0)},
        "mscale-twice",
        "warning",
        set(),
    ),
    "vLLM's attn_factor": (scaled(LLAMA | WIDE, **yarn(8.0, 4096, attn_factor=1.2)), "foreign-key", "error", {STATIC}),
    "vLLM's extrapolation_factor, at its neutral value": (
        scaled(LLAMA | WIDE, **yarn(8.0, 4096, extrapolation_factor=1)),
        "foreign-key",
        "info",
        {STATIC},
    ),
    "a misspelt key": (scaled(LLAMA | WIDE, **yarn(8.0, 4096, beta_fats=64)), "unknown-key", "error", {STATIC}),
    "a key of another rope_type": (
        scaled(LLAMA, type="linear", factor=8.0, beta_fast=64),
        "unknown-key",
        "error",
        {STATIC, "unknown-original"},
    ),
    "rope_scalling": (LLAMA | {"rope_scalling": yarn(8.0, 4096)}, "misspelt-key", "error", set()),
    "rope_parameter": (LLAMA | {"rope_parameter": yarn(8.0, 4096)}, "misspelt-key", "error", set()),
    "dynamic": (scaled(LLAMA, type="dynamic", factor=2.0), "dynamic-cache", "warning", set()),
    "dynamic with an L of its own": (
        scaled(LLAMA, type="dynamic", factor=2.0, original_max_position_embeddings=2048),
        "two-values",
        "warning",
        {"dynamic-cache"},
    ),
    "dynamic-yarn": (
        scaled(LLAMA, type="dynamic-yarn", factor=1.0, original_max_position_embeddings=4096),
        "dynamic-cache",
        "info",
        {"not-native"},
    ),
    "dynamic-yarn with a factor that was not trained": (
        scaled(LLAMA, type="dynamic-yarn", factor=8.0, original_max_position_embeddings=4096),
        "dynamic-factor",
        "warning",
        {"not-native", "dynamic-cache"},
    ),
    "our own rope_type": (
        NEW | WIDE | {"rope_parameters": RopeScaling("yarn", 8.0, 4096, ramp="rotations").to_config()},
        "not-native",
        "info",
        {STATIC},
    ),
    "Phi-3 with yarn": (PHI3 | {"rope_scaling": yarn(32.0, 4096)}, "phi3-rewritten", "error", {STATIC}),
    "Phi-3 with linear": (
        PHI3 | {"rope_scaling": {"type": "linear", "factor": 32.0}},
        "phi3-refused",
        "error",
        {STATIC},
    ),
    "OLMo 3, flat": (
        {key: value for key, value in OLMO3.items() if key != "rope_scaling"} | {"rope_parameters": yarn(8.0, 8192)},
        "flat-parameters",
        "error",
        set(),
    ),
    "Gemma 3, flat": (
        GEMMA3["text_config"]
        | {"rope_scaling": None, "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}},
        "flat-parameters",
        "error",
        {"family-theta"},
    ),
    "truncate inside a layer type": (
        {key: value for key, value in OLMO3.items() if key != "rope_scaling"}
        | {
            "rope_parameters": {
                "full_attention": yarn(8.0, 8192, truncate=False),
                "sliding_attention": {"rope_type": "default"},
            }
        },
        "nested-truncate",
        "warning",
        set(),
    ),
    "Falcon with ALiBi": (FALCON | {"alibi": True}, "alibi", "info", {"family-theta"}),
    "Falcon with ALiBi and a scaling": (
        scaled(FALCON | {"alibi": True, "rope_theta": 1e4, "max_position_embeddings": 16384}, **yarn(8.0, 2048)),
        "alibi",
        "error",
        {STATIC},
    ),
    "Mistral's window is shorter than L'": (
        scaled(MISTRAL | {"max_position_embeddings": 65536}, **yarn(8.0, 8192, beta_fast=32)),
        "sliding-window",
        "warning",
        {STATIC},
    ),
    "Mistral's window is shorter than its context": (MISTRAL, "sliding-window", "info", set()),
    "Cohere 2 scaled, where only near layers rotate": (
        scaled(COHERE2 | {"max_position_embeddings": 32768}, **yarn(4.0, 8192)),
        "layers-without-rope",
        "warning",
        {STATIC},
    ),
    "a model without RoPE": ({"model_type": "gpt2", "n_positions": 1024}, "no-rope", "warning", set()),
    "a scaling for a model without RoPE": (
        {"model_type": "gpt2", "n_positions": 1024, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "no-rope",
        "error",
        {STATIC, "no-theta", "unknown-original"},
    ),
    "llama_4_scaling_beta in a family that does not read it": (
        scaled(LLAMA | WIDE, **yarn(8.0, 4096, llama_4_scaling_beta=0.1)),
        "unknown-key",
        "error",
        {STATIC},
    ),
    "an unknown rope_type": (scaled(LLAMA, type="yarm", factor=8.0), "unknown-type", "error", set()),
    "no factor": (
        scaled(LLAMA, type="yarn", original_max_position_embeddings=4096),
        "no-factor",
        "error",
        set(),
    ),
    "a factor below 1": (scaled(LLAMA, **yarn(0.5, 4096)), "bad-value", "error", set()),
    "a factor as text": (scaled(LLAMA, **yarn("8", 4096)), "bad-value", "error", set()),
    "no dictionary": (LLAMA | {"rope_scaling": "yarn"}, "bad-value", "error", set()),
    "betas that cross": (scaled(LLAMA, **yarn(8.0, 4096, beta_slow=64)), "bad-value", "error", set()),
    "longrope with lists of another length": (
        LLAMA
        | WIDE
        | {"rope_scaling": PHI3["rope_scaling"] | {"factor": 8.0, "original_max_position_embeddings": 4096}},
        "bad-value",
        "error",
        {"longrope-switch"},
    ),
    "multimodal sections": (
        QWEN | {"model_type": "qwen2_vl", "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
        "attention-key",
        "info",
        set(),
    ),
    "multimodal sections by a name that the family does not know": (
        scaled(QWEN | {"model_type": "qwen3_vl_text"}, type="mrope", mrope_section=[16, 24, 24]),
        "not-native",
        "error",
        {"attention-key"},
    ),
    "code in the checkpoint of an unknown family": (
        LLAMA | {"model_type": "llamoid", "auto_map": REMOTE},
        "remote-code",
        "warning",
        set(),
    ),
    "keys beside the text part": (
        {"model_type": "foo_vl", "text_config": LLAMA, "rope_scaling": yarn(4.0, 4096)},
        "outside-text",
        "error",
        set(),
    ),
    "a list that transformers does not use": (
        PHI35_MOE,
        "long-list-unused",
        "warning",
        {"longrope-switch"},
    ),
    "an image's RoPE": ({"model_type": "pixtral"}, "no-context", "info", set()),
    "an odd head": (LLAMA | {"head_dim": 63}, "bad-value", "error", set()),
}


@pytest.mark.parametrize("name", TRAPS)
def test_each_trap_is_found_and_nothing_else(name: str):
    config, code, level, others = TRAPS[name]
    before = copy.deepcopy(config)
    report = inspect(config)
    assert config == before, "inspect must not change what it is given"
    assert set(report.codes) == {code, *others}, report.text()
    found = [finding for finding in report.findings if finding.code == code]
    assert {finding.level for finding in found} == {level}
    assert report.exit_code == (1 if any(finding.level == "error" for finding in report.findings) else 0)
    for finding in report.findings:
        assert "\n" not in finding.text and finding.text.endswith((".", "?")), finding


def test_a_record_that_the_config_has_left_behind():
    record = RopeScaling("ntk", 8.0, 4096).to_dict()
    config = LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "scaled_rope": record}
    assert inspect(config).codes == ["stale-record"]


def test_what_is_said_about_transformers_is_what_transformers_does():
    """Of transformers alone: the texts of findings and docs/serving.md claim this of its config classes."""

    def built(name: str) -> dict[str, Any]:
        config = copy.deepcopy(TRAPS[name][0])
        return CONFIG_MAPPING[config["model_type"]].from_dict(config).get_text_config().rope_parameters

    assert built("theta dropped: rope_scaling replaces the dictionary that held it")["rope_theta"] == 10000.0
    assert built("OLMo 3, flat")["full_attention"]["rope_type"] == "default"
    assert (
        built("factor counts twice: L missing, max_position_embeddings extended")["original_max_position_embeddings"]
        == 65536
    )
    assert built("both dialects, which disagree")["factor"] == 8.0
    assert built("type and rope_type disagree")["rope_type"] == "linear"
    for name in ("Phi-3 with yarn", "Phi-3 with linear"):
        with pytest.raises(REFUSALS, match="short_factor|longrope"):
            built(name)


def test_another_computation_in_transformers_is_an_error(monkeypatch: pytest.MonkeyPatch):
    config = scaled(LLAMA | WIDE, **yarn(8.0, 4096))
    own = compute_rope(RopeScaling("yarn", 8.0, 4096, truncate=False), 128)
    monkeypatch.setitem(ROPE_INIT_FUNCTIONS, "yarn", lambda *args, **kwargs: own)
    report = inspect(config)
    assert report.codes == ["computes-otherwise", STATIC] and report.exit_code == 1


def test_the_table_holds_the_numbers_in_effect():
    report = inspect(PUBLISHED["Yarn-Llama-2-7b-64k"][0])
    inv_freq, factor = compute_rope(RopeScaling("yarn", 16.0, 4096), 128)
    assert [dimension.scaled for dimension in report.dimensions] == inv_freq.double().tolist()
    for dimension in report.dimensions:
        plain = 10000.0 ** (-2 * dimension.index / 128)
        # Tables are float32.
        assert dimension.theta == pytest.approx(plain, rel=1e-6)
        assert dimension.wavelength == pytest.approx(2 * math.pi / plain, rel=1e-6)
        assert dimension.rotations == pytest.approx(4096 * plain / (2 * math.pi), rel=1e-6)
        expected = {"kept": 1.0, "interpolated": 16.0}.get(dimension.regime)
        assert dimension.divisor == pytest.approx(expected, rel=1e-5) if expected else 1 < dimension.divisor < 16
    numbers = {number.name: number.value for number in report.numbers}
    assert numbers["attention factor √(1/t)"] == pytest.approx(0.1 * math.log(16) + 1) == pytest.approx(factor)
    assert (numbers["head_dim"], numbers["beta_fast"], numbers["finetuned"]) == (128, 32.0, True)
    assert report.lengths == {
        "original": 4096,
        "extended": 65536,
        "max_position_embeddings": 65536,
        "sliding_window": None,
        "shown": None,
    }
    assert report.native == "yarn"


def test_lengths_that_are_no_product_of_the_factor():
    assert inspect(LLAMA3).lengths["extended"] is None  # there the factor is no ratio of lengths
    assert inspect(GEMMA3).lengths["original"] == 32768 and inspect(GEMMA3).lengths["extended"] == 131072  # known
    unsaid = inspect(LLAMA | {"max_position_embeddings": 32768, "rope_scaling": {"type": "linear", "factor": 8.0}})
    assert unsaid.lengths["extended"] is None  # which of its lengths is L is not said


def test_partial_rotation_and_rotated_parts():
    pythia, deepseek = inspect(PYTHIA), inspect(DEEPSEEK)
    assert {number.name: number.value for number in pythia.numbers}["rotated dimensions"] == 16
    assert deepseek.head_dim == 64  # not hidden_size / heads


def test_layer_types_have_their_own_scalings():
    report = inspect(OLMO3)
    assert {name: one.label for name, one in report.layers.items()} == {
        "sliding_attention": "unscaled",
        "full_attention": "yarn x8 (beta_fast=32, beta_slow=1)",
    }
    assert inspect(OLMO3, layer_type="sliding_attention").scaling.label == "unscaled"
    with pytest.raises(ConfigError, match="layer_type='full': must be one of"):
        inspect(OLMO3, layer_type="full")
    with pytest.raises(ConfigError, match="tells no layer types apart"):
        inspect(LLAMA, layer_type="full_attention")
    assert inspect(SMOLLM3).without_rope == (3, 7)
    assert inspect(COHERE2).without_rope == (3, 7)


def test_layers_that_a_patch_told_apart(tiny_model):
    model = tiny_model(layer_types=["full_attention", "sliding_attention"])
    patch_model(model, {"full_attention": "yarn:4"}, drop_layers=[1])
    report = inspect(model.config.to_dict())
    assert report.without_rope == (1,) and set(report.codes) == {"layers-without-rope", "not-native", STATIC}
    assert {name: one.method for name, one in report.layers.items()} == {
        "full_attention": "yarn",
        "sliding_attention": "default",
    }
    assert inspect(model.config).layers == report.layers


def test_another_scaling_than_the_models_own():
    report = inspect(LLAMA, scaling="dynamic-yarn")
    assert report.codes == ["dynamic-cache"] and report.lengths["shown"] == 8192
    longer = inspect(LLAMA, scaling="dynamic-yarn", length=16384)
    assert [d.scaled for d in longer.dimensions] == compute_rope(report.scaling, 128, 16384)[0].double().tolist()
    assert report.native is None
    with pytest.raises(ConfigError, match="unknown method 'yarm'"):
        inspect(LLAMA, scaling="yarm:8")


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 0.5, 1, 3, 1e9, 10**30, float("nan"), float("inf"), "8", "", [], [1], {}, {"a": 1}]),
    st.sampled_from(["yarn", "linear", "dynamic", "llama3", "longrope", "scaled-rope", "dynamic-yarn", "proportional"]),
)
KEYS = ["rope_type", "type", "factor", "original_max_position_embeddings", "beta_fast", "mscale", "attention_factor"]
KEYS += [
    "finetuned",
    "rope_theta",
    "partial_rotary_factor",
    "short_factor",
    "long_factor",
    "truncate",
    "full_attention",
]
TOP = [
    "max_position_embeddings",
    "rope_theta",
    "head_dim",
    "hidden_size",
    "num_attention_heads",
    "layer_types",
    "alibi",
]
TOP += ["sliding_window", "model_type", "rope_scaling", "rope_parameters", "auto_map", "scaled_rope", "text_config"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([LLAMA, MISTRAL, PHI3, OLMO3, GEMMA3, DEEPSEEK, COHERE2, PYTHIA]),
    st.dictionaries(st.sampled_from(TOP), VALUES, max_size=2),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4),
    st.sampled_from(["rope_scaling", "rope_parameters", None]),
    st.sampled_from([None, None, "llava", "qwen2_vl", "colqwen2", "unheard_of"]),
    st.sampled_from([{}, {"rope_theta": 7.5}, {"rope_scaling": {"type": "yarn", "factor": 2.0}}]),
)
def test_no_config_ends_in_a_traceback(
    base: dict[str, Any],
    top: dict[str, Any],
    rope: dict[str, Any],
    place: str | None,
    whole: str | None,
    outside: dict[str, Any],
):
    config: dict[str, Any] = base | top | ({place: rope} if place else {})
    if whole == "colqwen2":
        config = {"model_type": whole, "vlm_config": {"model_type": "qwen2_vl", "text_config": config}} | outside
    elif whole is not None:
        config = {"model_type": whole, "text_config": config} | outside
    try:
        report = inspect(config)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        json.dumps(report.to_dict())
        report.text(full=True)
    try:
        result = repair(config)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert inspect(result.config).exit_code == 0
        assert repair(result.config).changes == ()


# The command ----------------------------------------------------------------------------------------------------------


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(written(tmp_path, LLAMA))]) == 0
    assert "no findings" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path)]) == 0  # the folder
    written(tmp_path, TRAPS["a misspelt key"][0])
    assert main(["inspect", str(tmp_path)]) == 1
    assert "Probably meant: 'beta_fast'." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'\xef\xbb\xbf{"model_type": "llama"}', "begins with a byte order mark, so transformers cannot read it"),
        ('{"model_type": "llama"}'.encode("utf-16"), "is not JSON, and not text in UTF-8"),
        (b'{"model_type": ["llama"], "max_position_embeddings": 4096}', "model_type ['llama'] is not allowed; a text"),
        (b'{"model_type": "llava", "text_config": {"model_type": 3}}', "model_type 3 is not allowed; a text"),
        (b'{"rope_theta": 1e4, "model_type": "llama", "rope_theta": 5e5}',
         "says 'rope_theta' twice, 10000.0 and 500000.0: readers differ in which one they take"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["inspect", "repair"])
def test_what_others_cannot_read_or_read_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, said: str, command: str
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert main([command, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error and ("twice" not in said or "is not JSON" not in error)


def test_a_key_that_says_the_same_twice_is_read(tmp_path: Path) -> None:
    text = '{"model_type": "llama", "rope_theta": 1e4, "rope_theta": 10000.0, "x": NaN, "x": NaN}'
    (tmp_path / "config.json").write_text(text)
    assert inspect(tmp_path).scaling == inspect({"model_type": "llama", "rope_theta": 1e4}).scaling


def test_numbers_that_attention_takes_from_the_rope_dictionary() -> None:
    numbers = {number.name: number.value for number in inspect({"model_type": "mistral4"}).numbers}
    assert numbers["softmax scale times"] == pytest.approx((0.1 * math.log(128) + 1) ** 2)
    assert numbers["llama_4_scaling_beta"] == 0.1 and numbers["rotated dimensions"] == 64
    asked = {number.name for number in inspect({"model_type": "mistral4"}, scaling="yarn:8").numbers}
    assert not asked & {"softmax scale times", "llama_4_scaling_beta"}


def test_an_attention_temperature_is_shown() -> None:
    found = inspect(LLAMA, scaling="yarn:8,attention_temperature=ministral")
    numbers = {number.name: (number.value, number.origin) for number in found.numbers}
    assert numbers["attention_temperature"] == ("ministral", "of queries, by this package alone")
    assert numbers["temperature_slope"] == (0.1, "default")


def test_layers_that_differ_in_the_size_of_heads() -> None:
    full, sliding = (inspect({"model_type": "gemma4_text"}, name) for name in ("full_attention", "sliding_attention"))
    assert (full.head_dim, sliding.head_dim) == (512, 256) and full.exit_code == 0
    assert full.scaling is not None and full.scaling.method == "proportional"
