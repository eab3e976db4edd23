"""How the model of a row was loaded: what tells rows of one model and one scaling apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaled_rope.results import Row
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.scaling.spec import shown


@dataclass(frozen=True)
class Loading:
    """The options of a row's command that change what its model computes, beside the scaling and the precision.

    Attributes:
        adapter: the LoRA adapter that was merged, as the row records its path.
        window: the attention window in tokens, where one was set.
        bits: those of quantised weights, 8 or 4.
        layers: the layers that were chosen, as text; labels have them in words.
    """

    adapter: str = ""
    window: str = ""
    bits: str = ""
    layers: str = ""

    @classmethod
    def of(cls, row: Row) -> Loading:
        """That of a row; rows without arguments count as loaded plainly."""
        given = row.get("provenance", {}).get("arguments")
        found: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
        bits = next((bits for bits in ("8", "4") if found.get(f"load_in_{bits}bit")), "")
        chosen = [found.get("layers"), found.get("drop_layers")]
        return cls(
            str(found.get("adapter") or ""),
            str(found.get("sliding_window_attention") or ""),
            bits,
            json.dumps(chosen) if any(chosen) else "",
        )

    def __bool__(self) -> bool:
        """Whether it is any other than the plain one."""
        return self != Loading()

    @property
    def words(self) -> str:
        """The part that labels do not say, in words; "" where that is nothing."""
        said = [f"adapter {_short(self.adapter)}"] if self.adapter else []
        said += [f"attention window {self.window}"] if self.window else []
        said += [f"{self.bits} bits"] if self.bits else []
        return ", ".join(said)


def _short(path: str) -> str:
    """The last two names of an adapter's path: the last alone is often "adapter" or the number of a step."""
    return "/".join(Path(path).parts[-2:])


def origin(row: Row) -> tuple[Any, ...]:
    """The model and metric of a row, how the model was loaded, and the server that was asked, if any."""
    server = row.get("server") or {}
    return row["model"], row["metric"], Loading.of(row), server.get("url"), server.get("name")


_PRETRAINED = {
    "original_max_position_embeddings": "L", "rope_theta": "theta", "partial_rotary_factor": "rotary share",
    "turning_fraction": "turning share",
}  # fmt: skip
"""Fields of a scaling that say how a model was pre-trained, which labels do not have, and their short names."""


def _pretrained(row: Row) -> tuple[tuple[str, Any], ...]:
    scaling = RopeScaling.from_dict(row["scaling"])
    return tuple((name, getattr(scaling, name)) for name in _PRETRAINED)


class SeriesWords:
    """The words by which series of one model and one label are told apart."""

    def __init__(self, rows: list[Row]) -> None:
        """rows: all that a report shows."""
        loaded: dict[str, set[str]] = {}
        precisions: dict[tuple[Any, ...], set[str]] = {}
        self._corrected: dict[tuple[str, str], set[tuple[str, Any]]] = {}
        for row in rows:
            self._corrected.setdefault((row["model"], row["label"]), set()).update(_pretrained(row))
            loaded.setdefault(row["model"], set()).add(Loading.of(row).words)
            precisions.setdefault(origin(row), set()).add(row["dtype"])
        self._loaded = {model for model, words in loaded.items() if len(words) > 1}
        # Where each metric was measured in one precision, though not all in the same, a model is one series.
        self._precise = {model for (model, *_), dtypes in precisions.items() if len(dtypes) > 1}

    def precision(self, row: Row) -> str:
        """The dtype of a row, where that tells series apart; else ""."""
        return str(row["dtype"]) if row["model"] in self._precise and "server" not in row else ""

    def __call__(self, row: Row) -> str:
        """The words for the series of a row, to be appended to its label; "" where the label is enough."""
        loaded = Loading.of(row).words if row["model"] in self._loaded else ""
        return "".join(f", {words}" for words in (loaded, self._correction(row), self.precision(row)) if words)

    def _correction(self, row: Row) -> str:
        """How this row's scaling says that the model was trained, where others of its label say otherwise."""
        known = [name for name, _ in self._corrected[row["model"], row["label"]]]
        return ", ".join(
            f"{_PRETRAINED[name]} {'unknown' if value is None else shown(value)}"
            for name, value in _pretrained(row)
            if known.count(name) > 1
        )
