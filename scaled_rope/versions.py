"""The oldest versions of torch and transformers that the package works with.

Knows nothing of what they are needed for.
"""

from __future__ import annotations

import importlib.metadata
import re

from scaled_rope.errors import ConfigError

# setup.py reads this line; benchmarks/support.sh tests what it says, see docs/support.md.
LEAST = {"torch": "2.9", "transformers": "5.17"}


def check_versions(*packages: str) -> None:
    """Raise an error for a package that is installed in too old a version; whoever imports it misses one that is not.

    Raises:
        ConfigError: the version is below that in `LEAST`.
    """
    for package in packages:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if _release(version) < _release(LEAST[package]):
            raise ConfigError(f"scaled-rope needs {package} >= {LEAST[package]}, this is {version}")


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number: (5, 17) of "5.17.0.dev0"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
