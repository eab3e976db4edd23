"""Frequencies and attention factors against golden values, transformers, a float64 reference and laws."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from scaled_rope import METHODS, ConfigError, RopeScaling, compute_rope
from scaled_rope.methods import compute_rope_batch

UNIT = 2**-24  # largest relative error of one rounding to float32
GOLDEN = [case for case in json.loads((Path(__file__).parent / "golden_rope.json").read_text())["cases"]]
SCALED = ["linear", "ntk", "ntk-by-parts", "yarn"]
VARIANTS = [
    {"method": "linear"},
    {"method": "ntk"},
    {"method": "ntk-by-parts"},
    {"method": "ntk-by-parts", "ramp": "rotations"},
    {"method": "ntk-by-parts", "truncate": False},
    {"method": "yarn"},
    {"method": "yarn", "ramp": "rotations", "beta_fast": 16.0, "beta_slow": 2.0},
    {"method": "yarn", "truncate": False, "beta_fast": 128.0, "beta_slow": 2.0, "mscale": 0.7},
]


def expect(inv_freq: torch.Tensor, wanted: list[float] | torch.Tensor, rtol: float) -> None:
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    assert inv_freq.dtype == torch.float32
    torch.testing.assert_close(inv_freq.double(), wanted, rtol=rtol, atol=0)


def oracle(scaling: RopeScaling, head_dim: int, s: float) -> tuple[list[float], float]:
    """(frequencies, attention factor) by the reference, for every variant above."""
    theta, original = scaling.rope_theta, scaling.original_max_position_embeddings
    if scaling.method == "linear":
        return reference.linear(head_dim, theta, s), 1.0
    if scaling.method == "ntk":
        return reference.ntk(head_dim, theta, s), 1.0
    assert original is not None
    beta, alpha = scaling.beta_fast or 32, scaling.beta_slow or 1
    if scaling.ramp == "rotations":
        frequencies = reference.by_parts_rotations(head_dim, theta, s, original, beta, alpha)
    else:
        truncate = scaling.truncate is not False
        frequencies = reference.by_parts_dimension(head_dim, theta, s, original, beta, alpha, truncate)
    mscale = 1.0 if scaling.mscale is None else scaling.mscale
    return frequencies, reference.attention_factor(s, mscale) if scaling.method == "yarn" else 1.0


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['method']}-{c['head_dim']}-x{c['factor']:g}")
def test_golden_values_of_the_released_code(case):
    constants = {"beta_fast": 128, "beta_slow": 2, "mscale": 0.7} if case["method"] == "yarn-mistral" else {}
    scaling = RopeScaling(
        case["method"].removesuffix("-mistral"),
        case["factor"],
        case["original_max_position_embeddings"],
        case["rope_theta"],
        **constants,
    )
    inv_freq, attention_factor = compute_rope(scaling, case["head_dim"])
    expect(inv_freq, case["inv_freq"], rtol=1e-6)  # the golden values were computed in float32
    assert attention_factor == pytest.approx(case["attention_factor"], rel=1e-12)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_equals_transformers_linear_and_yarn(head_dim):
    # transformers computes in float32. Rounding the exponent 2d/D costs ln(b) units, the power and the
    # divisions up to 4 more; in yarn the rounded ramp weight (3 units of 1) counts s-fold, because it
    # multiplies a frequency that may be s times as large as the result.
    config = LlamaConfig(head_dim=head_dim)
    thetas, lengths, factors = (1e4, 5e5, 1e6), (256, 2048, 4096, 32768), (1.0, 1.5, 4.0, 16.0, 32.0)
    for theta, length, s in itertools.product(thetas, lengths, factors):
        config.rope_parameters = {"rope_type": "linear", "rope_theta": theta, "factor": s}
        theirs, _ = ROPE_INIT_FUNCTIONS["linear"](config, "cpu")
        ours, attention_factor = compute_rope(RopeScaling("linear", s, rope_theta=theta), head_dim)
        expect(ours, theirs, rtol=(math.log(theta) + 4) * UNIT)
        assert attention_factor == 1.0

        for options in (
            {},
            {"beta_fast": 128.0, "beta_slow": 2.0},
            {"truncate": False},
            {"attention_factor": 1.1},
        ):
            config.rope_parameters = {
                "rope_type": "yarn",
                "rope_theta": theta,
                "factor": s,
                "original_max_position_embeddings": length,
                **options,
            }
            theirs, their_factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
            ours, attention_factor = compute_rope(RopeScaling("yarn", s, length, theta, **options), head_dim)
            expect(ours, theirs, rtol=(math.log(theta) + 4 + 3 * s) * UNIT)
            assert attention_factor == pytest.approx(their_factor, rel=1e-12)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_equals_the_float64_reference(variant):
    # Computed in float64 and rounded once: one unit, and a little for float64's own noise.
    for head_dim, theta, length, s in itertools.product((4, 64, 128), (1e4, 1e6), (256, 8192), (1.0, 2.5, 32.0)):
        scaling = RopeScaling(factor=s, original_max_position_embeddings=length, rope_theta=theta, **variant)
        inv_freq, attention_factor = compute_rope(scaling, head_dim)
        frequencies, factor = oracle(scaling, head_dim, s)
        expect(inv_freq, frequencies, rtol=1.001 * UNIT)
        assert attention_factor == pytest.approx(factor, rel=1e-14)


def test_a_ramp_without_width_is_a_step():
    # L = 6 is less than one rotation of any frequency: both ends of the ramp are 0.
    inv_freq, _ = compute_rope(RopeScaling("yarn", 4, 6), 8)
    expect(inv_freq, reference.by_parts_dimension(8, 1e4, 4, 6), rtol=1.001 * UNIT)
    expect(inv_freq, [1.0, 0.1 / 4, 0.01 / 4, 0.001 / 4], rtol=1.001 * UNIT)


def test_partial_rotary_width_counts_as_the_dimension():
    scaling = RopeScaling("yarn", 8, 2048, partial_rotary_factor=0.25)
    inv_freq, _ = compute_rope(scaling, 256)
    expect(inv_freq, reference.by_parts_dimension(64, 1e4, 8, 2048), rtol=1.001 * UNIT)


def test_check_values_of_the_paper():
    for s, factor, base in zip(
        (2, 4, 8, 16, 32),
        (1.0693, 1.1386, 1.2079, 1.2773, 1.3466),
        (20221, 40890, 82685, 167199, 338097),
        strict=True,
    ):
        assert round(compute_rope(RopeScaling("yarn", s, 4096), 128)[1], 4) == factor
        inv_freq, _ = compute_rope(RopeScaling("ntk", s), 128)
        # The second frequency is b'^(-2/128), so it gives b' back; one unit of it is 64 units of b'.
        assert float(inv_freq[1].double()) ** -64 == pytest.approx(base, rel=64 * UNIT + 0.5 / base)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_factor_one_is_the_identity(variant):
    plain, _ = compute_rope(RopeScaling("default"), 128)
    scaling = RopeScaling(factor=1.0, original_max_position_embeddings=4096, **variant)
    inv_freq, attention_factor = compute_rope(scaling, 128)
    assert torch.equal(inv_freq, plain)
    assert attention_factor == 1.0


def test_default_is_equation_5():
    inv_freq, attention_factor = compute_rope(RopeScaling("default", rope_theta=5e5), 96)
    expect(inv_freq, reference.unscaled(96, 5e5), rtol=1.001 * UNIT)
    assert attention_factor == 1.0


def test_forks_are_real():
    # Each named parameter must change something, or a test of its equality above proves nothing.
    base = RopeScaling("yarn", 16, 4096)
    plain, factor = compute_rope(base, 128)
    for change in ({"ramp": "rotations"}, {"truncate": False}, {"beta_fast": 64}, {"beta_slow": 2}):
        assert not torch.allclose(compute_rope(replace(base, **change), 128)[0], plain, rtol=1e-3, atol=0)
    assert compute_rope(replace(base, mscale=0.7), 128)[1] == pytest.approx(1 + 0.7 * (factor - 1))
    # Between the two ramps frequencies differ by up to 3.04 times.
    ratio = compute_rope(replace(base, ramp="rotations"), 128)[0] / plain
    assert max(ratio.max(), 1 / ratio.min()) == pytest.approx(3.04, abs=0.005)


def test_extrapolation_factor_zero_is_position_interpolation():
    interpolated, _ = compute_rope(RopeScaling("linear", 16), 128)
    by_parts, _ = compute_rope(RopeScaling("ntk-by-parts", 16, 4096, extrapolation_factor=0.0), 128)
    expect(by_parts, interpolated.double(), rtol=2 * UNIT)  # each rounded once


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_dynamic_scale_is_the_larger_of_factor_and_stretch(variant, factor):
    original = 256
    scaling = RopeScaling(factor=factor, original_max_position_embeddings=original, dynamic=True, **variant)
    lengths = [1, 255, 256, 257, 700, 1024, 1025, 5000]
    for length in lengths:
        inv_freq, attention_factor = compute_rope(scaling, 64, seq_len=length)
        frequencies, wanted = oracle(scaling, 64, reference.dynamic_scale(length, original, factor))
        expect(inv_freq, frequencies, rtol=1.001 * UNIT)
        assert attention_factor == pytest.approx(wanted, rel=1e-14)
    # Without a length the scale is the factor.
    inv_freq, attention_factor = compute_rope(scaling, 64)
    static, static_factor = compute_rope(replace(scaling, dynamic=False), 64)
    assert torch.equal(inv_freq, static) and attention_factor == static_factor

    # A batch is the same numbers row by row, whatever the order.
    batch, factors = compute_rope_batch(scaling, 64, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        inv_freq, attention_factor = compute_rope(scaling, 64, seq_len=length)
        # Vectorised float64 powers may differ in the last bit of float64, which may move one rounding.
        expect(batch[row], inv_freq, rtol=2 * UNIT)
        assert factors[row].item() == pytest.approx(attention_factor, rel=UNIT)


def test_explicit_attention_factor_stays_constant_under_dynamic():
    scaling = RopeScaling("yarn", 1.0, 256, dynamic=True, attention_factor=1.25)
    assert [compute_rope(scaling, 64, seq_len=n)[1] for n in (10, 256, 4096)] == [1.25] * 3


def test_static_methods_ignore_the_length():
    for method in SCALED:
        scaling = RopeScaling(method, 4.0, 256)
        assert torch.equal(compute_rope(scaling, 64, seq_len=9999)[0], compute_rope(scaling, 64)[0])


def test_lower_frequencies_are_never_raised():
    for method in SCALED:
        ratio = compute_rope(RopeScaling(method, 8, 4096), 128)[0] / compute_rope(RopeScaling("default"), 128)[0]
        # Kept or divided by at most s, the lowest frequency by s exactly; each value is rounded once.
        assert ratio.max() <= 1 + 2 * UNIT and ratio.min() >= (1 - 2 * UNIT) / 8
        assert ratio[-1].item() == pytest.approx(1 / 8, rel=3 * UNIT)


@pytest.mark.parametrize("head_dim", [0, -2, 7, 1, 64.0, True, None])
def test_bad_head_dim(head_dim):
    with pytest.raises(ConfigError, match="head_dim"):
        compute_rope(RopeScaling("yarn", 8, 4096), head_dim)


def test_bad_widths_and_lengths():
    with pytest.raises(ConfigError, match="partial_rotary_factor=0.3"):
        compute_rope(RopeScaling("linear", 2, partial_rotary_factor=0.3), 64)  # 19 dimensions
    with pytest.raises(ConfigError, match="needs at least 4"):
        compute_rope(RopeScaling("ntk", 2), 2)
    for seq_len in (0, -5, math.nan, math.inf):
        with pytest.raises(ConfigError, match="seq_len"):
            compute_rope(RopeScaling("yarn", 1, 4096, dynamic=True), 64, seq_len=seq_len)


def test_a_method_without_frequencies_is_refused(monkeypatch):
    monkeypatch.setitem(METHODS, "linear", replace(METHODS["linear"], kind="attention"))
    with pytest.raises(ConfigError, match="changes attention itself"):
        compute_rope(RopeScaling("linear", 2), 64)


def test_the_registry_says_where_each_formula_is_from():
    assert set(METHODS) >= {"default", *SCALED}
    for name, row in METHODS.items():
        assert row.name == name and row.source and row.summary
