"""One model type, tried small: patched, unpatched, saved and read again, its logits compared each time."""

from __future__ import annotations

import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

from benchmarks.small_models import CAUSAL_TYPES, TRAINED, small_config, small_model
from scaled_rope.errors import ConfigError
from scaled_rope.patching.cache_argument import cache_name, returned_cache
from scaled_rope.patching.forward_pass import lengths
from scaled_rope.patching.loading import auto_class, load_model
from scaled_rope.patching.loss import hidden_states, project
from scaled_rope.patching.patch import cache_obstacle, patch_model, unpatch_model
from scaled_rope.scaling.hf_config import text_config
from scaled_rope.serving.default_configs import inspect_default

LENGTH, PREFILL = 160, 144
"""Tokens of the text: two and a half times L; and how many of them go into a cache at once."""
SCALINGS = ("yarn:4", "linear:4", "ntk:4", "dynamic-yarn")
Trial = dict[str, Any]

# Logits of the small models have standard deviations of 0.3 to 4. What must be the same differs by rounding, which
# experts and recurrences make larger; what a scaling changes differs by a tenth and more.
SAME, CHANGED = 2e-3, 1e-2


def has_rope(model_type: str) -> bool:
    """Whether the default config of a type has RoPE parameters."""
    try:
        config = CONFIG_MAPPING[model_type]()
        return getattr(text_config(config), "rope_parameters", None) is not None
    except Exception:
        return True  # judged by building it


def try_type(model_type: str) -> Trial:
    """Build a small model of a type and try everything with it. Never raises; what failed is in the result."""
    trial: Trial = {"model_type": model_type, "text": model_type in CAUSAL_TYPES, "rope": has_rope(model_type)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial["inspect"] = _inspected(model_type)
        if not trial["rope"]:
            return trial
        try:
            model, ids = small_model(model_type), _text()
            before = _logits(model, ids)
            if before.shape[:2] != ids.shape:
                raise ValueError(f"its logits are {list(before.shape)}, for {LENGTH} tokens")
        except Exception as error:
            return trial | {"built": False, "error": _line(error)}
        trial |= {"built": True, "text_type": text_config(model.config).model_type}
        trial["loss"] = _tried(lambda: _distance(project(model, hidden_states(model, ids)), before))
        trial["cache_noise"] = _tried(lambda: _cached(model, ids, before))
        # A token short of L, as PaliGemma counts from 1; and a text of its own, as its tokens see both ways.
        short = _logits(model, ids[:, : TRAINED - 1])
        trial["roundtrip"] = _tried(lambda: _roundtrip(model, ids, before))
        trial["scalings"] = {spec: _try_scaling(model, spec, ids, before, short) for spec in SCALINGS}
        trial["follows"] = _tried(lambda: _followed(model_type, ids))
        trial["regions"] = _tried(lambda: _within_a_window(model, ids[:, : TRAINED - 16]))
    return trial


def _text() -> Tensor:
    return torch.randint(3, 200, (1, LENGTH), generator=torch.Generator().manual_seed(0))


def _logits(model: Any, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False, **more).logits
    return found


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors. Raises ValueError where they are not of one shape, or not finite."""
    if one.shape != other.shape or not bool(one.isfinite().all()):
        raise ValueError(f"logits {list(one.shape)}, finite: {bool(one.isfinite().all())}; wanted {list(other.shape)}")
    return round(float((one - other).abs().max()), 7)


def _tried(action: Callable[[], Any]) -> Any:
    """The result of an action, or its error in one line."""
    try:
        return action()
    except ConfigError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"error: {_line(error)}"


def _line(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__} in {place.name}: {text}" if text else f"{type(error).__name__} in {place.name}"


def _inspected(model_type: str) -> str:
    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception as error:
        return f"no default config: {_line(error)}"
    found = _tried(lambda: inspect_default(config))
    return found if isinstance(found, str) else ": ".join(filter(None, (found.verdict, found.detail)))


def _try_scaling(model: PreTrainedModel, spec: str, ids: Tensor, before: Tensor, short: Tensor) -> Trial:
    found: Trial = {}
    if getattr(text_config(model.config), "max_position_embeddings", None) is None:
        spec += f",original_max_position_embeddings={TRAINED}"  # RecurrentGemma does not say its own
    try:
        report = patch_model(model, spec, kernel="none")
    except ConfigError as error:
        return {"refused": str(error)}
    except Exception as error:
        return {"error": _line(error)}
    try:
        found["native"], found["own"] = report.native, report.before.label
        patched = _logits(model, ids)
        found["within"] = _distance(patched[:, :TRAINED], before[:, :TRAINED])
        found["beyond"] = _distance(patched[:, TRAINED:], before[:, TRAINED:])
        if "dynamic" in spec:
            found["within"] = _distance(_logits(model, ids[:, : TRAINED - 1]), short)
        obstacle = cache_obstacle(model)
        found["cached"] = f"refused: {obstacle}" if obstacle else _tried(lambda: _cached(model, ids, patched))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            found["loaded"] = _tried(lambda: _distance(_logits(load_model(folder, device="cpu"), ids), patched))
            if report.native:
                found["vanilla"] = _tried(lambda: _distance(_logits(_vanilla(folder, model), ids), patched))
    except Exception as error:
        found["error"] = _line(error)
    finally:
        unpatch_model(model)
    found["unpatched"] = _tried(lambda: bool(torch.equal(_logits(model, ids), before)))
    return found


def _roundtrip(model: PreTrainedModel, ids: Tensor, before: Tensor) -> float:
    """How far logits are when transformers alone has saved and read the unpatched model."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return _distance(_logits(_vanilla(folder, model), ids), before)


def _vanilla(folder: str, model: PreTrainedModel) -> Any:
    """The saved model as transformers alone reads it."""
    return auto_class(model.config).from_pretrained(folder, dtype=torch.float32).eval()


def _cached(model: Any, ids: Tensor, whole: Tensor) -> float:
    """How far logits of single tokens behind a cache are from those of one pass over all, `whole`.

    All passes have the scale of the whole text: under dynamic scaling each would have another one otherwise.
    """
    worst = 0.0
    with torch.no_grad(), lengths(torch.tensor([LENGTH])):
        output = model(input_ids=ids[:, :PREFILL], use_cache=True)
        for index in range(PREFILL, LENGTH):
            cache = returned_cache(output)
            if cache is None:
                raise ValueError("it returns no cache")
            output = model(input_ids=ids[:, index : index + 1], use_cache=True, **{cache_name(model): cache})
            worst = max(worst, _distance(output.logits[:, -1], whole[:, index]))
    return worst


def _within_a_window(model: PreTrainedModel, ids: Tensor) -> float:
    """How far logits are under a method that changes attention beyond a window only, for a text within that window.

    Weights of normalisations are made unequal first: where they are all 1 a normalisation and a rotation may change
    places. To be called last, since they stay.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1 and "norm" in name:
                weight.add_(0.5 * torch.randn(weight.shape, generator=generator))
    before = _logits(model, ids)
    patch_model(model, f"rerope,window={ids.shape[1]}", kernel="none")
    try:
        return _distance(_logits(model, ids), before)
    finally:
        unpatch_model(model)


def _followed(model_type: str, ids: Tensor) -> float | str:
    """How far logits behind a cache are from those of one pass over all, where each pass has the scale of its own
    length. That is exact for models of one layer alone, whose keys don't depend on earlier scales but by rotation."""
    for model in _one_layer(model_type):
        before = _logits(model, ids)
        try:
            patch_model(model, "dynamic-yarn", kernel="none")
        except ConfigError:
            continue  # rotary modules of another layer
        whole = _logits(model, ids)
        if _distance(whole, before) < CHANGED:
            continue  # a layer without rotation
        if obstacle := cache_obstacle(model):
            return f"refused: {obstacle}"
        with torch.no_grad():
            output = model(input_ids=ids[:, : TRAINED - 4], use_cache=True)
            if (cache := returned_cache(output)) is None:
                return "no cache"
            rest = model(input_ids=ids[:, TRAINED - 4 :], use_cache=True, **{cache_name(model): cache})
        return _distance(rest.logits, whole[:, TRAINED - 4 :])
    return "no model of one layer"


def _one_layer(model_type: str) -> Iterator[PreTrainedModel]:
    """Small models with a single layer, of each of the types of layers in turn; those that cannot be built are left
    out."""
    text = text_config(small_config(model_type))
    for kind in dict.fromkeys(getattr(text, "layer_types", None) or [""]):
        settings: dict[str, Any] = {"num_hidden_layers": 1} | ({"layer_types": [kind]} if kind else {})
        try:
            model = small_model(model_type, **settings)
            _logits(model, _text())
        except Exception:
            continue
        yield model


def judge(trial: Trial) -> list[str]:
    """The faults of a type: missing effects, tracebacks, numbers that differ. Empty when all is right."""
    wrong = []
    if str(trial.get("inspect")).startswith(("error", "traceback", "differs")):
        wrong.append(f"inspect: {trial['inspect']}")
    if not trial.get("built"):
        return wrong
    if isinstance(trial["loss"], str) or trial["loss"] > 1e-4:
        wrong.append(f"loss: {trial['loss']}")
    noise = trial["cache_noise"] if isinstance(trial["cache_noise"], float) else None
    follows = trial.get("follows")
    if isinstance(follows, float) and noise is not None and follows > SAME + 10 * noise:
        wrong.append(f"dynamic-yarn: one layer behind a cache, {follows}")
    regions = trial.get("regions", 0.0)
    if regions != 0.0 and not (isinstance(regions, float) and regions <= SAME) and not _is_refusal(regions):
        wrong.append(f"rerope: changes a text within its window, {regions}")
    for spec, found in trial["scalings"].items():
        if "refused" in found:
            continue
        if "error" in found:
            wrong.append(f"{spec}: {found['error']}")
            continue
        if found["beyond"] < CHANGED:
            wrong.append(f"{spec}: without effect, {found['beyond']}")
        # A scaling of the model's own (Mistral 4's) gives way, so that texts of L tokens change as well.
        if spec == "dynamic-yarn" and found["within"] > SAME and not found["own"].startswith("yarn"):
            wrong.append(f"{spec}: changes a text of L tokens by {found['within']}")
        if found["unpatched"] is not True:
            wrong.append(f"{spec}: unpatching leaves something, {found['unpatched']}")
        reads_itself = isinstance(trial["roundtrip"], float) and trial["roundtrip"] <= SAME
        for name in ("loaded", "vanilla") if reads_itself else ():
            value = found.get(name, 0.0)
            if isinstance(value, str) or value > SAME:
                wrong.append(f"{spec}: {name}, {value}")
        cached = found["cached"]
        if isinstance(cached, str) and not cached.startswith("refused") and noise is not None:
            wrong.append(f"{spec}: cached, {cached}")
        elif isinstance(cached, float) and noise is not None and cached > SAME + 10 * noise:
            wrong.append(f"{spec}: cached, {cached} where the unpatched model has {noise}")
    return wrong


def _is_refusal(result: Any) -> bool:
    return isinstance(result, str) and result.startswith("refused")
