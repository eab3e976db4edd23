"""Proof, before a run begins, that documents packed into one row do not see each other in its model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scaled_rope.errors import ConfigError
from scaled_rope.scaling.hf_config import text_config
from scaled_rope.training.engine import restore_heads
from scaled_rope.training.run_state import refused_on_all_ranks

_LENGTH = 24
"""Tokens of each of the two documents: more than a convolution along a sequence spans."""
_EXACT, _ROUNDED = 1e-4, 0.05
"""The share of what a joined document changes from which it counts as seen. Passes of one shape round alike, so nothing
at all changes where nothing is seen; with experts the sizes of their matrix products change with the tokens, and with
them the rounding, which is coarse in half precision."""


def check_separation(accelerator: Any, module: Any, batch_size: int) -> None:
    """Raise an error for a model in which a document of a packed row depends on the one before it.

    Layers with a state or a convolution that run along the row do, and so does attention that is not told the borders.
    The same second document is read behind two different first ones. Every rank must call this.

    module: a `SummedLoss`, prepared by `accelerator`, which reads `batch_size` rows at once, as in training.

    Raises:
        ConfigError: it depends on it; with by how much.
    """
    inner = accelerator.unwrap_model(module)
    training = module.training
    module.eval()
    restore_heads(inner.model)
    with torch.no_grad():
        seen = _effect(accelerator, module, batch_size, separate=True)
        joined = _effect(accelerator, module, batch_size, separate=False) if seen > 0 else 0.0
    module.train(training)
    with refused_on_all_ranks():
        if seen > _share(accelerator, inner.model) * joined:
            raise ConfigError(
                f"documents: separate is not possible with {inner.config.model_type} models and attention"
                f" {inner.config._attn_implementation} in rows of {batch_size}: a packed document changes the loss of"
                f" the next one by up to {seen:.2g} nats per token, a joined one by {joined:.2g}; take joined"
            )


def _share(accelerator: Any, model: nn.Module) -> float:
    coarse = accelerator.mixed_precision != "no" or any(p.dtype != torch.float32 for p in model.parameters())
    return _ROUNDED if coarse and any("expert" in name for name, _ in model.named_modules()) else _EXACT


def _effect(accelerator: Any, module: Any, batch_size: int, separate: bool) -> float:
    """The largest change of a loss in the second document when the first one is another; the largest of all ranks."""
    vocabulary = text_config(accelerator.unwrap_model(module).config).vocab_size
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(vocabulary, (3, batch_size, _LENGTH), generator=generator, device="cpu")
    starting = torch.arange(_LENGTH, device="cpu").repeat(2).expand(batch_size, -1)
    losses: list[Tensor] = []
    for first in drawn[:2]:
        ids = torch.cat([first, drawn[2]], dim=1)
        targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
        rows = {"input_ids": ids, "targets": targets, "weights": torch.ones_like(ids)}
        rows |= {"position_ids": starting} if separate else {}
        rows = {name: value.to(accelerator.device) for name, value in rows.items()}
        losses.append(module(**rows, separate=separate, reduce=False)[:, _LENGTH:])
    change = (losses[0] - losses[1]).abs().max().nan_to_num(nan=torch.inf)
    return float(accelerator.gather(change[None]).max())
