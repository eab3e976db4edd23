"""Fixtures: tiny random models, made in milliseconds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, and the next line does that

from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel  # noqa: E402

from tests.runs import Ranks, make_workspace  # noqa: E402

# On a machine with a GPU patched models would get the rotary kernel, and would no longer equal vanilla ones bit by bit.
os.environ.setdefault("SCALED_ROPE_KERNEL", "none")

VOCABULARY = 61
LAYER_TYPES = ["sliding_attention", "full_attention"]
# A window longer than any text of the tests, for families that cannot do without one.
WINDOW = {"sliding_window": 64}
TWO_TYPES: dict[str, Any] = {"layer_types": LAYER_TYPES, **WINDOW}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {"head_dim": 16, "num_experts": 4, "num_dense_layers": 1, **TWO_TYPES, **EXPERTS},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0, **TWO_TYPES},
    "exaone4": TWO_TYPES,
    "exaone_moe": {"num_experts": 4, "num_shared_experts": 1, "n_group": 1, "topk_group": 1, **TWO_TYPES, **EXPERTS},
    "falcon": {},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, **TWO_TYPES},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, **TWO_TYPES},
    # 32 dimensions, of which 8 are rotated.
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 64},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "rope_parameters": PLAIN, **TWO_TYPES, **EXPERTS},
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 2},
    "olmo": {},
    "olmo2": {},
    "olmo3": TWO_TYPES,
    "phi": {},
    # A share of the head as Phi-4-mini has it, and the top-level length that only this family has.
    "phi3": {"original_max_position_embeddings": 32, "partial_rotary_factor": 0.5},
    "qwen2": {"use_sliding_window": True, **TWO_TYPES},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 16, **EXPERTS},
    "qwen3": {"head_dim": 16, "use_sliding_window": True, **TWO_TYPES},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, **EXPERTS},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"hidden_size": 64, "intermediate_size": 64},
}
"""What tiny models need beside `tiny_model`'s settings, by model type."""

DETECTED: dict[str, dict[str, Any]] = {
    "apertus": {"rope_parameters": PLAIN},
    "ernie4_5": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "granite": {"attention_multiplier": 0.25},
    "ministral3": {
        "head_dim": 16,
        "rope_parameters": {**PLAIN, "original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.1},
    },
    "mellum": {"head_dim": 16, "num_experts": 4, **TWO_TYPES, **EXPERTS},
    "persimmon": {},
    "phimoe": {"num_local_experts": 4},
    "seed_oss": {"head_dim": 16},
    "starcoder2": {"sliding_window": None},
}
"""Families that the package does not know by name."""


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """make(family="llama", seed=0, **config): a random model with 2 layers, head_dim 16 and 32 positions.

    Equal seeds give equal weights. The weights are large, so that attention depends sharply on positions.
    """

    def make(family: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
        settings: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 32,
            "initializer_range": 0.3,
            "bos_token_id": 0,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        settings |= (FAMILIES | DETECTED)[family] | overrides
        torch.manual_seed(seed)
        # A copy of what is nested: configs change it in place.
        config = CONFIG_MAPPING[family](**{name: _copy(value) for name, value in settings.items()})
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return model.eval()

    return make


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copy(entry) for name, entry in value.items()}
    return list(value) if isinstance(value, list) else value


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make_workspace` makes."""
    folder = tmp_path_factory.mktemp("training")
    make_workspace(folder)
    return folder


@pytest.fixture(scope="session")
def straight(workspace: Path) -> Path:
    """The run that others are compared with: one process, no interruption."""
    Ranks(workspace, workspace / "straight", 1, extra=("--log-loss", str(workspace / "losses.csv"))).succeed()
    return workspace / "straight"


@pytest.fixture(scope="session")
def tied(workspace: Path) -> Path:
    """`straight` with embeddings that are the projection as well."""
    Ranks(workspace, workspace / "straight-tied", 1, extra=("--model", str(workspace / "tied"))).succeed()
    return workspace / "straight-tied"


@pytest.fixture
def tokens() -> torch.Tensor:
    """Random token ids [2, 48], longer than the tiny models' 32 positions."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, VOCABULARY, (2, 48), generator=generator)
