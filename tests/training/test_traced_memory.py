"""Traced passes against what the same pass holds when it really runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scaled_rope.patching import loss
from scaled_rope.training.model import SummedLoss, add_lora, enable_checkpointing
from scaled_rope.training.traced_memory import LiveBytes, layers_alike, to_cpu, trace_pass
from tests.helpers.planning import small


def _recipe(checkpointing, precision="fp32"):
    """`checkpointing`: whether, or "attention kept"."""
    kept = checkpointing == "attention kept"
    return replace(small(gradient_checkpointing=bool(checkpointing), keep_attention=kept), precision=precision)


@pytest.mark.parametrize("checkpointing", [False, True, "attention kept"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulating", [False, True])
def test_a_traced_pass_holds_what_a_real_one_holds(checkpointing, precision, accumulating):
    """The same counter over real tensors. Without data an operator cannot tell a sparse case: none is there."""
    from transformers import AutoConfig, AutoModelForCausalLM

    recipe = _recipe(checkpointing, precision)
    fields = dict(recipe.init)
    peaks = []
    from torch._subclasses.fake_tensor import FakeTensorMode

    masks = pytest.importorskip("transformers.masking_utils").ALL_MASK_ATTENTION_FUNCTIONS
    for mode in (FakeTensorMode(), torch.device("cpu")):
        with mode:
            config = AutoConfig.for_model(
                fields["model_type"], **{k: v for k, v in fields.items() if k != "model_type"}
            )
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
            enable_checkpointing(model, recipe)
            model.config.use_cache = False
            peaks.append(trace_pass(SummedLoss(model), 2, 256, precision == "bf16", accumulating))
    assert "sdpa" not in masks._local_mapping, "masks were to come back"
    assert peaks[0].kept == pytest.approx(peaks[1].kept, rel=0.01)
    assert peaks[0].peak == pytest.approx(peaks[1].peak, rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True, pytest.param("attention kept", marks=pytest.mark.slow)])
@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("length", "precision"),
    [*(pytest.param(length, "bf16", marks=pytest.mark.slow) for length in (2, 16)), (256, "fp32")],
)  # gradients weigh most, then casts of weights, then activations
def test_a_few_layers_tell_what_many_hold(checkpointing, lora, length, precision):
    """To the byte."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoConfig, AutoModelForCausalLM

    recipe = _recipe(checkpointing, precision)
    fields = {**recipe.init, "num_hidden_layers": 6}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)

    def trace(layers, accumulating):
        with torch.device("meta"):
            base = model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
            model = add_lora(model, False) if lora else model
        with FakeTensorMode():
            to_cpu(model)
            enable_checkpointing(model, recipe)
            owner, name = layers_alike(base)
            setattr(owner, name, getattr(owner, name)[:layers])
            kept = getattr(owner, name)
            return trace_pass(SummedLoss(model), 2, length, precision == "bf16", accumulating, kept)

    for accumulating in (False, True):
        few, more, all_ = (trace(layers, accumulating) for layers in (3, 4, 6))
        told = few.with_layers(3, more, 4, 6)
        assert (told.peak, told.kept) == (all_.peak, all_.kept)
        assert few.peak < more.peak < all_.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("precision", "lora"),
    [
        ("fp32", False),
        ("bf16", False),
        *(pytest.param(kind, True, marks=pytest.mark.slow) for kind in ("bf16", "fp32")),
    ],
)
def test_a_few_pieces_of_the_loss_tell_what_many_hold(checkpointing, precision, lora, monkeypatch):
    """To the byte, for a sequence of 32 pieces."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoConfig, AutoModelForCausalLM

    recipe = small(gradient_checkpointing=checkpointing)
    fields = dict(recipe.init)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    monkeypatch.setattr(loss, "_LOGITS_PER_CHUNK", 16 * config.vocab_size)
    inner, pieces = loss.project, []
    monkeypatch.setattr(loss, "project", lambda *given: (pieces.append(1), inner(*given))[1])

    def trace(kind, accumulating):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
            model = add_lora(model, False) if lora else model
        with FakeTensorMode():
            to_cpu(model)
            enable_checkpointing(model, recipe)
            pieces.clear()
            found = trace_pass(SummedLoss(model, loss=kind), 2, 255, precision == "bf16", accumulating)
            return found, len(pieces)

    for accumulating in (False, True):
        (outlined, few), (whole, many) = (trace(kind, accumulating) for kind in ("outlined", "chunked"))
        assert outlined == whole
        assert (few, many) == (2 * 8 - 1, 2 * 32 - 1)  # all but the last run twice


def test_layers_that_differ_are_seen():
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**small().init, "num_hidden_layers": 4}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
        assert layers_alike(model) == (model.model, "layers")
        model.model.layers[2].mlp.down_proj = torch.nn.Linear(8, 8)
    assert layers_alike(model) is None


def test_storages_count_once_and_as_long_as_they_live():
    with LiveBytes() as counter:
        a = torch.empty(1000)
        b = a[10:].view(-1)
        assert counter.live == 4000
        c = a + 1
        del a, c
        assert counter.live == 4000 and counter.peak == 8000
        del b
        assert counter.live == 0 and counter.peak == 8000
