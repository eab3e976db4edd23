"""lm-eval's model type: when it is imported, and its parts."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scaled_rope import patch_model
from tests.helpers import ROOT


def test_lm_eval_is_imported_when_it_is_needed_only() -> None:
    code = (
        "import sys; import eval.harness, scaled_rope.evaluation.lm_eval_tasks as tasks; "
        "assert 'lm_eval' not in sys.modules; "
        "sys.modules['lm_eval'] = None; tasks.model_class()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "ConfigError: benchmarks need lm-eval: pip install 'scaled-rope[eval]'" in done.stderr.splitlines()[-1]


def test_parts(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from scaled_rope.evaluation import lm_eval_model

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [lm_eval_model._available(device) for device in ("cuda", "cuda:1", "cpu", None)] == [None, None, "cpu", None]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert lm_eval_model._available("cuda:1") == "cuda:1"

    model = tiny_model()
    assert lm_eval_model._scaling_of(model).method == "default"
    scaling = patch_model(model, "yarn:4").scaling
    assert lm_eval_model._scaling_of(model) == scaling

    given: dict[str, Any] = {}
    bare = SimpleNamespace(generate=lambda **options: given.update(options))
    lm_eval_model._without_cache(bare).generate(use_cache=True, max_length=3)
    assert given == {"use_cache": False, "max_length": 3}
