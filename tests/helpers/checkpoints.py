"""A tiny checkpoint on disk, and flags that name it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from tests.helpers.models import Make


@pytest.fixture
def checkpoint(tiny_model: Make, tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def adapter(tiny_model: Make, tmp_path: Path) -> Path:
    """A LoRA adapter of the tiny model, with weights that change something and a module that is saved whole."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(tiny_model(), settings)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


@pytest.fixture
def sliding(tmp_path: Path) -> Path:
    """A model with a sliding and a full-attention layer that share one pair of tables."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 61}
    config = Qwen2Config(
        hidden_size=32, intermediate_size=48, max_position_embeddings=32, initializer_range=0.3, sliding_window=24,
        use_sliding_window=True, layer_types=["sliding_attention", "full_attention"], **sizes,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "sliding")
    return tmp_path / "sliding"


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
