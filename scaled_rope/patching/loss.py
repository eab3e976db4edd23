"""Per-token negative log-likelihood without ever holding the logits of a whole sequence.

Float32 logits of one 128k-token sequence over a 32k vocabulary take 16.8 GB. The hidden states are computed in one
pass; the output projection and the cross-entropy then run over a few positions at a time, in float32. When gradients
are wanted each piece but the last is checkpointed, so training holds one piece of logits at a time too. On a GPU one
Triton kernel, Liger's (https://github.com/linkedin/Liger-Kernel), can do both, without float32 copies of the logits.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from scaled_rope.errors import ConfigError
from scaled_rope.kernels import triton_lacks
from scaled_rope.patching.cache_argument import cache_name, returned_cache
from scaled_rope.patching.forward_pass import lengths
from scaled_rope.patching.output_head import decoder_of, output_head, own_logits
from scaled_rope.provenance import package_version
from scaled_rope.scaling.hf_config import text_config

IGNORE = -100
"""The target value of positions that are not scored."""

_LOGITS_PER_CHUNK = 2**25  # 128 MiB of float32: large enough to keep a GPU busy, small next to the activations


def logits_bytes() -> int:
    """The most that logits take while training: one piece in float32, its gradient, and the softmax between them."""
    return 3 * 4 * _LOGITS_PER_CHUNK


_LIGER = "0.8.5"
"""Oldest version of Liger known to apply weights of single tokens before it sums gradients of the projection."""


def resolve_loss(name: str, device: torch.device, model: nn.Module | None = None) -> str:
    """Return the way in which the loss called `name` is computed here: "chunked", "fused" or "whole".

    Args:
        name: one of `recipes.LOSSES`; "auto" is "fused" where that is possible on a GPU on which Triton runs, else
            "chunked".
        model: checked too, if it is given.

    Raises:
        ConfigError: "fused" where it cannot run.
    """
    lack = _fused_lacks(device, model)
    if name == "auto":
        return "fused" if device.type == "cuda" and not lack and not triton_lacks(device) else "chunked"
    if name == "fused" and lack:
        raise ConfigError(f"loss 'fused' needs {lack}; use chunked")
    return name


def _fused_lacks(device: torch.device, model: nn.Module | None) -> str:
    """Say in a few words what the fused loss needs and lacks; "" where it can run."""
    installed = package_version("liger-kernel")
    if importlib.util.find_spec("liger_kernel") is None or installed is None or Version(installed) < Version(_LIGER):
        return f"liger-kernel {_LIGER} or newer: pip install 'scaled-rope[kernels]'"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"a CUDA GPU, this is {device.type}"
    if model is None:
        return ""
    head = _causal_lm(model).get_output_embeddings()
    if type(head) is not nn.Linear:
        return f"an output projection that is a plain linear layer, this is {type(head).__name__}"
    # Liger has a soft cap, but it does not run in Triton's interpreter, so no test of ours covers it.
    around = output_head(_causal_lm(model))
    if not around.followed:
        return "a projection that comes straight after the decoder"
    if around.width is not None:
        return "a projection that is not wider than the logits"
    return "" if around.cap is None else "logits without a soft cap"


def _causal_lm(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper or around the text part of a multimodal one, or `model` itself."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not hasattr(inner, "get_output_embeddings") or inner.get_output_embeddings() is None:
        raise ConfigError(f"model {type(model).__name__} has no output projection; a causal language model is needed")
    while (decoder := decoder_of(inner)).get_output_embeddings() is not None:
        inner = decoder  # Llama 4 has its causal language model inside the one for images and text
    return inner


def hidden_states(
    model: nn.Module, input_ids: Tensor, position_ids: Tensor | None = None, separate: bool = False
) -> Tensor:
    """Final hidden states [B, T, H] of `input_ids` [B, T]: no cache, no projection.

    separate: attention does not cross the borders where positions start anew.
    """
    base = decoder_of(_causal_lm(model))
    # Without a mask transformers takes any jump in positions for a border between packed sequences.
    mask = None if position_ids is None or separate else torch.ones_like(input_ids)
    borders = _documents(position_ids) if separate and position_ids is not None and _is_flash(base) else {}
    output = base(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False, **borders)
    return cast(Tensor, output.last_hidden_state)


def _is_flash(base: Any) -> bool:
    return "flash" in str(base.config._attn_implementation)


def _documents(position_ids: Tensor) -> dict[str, Any]:
    """Where the documents of packed rows [B, T] begin and end, in the rows one after another, for FlashAttention.

    By itself transformers looks for them in batches of one row alone, and lets them see each other in larger ones.
    """
    places = position_ids.reshape(-1)
    starts = torch.cat([(places == 0).nonzero()[:, 0], places.new_tensor([len(places)])]).to(torch.int32)
    longest = int(starts.diff().max())
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def _hidden_pieces(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor | None,
    size: int,
    cache: Any = None,
    start: int = 0,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first position, final hidden states [B, t, H]) of successive pieces of `size` positions, with a KV cache.

    cache: holds the positions before `start` and takes up the others; by default a new one.
    """
    base = decoder_of(_causal_lm(model))
    mask = None if position_ids is None else torch.ones_like(input_ids)
    # A scale that depends on the length is the same for every piece: that of the whole text.
    whole = torch.tensor([input_ids.shape[1]]) if position_ids is None else position_ids.amax(dim=-1) + 1
    for first in range(start, input_ids.shape[1], size):
        end = first + size
        with lengths(whole):
            output = base(
                input_ids=input_ids[:, first:end],
                attention_mask=None if mask is None else mask[:, :end],
                position_ids=None if position_ids is None else position_ids[:, first:end],
                use_cache=True,
                **{cache_name(base): cache},
            )
        cache = returned_cache(output)
        yield first, output.last_hidden_state


def shared_hidden_states(
    model: nn.Module, sequences: Sequence[Tensor], starts: Sequence[int], chunk: int = 2048
) -> Iterator[Tensor]:
    """Yield final hidden states [1, T_i - starts_i, H] of each sequence from position starts_i on, without gradients.

    The common beginning of a sequence and the one before it is read once: its keys and values stay in a cache. Order
    the sequences so that each shares as much as possible with its neighbours.

    Args:
        model: under a scaling that does not depend on the length, or the shared part would have another scale.
        sequences: token ids [T_i].
        starts: the first position wanted of each sequence, below T_i.
        chunk: positions that go through the model at once; a mask of chunk x T is built for all but the first.
    """
    cache, kept = DynamicCache(), 0
    for index, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        following = sequences[index + 1] if index + 1 < len(sequences) else ids[:0]
        size = min(len(ids), len(following))
        differs = (ids[:size] != following[:size]).nonzero()
        # What the next sequence shares, but nothing from its start on, whose hidden states must be computed.
        common = min(int(differs[0]) if len(differs) else size, starts[index + 1]) if len(following) else 0
        with torch.inference_mode():
            pieces = list(_hidden_pieces(model, ids[None], None, chunk, cache, kept))
            if common < len(ids):
                cache.crop(common - len(ids))  # negative: how many to remove
        kept = common
        yield torch.cat([hidden[:, max(0, start - first) :] for first, hidden in pieces], dim=1)


def project(model: nn.Module, hidden: Tensor) -> Tensor:
    """Float32 logits [..., V] of `hidden` [..., H], including the architecture's own scaling and soft cap.

    The projection is the model's own module, called as such, because sharding (ZeRO-3, FSDP) gathers weights in hooks.
    """
    inner = _causal_lm(model)
    head = output_head(inner)
    if not head.followed:
        return own_logits(inner, hidden)
    if head.hidden_scale != 1.0:
        hidden = hidden * head.hidden_scale
    logits: Tensor = inner.get_output_embeddings()(hidden)
    return head.after(logits.float())


def token_nll(
    model: nn.Module,
    input_ids: Tensor,
    targets: Tensor,
    position_ids: Tensor | None = None,
    chunk: int | None = None,
    *,
    start: int = 0,
    prefill_chunk: int | None = None,
    separate: bool = False,
    loss: str = "chunked",
) -> Tensor:
    """Negative log-likelihood in nats of each target from `start` on, float32 [B, T - start]; differentiable.

    Args:
        model: a transformers causal language model, plain or wrapped by PEFT. A data-parallel wrapper must call this
            from inside its own forward pass, or it will not see the gradients.
        input_ids: [B, T].
        targets: [B, T], already shifted: `targets[b, t]` is what position t should predict. `IGNORE` scores 0.
        position_ids: [B, T]; default 0 … T-1. Every token still attends to all before it, unless `separate`.
        chunk: positions whose logits are in memory at once; by default near 128 MiB. Changes memory, not values.
        start: the first position that is scored; those before it are context and never reach the projection.
        prefill_chunk: positions that go through the model at once, while earlier ones are read from a KV cache. This
            bounds activations, at the price of the cache. Under a scaling that depends on the length all of them have
            the scale of the whole text, so only rounding differs.
        separate: `position_ids` start anew with each packed document, and attention stays within documents.
        loss: "chunked"; "fused", by Liger's kernel; "whole", all logits at once, as in transformers. They differ in
            rounding only: "fused" applies the factor of Cohere's logits before the projection. "outlined" is for
            tensors without values: it holds what "chunked" holds, and passes over most of a long sequence.

    Raises:
        ConfigError: not a causal language model.
    """
    if prefill_chunk is None or prefill_chunk >= input_ids.shape[1]:
        hidden = hidden_states(model, input_ids, position_ids, separate)
        return _score(model, hidden[:, start:], targets[:, start:], chunk, loss)
    scored = []
    for first, hidden in _hidden_pieces(model, input_ids, position_ids, prefill_chunk):
        skip, end = max(0, start - first), first + hidden.shape[1]
        if first + skip < end:
            scored.append(_score(model, hidden[:, skip:], targets[:, first + skip : end], chunk, loss))
    return torch.cat(scored, dim=1)


def positions_per_chunk(model: nn.Module) -> int:
    """The number of positions whose float32 logits may be in memory at once."""
    return max(1, _LOGITS_PER_CHUNK // int(text_config(_causal_lm(model).config).vocab_size))


def _score(model: nn.Module, hidden: Tensor, targets: Tensor, chunk: int | None, loss: str) -> Tensor:
    """The loss [B, t] of targets [B, t] given hidden states [B, t, H], over `chunk` positions at a time."""
    if loss == "fused":
        return _fused(model, hidden.flatten(0, 1), targets.flatten()).view(targets.shape)

    def piece(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = project(model, hidden)  # of a split model these are where its projection is
        return F.cross_entropy(logits, targets.to(logits.device), ignore_index=IGNORE, reduction="none")

    if loss == "whole":
        return piece(hidden.flatten(0, 1), targets.flatten()).view(targets.shape)
    if chunk is None:
        chunk = positions_per_chunk(model)
    sizes = _piece_sizes(targets.numel(), chunk, outlined=loss == "outlined")
    parts = zip(torch.split(hidden.flatten(0, 1), sizes), torch.split(targets.flatten(), sizes), strict=True)
    *earlier, last = parts
    pieces = []
    for part, wanted in earlier:
        if len(part) > chunk:
            pieces.append(cast(Tensor, _Outline.apply(part)))  # type: ignore[no-untyped-call]
        elif torch.is_grad_enabled() and part.requires_grad:
            pieces.append(cast(Tensor, checkpoint(piece, part, wanted, use_reentrant=False)))
        else:
            pieces.append(piece(part, wanted))
    # The backward pass begins with the last piece, and would compute it again for the same memory.
    pieces.append(piece(*last))
    return torch.cat(pieces).view(targets.shape)


_SHOWN = 4
"""Pieces at each end of a sequence that an outlined loss computes. What is held grows from one piece to the next, so it
is most at an end; the first few are the ones in which gradients of the projection begin to be summed."""


def _piece_sizes(positions: int, chunk: int, outlined: bool) -> list[int]:
    """How many positions each piece of a loss has; outlined: those between the ends are one, which is larger."""
    sizes = [min(chunk, positions - first) for first in range(0, positions, chunk)] or [positions]
    if not outlined or len(sizes) < 2 * _SHOWN + 2:
        return sizes
    return [*sizes[:_SHOWN], sum(sizes[_SHOWN:-_SHOWN]), *sizes[-_SHOWN:]]


class _Outline(torch.autograd.Function):
    """Stands for losses [N] of hidden states [N, H], after and before what was held to compute them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        return hidden.new_zeros(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.new_zeros(ctx.shape, dtype=ctx.dtype)


def _fused(model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """The loss [N] of targets [N] given hidden states [N, H] by Liger's kernel.

    Its `reduction="none"` computes logits again in the backward pass, where the weight of each target is known, so a
    weighted sum and its gradients are exact. Gradients of the projection are summed in float32.

    Engines that shard weights (ZeRO-3, FSDP) gather them in hooks around a call of the module and around its backward
    pass. So the kernel runs as the projection's own forward pass, and instead of the weights that it saves for the
    backward pass, a note is saved to read them from the module then.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    around = output_head(_causal_lm(model))
    scale = around.scale * around.hidden_scale
    head = _causal_lm(model).get_output_embeddings()
    fused = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, reduction="none", accum_dtype=torch.float32)

    def forward(hidden: Tensor) -> Tensor:
        gathered = head.weight.data_ptr()  # by address: the kernel saves detached tensors over the same memory

        def pack(saved: Tensor) -> Tensor | None:
            return None if saved.data_ptr() == gathered else saved

        def unpack(packed: Tensor | None) -> Tensor:
            return head.weight.detach() if packed is None else packed

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return cast(Tensor, fused(head.weight, hidden, targets, head.bias))

    with _forward_as(head, forward):
        return cast(Tensor, head(hidden if scale == 1.0 else hidden * scale))


@contextlib.contextmanager
def _forward_as(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within this context, a call of `module` computes `forward`, with the module's hooks around it."""
    before = module.__dict__.get("forward")  # set if a library has put its own in place of the class's
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
