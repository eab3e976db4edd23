"""Gradient checkpointing that keeps what attention returned, so that the backward pass does not compute it again.

A checkpointed layer keeps its input and computes all else twice. In a long sequence most of that is attention, whose
time grows with the square of the length, while its result is as small as the layer's input.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch._ops import OpOverload
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from scaled_rope.errors import ConfigError


def is_attention(operator: Any) -> bool:
    """Whether an operator is the forward pass of an attention kernel, of torch or of flash-attn in any version."""
    if not isinstance(operator, OpOverload):
        return False
    namespace, _, name = operator._schema.name.partition("::")
    if namespace == "aten":
        return name.startswith("_scaled_dot_product_") and not name.endswith("_backward")
    return "flash_attn" in namespace and name.endswith(("forward", "fwd"))


class KeptAttention:
    """The `context_fn` of torch's checkpoint that keeps the results of attention kernels.

    `seen` counts the kernels that ran in forward passes.
    """

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self) -> tuple[Any, Any]:
        make: Any = create_selective_checkpoint_contexts  # has no types
        contexts: tuple[Any, Any] = make(self._policy)
        return contexts

    def _policy(self, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if not is_attention(operator):
            return CheckpointPolicy.PREFER_RECOMPUTE
        self.seen += not context.is_recompute
        return CheckpointPolicy.MUST_SAVE

    def check_first_pass(self, decoder: nn.Module, attention: str) -> None:
        """Let the first forward pass with gradients raise a ConfigError if nothing was kept in it."""

        def check(module: nn.Module, _: Any, output: Any) -> None:
            hidden = output[0]
            if not (module.training and hidden.requires_grad):
                return
            handle.remove()
            if not self.seen:
                raise ConfigError(
                    f"keep_attention true is not possible with attention {attention}: no attention kernel ran whose "
                    "result could be kept; sdpa and flash attention have one"
                )

        handle = decoder.register_forward_hook(check)
