"""Files that come with the project: recipes, the published numbers, lm-eval's tasks, the embedded model.

In a checkout they lie beside the package, where people edit them; a wheel holds copies inside the package.
Knows nothing of what is in them.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

FOLDERS = ("configs", "data", "eval/tasks", "models/tiny-llama-256")
"""Folders whose files a wheel contains; `setup.py` copies each into `scaled_rope/_files/`."""
_CHECKOUT = Path(__file__).resolve().parents[1]


def bundled(path: str) -> Path:
    """The path of a file or folder inside one of `FOLDERS`, given its path in a checkout."""
    if (_CHECKOUT / "setup.py").is_file():
        return _CHECKOUT / path
    return Path(str(importlib.resources.files("scaled_rope"))) / "_files" / path
