"""A config as its author wrote it: from a folder, a file, the hub, a dictionary or an object of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from scaled_rope.checkpoint import no_config
from scaled_rope.errors import ConfigError, first_line, shortened
from scaled_rope.serving.inspect_report import quiet

_MAX_CONFIG_BYTES = 16 << 20
"""Somebody who names a file of weights should not wait until it has been read."""


def read_config_file(source: str | Path) -> dict[str, Any]:
    """The config.json of a folder, of a path or of a hub name, as its author wrote it.

    Raises:
        ConfigError: nothing there, not JSON, not a dictionary, two values for one key, or a hub that cannot be reached.
    """
    path = Path(source)
    if not str(source):
        raise ConfigError("model '': must be a folder, a config.json or a hub name")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise no_config(str(source))
        path = path / "config.json"
    if path.is_file():
        return _parse(path)
    name = str(source)
    # A hub name is OWNER/NAME; a folder here that is called like the owner speaks for a local path.
    if path.is_absolute() or len(path.parts) != 2 or path.suffix == ".json" or Path(path.parts[0]).is_dir():
        hint = "" if "/" in name or path.suffix else ", and a hub name is OWNER/NAME"
        raise ConfigError(f"model {name!r} does not exist{hint}")
    return _from_hub(name)


def _from_hub(name: str) -> dict[str, Any]:
    with quiet():
        try:
            raw, _ = transformers.PreTrainedConfig.get_config_dict(name)
        except Exception as error:  # the hub client has a dozen types for "no such thing" and "no network"
            raise ConfigError(
                f"model {name!r} is no folder or file here, and not on the hub: {first_line(error)}"
            ) from error
    if not raw:
        raise ConfigError(f"model {name!r} is no folder or file here, and not on the hub")
    return {str(key): value for key, value in raw.items() if key != "_commit_hash"}


def _parse(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        data = file.read(_MAX_CONFIG_BYTES + 1)
    if data.startswith(b"GGUF"):
        raise ConfigError(
            f"model {str(path)!r} is a GGUF file; inspect reads config.json: name that of the model it was made from"
        )
    if len(data) > _MAX_CONFIG_BYTES:
        raise ConfigError(f"config {str(path)!r} is larger than {_MAX_CONFIG_BYTES >> 20} MiB, which no config.json is")
    try:
        text = data.decode("utf-8")  # json.loads would read more than the programs that have to read the file
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {str(path)!r} is not JSON, and not text in UTF-8") from error
    if text.startswith("\ufeff"):
        raise ConfigError(
            f"config {str(path)!r} begins with a byte order mark, so transformers cannot read it; save it as UTF-8"
            " without one"
        )

    def unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found and repr(found[key]) != repr(value):
                raise ConfigError(
                    f"config {str(path)!r} says {shortened(key, 80)!r} twice, {shortened(repr(found[key]), 80)} and"
                    f" {shortened(repr(value), 80)}: readers differ in which one they take; remove one"
                )
            found[key] = value
        return found

    try:
        raw = json.loads(text, object_pairs_hook=unambiguous)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config {str(path)!r} is not JSON: {first_line(error)}") from error
    if not isinstance(raw, dict):
        kind = "null" if raw is None else f"a {type(raw).__name__}"
        raise ConfigError(f"config {str(path)!r} holds {kind}: must be a dictionary")
    return raw


def config_as_dictionary(source: Any) -> dict[str, Any]:
    """A config given as a dictionary or as an object of transformers.

    Raises:
        ConfigError: neither of the two.
    """
    if isinstance(source, Mapping):
        return {str(key): value for key, value in source.items()}
    if hasattr(source, "to_dict"):
        return dict(source.to_dict())
    raise ConfigError(f"config of type {type(source).__name__}: must be a model's config, a dictionary or a path")
