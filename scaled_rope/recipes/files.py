"""Recipes as YAML files: those of `configs/`, and any other by its path."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from scaled_rope.bundled import bundled
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.recipes.recipe import Recipe, make_recipe

CONFIGS = bundled("configs")


def available() -> dict[str, Path]:
    """Recipe name -> file, for every YAML file in `configs/`."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # that of libyaml takes a tenth of the time
_LARGEST_FILE = 2**20  # bytes
_DEEPEST = 20  # blocks within blocks
_LONG_NUMBER = re.compile(r"[-+]?[\d_.]{40,}")


def _check_events(text: str, path: Path, loader: Any = _LOADER) -> None:
    """Raise a ConfigError for what makes a small file large or endless: aliases, blocks without end, long numbers."""
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{path}, line {line}: *{event.anchor} is not allowed; write the value again")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _DEEPEST:
                raise ConfigError(f"{path}, line {line}: more than {_DEEPEST} blocks within each other are not allowed")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent) and not event.style and _LONG_NUMBER.fullmatch(event.value):
            raise ConfigError(f"{path}, line {line}: a number of {len(event.value)} digits is not allowed")


def _check_keys(node: yaml.Node | None, path: Path) -> None:
    """Raise a ConfigError for a key that occurs twice in one block, where YAML would silently take the last."""
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise ConfigError(f"{path}, line {line}: {name} stands there again, after line {lines[name]}; keep one")
            lines[name] = line
            _check_keys(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value, path)


def read_yaml(path: Path, what: str = "recipe") -> dict[str, Any]:
    """Read a YAML file of `field: value` lines.

    what: the name of its content in errors.

    Raises:
        ConfigError: it is no YAML, no such lines, a key stands there twice, or it is larger or deeper than any
            such file.
    """
    try:
        if (size := path.stat().st_size) > _LARGEST_FILE:
            raise ConfigError(f"{path} has {size} bytes; a {what} has at most {_LARGEST_FILE}")
        text = path.read_text(encoding="utf-8")
        _check_events(text, path)
        _check_keys(yaml.compose(text, Loader=_LOADER), path)
        content = yaml.load(text, Loader=_LOADER)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except yaml.YAMLError as error:
        with contextlib.suppress(yaml.YAMLError):
            _check_events(text, path, yaml.SafeLoader)  # libyaml refuses deep blocks before it tells of them
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no {what}; expected `field: value` lines")
    return content


def read_recipe(name: str, overrides: Mapping[str, Any] | None = None, also: Sequence[str] = ()) -> Recipe:
    """Read a recipe by its name in `configs/` or by the path of a YAML file.

    A recipe may name one `base` recipe whose fields it takes over; the base may not have a base itself.

    also: further names to suggest in the error for an unknown recipe.

    Raises:
        ConfigError: no such recipe, an unknown field, a value that is not allowed, or a missing field.
    """
    if not name.isprintable():
        raise ConfigError(f"recipe {name!r} is not allowed; a name without line breaks and control characters")
    path = Path(name) if name.endswith((".yaml", ".yml")) else available().get(name)
    if path is None:
        raise unknown("recipe", name, [*available(), *also])
    if not os.path.isfile(path):  # False for names that no file can have, where Path.is_file raises
        raise ConfigError(f"recipe file {path} does not exist")
    fields = read_yaml(path)
    if base := fields.pop("base", None):
        named = isinstance(base, str) and re.fullmatch(r"[\w.-]+", base) is not None
        beside = path.with_name(f"{base}.yaml") if named else path
        parent = read_yaml(beside) if named and os.path.isfile(beside) else None
        if parent is None or "base" in parent:
            raise ConfigError(f"{path}: base {base!r} is not allowed; a recipe beside it that has no base itself")
        fields = parent | fields
    model = fields.get("model")
    if isinstance(model, str) and not os.path.exists(model) and os.path.isdir(bundled(model)):
        fields["model"] = str(bundled(model))  # the embedded model, seen from outside the checkout
    return make_recipe({"name": path.stem} | fields | dict(overrides or {}), str(path))
