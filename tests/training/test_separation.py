"""Packed documents that must not see each other."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, modeling_flash_attention_utils

import finetune
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.patching.loss import token_nll
from scaled_rope.training.model import SummedLoss
from scaled_rope.training.separation import check_separation

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip


def made(family: str, attention: str = "sdpa", **more: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | more))
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}), ("mistral", {"sliding_window": 8}), ("mixtral", EXPERTS), ("gemma3_text", {}),
        ("qwen3_moe", EXPERTS | {"mlp_only_layers": []}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 2])
def test_models_of_attention_keep_documents_apart(family, more, rows):
    for attention in ("sdpa", "eager"):
        module = SummedLoss(made(family, attention, **more))
        with torch.device("meta"):  # documents are drawn on the CPU, whatever the default device is
            check_separation(Accelerator(cpu=True), module, rows)
        assert module.training


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
        ("bamba", MAMBA | {"attn_layer_indices": [1, 3]}),
        ("granitemoehybrid", MAMBA | EXPERTS | {"layer_types": ["mamba", "attention"] * 2}),
        ("qwen3_next", LINEAR | EXPERTS | {"shared_expert_intermediate_size": 32}),
        ("recurrent_gemma", {"lru_width": 64}),
    ],
)
def test_models_with_a_state_or_a_convolution_are_refused(family, more):
    logging.disable(logging.WARNING)  # of kernels that are not installed
    try:
        module = SummedLoss(made(family, **more))
        with pytest.raises(
            ConfigError, match=rf"not possible with {family} models and attention sdpa in rows of 1: a "
        ):
            check_separation(Accelerator(cpu=True), module, 1)
    finally:
        logging.disable(logging.NOTSET)


def test_a_run_is_refused_before_anything_is_written(workspace, tmp_path, capsys):
    model = made("lfm2", layer_types=["conv", "full_attention"] * 2)
    model.save_pretrained(tmp_path / "model")
    arguments = [str(workspace / "recipe.yaml"), "--model", str(tmp_path / "model"), "--documents", "separate"]
    arguments += ["--tokenizer", str(workspace / "model"), "--output-dir", str(tmp_path / "out")]
    assert run_cli(lambda: finetune.main(arguments)) == 2
    assert "documents: separate is not possible with lfm2 models" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def flash_without_its_kernels(monkeypatch):
    """FlashAttention as transformers calls it, computed by PyTorch; yields the names of the functions it called."""
    called: list[str] = []

    def dense(q, k, v, softmax_scale=None, **_):
        called.append("dense")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale)
        return scores.transpose(1, 2)

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=None, **_):
        out, before = torch.empty_like(q), len(called)
        for first, end in zip(cu_seqlens_q.tolist(), cu_seqlens_q[1:].tolist(), strict=False):
            out[first:end] = dense(*(x[None, first:end] for x in (q, k, v)), softmax_scale=softmax_scale)[0]
        called[before:] = ["varlen"]
        return out

    def lazily(*_, **__):
        names = (dense, varlen, None, modeling_flash_attention_utils._pad_input, None)
        return names, (lambda **given: {"softmax_scale": given.get("softmax_scale")}, None)

    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lazily)
    return called


@pytest.mark.parametrize("rows", [1, 2])
def test_flash_attention_keeps_documents_apart_in_several_rows(flash_without_its_kernels, rows):
    """transformers itself looks for packed documents in batches of one row alone."""
    model = made("llama").eval()
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(3, 97, (rows, size), generator=generator) for size in (20, 30))

    def losses(ids, positions=None):
        targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
        return token_nll(model, ids, targets, positions, separate=positions is not None).detach()

    alone = losses(second)
    model.config._attn_implementation = "flash_attention_2"
    positions = torch.cat([torch.arange(20), torch.arange(30)]).expand(rows, -1)
    packed = losses(torch.cat([first, second], dim=1), positions)[:, 20:]
    assert flash_without_its_kernels == ["varlen"] * 4  # layers
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)  # float32 with another order of sums
    check_separation(Accelerator(cpu=True), SummedLoss(model), rows)


def test_attention_that_is_not_told_the_borders_is_found_out(flash_without_its_kernels, monkeypatch):
    monkeypatch.setattr("scaled_rope.patching.loss._is_flash", lambda base: False)
    model = made("llama")
    model.config._attn_implementation = "flash_attention_2"
    check_separation(Accelerator(cpu=True), SummedLoss(model), 1)
    with pytest.raises(ConfigError, match="with llama models and attention flash_attention_2 in rows of 2: a packed"):
        check_separation(Accelerator(cpu=True), SummedLoss(model), 2)


def test_rounding_of_experts_in_half_precision_is_no_sight(monkeypatch):
    """What a joined document changes is what the change by a packed one is held against."""
    module = SummedLoss(made("mixtral", **EXPERTS))
    effects = iter([0.01, 0.5, 0.01, 0.5])
    monkeypatch.setattr("scaled_rope.training.separation._effect", lambda *_, **__: next(effects))
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ConfigError, match=r"by up to 0\.01 nats per token, a joined one by 0\.5"):
        check_separation(accelerator, module, 1)
    half = SimpleNamespace(mixed_precision="bf16", unwrap_model=accelerator.unwrap_model)
    check_separation(half, module, 1)
