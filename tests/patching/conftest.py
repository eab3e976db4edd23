"""Fixtures of the tests of patched models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import Tensor

from tests.helpers.models import VOCABULARY


@pytest.fixture
def text() -> Tensor:
    """Token ids [2, 80], 2.5 times the tiny models' 32 positions."""
    return torch.randint(1, VOCABULARY, (2, 80), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """transformers logs every rope_parameters key that it has no use for."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)
