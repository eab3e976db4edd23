"""The model type in lm-eval's registry, whatever is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

from scaled_rope.evaluation.lm_eval_registration import NAMES
from tests.helpers import ROOT

_CHECK = (
    f"from lm_eval.api.registry import model_registry; assert {{*{NAMES}}} <= set(model_registry), 'not registered'; "
)


@pytest.mark.parametrize("code", ["install(); install(); import sys; assert 'lm_eval' not in sys.modules; ", ""])
def test_before_and_after_lm_eval(code: str) -> None:
    pytest.importorskip("lm_eval")
    script = f"from scaled_rope.evaluation.lm_eval_registration import install; {code}"
    script += "import lm_eval.api.registry; " + ("" if code else "install(); ") + _CHECK
    # Our own registration agrees with it.
    script += "from scaled_rope.evaluation.lm_eval_tasks import model_class; "
    script += f"assert all(model_registry.get(name) is model_class() for name in {NAMES})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
