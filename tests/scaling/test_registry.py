"""Every row of the registry of methods."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from scaled_rope import METHODS, ConfigError, RopeScaling, compute_rope
from tests.helpers.method_variants import ALL, make, name_of


def test_every_field_of_a_row_exists():
    for row in METHODS.values():
        assert row.fields <= set(RopeScaling.__dataclass_fields__)


@pytest.mark.parametrize("method", METHODS)
def test_every_row_of_the_registry_makes_sense(method):
    row = METHODS[method]
    assert row.name == method == method.lower() and row.fn.__doc__
    assert row.source and row.summary and len(row.summary) < 100 and not row.summary.endswith(".")
    assert row.kind in ("frequency", "attention")
    if row.kind == "frequency":
        assert method in {variant["method"] for variant in ALL}, "compare it with the reference above"
    assert bool(row.no_dynamic) == ("dynamic" not in row.fields)  # what has no dynamic form says why
    assert not row.factor_optional or "factor" in row.fields
    assert not (row.length_dependent and "dynamic" in row.fields)
    if row.params_type is not None:
        assert row.params_type.__dataclass_params__.frozen
        assert not {f.name for f in fields(row.params_type)} & set(RopeScaling.__dataclass_fields__)


@pytest.mark.parametrize("variant", ALL, ids=name_of)
def test_the_registry_knows_what_each_formula_needs(variant):
    row = METHODS[variant["method"]]
    scaling = make(variant, 64, 4.0)
    if row.needs_original:
        with pytest.raises(ConfigError, match="original_max_position_embeddings is missing"):
            replace(scaling, original_max_position_embeddings=None)
        # 4096 and 300 must differ, or the formula does not contain L.
        other = compute_rope(replace(scaling, original_max_position_embeddings=300), 64, seq_len=4000)[0]
        assert not torch.equal(other, compute_rope(scaling, 64, seq_len=4000)[0])
    else:
        without = replace(scaling, original_max_position_embeddings=None)
        assert torch.equal(compute_rope(without, 64)[0], compute_rope(scaling, 64)[0])
    if row.no_dynamic:
        with pytest.raises(ConfigError, match=row.no_dynamic):
            replace(scaling, dynamic=True)
    if row.factor_optional and variant["method"] != "proportional":
        assert torch.equal(compute_rope(replace(scaling, factor=9.0), 64)[0], compute_rope(scaling, 64)[0])
