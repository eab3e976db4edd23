"""The model that a server is held against: its log-probabilities under each hypothesis, in float32."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scaled_rope.certificate.hypotheses import Hypothesis, spelled_out
from scaled_rope.certificate.observed import Numbers, Observed, logits_of
from scaled_rope.errors import ConfigError
from scaled_rope.patching.loading import DTYPES, apply_scaling
from scaled_rope.scaling.hf_config import head_dim_of, text_config
from scaled_rope.scaling.record import RopeScaling, RopeSettings

_ULPS = 5e-7
"""By how much frequencies are changed to see what rounding of angles does: 8 units in the last place of float32.
llama.cpp computes each angle from the one before, which makes errors of this size."""

Predicted = list[Numbers]
"""Log-probabilities of the observed tokens, one array per position."""


class Reference:
    """A model of transformers that is run under several scalings.

    model: taken over; its scaling is changed at will.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        config = model.config
        self.config = text_config(config)
        self.head_dim = head_dim_of(self.config)
        self._scaling: RopeScaling | None = None
        forward = inspect.signature(model.forward).parameters
        self._keeps = "logits_to_keep" in forward

    @property
    def scaling(self) -> RopeScaling:
        """That of the model as it was given."""
        return RopeSettings(self.config).scaling

    @torch.inference_mode()
    def predict(self, hypothesis: Hypothesis, observed: Observed) -> Predicted:
        """The log-probabilities of the observed tokens, if the hypothesis holds."""
        if self._scaling != hypothesis.scaling:
            with warnings.catch_warnings():  # that a base is another one, which is the hypothesis
                warnings.simplefilter("ignore", UserWarning)
                apply_scaling(self.model, hypothesis.scaling)
            self._scaling = hypothesis.scaling
        logits = self._logits(observed, hypothesis.window)
        return chosen(logits, observed)

    def _logits(self, observed: Observed, window: int | None) -> Tensor:
        """Logits [P, V] at the observed positions."""
        device = self.model.device
        ids = torch.tensor([observed.ids], device=device)
        places = torch.tensor(observed.positions, device=device)
        options: dict[str, Any] = {"use_cache": False}
        own_mask = window is not None and window < len(observed.ids)
        if own_mask:
            assert window is not None
            options["attention_mask"] = self._window_mask(len(observed.ids), window)
        with self._masked() if own_mask else contextlib.nullcontext():
            if self._keeps:
                logits: Tensor = self.model(ids, logits_to_keep=places, **options).logits[0]
            else:
                logits = self.model(ids, **options).logits[0, places]
        return logits.float().cpu()

    @contextlib.contextmanager
    def _masked(self) -> Iterator[None]:
        """Within this context the model's attention takes a mask [1, 1, T, T]: "sdpa_blocked" takes none."""
        former = self.config._attn_implementation
        if former != "sdpa_blocked":
            yield
            return
        self.model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            self.model.set_attn_implementation(former)

    def _window_mask(self, length: int, window: int) -> Any:
        """A mask that lets every position see the last `window` tokens, itself among them."""
        device, dtype = self.model.device, self.model.dtype
        away = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
        mask = torch.zeros(1, 1, length, length, device=device, dtype=dtype)
        mask.masked_fill_((away < 0) | (away >= window), torch.finfo(dtype).min)
        types = set(getattr(self.config, "layer_types", None) or ())
        by_type = len(types) > 1 or _takes_masks_by_type(self.model)
        return dict.fromkeys(types, mask) if by_type and types else mask

    def rounded(self, dtype: str) -> Reference:
        """A copy of the model that rounds weights and the outputs of all modules to another dtype.

        It computes in float32 in between: most CPUs are ten times slower in the short dtypes themselves.
        """
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for value in model.parameters():
                value.copy_(_round(value, DTYPES[dtype]))
        for module in model.modules():
            if not any(True for _ in module.children()):
                module.register_forward_hook(lambda _, __, output: _rounded_output(output, DTYPES[dtype]))
        return Reference(model)

    def angle_pair(self, claim: RopeScaling, length: int) -> tuple[Hypothesis, Hypothesis]:
        """A table and the same with every frequency a few roundings larger."""
        one, other = (
            spelled_out(claim, self.head_dim, length, lambda table, times=times: table * times)  # type: ignore[misc]
            for times in (1.0, 1.0 + _ULPS)
        )
        return Hypothesis("table", one), Hypothesis("table, otherwise rounded", other)

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        return sum(value.numel() * value.element_size() for value in self.model.parameters())


def _round(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype).to(value.dtype) if value.is_floating_point() else value


def _rounded_output(output: Any, dtype: torch.dtype) -> Any:
    if isinstance(output, Tensor):
        return _round(output, dtype)
    if isinstance(output, tuple):
        return tuple(_rounded_output(one, dtype) for one in output)
    return output


def _takes_masks_by_type(model: nn.Module) -> bool:
    """Whether a model's code asks for one mask per layer type."""
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    try:
        return "causal_mask_mapping" in inspect.getsource(inspect.unwrap(type(decoder).forward))
    except (OSError, TypeError):
        return False


class CallableReference:
    """A callable as the reference: there is one hypothesis, that both compute the same."""

    def __init__(self, logits: Callable[[list[int]], Any]) -> None:
        self.logits = logits

    def predict(self, hypothesis: Hypothesis, observed: Observed) -> Predicted:
        rows = logits_of(self.logits, observed.ids)
        if rows.shape[0] > 1 or len(observed.ids) == 1:
            return chosen(rows[list(observed.positions)].float(), observed)
        # It gives the next token alone: the prompt is cut after each position.
        cut = [logits_of(self.logits, observed.ids[: at + 1])[-1] for at in observed.positions]
        return chosen(torch.stack(cut).float(), observed)


def chosen(logits: Tensor, observed: Observed) -> Predicted:
    """The log-probabilities of the observed tokens in logits [P, V] at the observed positions.

    Raises:
        ConfigError: a token that is none of V.
    """
    for tokens in observed.tokens:
        if (strange := tokens[(tokens < 0) | (tokens >= logits.shape[-1])]).size:
            raise ConfigError(
                f"what is served gives token {strange[0]} a probability, and this model has tokens 0 to"
                f" {logits.shape[-1] - 1}: it is another model, or one with another vocabulary"
            )
    logs = logits.double().log_softmax(-1).numpy()
    return [np.asarray(row[tokens]) for row, tokens in zip(logs, observed.tokens, strict=True)]


def available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
