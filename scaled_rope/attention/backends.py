"""Choose an attention implementation for a machine and a model; `sdpa_blocked`, PyTorch's own without a T x T mask.

Implementations are those of transformers' attention interface, under its names. This module chooses among the installed
ones, refuses those that cannot work before a model is built, and adds `blockwise` (`scaled_rope.attention`) and
`sdpa_blocked`, which calls PyTorch's scaled_dot_product_attention on pieces. transformers' `sdpa` builds a boolean mask
of T x T for windows, for packed documents, for padding and whenever it is compiled, which is 17 GB at 128k tokens.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask
from transformers.utils import import_utils

from scaled_rope.attention import blockwise
from scaled_rope.attention.interface import AttentionCall, attention_function
from scaled_rope.errors import ConfigError, shortened, unknown
from scaled_rope.kernels import triton_lacks
from scaled_rope.scaling.hf_config import config_head_dim, text_config

FLASH_HEAD_DIM = 256
"""The widest head that FlashAttention takes."""


@dataclass(frozen=True)
class Attention:
    """The requirements of an attention implementation, and the cases that it computes without a T x T matrix."""

    flag: str = ""
    """Class attribute of transformers' models that says whether they can use it; "" for none."""
    gpu: bool = False
    """Whether it needs a GPU and, if it is FlashAttention, a half-precision dtype."""
    install: str = ""
    """How to install it; "" when it comes with PyTorch."""
    capability: int = 0
    """Least major CUDA capability."""
    windows: bool = False
    """Whether sliding windows need no T x T matrix."""
    documents: bool = False
    """Whether packed documents need no T x T matrix."""
    softcap: bool = False
    """Whether it can cap attention scores."""
    matrix: str = ""
    """The cases in which it makes a T x T matrix."""
    cpu: str = ""
    """The dtype that it needs, if it is for CPUs alone; else ""."""

    @property
    def flash(self) -> bool:
        return bool(self.install)


IMPLEMENTATIONS = {
    "flash_attention_2": Attention(
        "_supports_flash_attn", True, "pip install 'scaled-rope[flash]'", 8, True, True, True, "never"
    ),
    "flash_attention_3": Attention(
        "_supports_flash_attn", True, "the hopper folder of Dao-AILab/flash-attention", 9, True, True, True, "never"
    ),
    "flash_attention_4": Attention(
        "_supports_flash_attn", True, "pip install --pre flash-attn-4", 9, True, True, True, "never"
    ),
    "sdpa": Attention("_supports_sdpa", matrix="windows, documents, padding, torch.compile"),
    "sdpa_blocked": Attention("_supports_sdpa", windows=True, documents=True, matrix="never"),
    "blockwise": Attention("_supports_sdpa", cpu="bfloat16", matrix="windows, documents, padding"),
    "flex_attention": Attention(
        "_supports_flex_attn", True, windows=True, documents=True, softcap=True, matrix="never (compiled)"
    ),
    "eager": Attention(softcap=True, matrix="always"),
}
"""Implementations by their names in transformers."""
ATTENTIONS = ("auto", *IMPLEMENTATIONS)


# ---------------------------------------------------------------------------------------------------------- choosing


def resolve_attention(name: str, device: torch.device, dtype: str) -> str:
    """Return `name` or, for "auto", the newest FlashAttention that is installed and can run here, else "sdpa".

    Raises:
        ConfigError: unknown name, or one that cannot run here.
    """
    if name not in ATTENTIONS:
        raise unknown("attention", name, ATTENTIONS)
    if name == "auto":
        flash = [one for one, row in IMPLEMENTATIONS.items() if row.flash and not _lacks(one, device, dtype)]
        return flash[-1] if flash else "sdpa"
    if lack := _lacks(name, device, dtype):
        raise ConfigError(f"attention {name!r} needs {lack}")
    return name


def attention_for(config: Any, attention: str, device: torch.device | None = None) -> str:
    """Return the implementation that a family uses under "auto", given the one that "auto" resolved to.

    FlashAttention and PyTorch's own stay where the family can use them. Otherwise, and for windows, one that makes no
    T x T mask takes their place: "sdpa_blocked" for windows, "flex_attention" on a GPU where Triton runs for families
    with soft caps or sinks, or else "eager".

    Args:
        config: a config of transformers.
        attention: the result of `resolve_attention`; an unknown name is returned unchanged.
        device: None: the first GPU when there is one, else the CPU.
    """
    if attention not in IMPLEMENTATIONS:
        return attention
    if IMPLEMENTATIONS[attention].flash and not refusal(config, attention):
        return attention
    if not IMPLEMENTATIONS[attention].flash and attention != "sdpa":
        return attention
    if not refusal(config, "sdpa"):
        text = text_config(config)
        return "sdpa_blocked" if has_window(text) and not refusal(config, "sdpa_blocked") else "sdpa"
    gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    # It is compiled into a kernel of Triton's.
    flex = gpu and not refusal(config, "flex_attention") and not triton_lacks(device)
    return "flex_attention" if flex else "eager"


def check_attention(config: Any, name: str, device: torch.device, dtype: str) -> None:
    """Raise an error for an implementation that a machine or an architecture cannot use.

    Raises:
        ConfigError: it cannot run; the message says what is missing.
    """
    resolve_attention(name, device, dtype)
    if reason := refusal(config, name):
        raise ConfigError(f"attention {name!r}: cannot be used with {config.model_type} models, {reason}")


def refusal(config: Any, name: str) -> str:
    """Why an architecture cannot use an implementation, in a few words; "" when it can or is not known."""
    row = IMPLEMENTATIONS[name]
    text = text_config(config)
    family = _family(config)
    # Asked first: some releases of transformers let sdpa run, and leave the cap out.
    if getattr(text, "attn_logit_softcapping", None) is not None and not row.softcap:
        return "whose scores have a soft cap"
    if row.flag and not getattr(family, row.flag, True):
        return "says transformers"
    if row.flash:
        only = getattr(family, "_compatible_flash_implementations", None)
        if only is not None and name not in only:
            return "whose attention needs sinks"
        if (head_dim := config_head_dim(text) or 0) > FLASH_HEAD_DIM:
            return f"head_dim {head_dim} is more than {FLASH_HEAD_DIM}"
    if name == "sdpa_blocked" and family is not None:
        module = _modeling(text) or sys.modules[family.__module__]
        if not hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
            return "they do not use transformers' attention interface"
        if getattr(text, "attention_chunk_size", None) is not None:
            return "they attend in chunks"
        if any("index" in str(kind) for kind in getattr(text, "layer_types", None) or ()):
            return "some of their layers choose keys by an index"
        source = inspect.getsource(module)
        if has_window(text) and "sliding_window=" not in source:
            return "they do not say what their windows are"
        if has_window(text) and not _LAYERS_GET_POSITIONS.search(source):
            return "their layers do not learn where packed documents begin"
    return ""


_LAYERS_GET_POSITIONS = re.compile(r"[lL]ayer(?:_module|s\[[^\]]*\])?\(\s*[^()]*?(?:\([^()]*\)[^()]*?)*position_ids")
"""A call of a decoder layer, in the source of a family, that passes `position_ids` on."""


def _family(config: Any) -> Any:
    """The class of models of text, or of images and text, that transformers has for a config; None without one."""
    for known in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        found = next((known[kind] for kind in type(config).__mro__ if kind in known), None)
        if found is not None:
            return found[0] if isinstance(found, tuple | list) else found
    return None


def _modeling(text: Any) -> ModuleType | None:
    """The source file of the decoder that a config of transformers describes; None where it isn't transformers' own."""
    place = type(text).__module__
    if not place.startswith("transformers.models."):
        return None
    try:
        return importlib.import_module(place.replace(".configuration_", ".modeling_"))
    except ImportError:
        return None


_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
"""Names of the dropout of attention weights in configs."""


def attention_dropout(text: Any) -> str | None:
    """The name and the rate of the dropout of attention weights in the config of a model of text; None without it."""
    for name in _DROPOUTS:
        if rate := getattr(text, name, 0.0):
            return f"{name} {rate}"
    return None


def has_window(config: Any) -> bool:
    """Whether any layer of a model has a sliding window."""
    if getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True):
        return False
    types = getattr(config, "layer_types", None)
    return not types or any("sliding" in kind for kind in types)


def set_window(config: Any, window: int) -> None:
    """Set the sliding window of a config of text, in tokens.

    Raises:
        ConfigError: no layer has one, so that nothing would change. The config is then unchanged.
    """
    former = getattr(config, "sliding_window", None)
    if hasattr(config, "sliding_window"):
        config.sliding_window = window
        if has_window(config):
            return
        config.sliding_window = former
    raise ConfigError(
        f"sliding_window={window}: no layer of this {config.model_type!r} model has a sliding window; leave it out"
    )


def _lacks(name: str, device: torch.device, dtype: str) -> str:
    """Say in a few words what a machine lacks for an implementation; "" when nothing."""
    row = IMPLEMENTATIONS[name]
    if row.cpu and (device.type, dtype) != ("cpu", row.cpu):
        return f"{row.cpu} on a CPU, not {dtype} on {device.type!r}"
    if not row.gpu:
        return ""
    if row.flash:
        there = device.type == "cuda" and dtype != "float32" and _is_installed(name)
        if not there:
            return f"a GPU, a half-precision dtype and: {row.install}"
    elif device.type != "cuda":
        return "a GPU"
    if (found := torch.cuda.get_device_capability(device)[0]) < row.capability:
        return f"a GPU of CUDA capability {row.capability}.0 or more, not {found}.x"
    return ""


def _is_installed(name: str) -> bool:
    # transformers can tell them apart: two versions of FlashAttention share an import name.
    check = getattr(import_utils, f"is_flash_attn_{name[-1]}_available", None)
    return check is not None and bool(check())


# -------------------------------------------------------------------------------------------------------- sdpa_blocked

BLOCK = 128
"""Least number of queries in a block of windowed attention."""


@attention_function
def blocked_sdpa(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Causal attention in the interface of transformers, without a T x T mask.

    Args:
        call: its mask is [B, S], true for the keys to attend to, one stretch of each row; or [B, 0]: all keys; or
            None: all keys, of one document or of several. These options are used, others ignored: dropout and scaling;
            sliding_window: positions that a query sees, itself included;
            position_ids: [B, T]; a new document begins where they do not rise by one, without a cache and a mask only;
            cu_seq_lens_q: first tokens of documents, [documents + 1], as FlashAttention takes it; B is 1, there is no
            cache and no padding; cu_seq_lens_k: the same.

    Returns:
        [B, T, H, D] and None. Rows of padding are zero.

    Raises:
        ConfigError: soft caps, sinks and biases; a mask of another form; a module that does not pass positions on;
            borders of documents that do not fit the tokens.
    """
    if name := call.has("softcap", "s_aux", "position_bias", "cache"):
        raise ConfigError(f"attention 'sdpa_blocked': has no {name}")
    if call.may_see_later_keys:
        raise ConfigError("attention 'sdpa_blocked': is causal, use 'sdpa'")
    module, query, key, value, mask = call.module, call.query, call.key, call.value, call.attention_mask
    if mask is not None and mask.dim() != 2:
        raise ConfigError(
            f"attention 'sdpa_blocked': attention_mask of shape {list(mask.shape)} is not allowed; [rows, tokens], or "
            "another attention implementation, such as 'sdpa'"
        )
    window: int | None = call.options.get("sliding_window")
    given = {"dropout": call.dropout, "scaling": call.options.get("scaling")}
    # One query of each row, as in decoding: its rows need not be attended to one by one.
    if mask is not None and mask.shape[1] > 0 and query.shape[2] == 1 and not call.has(*_BORDERS):
        key, value = written(key, value, mask)
        seen = mask if window is None else mask[:, -window:]
        key, value = key[:, :, -seen.shape[1] :], value[:, :, -seen.shape[1] :]
        return sdpa_attention_forward(module, query, key, value, seen[:, None, None], **given)[0], None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _causal(module, q, k, v, window, given)

    return by_stretch(attend, call), None


def written(key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cut keys and values to the length of a mask [B, S]: the rest of a cache of fixed size is not written yet."""
    if mask is None or not 0 < mask.shape[1] < key.shape[2]:
        return key, value
    return key[:, :, : mask.shape[1]], value[:, :, : mask.shape[1]]


def by_stretch(attend: Callable[[Tensor, Tensor, Tensor], Tensor], call: AttentionCall) -> Tensor:
    """Causal attention within each text of each row, [B, T, H, D]; zero where a query belongs to none.

    Args:
        attend: queries [B, H, T, D], the last T of S positions, and keys and values [B, K, S, D] -> [B, T, H, D].
        call: as in `blocked_sdpa`.
    """
    query, mask = call.query, call.attention_mask
    key, value = written(call.key, call.value, mask)
    tokens, keys = query.shape[2], key.shape[2]
    if call.has(*_BORDERS):
        found: list[tuple[int, int, int]] | None = _between_borders(call, keys)
    else:
        found = _stretches(mask, call.options.get("position_ids"), query, keys)
    if found is None:
        return attend(query, key, value)
    out = query.new_zeros(query.shape[0], tokens, query.shape[1], value.shape[-1])
    for row, start, end in found:
        first = max(start, keys - tokens)  # keys before that belong to no query of this pass
        if first >= end:
            continue
        one, those = slice(row, row + 1), slice(first - keys + tokens, end - keys + tokens)
        out[one, those] = attend(query[one, :, those], key[one, :, start:end], value[one, :, start:end])
    return out


_BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k")


def _between_borders(call: AttentionCall, keys: int) -> list[tuple[int, int, int]] | None:
    """List (row, first key, end) of each document, by the borders that a call is given.

    Raises:
        ConfigError: borders that do not fit the tokens of the call.
    """
    name = call.has(*_BORDERS)
    borders: Tensor = call.options[name]
    rows, _, tokens, _ = call.query.shape
    if rows != 1:
        raise ConfigError(f"{name}: goes with one row, got {rows}; put the documents of all rows into one")
    if tokens != keys:
        raise ConfigError(f"{name}: goes with a pass that reads no cache, this one has {tokens} of {keys} tokens")
    if call.attention_mask is not None and call.attention_mask.shape[1] > 0:
        raise ConfigError(f"{name}: goes without padding, and attention_mask leaves tokens out; give one of them")
    if isinstance(borders, FakeTensor):
        return None  # planned on shapes alone, as below
    bounds = borders.tolist()
    pairs = list(zip(bounds, bounds[1:], strict=False))
    if not pairs or bounds[0] != 0 or bounds[-1] > tokens or any(end < start for start, end in pairs):
        raise ConfigError(
            f"{name}: must rise from 0 to at most the number of tokens, {tokens}, got {shortened(str(bounds), 80)}"
        )
    other = call.options.get("cu_seq_lens_k")
    if other is not None and other is not borders and not torch.equal(other, borders):
        raise ConfigError("cu_seq_lens_k: must be the same as cu_seq_lens_q")
    # Borders are padded to a fixed number by repeating the last one, as for FlashAttention: documents without tokens.
    return [(0, start, end) for start, end in pairs if start < end]


def _stretches(
    mask: Tensor | None, position_ids: Tensor | None, query: Tensor, keys: int
) -> list[tuple[int, int, int]] | None:
    """List (row, first key, end) of each text that attends only to itself; None when every row is a single text.

    Raises:
        ConfigError: a mask that leaves out keys inside a text; positions that are not there to tell packed texts.
    """
    batch, _, tokens, _ = query.shape
    if mask is not None and mask.shape[1] == 0:
        return None
    if mask is not None:
        seen = mask.long()
        # argmax gives the first of equal values, so where padding on the left ends. Read at once: a GPU waits for it.
        last = (seen * torch.arange(mask.shape[1], device=mask.device)).amax(dim=1)
        found = torch.stack((seen.argmax(dim=1), seen.sum(dim=1), last), dim=1).tolist()
        for row, (start, count, end) in enumerate(found):
            if count and end != start + count - 1:
                raise ConfigError(
                    f"attention_mask: row {row} leaves out tokens between {start} and {end}, which needs 'sdpa' or "
                    "'eager' and a method that computes no attention itself; pad on the left or on the right"
                )
        return [(row, start, start + count) for row, (start, count, _) in enumerate(found)]
    if tokens != keys or tokens == 1:
        return None
    if position_ids is None:
        raise ConfigError("attention 'sdpa_blocked': gets no position_ids, so it cannot tell packed documents")
    if isinstance(position_ids, FakeTensor):
        return None  # planned on shapes alone: as if every row were one text
    jumps = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if torch.compiler.is_compiling():
        # Reading values would break the graph, and attending across documents would be wrong: checked on the device.
        torch._assert_async(~jumps.any(), "sdpa_blocked: packed documents cannot be compiled, use flex_attention")
        return None
    if not bool(jumps.any()):
        return None
    jumps = jumps.expand(batch, -1)
    places = jumps.nonzero().tolist()
    apart = []
    for row in range(batch):
        bounds = [0, *(place + 1 for at, place in places if at == row), tokens]
        apart += [(row, start, end) for start, end in zip(bounds, bounds[1:], strict=False)]
    return apart


def _causal(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, window: int | None, given: dict[str, Any]
) -> Tensor:
    """Causal attention [B, T, H, D] within a window; queries are the last T of S positions."""
    tokens, keys = query.shape[2], key.shape[2]
    window = keys if window is None else min(window, keys)
    if tokens == 1:
        return _plain(module, query, key[:, :, -window:], value[:, :, -window:], None, given)
    if tokens == keys and window == keys:
        return _plain(module, query, key, value, None, given)
    # Blocks of a quarter of the window: a query is scored with a quarter more keys than it sees, and pieces stay large.
    block = max(BLOCK, window // 4)
    results = []
    for start in range(0, tokens, block):
        end = min(start + block, tokens)
        before = keys - tokens
        first, last = max(0, before + start - window + 1), before + end
        at = torch.arange(before + start, last, device=query.device)[:, None]
        seen = torch.arange(first, last, device=query.device)[None]
        mask = (seen <= at) & (seen > at - window)
        results.append(
            _plain(module, query[:, :, start:end], key[:, :, first:last], value[:, :, first:last], mask, given)
        )
    return torch.cat(results, dim=1)


def _plain(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, given: dict[str, Any]
) -> Tensor:
    """Call transformers' own sdpa, which is causal without a mask and handles grouped heads."""
    mask = None if mask is None else mask[None, None].expand(query.shape[0], 1, -1, -1)
    out: Tensor = sdpa_attention_forward(module, query, key, value, mask, is_causal=True, **given)[0]
    return out


def blocked_mask(*, attention_mask: Tensor | None = None, use_vmap: bool = False, **kwargs: Any) -> Tensor | None:
    """The mask for `blocked_sdpa`: [B, S], true but for padding; [B, 0] without padding; None when none was given.

    Raises:
        ConfigError: a mask that is neither causal nor a window nor documents.
    """
    if use_vmap:
        raise ConfigError("attention 'sdpa_blocked': has no custom masks, use 'sdpa'")
    mask: Tensor | None = flash_attention_mask(attention_mask=attention_mask, **kwargs)
    # Keeps the difference: only without a mask does transformers take a jump in positions for a new document.
    return attention_mask[:, :0] if mask is None and attention_mask is not None else mask


AttentionInterface.register("sdpa_blocked", blocked_sdpa)
AttentionMaskInterface.register("sdpa_blocked", blocked_mask)
blockwise.register()
