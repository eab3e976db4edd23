"""Package metadata and extras; tool settings are in pyproject.toml, exact versions in constraints.txt."""

import ast
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "scaled_rope/__init__.py").read_text(), re.MULTILINE).group(1)

EXTRAS = {
    "train": [
        "accelerate>=1.15", "datasets>=5.0", "deepspeed>=0.19.6", "matplotlib", "ninja", "peft>=0.21", "zstandard",
    ],
    "qlora": ["accelerate>=1.15", "bitsandbytes>=0.50", "peft>=0.21"],
    "flash": ["flash-attn>=2.8"],
    "kernels": ["triton>=3.6", "liger-kernel>=0.8.5"],
    "eval": ["lm-eval>=0.4.13", "matplotlib", "nltk", "wonderwords"],
    "wandb": ["wandb"],
    "gguf": ["gguf>=0.19"],
    "search": ["cmaes>=0.12", "matplotlib"],
    "dev": [
        "bitsandbytes>=0.50", "cmaes>=0.12", "gguf>=0.19", "hypothesis", "liger-kernel>=0.8.5", "mypy", "pytest",
        "pytest-xdist", "ruff", "triton>=3.6", "trl>=1.16", "types-PyYAML",
    ],
}  # fmt: skip
# Not in "all": flash-attn, which builds only where a CUDA toolkit is.
EXTRAS["all"] = sorted({requirement for name in EXTRAS if name != "flash" for requirement in EXTRAS[name]})

REQUIRED = ["blake3>=1.0", "numpy", "einops>=0.8", "pyyaml", "tqdm"]
# The oldest torch and transformers that work, see scaled_rope/versions.py.
LEAST = ast.literal_eval(
    re.search(r"^LEAST = (.+)$", (ROOT / "scaled_rope/versions.py").read_text(), re.MULTILINE).group(1)
)

# What a wheel holds a copy of, see scaled_rope/bundled.py: package -> folder of the checkout.
FOLDERS = re.search(r"^FOLDERS = (.+)$", (ROOT / "scaled_rope/bundled.py").read_text(), re.MULTILINE).group(1)
BUNDLED = {f"scaled_rope._files.{folder.replace('/', '.')}": folder for folder in ast.literal_eval(FOLDERS)}

setup(
    name="scaled-rope",
    version=VERSION,
    description="Extend the context window of RoPE language models: YaRN and its family, trained, evaluated, compared",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=[*find_packages(include=["scaled_rope", "scaled_rope.*"]), *BUNDLED],
    package_dir=BUNDLED,
    package_data={"scaled_rope": ["py.typed"], **dict.fromkeys(BUNDLED, ["*.yaml", "*.json", "*.py", "*.safetensors"])},
    entry_points={
        "console_scripts": ["scaled-rope = scaled_rope.cli:main"],
        # torch calls these when it has been imported; see the module for why this is not an entry point of lm-eval.
        "torch.backends": ["scaled-rope-lm-eval = scaled_rope.evaluation.lm_eval_registration:install"],
    },
    install_requires=[*(f"{name}>={version}" for name, version in LEAST.items()), *REQUIRED],
    extras_require=EXTRAS,
)
