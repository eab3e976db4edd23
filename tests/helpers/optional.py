"""Marks for packages that need not be installed."""

from __future__ import annotations

import importlib.util

import pytest

needs_liger = pytest.mark.skipif(not importlib.util.find_spec("liger_kernel"), reason="no liger-kernel")
