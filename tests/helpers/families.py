"""Parts of the tests of all model families: tiny models under scalings, their tables, and references."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from scaled_rope import RopeScaling
from scaled_rope.patching.loading import load_model
from tests.helpers import reference
from tests.helpers.models import DETECTED, FAMILIES

ALL = [*FAMILIES, *DETECTED]
NESTED = ["gemma3_text", "mellum", "olmo3"]
"""Families whose RoPE parameters are nested per layer type."""
SHARED = ["gemma2", "gpt_oss", "qwen2", "qwen3"]
"""Families with layers of two types that share one pair of tables."""
TYPED = [*NESTED, *SHARED]
WITHOUT_WORDS = {
    "mixtral": ("yarn", "longrope"),  # transformers fails on its empty head_dim
    "phi3": ("linear", "yarn"),
    "phimoe": ("linear", "yarn", "longrope"),
}
"""Methods that transformers rejects or gets wrong in a family, so that there is no vanilla model to compare with."""
REFUSALS = (KeyError, ValueError, StrictDataclassError)
"""The errors that it raises when it finds a rope_type that it does not know."""

# Logits reach 12. transformers rounds its frequencies several times in float32, ours are rounded once, so angles of up
# to 48 radians differ by some 1e-5; these weights pass that on to logits without making it more than ten times larger.
# The methods move the same logits by 1 and more.
SAME = 2e-4
CHANGED = 0.3


def logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids, use_cache=False).logits


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def own_entry(model: PreTrainedModel) -> dict[str, Any]:
    """The RoPE parameters of an unpatched model's full-attention layers."""
    rope = model.config.rope_parameters
    return dict(rope.get("full_attention", rope))


def words(model: PreTrainedModel, method: str) -> dict[str, Any]:
    """A method in the words of transformers, written by hand."""
    if method == "default":
        return {}
    if method == "linear":
        return {"rope_type": "linear", "factor": 4.0}
    more = {"rope_type": method, "factor": 4.0, "original_max_position_embeddings": 32}
    if method == "yarn":
        return more
    count = width(model) // 2
    return {**more, "short_factor": [1 + 0.1 * i for i in range(count)], "long_factor": [1.5 + i for i in range(count)]}


def record(model: PreTrainedModel, method: str) -> RopeScaling:
    """The same as a record."""
    own = own_entry(model)
    keys = ("short_factor", "long_factor")
    given = {key: value for key, value in words(model, method).items() if key != "rope_type"}
    params = {key: given.pop(key) for key in keys if key in given}
    given["original_max_position_embeddings"] = 32
    partial = own.get("partial_rotary_factor", 1.0)
    return RopeScaling(method, rope_theta=own["rope_theta"], partial_rotary_factor=partial, params=params, **given)


def vanilla_settings(model: PreTrainedModel, method: str) -> dict[str, Any]:
    """Config settings of an unpatched model that is to compute like `model` patched with `method`."""
    rope, entry = model.config.rope_parameters, {**own_entry(model), **words(model, method)}
    context = 32 if method == "default" else 128
    return {
        "rope_parameters": {**rope, "full_attention": entry} if "full_attention" in rope else entry,
        "max_position_embeddings": context,
    }


def width(model: PreTrainedModel) -> int:
    """D, the number of rotated dimensions, by the buffers of transformers."""
    rotary = model.base_model.rotary_emb
    return 2 * len(next(buffer for name, buffer in rotary.named_buffers() if name.endswith("inv_freq")))


class Reference(nn.Module):
    """Tables from given frequencies in float64, in the common layout or another one."""

    def __init__(self, frequencies: list[float] | Tensor, factor: float = 1.0, layout: str = "halves") -> None:
        super().__init__()
        self.frequencies = torch.as_tensor(frequencies, dtype=torch.float64)
        self.factor, self.layout = factor, layout

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * self.frequencies
        if self.layout == "halves":
            angles = torch.cat((angles, angles), dim=-1)
        elif self.layout == "interleaved":
            angles = torch.stack((angles, angles), dim=-1).flatten(-2)
        return (angles.cos() * self.factor).to(x.dtype), (angles.sin() * self.factor).to(x.dtype)


def reference_of(scaling: RopeScaling, dim: int, layout: str = "halves") -> Reference:
    """The oracle's tables for the methods that it knows."""
    theta, s, original = scaling.rope_theta, scaling.factor, scaling.original_max_position_embeddings
    if scaling.method == "default":
        return Reference(reference.unscaled(dim, theta), layout=layout)
    if scaling.method == "linear":
        return Reference(reference.linear(dim, theta, s), layout=layout)
    assert original is not None
    if scaling.method == "longrope":  # beyond L
        factor = math.sqrt(1 + math.log(s) / math.log(original))
        plain = reference.unscaled(dim, theta)
        return Reference([w / d for w, d in zip(plain, scaling.params["long_factor"], strict=True)], factor, layout)
    assert scaling.method == "yarn"
    frequencies = reference.by_parts_dimension(dim, theta, s, original)
    return Reference(frequencies, reference.attention_factor(s), layout)


def load(folder: Path) -> PreTrainedModel:
    """`load_model` of a saved model."""
    loaded: PreTrainedModel = load_model(str(folder), device="cpu")
    return loaded


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    base = model.base_model
    return base.h if hasattr(base, "h") else base.layers


def attentions(model: PreTrainedModel) -> list[nn.Module]:
    return [
        next(child for child in layer.children() if "Attention" in type(child).__name__) for layer in layers_of(model)
    ]


def attention_tables(model: PreTrainedModel, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The (cos, sin) that each layer's attention gets."""
    seen: list[tuple[Tensor, Tensor]] = []

    def see(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_embeddings"])

    hooks = [module.register_forward_pre_hook(see, with_kwargs=True) for module in attentions(model)]
    logits(model, input_ids)
    for hook in hooks:
        hook.remove()
    return seen


def force_tables(model: PreTrainedModel, tables: list[tuple[Tensor, Tensor]]) -> None:
    """Make each layer's attention of an unpatched model compute with the given tables."""
    for module, pair in zip(attentions(model), tables, strict=True):

        def give(module: nn.Module, args: Any, kwargs: dict[str, Any], pair: Any = pair) -> Any:
            return args, {**kwargs, "position_embeddings": pair}

        module.register_forward_pre_hook(give, with_kwargs=True)


def gradients(model: PreTrainedModel, input_ids: Tensor, checkpointing: bool) -> list[Tensor | None]:
    model.train()
    if checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of its name in later versions
            model.gradient_checkpointing_enable()
    torch.manual_seed(0)  # some families have dropout by default
    model(input_ids, labels=input_ids, use_cache=False).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def assert_same_gradients(make: Callable[[], PreTrainedModel], input_ids: Tensor) -> None:
    plain, recomputed = (gradients(make(), input_ids, checkpointing) for checkpointing in (False, True))
    assert sum(one is not None and bool(one.abs().sum() > 0) for one in plain) > len(plain) / 2
    for one, other in zip(plain, recomputed, strict=True):
        # Recomputation repeats the same operations; sums over experts may come in another order.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


def assert_vanilla_is_right_or_refuses(model: PreTrainedModel, native: bool, tokens: Tensor, folder: Path) -> None:
    wanted = logits(model, tokens)
    model.save_pretrained(folder)
    assert distance(logits(load(folder), tokens), wanted) < SAME
    if native:
        vanilla = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert distance(logits(vanilla, tokens), wanted) < SAME
    else:
        with pytest.raises(REFUSALS, match="rope"):
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


PLANS: list[tuple[str, Any, list[int]]] = [
    *((family, {"full_attention": "yarn:4", "sliding_attention": None}, []) for family in TYPED),
    ("gemma3_text", {"full_attention": "yarn:4,ramp=rotations", "sliding_attention": "linear:2"}, []),
    ("gemma3_text", {"full_attention": "yarn:4,truncate=false"}, []),
    ("gemma3_text", {"full_attention": "yarn:4"}, [0]),
    ("olmo3", {"full_attention": "dynamic-yarn"}, []),
    ("qwen3", {"full_attention": "dynamic-yarn", "sliding_attention": "linear:2"}, [1]),
    ("gpt_oss", {"full_attention": "yarn:4"}, [0]),
    ("llama", "yarn:4", [1]),
    ("falcon", "yarn:4", [0]),
    ("gpt_neox", "yarn:4,ramp=rotations", [0]),
    ("phi3", "yarn:4", [0]),
]
