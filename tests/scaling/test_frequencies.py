"""Frequencies and attention factors against golden values, transformers, a float64 reference and laws."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from scaled_rope import METHODS, ConfigError, RopeScaling, compute_rope
from scaled_rope.scaling.frequencies import compute_rope_batch, compute_scale
from tests.helpers import reference
from tests.helpers.method_variants import ALL, VARIANTS, make, name_of

UNIT = 2**-24  # largest relative error of one rounding to float32
GOLDEN = [case for case in json.loads((Path(__file__).parent / "golden_rope.json").read_text())["cases"]]
SCALED = ["linear", "ntk", "ntk-by-parts", "yarn", "part-ntk", "llama3", "ntk-mixed"]  # between θ/s and θ


def expect(inv_freq: torch.Tensor, wanted: list[float] | torch.Tensor, rtol: float) -> None:
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    assert inv_freq.dtype == torch.float32
    torch.testing.assert_close(inv_freq.double(), wanted, rtol=rtol, atol=0)


def oracle(scaling: RopeScaling, head_dim: int, length: int | None = None) -> tuple[list[float], float]:
    """(frequencies, attention factor) by the reference."""
    dim, theta, s = head_dim, scaling.rope_theta, scaling.factor
    original = scaling.original_max_position_embeddings
    assert original is not None
    if scaling.dynamic and length is not None:
        s = reference.dynamic_scale(length, original, s)
    params = scaling.params
    clip = params.get("clip")
    kept = 1.0 if scaling.extrapolation_factor is None else scaling.extrapolation_factor
    beta, alpha = scaling.beta_fast or 32, scaling.beta_slow or 1
    factor = 1.0
    match scaling.method:
        case "default":
            frequencies = reference.unscaled(dim, theta)
        case "linear":
            frequencies = reference.linear(dim, theta, s)
        case "ntk":
            frequencies = reference.ntk(dim, theta, s)
        case "ntk-by-parts" | "yarn" if scaling.ramp == "rotations":
            frequencies = reference.by_parts_rotations(dim, theta, s, original, beta, alpha, kept)
        case "ntk-by-parts" | "yarn":
            truncate = scaling.truncate is not False
            frequencies = reference.by_parts_dimension(dim, theta, s, original, beta, alpha, truncate, kept)
        case "part-ntk":
            frequencies = reference.part_ntk(dim, theta, s, original, extrapolation_factor=kept, **params)
        case "llama3":
            bounds = params.get("low_freq_factor", 1), params.get("high_freq_factor", 4)
            frequencies = reference.llama3(dim, theta, s, original, *bounds)
        case "longrope":
            lists = params["short_factor"], params["long_factor"]
            frequencies = reference.longrope(dim, theta, original, *lists, length)
            factor = scaling.attention_factor or reference.longrope_attention_factor(s, original)
        case "abf":
            frequencies = reference.unscaled(dim, params["theta"])
        case "dynamic-ntk":
            frequencies = reference.dynamic_ntk(dim, theta, s, original, length)
        case "ntk-mixed":
            frequencies = reference.ntk_mixed(dim, theta, s, **params)
        case "proportional":
            frequencies = reference.proportional(dim, theta, s, **params)
        case "cope":
            frequencies = reference.cope(dim, params.get("theta", theta), clip)
        case "hardclip":
            frequencies = reference.hardclip(dim, params.get("theta", theta), clip)
        case "drope":
            frequencies = reference.drope(dim)
        case _:
            raise AssertionError(f"no reference for {scaling.method}")
    if scaling.method == "yarn":
        factor = reference.attention_factor(s, 1.0 if scaling.mscale is None else scaling.mscale)
    return (reference.resonance(frequencies) if scaling.resonance else frequencies), factor


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


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
def test_equals_transformers_in_its_other_types(head_dim):
    # float32 against float64 as above: ln(b) + 4 units for the frequencies of a base b.
    half = head_dim // 2
    config = LlamaConfig(head_dim=head_dim)
    thetas, lengths, factors = (1e4, 5e5), (256, 8192), (1.0, 4.0, 32.0)
    for theta, original, s in itertools.product(thetas, lengths, factors):
        config.max_position_embeddings = original
        units = math.log(theta) + 4
        shared = {"rope_theta": theta, "factor": s}

        config.rope_parameters = {"rope_type": "dynamic", **shared}
        scaling = RopeScaling.from_config(config)
        assert scaling == RopeScaling("dynamic-ntk", s, original, theta)
        for length in (1, original, original + 1, 3 * original):
            theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=length)
            base = theta * (3 * s) ** (head_dim / (head_dim - 2))  # no larger base occurs
            expect(compute_rope(scaling, head_dim, seq_len=length)[0], theirs, rtol=(math.log(base) + 4) * UNIT)

        for high in (4.0, 1.0):  # Llama 4 has both bounds at 1
            bounds = {"low_freq_factor": 1.0, "high_freq_factor": high}
            length = {"original_max_position_embeddings": original}
            config.rope_parameters = {"rope_type": "llama3", **shared, **bounds, **length}
            theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
            scaling = RopeScaling.from_config(config)
            assert scaling == RopeScaling("llama3", s, original, theta, params={"high_freq_factor": high})
            # The share (r - 1)/(4 - 1) is off by up to 4/3 of the error of r, and counts s-fold in the result.
            expect(compute_rope(scaling, head_dim)[0], theirs, rtol=units * (1 + s * 4 / 3) * UNIT)

        lists = {"short_factor": [1.0 + d / 10 for d in range(half)], "long_factor": [1.5 + d for d in range(half)]}
        for explicit in ({}, {"attention_factor": 1.19}):
            config.rope_parameters = {"rope_type": "longrope", **shared, **lists, **explicit}
            config.rope_parameters["original_max_position_embeddings"] = original
            scaling = RopeScaling.from_config(config)
            assert scaling == RopeScaling("longrope", s, original, theta, params=lists, **explicit)
            for length in (None, 1, original, original + 1, 5 * original):
                theirs, their_factor = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=length)
                ours, attention_factor = compute_rope(scaling, head_dim, seq_len=length)
                expect(ours, theirs, rtol=(units + 1) * UNIT)  # and one for the divisor
                assert attention_factor == pytest.approx(their_factor, rel=1e-12)

        for fraction in (1.0, 0.5, 0.3, 0.05):
            config.rope_parameters = {"rope_type": "proportional", **shared, "partial_rotary_factor": fraction}
            theirs, _ = ROPE_INIT_FUNCTIONS["proportional"](config, "cpu")
            scaling = RopeScaling.from_config(config)
            assert scaling.params.get("fraction", 1.0) == fraction and scaling.partial_rotary_factor == 1.0
            expect(compute_rope(scaling, head_dim)[0], theirs, rtol=units * UNIT)


@pytest.mark.parametrize("resonance", [False, True], ids=["", "resonance"])
@pytest.mark.parametrize("variant", ALL, ids=name_of)
def test_equals_the_float64_reference(variant, resonance):
    # Computed in float64 and rounded once: one unit, and a little for float64's own noise.
    for head_dim, theta, original in itertools.product((8, 64, 96, 128), (1e4, 1e6), (256, 8192)):
        for s in (1.0, 2.5, 32.0):
            scaling = make(
                variant,
                head_dim,
                s,
                original_max_position_embeddings=original,
                rope_theta=theta,
                resonance=resonance,
            )
            lengths = (None, 1, original, original + 1, 3 * original) if scaling.is_length_dependent else (None, 99999)
            for length in lengths:
                inv_freq, attention_factor = compute_rope(scaling, head_dim, seq_len=length)
                frequencies, factor = oracle(scaling, head_dim, length)
                expect(inv_freq, frequencies, rtol=1.001 * UNIT)
                assert attention_factor == pytest.approx(factor, rel=1e-14)


def test_four_dimensions_are_enough():
    for variant in VARIANTS:
        scaling = make(variant, 4, 8.0)
        expect(compute_rope(scaling, 4)[0], oracle(scaling, 4)[0], rtol=1.001 * UNIT)


@pytest.mark.parametrize("method", ["cope", "hardclip"])
def test_clipped_share_without_a_number(method):
    for head_dim, clip in ((256, 40), (128, 20), (64, 10), (32, 5), (4, 1)):  # 20 of 64, at least one
        scaling = RopeScaling(method)
        expect(compute_rope(scaling, head_dim)[0], getattr(reference, method)(head_dim, 1e4, clip), rtol=1.001 * UNIT)
        assert torch.equal(
            compute_rope(scaling, head_dim)[0], compute_rope(replace(scaling, params={"clip": clip}), head_dim)[0]
        )


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


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_factor_one_is_the_identity(variant):
    plain, _ = compute_rope(RopeScaling("default"), 128)
    inv_freq, attention_factor = compute_rope(make(variant, 128), 128)
    assert torch.equal(inv_freq, plain)
    assert attention_factor == 1.0


def test_what_else_is_the_identity():
    plain, _ = compute_rope(RopeScaling("default"), 128)
    ones = {"short_factor": [1.0] * 64, "long_factor": [1.0] * 64}
    for scaling, length in (
        (RopeScaling("proportional"), None),
        (RopeScaling("abf", params={"theta": 1e4}), None),
        (RopeScaling("dynamic-ntk", 8.0, 4096), 4096),  # up to L, whatever the factor
        (RopeScaling("dynamic-ntk", 8.0, 4096), None),
        (RopeScaling("longrope", 1.0, 4096, params=ones), 9999),
    ):
        inv_freq, attention_factor = compute_rope(scaling, 128, seq_len=length)
        assert torch.equal(inv_freq, plain) and attention_factor == 1.0, scaling


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


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_dynamic_scale_is_the_larger_of_factor_and_stretch(variant, factor):
    original = 256
    scaling = make(variant, 64, factor, original_max_position_embeddings=original, dynamic=True)
    lengths = [1, 255, 256, 257, 700, 1024, 1025, 5000]
    for length in lengths:
        inv_freq, attention_factor = compute_rope(scaling, 64, seq_len=length)
        frequencies, wanted = oracle(scaling, 64, length)
        expect(inv_freq, frequencies, rtol=1.001 * UNIT)
        assert attention_factor == pytest.approx(wanted, rel=1e-14)
        # The static form at that scale, to the bit.
        static = replace(scaling, dynamic=False, factor=max(factor, length / original))
        assert torch.equal(inv_freq, compute_rope(static, 64)[0])
        assert attention_factor == compute_rope(static, 64)[1]
    # Without a length the scale is the factor.
    inv_freq, attention_factor = compute_rope(scaling, 64)
    static, static_factor = compute_rope(replace(scaling, dynamic=False), 64)
    assert torch.equal(inv_freq, static) and attention_factor == static_factor


@pytest.mark.parametrize("resonance", [False, True], ids=["", "resonance"])
@pytest.mark.parametrize("variant", [*ALL, *({**v, "dynamic": True} for v in VARIANTS)], ids=name_of)
def test_a_batch_is_the_same_numbers_row_by_row(variant, resonance):
    scaling = make(variant, 64, 2.0, resonance=resonance, original_max_position_embeddings=256)
    lengths = [5000, 1, 255, 256, 257, 700, 512, 513]
    batch, factors = compute_rope_batch(scaling, 64, torch.tensor(lengths))
    assert batch.shape == (len(lengths), 32) and factors.shape == (len(lengths),)
    for row, length in enumerate(lengths):
        inv_freq, attention_factor = compute_rope(scaling, 64, seq_len=length)
        # Vectorised float64 powers may differ in the last bit of float64, which may move one rounding.
        expect(batch[row], inv_freq, rtol=2 * UNIT)
        assert factors[row].item() == pytest.approx(attention_factor, rel=UNIT)


def test_explicit_attention_factor_stays_constant_under_dynamic():
    scaling = RopeScaling("yarn", 1.0, 256, dynamic=True, attention_factor=1.25)
    assert [compute_rope(scaling, 64, seq_len=n)[1] for n in (10, 256, 4096)] == [1.25] * 3


@pytest.mark.parametrize("variant", ALL, ids=name_of)
def test_static_methods_ignore_the_length(variant):
    scaling = make(variant, 64, 4.0, original_max_position_embeddings=256)
    same = torch.equal(compute_rope(scaling, 64, seq_len=9999)[0], compute_rope(scaling, 64)[0])
    assert same == (not scaling.is_length_dependent)


@pytest.mark.parametrize("length", [torch.tensor(5000), torch.tensor([5000]), np.array(5000), np.int32(5000), 5e3])
def test_a_length_may_be_a_tensor_of_one(length):
    scaling = RopeScaling("yarn", 4.0, 2048, dynamic=True)
    assert torch.equal(compute_rope(scaling, 64, seq_len=length)[0], compute_rope(scaling, 64, seq_len=5000)[0])


@pytest.mark.parametrize("length", ["64", 0, -1, True, math.inf, math.nan, torch.tensor([5000, 9000])])
def test_a_length_that_is_none_is_refused(length):
    with pytest.raises(ConfigError, match="must be a positive number of tokens"):
        compute_rope(RopeScaling("yarn", 4.0, 2048, dynamic=True), 64, seq_len=length)


@pytest.mark.parametrize("resonance", [False, True], ids=["", "resonance"])
@pytest.mark.parametrize("variant", ALL, ids=name_of)
def test_frequencies_fall_and_are_never_raised(variant, resonance):
    for head_dim, s, theta in itertools.product((8, 64, 128), (1.0, 3.0, 50.0), (1e3, 1e4, 1e6)):
        scaling = make(variant, head_dim, s, rope_theta=theta, resonance=resonance)
        inv_freq, _ = compute_rope(scaling, head_dim, seq_len=20000)
        assert (inv_freq >= 0).all() and inv_freq.isfinite().all()
        assert (inv_freq.diff() <= 0).all(), scaling  # neighbours may share a whole wavelength, or stand still
        if resonance:
            continue
        theta = scaling.params.get("theta", theta)  # the only way to raise a frequency is another base
        plain = compute_rope(RopeScaling("default", rope_theta=theta), head_dim)[0].double()
        assert (inv_freq <= plain * (1 + 2 * UNIT)).all()  # each value is rounded once
        if scaling.method in SCALED:
            assert (inv_freq >= plain / s * (1 - 2 * UNIT)).all()
            assert inv_freq.diff().max() < 0
        if scaling.method in ("linear", "ntk", "ntk-mixed"):  # the others depend on how often it turns over L
            assert inv_freq[-1].item() == pytest.approx(plain[-1].item() / s, rel=3 * UNIT)
        if scaling.method in ("ntk", "dynamic-ntk", "cope", "hardclip"):
            assert inv_freq[0] == 1.0


@pytest.mark.parametrize("variant", ALL, ids=name_of)
def test_resonance_makes_wavelengths_whole(variant):
    for head_dim, s, length in itertools.product((8, 64, 128), (1.0, 3.7, 50.0), (None, 10000)):
        plain = compute_rope(make(variant, head_dim, s), head_dim, seq_len=length)
        whole = compute_rope(make(variant, head_dim, s, resonance=True), head_dim, seq_len=length)
        assert whole[1] == plain[1]
        assert torch.equal(whole[0] == 0, plain[0] == 0)  # what stands still goes on standing still
        turning = plain[0] > 0
        before, after = (2 * math.pi / frequencies[turning].double() for frequencies in (plain[0], whole[0]))
        # A frequency is rounded to float32 once, its wavelength with it: λ·UNIT; twice that for a little more noise.
        assert ((after - after.round()).abs() <= 2 * UNIT * after).all()
        assert ((after - before).abs() <= 0.5 + 4 * UNIT * after).all()
        assert (after.round() >= 1).all()


def test_resonance_of_waves_shorter_than_a_token():
    # LongRoPE's divisors may be below 1; a wavelength of 0.31 tokens becomes one token, not none.
    lists = {"short_factor": [0.05, 1.0], "long_factor": [1.0, 1.0]}
    inv_freq, _ = compute_rope(RopeScaling("longrope", 2.0, 64, resonance=True, params=lists), 4)
    expect(inv_freq, [2 * math.pi, 2 * math.pi / 628], rtol=1.001 * UNIT)


def test_longrope_switches_between_l_and_one_more():
    scaling = make({"method": "longrope", "params": {"short_factor": "short", "long_factor": "long"}}, 64, 4.0)
    short, long = (compute_rope(scaling, 64, seq_len=n)[0] for n in (1, 10**6))
    assert not torch.allclose(short, long, rtol=1e-3, atol=0)
    for length, wanted in ((None, short), (4095, short), (4096, short), (4097, long), (4096.5, long)):
        assert torch.equal(compute_rope(scaling, 64, seq_len=length)[0], wanted)
    batch, _ = compute_rope_batch(scaling, 64, torch.tensor([4097, 4096]))
    assert torch.equal(batch, torch.stack((long, short)))
    with pytest.raises(ConfigError, match="short_factor has 32 numbers: must have 64"):
        compute_rope(scaling, 128)


def test_dynamic_ntk_with_factor_one_is_the_dynamic_form_of_ntk():
    for length in (None, 1, 4096, 4097, 50000):
        ours, theirs = (
            compute_rope(scaling, 64, seq_len=length)[0]
            for scaling in (RopeScaling("dynamic-ntk", 1.0, 4096), RopeScaling("ntk", 1.0, 4096, dynamic=True))
        )
        assert torch.equal(ours, theirs)


def test_laws_between_methods():
    def frequencies(spec: str) -> torch.Tensor:
        return compute_rope(RopeScaling.from_spec(spec, RopeScaling("default", 1.0, 4096)), 64)[0]

    assert torch.equal(frequencies("proportional:8"), frequencies("linear:8"))
    changed = 1e4 * 8 ** (64 / 62)
    expect(frequencies(f"abf,theta={changed!r}"), frequencies("ntk:8"), rtol=2 * UNIT)  # each rounded once
    assert torch.equal(frequencies("hardclip,clip=5"), frequencies("proportional,fraction=0.84375"))  # 27 of 32
    # Where the cosine is 1 and 0 there is no taper.
    assert torch.equal(frequencies("cope,clip=1"), frequencies("hardclip,clip=1"))
    assert torch.equal(frequencies("cope,clip=2"), frequencies("hardclip,clip=1"))
    tapered, cut = frequencies("cope,clip=9"), frequencies("hardclip,clip=9")
    assert torch.equal(tapered[:23], cut[:23]) and tapered[-1] == cut[-1] == 0
    assert tapered[23] == frequencies("default")[23] and (tapered[24:31] > 0).all()
    # One ramp in rotations, two names for its ends; YaRN's frequencies are those of its first half.
    assert torch.equal(
        frequencies("llama3:8,low_freq_factor=1,high_freq_factor=32"), frequencies("ntk-by-parts:8,ramp=rotations")
    )
    assert torch.equal(frequencies("yarn:8"), frequencies("ntk-by-parts:8"))


@pytest.mark.parametrize("variant", ALL, ids=name_of)
def test_a_default_device_without_storage_changes_nothing(variant):
    for resonance in (False, True):
        scaling = make(variant, 64, 4.0, resonance=resonance)
        plain, factor = compute_rope(scaling, 64, seq_len=9999)
        with torch.device("meta"):  # models are built under it
            inv_freq, again = compute_rope(scaling, 64, seq_len=9999)
        assert inv_freq.device.type == "cpu" and torch.equal(inv_freq, plain) and again == factor


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


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.kind == "attention"])
def test_a_method_without_frequencies_is_refused(method):
    params = {"rerope": {"window": 8}, "leaky-rerope": {"window": 8, "k": 4}, "self-extend": {"window": 8, "group": 2}}
    params["dpe"] = {"window": 8, "groups": [2, 4]}
    scaling = RopeScaling(method, 1, 32, params=params.get(method, {"chunk": 8}))
    with pytest.raises(ConfigError, match="changes attention itself"):
        compute_rope(scaling, 64)
    assert compute_rope(scaling.of_frequencies, 64)[0].equal(compute_rope(RopeScaling("default"), 64)[0])


@pytest.mark.parametrize(("factor", "step"), [(1.0, 2.0), (1.5, 1.2), (4.0, 3.0), (1.0, 1.1)])
def test_a_step_is_the_first_that_covers_the_length(factor: float, step: float) -> None:
    scaling = RopeScaling("yarn", factor, 4096, dynamic=True, dynamic_step=step)
    lengths = [1, 4095, 4096, 4097, 8192, 8193, 40000, 2**20, *(math.floor(4096 * factor * step**k) for k in range(9))]
    found = compute_scale(scaling, torch.tensor(lengths)).tolist()
    for length, scale in zip(lengths, found, strict=True):
        k = 0
        while factor * step**k < length / 4096:
            k += 1
        assert scale == factor * step**k
