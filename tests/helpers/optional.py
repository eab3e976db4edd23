"""Marks for packages that need not be installed, and for what old releases of transformers do wrong by themselves."""

from __future__ import annotations

import importlib.util

import pytest
import transformers

needs_liger = pytest.mark.skipif(not importlib.util.find_spec("liger_kernel"), reason="no liger-kernel")


def transformers_is(least: str) -> bool:
    """Whether transformers is this release ("5.21") or a newer one."""
    return [int(part) for part in transformers.__version__.split(".")[:2]] >= [int(part) for part in least.split(".")]


def needs_transformers(least: str, before: str) -> pytest.MarkDecorator:
    """Skip a test with a release older than `least`; `before` says what is wrong with those."""
    return pytest.mark.skipif(not transformers_is(least), reason=f"transformers before {least} {before}")


# Found with benchmarks/support.sh.
nested_parameters = needs_transformers("5.18", "fails on rope_parameters that are not nested where they should be")
phi3_cache = needs_transformers("5.20", "gives a phi3 whose cache it has dropped the newest token alone")
fp8_caches = needs_transformers("5.21", "has no fp8 caches")
