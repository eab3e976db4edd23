"""Data sets of the Hugging Face hub. `datasets` is imported when one is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scaled_rope.errors import ConfigError, first_line


def import_datasets(name: str) -> Any:
    """Import the `datasets` library.

    Raises:
        ConfigError: it is not installed; `name` is the data set that needs it.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"dataset {name!r} is no local path; hub datasets need: pip install 'scaled-rope[train]'"
        ) from None
    return datasets


def load_hub(name: str, split: str, subset: str | None = None, streaming: bool = False) -> Any:
    """Load a data set of the hub with the `datasets` library.

    Args:
        name: OWNER/NAME, or OWNER/NAME:FOLDER for one folder of the repository.
        split: such as "train".
        subset: one of the configurations that the repository defines; it takes the place of a folder.
        streaming: return an iterable that reads records as needed, instead of a table.

    Raises:
        ConfigError: no such data set, or `datasets` is missing.
    """
    datasets = import_datasets(name)
    repository, _, folder = name.partition(":")
    try:
        if subset is None:
            return datasets.load_dataset(repository, data_dir=folder or None, split=split, streaming=streaming)
        return datasets.load_dataset(name, subset, split=split, streaming=streaming)
    except Exception as error:  # the library raises a dozen unrelated types for "cannot be loaded"
        asked = " is no local path and" if subset is None else f" with subset {subset!r}:"
        raise ConfigError(f"dataset {name!r}{asked} the hub gave: {first_line(error)}") from None


def hub_records(name: str, split: str, subset: str | None = None) -> Iterator[Any]:
    """Yield the records of a data set of the hub; arguments as for `load_hub`.

    Raises:
        ConfigError: as `load_hub`, or a record that cannot be read.
    """
    stream = iter(load_hub(name, split, subset, streaming=True))
    while True:
        try:
            record = next(stream)
        except StopIteration:
            return
        except Exception as error:  # as above; files are opened, and decompressed, only now
            raise ConfigError(f"dataset {name!r} cannot be read: {first_line(error)}") from None
        yield record
