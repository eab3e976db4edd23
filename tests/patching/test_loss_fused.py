"""Liger's fused projection and cross-entropy against the chunked form: losses, weighted sums and every gradient."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import finetune
from scaled_rope.command_line import run_cli
from scaled_rope.patching.loss import IGNORE, token_nll
from scaled_rope.training.model import SummedLoss
from tests.helpers.models import Make
from tests.helpers.optional import needs_liger
from tests.helpers.runs import log

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def weighted_sum(module: SummedLoss, tokens: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
    """Losses of the tokens, and gradients of their weighted sum, in which some targets and weights are missing."""
    module.zero_grad(set_to_none=True)
    targets = tokens.roll(-1, dims=1)
    targets[0, -5:] = IGNORE
    weights = torch.randint(0, 4, tokens.shape, generator=torch.Generator().manual_seed(0)).float().to(tokens.device)
    nll = module(tokens, targets, weights, reduce=False)
    ((nll * weights).sum() / weights.sum()).backward()
    assert torch.all(nll[targets == IGNORE] == 0)
    gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in module.parameters()]
    return nll.detach(), [None if gradient is None else gradient.clone() for gradient in gradients]


def assert_alike(fused: tuple[torch.Tensor, list[Any]], chunked: tuple[torch.Tensor, list[Any]]) -> None:
    (nll, found), (reference, wanted) = fused, chunked
    # Losses of a few nats, gradients summed over 91 targets: float32 noise of a different order of summation.
    torch.testing.assert_close(nll, reference, rtol=1e-5, atol=1e-5)
    assert nll.dtype == torch.float32
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@needs_liger
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False, "vocab_size": 97}),
        ("cohere", {"logit_scale": 0.3}),
        ("phi", {}),  # a bias
    ],
    ids=["tied", "untied", "factor", "bias"],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_fused_loss_is_the_chunked_one(
    tiny_model: Make, tokens: torch.Tensor, family: str, settings: dict[str, Any], frozen: bool
) -> None:
    """frozen: adapters elsewhere, the projection not trained."""
    model = tiny_model(family, **settings).to(DEVICE)
    if frozen:
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.requires_grad_(False)
    fused, chunked = (weighted_sum(SummedLoss(model, loss=name), tokens.to(DEVICE)) for name in ("fused", "chunked"))
    assert_alike(fused, chunked)


@needs_liger
def test_without_gradients_and_under_autocast(tiny_model: Make, tokens: torch.Tensor) -> None:
    model, tokens = tiny_model().to(DEVICE), tokens.to(DEVICE)
    with torch.no_grad():
        reference, nll = (token_nll(model, tokens, tokens, loss=name) for name in ("whole", "fused"))
    torch.testing.assert_close(nll, reference, rtol=1e-5, atol=1e-5)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        (reference, wanted), (nll, found) = (
            weighted_sum(SummedLoss(model, loss=name), tokens) for name in ("chunked", "fused")
        )
    # Both take the softmax of the same bfloat16 logits in float32.
    torch.testing.assert_close(nll, reference, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, wanted, strict=True):
        # Products and sums of up to 91 gradients that are rounded to 2^-9, which the interpreter truncates, to 2^-8.
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=2**-6 * float(theirs.abs().max()))


@needs_liger
def test_a_run_says_how_it_computes_its_loss_and_goes_the_same_way(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = [str(workspace / "recipe.yaml"), "--max-train-steps", "2", "--heldout-steps", "9"]
    for name in ("auto", "fused"):
        assert finetune.main([*short, "--output-dir", str(tmp_path / name), "--loss", name]) == 0
        computed = "fused" if name == "fused" or DEVICE.type == "cuda" else "chunked"
        assert f", loss {computed}\n" in capsys.readouterr().out
    for one, two in zip(log(tmp_path / "auto"), log(tmp_path / "fused"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    if DEVICE.type == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        assert run_cli(lambda: finetune.main([*short, "--output-dir", str(tmp_path / "no"), "--loss", "fused"])) == 2
        assert capsys.readouterr().err == "error: loss 'fused' needs a CUDA GPU, this is cpu; use chunked\n"


# ------------------------------------------------------------------------------------------------ sharded weights


@needs_liger
def test_weights_that_are_freed_between_the_passes_are_gathered_again(tiny_model: Make, tokens: torch.Tensor) -> None:
    """Hooks like those of ZeRO-3: the projection's weights exist from before its call until after it, and again from
    before its backward pass, in other memory. What is freed is overwritten here, so nothing may have kept it."""
    model, tokens = tiny_model().to(DEVICE), tokens.to(DEVICE)
    chunked = weighted_sum(SummedLoss(model), tokens)
    head, whole, events = model.lm_head, model.lm_head.weight.detach().clone(), []

    def gather(*_: object) -> None:
        events.append("gather")
        head.weight.data = whole.clone()

    def free(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        events.append("free")
        head.weight.data.fill_(torch.nan)
        head.weight.data = torch.empty(0, device=DEVICE)
        output.register_hook(gather)

    head.weight.data.fill_(torch.nan)
    head.register_forward_pre_hook(gather)
    head.register_forward_hook(free)
    head.forward = own = functools.partial(head.forward)  # as libraries do that wrap modules in place
    assert_alike(weighted_sum(SummedLoss(model, loss="fused"), tokens), chunked)
    assert events == ["gather", "free", "gather"]
    assert head.forward is own, "the projection is itself again"


@needs_liger
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")  # nothing changes it in place
@pytest.mark.parametrize("alone", [False, True], ids=["among others", "alone"])
def test_the_fused_loss_of_weights_that_fsdp2_shards(
    tiny_model: Make, tokens: torch.Tensor, tmp_path: Path, alone: bool
) -> None:
    """alone: the projection is a unit of its own, whose weights are whole in its own call only. FSDP treats one rank
    like many: weights are distributed tensors outside the passes, and the memory of gathered ones is freed."""
    model, tokens = tiny_model().to(DEVICE), tokens.to(DEVICE)
    chunked = weighted_sum(SummedLoss(model), tokens)
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo" if DEVICE.type == "cpu" else "nccl", store=store, rank=0, world_size=1)
    try:
        module = SummedLoss(model, loss="fused")
        units = [*model.model.layers, *([model.lm_head] if alone else []), module]
        for unit in units:
            fully_shard(unit, mesh=distributed.init_device_mesh(DEVICE.type, (1,)), reshard_after_forward=True)
        assert isinstance(model.lm_head.weight, DTensor)
        assert_alike(weighted_sum(module, tokens), chunked)
    finally:
        distributed.destroy_process_group()
