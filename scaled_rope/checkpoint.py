"""A checkpoint before its weights are loaded: config, tokenizer, hash, and whether it is local.

Knows nothing of weights and of how a model is patched.
"""

from __future__ import annotations

import copy
import errno
import functools
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaled_rope.bundled import bundled
from scaled_rope.content_hash import kept_hash
from scaled_rope.errors import ConfigError, first_line, shortened
from scaled_rope.scaling.hf_config import CUSTOM_ROPE_TYPE, nested_types, read_by_attention, text_config, text_path
from scaled_rope.scaling.record import RopeScaling, RopeSettings


def encode(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text, without special tokens."""
    # "verbose" off: no warning about texts longer than the model's trained context.
    return list(tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id of a tokenizer; its length is less where ids have gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


DEFAULT_MODEL = bundled("models/tiny-llama-256")
"""The checkpoint that comes with this project, which trained it."""


# ---------------------------------------------------------------------------------------------------- names of models


def check_local(name: str) -> None:
    """Raise a ConfigError for a name that can only be a local path and is no checkpoint, instead of asking the hub."""
    if not name.strip():  # the path '' is the folder that we are in
        raise ConfigError(f"model {name!r} is not allowed; the name is empty")
    path = Path(name)
    if path.is_file():
        raise ConfigError(f"model {name!r} is a file; give the folder that holds config.json")
    looks_local = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2
    if not path.exists() and (looks_local or (len(path.parts) == 2 and Path(path.parts[0]).is_dir())):
        raise ConfigError(f"model {name!r} does not exist")
    if not path.exists() and len(path.parts) < 2:  # the few models of the hub without an owner are older than RoPE
        raise ConfigError(f"model {name!r} does not exist, and a hub name is OWNER/NAME")
    if path.is_dir() and not (path / "config.json").is_file():
        raise no_config(name)


def no_config(folder: str) -> ConfigError:
    """The error for a folder without config.json; its text depends on what the folder holds instead."""
    if (Path(folder) / "adapter_config.json").is_file():
        return ConfigError(f"model {folder!r} holds an adapter and no config.json: name its base model")
    if any(Path(folder).glob("*.gguf")):
        return ConfigError(
            f"model {folder!r} holds a GGUF file and no config.json: name the folder of the model it was made from"
        )
    return ConfigError(f"model {folder!r} holds no config.json")


# ---------------------------------------------------------------------------------------------- reading checkpoints


@contextmanager
def quiet_transformers(hide_bars: bool = False) -> Iterator[None]:
    """Without the logs of transformers and of the hub's client, which logs every try to reach the hub. Afterwards both
    are as loud as they were.

    hide_bars: also without transformers' progress bars.
    """
    from transformers.utils import logging as transformers_logging  # takes seconds; checks of flags do not need it

    verbosity, hub = transformers_logging.get_verbosity(), logging.getLogger("huggingface_hub")
    hub_level, bars = hub.level, transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    hub.setLevel(logging.CRITICAL)
    if hide_bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub.setLevel(hub_level)
        if hide_bars and bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def reading(what: str, name: str) -> Iterator[None]:
    """Report any failure to read a checkpoint as bad input in one line.

    transformers, tokenizers, safetensors and the hub client raise a dozen unrelated types for a broken checkpoint and
    log more, so every exception counts here and the log is silenced; the cause stays attached for debugging.
    """
    with quiet_transformers(hide_bars=not sys.stderr.isatty()):
        try:
            yield
        except ConfigError:
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ConfigError(f"{what} {name!r} cannot be read: {first_line(error)}") from error
        except Exception as error:
            raise ConfigError(f"{what} {name!r} cannot be read: {first_line(error)}") from error


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a checkpoint (directory or hub name), with the RoPE parameters as written.

    Raises:
        ConfigError: no such checkpoint, or not a configuration that transformers knows.
    """
    check_local(name)
    import transformers

    with reading("model", name):
        raw, _ = transformers.PreTrainedConfig.get_config_dict(name)
        path = text_path(raw)
        rope = functools.reduce(lambda part, key: part[key], path, raw).get("rope_parameters")
        if CUSTOM_ROPE_TYPE not in str(rope) or raw.get("model_type") not in transformers.CONFIG_MAPPING:
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            for part in ("decoder", "generator", "text_config"):  # where transformers looks for the part that is text
                value = getattr(config, part, None)
                if value is not None and not isinstance(value, transformers.PreTrainedConfig):
                    raise ConfigError(
                        f"model {name!r}: {part} = {shortened(repr(value), 200)} is not allowed; model_type"
                        f" {config.model_type!r} has no such part"
                    )
            return config
        # Some config classes reject rope types that they do not know, so ours is set after they have checked the rest.
        family = transformers.CONFIG_MAPPING[raw["model_type"]]
        unscaled = copy.deepcopy(raw)
        functools.reduce(lambda part, key: part[key], path, unscaled)["rope_parameters"] = without_custom_rope(rope)
        config = family.from_dict(unscaled)
        text_config(config).rope_parameters = rope
        return config


def raw_config(name: str) -> dict[str, Any]:
    """The config.json of a checkpoint (directory or hub name) as its author wrote it.

    Raises:
        ConfigError: no such checkpoint, or no JSON.
    """
    check_local(name)
    import transformers

    with reading("model", name):
        raw, _ = transformers.PreTrainedConfig.get_config_dict(name)
    raw.pop("_commit_hash", None)
    return dict(raw)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config has been read, and the RoPE settings in it."""

    name: str
    """Directory or hub name, as given."""
    config: Any
    """The configuration, an object of transformers."""
    settings: RopeSettings


def open_checkpoint(name: str | os.PathLike[str], trust_remote_code: bool = False) -> Checkpoint:
    """Read the config of a checkpoint, and warn of what had to be assumed about its RoPE.

    Raises:
        ConfigError: as `load_config`; RoPE parameters that cannot be read.
    """
    if not isinstance(name, str | os.PathLike):
        raise ConfigError(f"model {shortened(repr(name), 80)} is not allowed; a folder or a hub name")
    name = os.fspath(name)
    config = load_config(name, trust_remote_code)
    settings = RopeSettings(config, raw_config(name))
    settings.warn()
    return Checkpoint(name, config, settings)


def without_custom_rope(rope: Any) -> Any:
    """Replace RoPE parameters of type "scaled-rope" by those of the unscaled model, which transformers can build.

    Other parameters are copied; nested ones are treated one layer type at a time.
    """
    if nested_types(rope):
        return {
            name: without_custom_rope(entry) if name in nested_types(rope) else entry for name, entry in rope.items()
        }
    if rope.get("rope_type") != CUSTOM_ROPE_TYPE:
        return dict(rope)
    return read_by_attention(rope) | RopeScaling.from_spec("default", RopeScaling.from_config(rope)).to_config()


def load_tokenizer(name: str, trust_remote_code: bool = False, add_bos_token: bool | None = None) -> Any:
    """The tokenizer of a checkpoint.

    add_bos_token: whether encoded texts begin with the token of the beginning; None: as the tokenizer says.

    Raises:
        ConfigError: no such checkpoint, or no tokenizer in it.
    """
    if not (Path(name) / "tokenizer_config.json").is_file():  # a folder may hold a tokenizer alone
        check_local(name)
    import transformers

    with reading("tokenizer of model", name):
        options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **options)


def display_name(model: str) -> str:
    """The directory name of a checkpoint; RUN for RUN/model, where training runs keep theirs."""
    path = Path(model)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def weights_hash(folder: str | Path) -> str:
    """A short hash of all the weights, packed tokens and JSON files in a local folder, and of the Arrow files of saved
    `datasets` tables, one or several splits, but not of those that `datasets` keeps beside them for itself."""
    place = Path(folder)
    paths = sorted(path for pattern in ("*.safetensors", "*.bin", "*.json") for path in place.glob(pattern))
    paths += sorted(path for path in place.rglob("*.arrow") if not path.name.startswith(("cache-", "tmp")))
    files = [(path.relative_to(place).as_posix(), kept_hash(path)) for path in paths]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
