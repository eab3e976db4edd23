"""lm-eval's model type: when it is imported, and its parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scaled_rope import patch_model
from scaled_rope.checkpoint import DEFAULT_MODEL
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.lm_eval_tasks import model_class
from scaled_rope.patching.loading import former_names, load_model
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


def test_a_misspelt_argument_is_refused_before_weights_are_read() -> None:
    pytest.importorskip("lm_eval")
    model = str(DEFAULT_MODEL)
    for given, message in (
        ({"scalling": "yarn:8"}, r"unknown model argument scalling='yarn:8'; did you mean 'scaling'"),
        ({"max_len": 64}, r"unknown model argument max_len=64; did you mean 'max_length'"),
        ({"softmax_dtype": "float16"}, r"softmax_dtype='float16' has no effect under scaled-rope: log-probabilities"),
        ({"backend": "seq2seq"}, r"backend='seq2seq': must be 'default' or 'causal'"),
        ({"revision": "v2"}, r"revision='v2': '.*tiny-llama-256' is a folder, which has no revisions"),
        ({"subfolder": "x"}, r"subfolder='x': there is no such folder"),
        ({"adapter": "a", "peft": "b"}, r"adapter='a' and peft='b' mean the same"),
        ({"batch_size": "many"}, r"batch_size='many': must be a number"),
        ({"max_length": 0}, r"max_length=0: must be a whole number"),
        ({"pretrained": None}, r"pretrained: must name"),
    ):
        with pytest.raises(ConfigError, match=message):
            model_class()(**{"pretrained": model, **given})


def test_the_words_of_lm_eval_mean_what_they_mean_there(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    peft = pytest.importorskip("peft")
    model = load_model(str(DEFAULT_MODEL), device="cpu")
    settings = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    with former_names():
        peft.get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    shared = {"pretrained": str(DEFAULT_MODEL), "device": "cpu", "batch_size": "auto:4", "hide_progress": True}
    defaults = {"logits_cache": True, "max_batch_size": 64, "delta": None, "parallelize": False, "revision": "main"}
    base = model_class()(**shared, **defaults)
    tuned = model_class()(**shared, peft=str(tmp_path / "adapter"), attn_implementation="eager", max_length=64)
    same = model_class()(**shared, adapter=str(tmp_path / "adapter"), dtype="bfloat16", add_bos_token=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    weights = [lm.model.state_dict()[name].float() for lm in (base, tuned, same)]
    assert not torch.allclose(weights[0], weights[1], atol=1e-2)
    assert torch.allclose(weights[1], weights[2], atol=1e-2)  # bfloat16 keeps 8 bits
    # "auto" is the dtype in the config, as in lm-eval.
    assert base.model.dtype == base.config.dtype and same.model.dtype == torch.bfloat16
    assert tuned.model.config._attn_implementation == "eager" and tuned.max_length == 64
    assert same.tok_encode("a")[0] == same.tokenizer.bos_token_id != base.tok_encode("a")[0]


def test_a_loaded_model_takes_no_scaling_by_name(tiny_model: Any) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(ConfigError, match="scaling='yarn:4': a loaded model has its scaling"):
        model_class()(pretrained=tiny_model(), scaling="yarn:4")


@pytest.mark.slow  # the command imports everything anew; the tests of the registration do so in part
def test_the_command_of_lm_eval_knows_the_model_type(tmp_path: Path) -> None:
    """The command as it is installed, with the entry points that setup.py declares."""
    pytest.importorskip("lm_eval")
    command = [sys.executable, "setup.py", "-q", "dist_info", "--output-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    script = "import sys; from lm_eval.__main__ import cli_evaluate; sys.exit(cli_evaluate())"
    settings = f"pretrained={DEFAULT_MODEL},scaling=yarn:4,dtype=float32"
    flags = ["--include_path", str(ROOT / "eval/tasks"), "--tasks", "passkey", "--limit", "1", "--device", "cpu"]
    lengths = ["--metadata", '{"max_seq_lengths": [300]}', "--output_path", str(tmp_path / "results")]
    done = subprocess.run(
        [sys.executable, "-c", script, "run", "--model", "scaled_rope", "--model_args", settings, *flags, *lengths],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = (tmp_path / "results").rglob("*.json")
    assert json.loads(found.read_text())["config"]["scaling"]["method"] == "yarn"
