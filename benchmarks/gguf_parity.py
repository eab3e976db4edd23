"""Does llama.cpp compute what we compute, with the flags that `scaled-rope export` prints?

    python benchmarks/gguf_parity.py --model models/tiny-llama-256 --model out/demo/model --llama-python PATH

writes each checkpoint as a float32 GGUF, evaluates the same token ids with llama.cpp (llama-cpp-python, which may live
in another environment: --llama-python) and with the patched model of transformers, and compares the logits.

Everything is float32: weights, activations, the KV cache of llama.cpp (its default is float16), no flash attention, one
batch for the whole text. What remains is the order of summation, and angles: both programs multiply positions by
frequencies in float32, which near position 2000 is off by up to 6e-5 rad, and llama.cpp computes each angle from the
one before. So both are also compared with the same model in float64, which says how much either is off.

Exit code 1 when a logit differs by more than `TOLERANCE` under the exported flags.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Job = dict[str, Any]

TOLERANCE = 0.02
"""Largest difference of a logit. float32 leaves up to 0.004 over 2048 positions; a wrong constant makes 5 and more."""

SCALINGS = (
    "default",
    "linear:8",
    "ntk:8",
    "ntk-by-parts:8",
    "yarn:8",
    "yarn:8,attention_factor=1.0",
    "yarn:8,beta_fast=16,beta_slow=2",
    "yarn:8,mscale=0.7,beta_fast=128,beta_slow=2",
    "yarn:8,extrapolation_factor=0.5",
    "yarn:8,ramp=rotations",
    "yarn:8,truncate=false",
    "llama3:8",
)


# This part runs under the interpreter that has llama-cpp-python; it needs nothing else but numpy.


def evaluate(jobs: Sequence[Job]) -> None:
    """Compute the logits of every job with llama.cpp and write them to its "logits" path: float32 [N, V]."""
    import llama_cpp
    import numpy as np

    kinds = {
        "none": llama_cpp.LLAMA_ROPE_SCALING_TYPE_NONE,
        "linear": llama_cpp.LLAMA_ROPE_SCALING_TYPE_LINEAR,
        "yarn": llama_cpp.LLAMA_ROPE_SCALING_TYPE_YARN,
    }
    for job in jobs:
        given, tokens = job["given"], job["tokens"]
        rope: dict[str, Any] = {
            # As with the flags: a value that is not given keeps the program's own default.
            "rope_scaling_type": kinds.get(given.get("scaling"), llama_cpp.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED),
            "rope_freq_base": given.get("freq_base", 0.0),
            "rope_freq_scale": 1.0 / given["scale"] if "scale" in given else 0.0,
            "yarn_orig_ctx": given.get("orig_ctx", 0),
            "yarn_ext_factor": given.get("ext_factor", -1.0),
            "yarn_attn_factor": -1.0,
            "yarn_beta_fast": given.get("beta_fast", -1.0),
            "yarn_beta_slow": given.get("beta_slow", -1.0),
        }
        if job["override"]:
            rope["kv_overrides"] = job["override"]
        model = llama_cpp.Llama(
            job["gguf"],
            n_gpu_layers=0,
            n_ctx=len(tokens),
            n_batch=len(tokens),
            n_ubatch=len(tokens),
            n_threads=2,
            n_threads_batch=2,
            logits_all=True,
            flash_attn=False,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
            **rope,
        )
        model.eval(tokens)
        np.save(job["logits"], np.array(model.scores[: len(tokens)], dtype=np.float32))
        job["tokenized"] = model.tokenize(job["text"].encode(), add_bos=False) if job["text"] else None
        model.close()
    print(json.dumps({"llama_cpp": llama_cpp.__version__, "tokenized": [job["tokenized"] for job in jobs]}))


def run_llama_cpp(python: str | None, jobs: Sequence[Job], folder: Path) -> dict[str, Any]:
    """Run `evaluate` in a process of its own, under `python`. Raises ConfigError when that has no llama_cpp."""
    from scaled_rope.errors import ConfigError

    if python is None:
        if importlib.util.find_spec("llama_cpp") is None:
            raise ConfigError("llama-cpp-python is not installed here; name an interpreter that has it: --llama-python")
        python = sys.executable
    task = folder / "jobs.json"
    task.write_text(json.dumps(list(jobs)))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, __file__, "--evaluate", str(task)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"{python} could not evaluate with llama-cpp-python: {last}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


# The rest runs in this process.


def exact_rotary(scaling: Any, head_dim: int) -> Any:
    """A rotary module that makes float64 tables of our float32 frequencies."""
    import torch

    from scaled_rope.scaling.frequencies import compute_rope

    class Rotary(torch.nn.Module):
        def forward(self, x: Any, position_ids: Any) -> Any:
            inv_freq, factor = compute_rope(scaling, head_dim)
            angles = position_ids.double()[..., None] * inv_freq.double()
            angles = torch.cat((angles, angles), dim=-1)
            return angles.cos() * factor, angles.sin() * factor

    return Rotary()


def our_logits(folder: str, scaling: Any, tokens: Sequence[int]) -> tuple[Any, Any]:
    """Logits [N, V] of the patched model in float32, and of the same model in float64 throughout."""
    import torch

    from scaled_rope.patching.loading import load_model
    from scaled_rope.patching.patch import patch_model
    from scaled_rope.scaling.hf_config import head_dim_of

    model = load_model(folder, dtype="float32", device=torch.device("cpu"), attn_implementation="eager")
    patch_model(model, scaling)
    ids = torch.tensor([list(tokens)])
    with torch.inference_mode():
        single = model(ids, use_cache=False).logits[0].double().numpy()
        model.double()
        model.model.rotary_emb = exact_rotary(scaling, head_dim_of(model.config))
        double = model(ids, use_cache=False).logits[0].numpy()
    return single, double


def differences(a: Any, b: Any) -> dict[str, float]:
    """Differences between two sets of logits [N, V]: over all entries, and in their predictions."""
    import numpy as np

    def log_softmax(x: Any) -> Any:
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    a, b = a.astype(np.float64), b.astype(np.float64)
    p, q = log_softmax(a), log_softmax(b)
    return {
        "max_difference": float(np.abs(a - b).max()),
        "rms_difference": float(np.sqrt(((a - b) ** 2).mean())),
        "max_kl": float((np.exp(p) * (p - q)).sum(axis=-1).max()),
        "same_top": float((a.argmax(axis=-1) == b.argmax(axis=-1)).mean()),
    }


def as_converted(words: Any, scaling: Any) -> dict[str, Any]:
    """The rotary metadata that llama.cpp's own converter would write for these `rope_parameters` of YaRN."""
    rope = words["rope_parameters"]
    metadata: dict[str, Any] = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": float(rope["factor"]),
        "llama.rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
        "llama.rope.scaling.yarn_attn_factor": float(rope["attention_factor"]),
    }
    for name in ("beta_fast", "beta_slow"):
        if name in rope:
            metadata[f"llama.rope.scaling.yarn_{name}"] = float(rope[name])
    return metadata


def make_jobs(folder: str, specs: Sequence[str], text: str, length: int, scratch: Path) -> list[Job]:
    """One job per scaling with the exported flags, and for YaRN one with the converter's metadata and no flags."""
    from scaled_rope.checkpoint import load_config, load_tokenizer
    from scaled_rope.errors import ConfigError
    from scaled_rope.scaling.hf_config import head_dim_of
    from scaled_rope.scaling.record import RopeScaling
    from scaled_rope.scaling.resolve import resolve_scaling
    from scaled_rope.serving.export import export
    from scaled_rope.serving.gguf import GgufRope, add_rope, write_checkpoint
    from scaled_rope.serving.targets.common import divisors

    tokens = load_tokenizer(folder)(text, add_special_tokens=False)["input_ids"][:length]
    if len(tokens) < length:
        raise ConfigError(f"the text has {len(tokens)} tokens, fewer than the longest length {length}: --text FILE")
    config = load_config(folder)
    own = RopeScaling.from_config(config)
    plain = scratch / f"{len(list(scratch.iterdir()))}.gguf"
    write_checkpoint(folder, plain, GgufRope())
    jobs = []
    for index, spec in enumerate(specs):
        scaling = resolve_scaling(spec, own)
        report = export(scaling, config, "llama.cpp", length)
        if report.status != "exact":
            raise ConfigError(f"{spec!r}: {report.status}: {report.reason}")
        path = plain
        if report.gguf is not None:
            path = scratch / f"{plain.stem}-{index}.gguf"
            add_rope(plain, path, report.gguf)
        elif scaling.method == "llama3":  # the converter's tensor
            path = scratch / f"{plain.stem}-{index}.gguf"
            add_rope(plain, path, GgufRope(divisors=tuple(divisors(scaling, head_dim_of(config), length))))
        variants = [("flags" if path == plain else "tensor", path, *read_flags(report.flags))]
        if report.gguf is None and scaling.method in ("yarn", "ntk-by-parts") and scaling.is_native(64):
            path = scratch / f"{plain.stem}-{index}-converted.gguf"
            add_rope(plain, path, GgufRope(as_converted(report.config, scaling)))
            variants.append(("converted", path, {}, {}))
        for variant, gguf, given, override in variants:
            jobs.append(
                {
                    "spec": spec,
                    "scaling": scaling,
                    "variant": variant,
                    "command": report.command if variant != "converted" else "llama-server -m MODEL.gguf",
                    "gguf": str(gguf),
                    "given": given,
                    "override": override,
                    "tokens": tokens,
                    "text": "" if jobs else text,
                    "logits": str(scratch / f"{plain.stem}-{index}-{variant}.npy"),
                }
            )
    return jobs


def read_flags(flags: Sequence[str]) -> tuple[dict[str, Any], dict[str, float]]:
    """Parse exported flags into arguments of llama-cpp-python, so that the printed flags are the ones tested."""
    read: dict[str, Callable[[str], Any]] = {
        "--rope-scaling": str,
        "--rope-scale": float,
        "--rope-freq-base": float,
        "--yarn-orig-ctx": int,
        "--yarn-ext-factor": float,
        "--yarn-beta-fast": float,
        "--yarn-beta-slow": float,
    }
    given: dict[str, Any] = {}
    override: dict[str, float] = {}
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        if flag in read:
            given[flag.removeprefix("--rope-").removeprefix("--yarn-").replace("-", "_")] = read[flag](value)
        elif flag == "--override-kv":
            key, _, typed = value.partition("=")
            kind, _, number = typed.partition(":")
            override[key] = int(number) if kind == "int" else float(number)
    return given, override


def build_parser() -> Any:
    from scaled_rope.checkpoint import DEFAULT_MODEL
    from scaled_rope.command_line import Parser

    parser = Parser("benchmarks/gguf_parity.py", __doc__)
    add = parser.add_argument
    add("--model", action="append", metavar="DIR", help="a Llama or Mistral checkpoint; may be repeated")
    add("--scaling", action="append", metavar="SPEC", help="may be repeated; default: a set of twelve")
    add("--lengths", default="256,512,1024,2048", metavar="N,N", help="ends of the stretches that are reported apart")
    add("--text", default=str(DEFAULT_MODEL.parents[1] / "README.md"), metavar="FILE", help="what is evaluated")
    add("--llama-python", metavar="PATH", help="an interpreter that has llama-cpp-python")
    add("--output", metavar="FILE", help="rows, one JSON object per line, appended")
    return parser


@dataclass(frozen=True)
class Logits:
    """Logits [N, V] of one job: llama.cpp's, the patched model's in float32, and the same model's in float64."""

    theirs: Any
    single: Any
    double: Any

    def stretches(self, lengths: Sequence[int], unscaled: Any) -> Iterator[tuple[list[int], Job]]:
        """Yield positions [start, end] of each stretch, and how the logits differ there; stretches end at `lengths`.

        unscaled: the float32 logits without scaling, None where they are not compared with.
        """
        for start, end in zip([0, *lengths], lengths, strict=False):
            at = slice(start, end)
            found = {
                **differences(self.theirs[at], self.single[at]),
                "theirs_from_float64": differences(self.theirs[at], self.double[at]),
                "ours_from_float64": differences(self.single[at], self.double[at]),
                "logits_std": float(self.double[at].std()),
            }
            if unscaled is not None:
                found["effect_of_scaling"] = differences(unscaled[at], self.single[at])
            yield [start, end], found

    def cells(self) -> list[str]:
        """The differences over all positions, as cells of a line of the table."""
        whole = differences(self.theirs, self.single)
        return [
            f"{whole['max_difference']:.1e}",
            f"{whole['rms_difference']:.1e}",
            f"{whole['same_top']:.4f}",
            f"{differences(self.theirs, self.double)['max_difference']:.1e}",
            f"{differences(self.single, self.double)['max_difference']:.1e}",
        ]


def compare(
    model: str, specs: Sequence[str], text: str, lengths: Sequence[int], python: str | None
) -> Iterator[tuple[list[str], list[Job]]]:
    """Yield for each job of a model a line of the table, and a row without provenance for each stretch of positions."""
    import numpy as np

    from scaled_rope.checkpoint import display_name, weights_hash
    from scaled_rope.provenance import portable_model

    with tempfile.TemporaryDirectory() as name:
        jobs = make_jobs(model, specs, text, lengths[-1], Path(name))
        sent = [{key: value for key, value in job.items() if key != "scaling"} for job in jobs]
        answer = run_llama_cpp(python, sent, Path(name))
        tokens = jobs[0]["tokens"]
        same_tokens = answer["tokenized"][0][: len(tokens)] == tokens
        which = "the same" if same_tokens else "OTHER"
        print(f"{display_name(model)}: llama.cpp splits the text into {which} tokens", flush=True)
        ours: dict[str, Any] = {}
        for job in jobs:
            spec, scaling, variant = job["spec"], job["scaling"], job["variant"]
            if spec not in ours:
                ours[spec] = our_logits(model, scaling, tokens)
            logits = Logits(np.load(job["logits"]), *ours[spec])
            about = {
                "metric": "gguf-logits", "model": portable_model(model), "model_fingerprint": weights_hash(model),
                "dtype": "float32",
                "scaling": scaling.to_dict(), "label": scaling.label,
            }  # fmt: skip
            more = {"command": job["command"], "llama_cpp_python": answer["llama_cpp"], "same_tokens": same_tokens}
            unscaled = ours["default"][0] if "default" in ours and spec != "default" else None
            rows = []
            for positions, found in logits.stretches(lengths, unscaled):
                protocol = {"positions": positions, "variant": variant, "kv_cache": "float32"}
                rows.append({**about, "length": positions[1], "protocol": protocol, **more, **found})
            yield [display_name(model), scaling.label, variant, *logits.cells()], rows


def main() -> int:
    if sys.argv[1:2] == ["--evaluate"]:
        evaluate(json.loads(Path(sys.argv[2]).read_text()))
        return 0
    from scaled_rope.checkpoint import DEFAULT_MODEL
    from scaled_rope.errors import ConfigError
    from scaled_rope.evaluation.formatting import format_table
    from scaled_rope.provenance import provenance
    from scaled_rope.results import append_row

    args = build_parser().parse_args()
    try:
        lengths = sorted(int(part) for part in args.lengths.split(","))
        text = Path(args.text).read_text(encoding="utf-8")
    except ValueError as error:
        raise ConfigError(f"lengths={args.lengths!r}: whole numbers with commas between them") from error
    data = {"text": Path(args.text).name, "sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}
    table, worst = [], 0.0
    told = {key: value for key, value in vars(args).items() if key not in ("llama_python", "output")}
    for model in args.model or [str(DEFAULT_MODEL)]:
        for line, rows in compare(model, args.scaling or SCALINGS, text, lengths, args.llama_python):
            table.append(line)
            for row in rows:
                if args.output:
                    append_row(args.output, row | {"data": data} | provenance("cpu", None, told))
                if row["protocol"]["variant"] != "converted":
                    worst = max(worst, row["max_difference"])
    heads = ["model", "scaling", "variant", "max", "rms", "top", "theirs-f64", "ours-f64"]
    print(format_table(heads, table))
    print(f"largest difference under exported flags: {worst:.1e}, allowed {TOLERANCE}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--evaluate"]:
        sys.exit(main())
    from scaled_rope.command_line import run_cli

    sys.exit(run_cli(main))
