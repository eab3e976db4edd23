"""The training recipe: its fields, what each may be, and how plain values become one."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from scaled_rope.errors import ConfigError, check_name, is_number, suggestion, unknown
from scaled_rope.recipes.evaluate_flags import COMPLETING, EVALUATE_FIELDS, EVALUATE_FLAGS, unknown_flag
from scaled_rope.scaling.registry import METHODS
from scaled_rope.scaling.resolve import check_spec
from scaled_rope.scaling.spec import Spec

LR_SCHEDULES = ("linear", "constant", "cosine", "wsd")
LR_DECAYS = ("linear", "1-sqrt")
PRECISIONS = ("auto", "bf16", "fp32")
QUANTIZATIONS = ("nf4",)
SAVE_DTYPES = (None, "float32", "bfloat16", "float16")
_LARGEST = {
    "num_hidden_layers": 4096, "num_attention_heads": 4096, "num_key_value_heads": 4096, "head_dim": 2**14,
    "hidden_size": 2**18, "intermediate_size": 2**20, "vocab_size": 2**24,
}  # fmt: skip
"""The largest values of fields of `init`: beyond them, building a model takes memory and time without end."""
DOCUMENTS = ("joined", "separate")
POSITIONS = ("consecutive", "pose")
LOSSES = ("auto", "chunked", "fused", "whole")
LOSS_WEIGHTS = ("data", "long_ce")
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "lr_schedule": LR_SCHEDULES, "save_dtype": SAVE_DTYPES, "documents": DOCUMENTS, "positions": POSITIONS,
    "loss": LOSSES, "loss_weights": LOSS_WEIGHTS, "precision": PRECISIONS, "quantization": (*QUANTIZATIONS, None),
}  # fmt: skip
"""The values of fields that have a few."""
_POSITIVE = (
    "sequence_length", "global_batch_size", "batch_size", "max_train_steps", "sequence_parallel", "kept_checkpoints",
    "heldout_steps", "heldout_rows", "mlp_tiles", "context_parallel", "truncate", "checkpointing_steps",
)  # fmt: skip
"""Counts of at least 1; those that may be left out, as well where they are given."""
_ONLY_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "positions: pose": ("positions", ("pose_chunks", "skip_text")),
    "lr_schedule: wsd": ("lr_schedule", ("lr_decay_share", "lr_decay")),
    "loss_weights: long_ce": ("loss_weights", ("long_ce_cap", "long_ce_context", "long_ce_step")),
}
"""Value of a field -> that field, and the fields that keep their defaults under its other values."""


@dataclass(frozen=True)
class Recipe:
    """One training run. Lengths are in tokens, batches in sequences, steps are optimizer steps.

    Attributes:
        model: checkpoint to start from (directory or hub name); not with `init`.
        init: a model configuration (`model_type` and its fields) to train from random weights.
        tokenizer: where the tokenizer comes from; default: `model`.
        scaling: scaling to install, as `RopeScaling.from_spec` reads it; None keeps the checkpoint's own.
        layers: the only layer type that `scaling` is for (full_attention); None: all layers that the family scales.
        drop_layers: indices of layers, from 0, that lose their rotary embedding; None: as the checkpoint says.
        rope_theta, original_max_position_embeddings: override what the checkpoint says.
        max_position_embeddings: written to the checkpoint, at least the original; default: factor times original.
        dataset: tokenized data: packed set, saved `datasets` folder or hub name.
        prepare: shell commands that build `dataset`; each does nothing when its output is there.
        rebuild: where `dataset` is a published set, the commands that build such data from text instead. They are not
            run by train.sh; the last one's output is what to give to --dataset.
        sequence_length: the longest row that is accepted; rows are not cut unless `truncate` is set.
        truncate: cut every row to this many tokens.
        global_batch_size: sequences per optimizer step, over all ranks and accumulation.
        batch_size: sequences per rank and forward pass.
        lr_schedule: after the warm-up: "linear" and "cosine" fall to the floor, "constant" stays; "wsd" stays until its
            decay.
        lr_floor: where the schedule ends, as a share of the peak; None: 0, and 0.1 for cosine.
        lr_decay_share: the share of the steps, at the end, over which wsd decays.
        lr_decay: how wsd decays: "linear", or as "1-sqrt" of the part of the decay that is over.
        grad_norm: largest norm of the gradient; None does not clip.
        precision: "bf16" (mixed), "fp32", or "auto": bf16 but on a CPU that is slow with it.
        save_dtype: dtype of the saved checkpoint; default: bfloat16 under bf16, float32 under fp32.
        lora: train low-rank adapters instead of the weights.
        quantization: with `lora`: "nf4" keeps the frozen matrices in 4 bits (QLoRA, arXiv 2305.14314: 4-bit NormalFloat
            with double quantisation); None: none.
        lora_embeddings_and_norms: with `lora`: train embeddings, output projection and norms in full as well.
        documents: "joined" (the paper's): a packed row is one text; "separate": attention and positions start anew with
            each document of a row.
        positions: "consecutive", or "pose" (arXiv 2309.10400): windows of `sequence_length` tokens whose position ids
            jump, so that all positions up to the extended length are trained; rows may be longer than a window.
        pose_chunks: chunks of such a window.
        skip_text: whether its text jumps too, where rows are longer than a window.
        short_share: the share of the steps that read their rows as windows of the original length with the original
            frequencies, for mixed training (LongRoPE2, arXiv 2502.20082); the result changes its frequencies at that
            length, as `longrope`.
        sliding_window_attention_schedule: window at step i is entry i mod n, in layers with one; None: the model's own.
        loss: how it is computed from hidden states: "chunked", some logits at a time; "fused", by Liger's kernel on a
            GPU; "whole", all logits at once; "auto": fused where it can run, else chunked.
        loss_weights: "data": those of the data, else 1; "long_ce" (LongCE, arXiv 2410.23771): times the probability
            that far context adds to a token, min(p(token | all) / p(token | near), long_ce_cap).
        long_ce_context, long_ce_step: "near" are the last `long_ce_context` tokens and up to `long_ce_step` - 1 more.
        gradient_checkpointing: keep only the input of every layer and compute the rest again in the backward pass.
        keep_attention: with `gradient_checkpointing`: keep what the attention of a layer returns too, head_dim numbers
            for each head and token, and compute all but attention again.
        mlp_tiles: stretches of a sequence that an MLP works on one after another, so that its inner activations are
            there for one at a time; 1: the whole sequence at once.
        offload_activations: keep activations for the backward pass in CPU memory.
        sequence_parallel: ranks that share one sequence (Ulysses, under DeepSpeed ZeRO-3).
        context_parallel: ranks that share one sequence by ring attention (under FSDP2, on GPUs).
        stop_after: end after this step with a state instead of a model: the first part of a run whose second is another
            recipe, with `continue_from` and other data; None: train to the end.
        checkpointing_steps: keep a resumable state every so many steps; None: never.
        kept_checkpoints: how many of the newest states are kept.
        continue_from: folder of a state of another run, checkpoints/step-N, to begin from: with its weights, optimizer
            and step, on the same model, scaling and adapters; all else, such as data or rate, may differ.
        heldout: packed set whose perplexity is measured every `heldout_steps` steps over its first `heldout_rows` rows,
            cut at each of `heldout_lengths`.
        evaluate: settings of eval.sh for the result: `scalings` (specs under which the base is read without training),
            and the flags of `perplexity`, `passkey` and `report`. `perplexity_zero_shot` and `passkey_zero_shot` are
            the flags where the base is scaled, in place of the evaluator's others, for example with fewer prompts.
            Scalings and the names of flags are checked when the recipe is read, values of flags by the evaluators.
    """

    name: str
    output_dir: str
    dataset: str
    sequence_length: int
    global_batch_size: int
    description: str = ""
    model: str | None = None
    init: Mapping[str, Any] | None = None
    tokenizer: str | None = None
    scaling: str | None = None
    layers: str | None = None
    drop_layers: tuple[int, ...] | None = None
    rope_theta: float | None = None
    original_max_position_embeddings: int | None = None
    max_position_embeddings: int | None = None
    prepare: tuple[str, ...] = ()
    rebuild: tuple[str, ...] = ()
    truncate: int | None = None
    batch_size: int = 1
    max_train_steps: int = 400
    warmup_steps: int = 20
    learning_rate: float = 2e-5
    lr_schedule: str = "linear"
    lr_floor: float | None = None
    lr_decay_share: float = 0.1
    lr_decay: str = "linear"
    adam_betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.0
    grad_norm: float | None = None
    seed: int = 42
    precision: str = "bf16"
    save_dtype: str | None = None
    attention: str = "auto"
    loss: str = "auto"
    gradient_checkpointing: bool = True
    keep_attention: bool = False
    mlp_tiles: int = 1
    offload_activations: bool = False
    sequence_parallel: int = 1
    context_parallel: int = 1
    lora: bool = False
    lora_embeddings_and_norms: bool = False
    quantization: str | None = None
    documents: str = "joined"
    positions: str = "consecutive"
    pose_chunks: int = 2
    skip_text: bool = True
    short_share: float = 0.0
    loss_weights: str = "data"
    long_ce_cap: float = 5.0
    long_ce_context: int = 4096
    long_ce_step: int = 1024
    sliding_window_attention_schedule: tuple[int, ...] | None = None
    stop_after: int | None = None
    checkpointing_steps: int | None = None
    kept_checkpoints: int = 2
    continue_from: str | None = None
    heldout: str | None = None
    heldout_lengths: tuple[int, ...] = ()
    heldout_steps: int = 50
    heldout_rows: int = 8
    evaluate: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def require(condition: bool, name: str, allowed: str) -> None:
            if not condition:
                raise ConfigError(f"recipe {self.name!r}: {name} = {getattr(self, name)!r} is not allowed; {allowed}")

        check_name(self.output_dir, f"recipe {self.name!r}: output_dir")
        require((self.model is None) != (self.init is None), "model", "name a checkpoint, or give `init` instead")
        require(self.init is None or "model_type" in self.init, "init", "it needs `model_type`")
        require(self.init is None or self.tokenizer is not None, "tokenizer", "a model from `init` needs one")
        for name, most in _LARGEST.items():
            value = (self.init or {}).get(name)
            if value is not None and is_number(value) and not 1 <= value <= most:
                raise ConfigError(f"recipe {self.name!r}: init.{name} = {value!r} is not allowed; 1 to {most}")
        for name, choices in _CHOICES.items():
            words = [word for word in choices if word is not None] + ["or none"] * (None in choices)
            require(getattr(self, name) in choices, name, f"one of: {', '.join(words)}")
        for name in _POSITIVE:
            require(getattr(self, name) is None or getattr(self, name) >= 1, name, "at least 1")
        for setting, (decisive, names) in _ONLY_WITH.items():
            if f"{decisive}: {getattr(self, decisive)}" != setting:
                for name in names:
                    require(getattr(self, name) == getattr(Recipe, name), name, f"it is for {setting}")
        require(
            self.stop_after is None or 1 <= self.stop_after < self.max_train_steps,
            "stop_after", "a step before max_train_steps",
        )  # fmt: skip
        require(0 <= self.warmup_steps <= self.max_train_steps, "warmup_steps", "0 to max_train_steps")
        require(self.learning_rate > 0, "learning_rate", "above 0")
        require(self.grad_norm is None or self.grad_norm > 0, "grad_norm", "above 0")
        require(0 <= self.seed < 2**32, "seed", "0 to 4294967295")
        require(self.weight_decay >= 0, "weight_decay", "0 or more")
        require(len(self.adam_betas) == 2 and all(0 <= b < 1 for b in self.adam_betas), "adam_betas", "two in [0, 1)")
        self._check_schedule(require)
        if self.scaling is not None:
            check_spec(self.scaling)
        self._check_evaluate()
        if self.positions == "pose":
            require(self.documents == "joined", "documents", "joined, with positions: pose; both set position ids")
            require(self.truncate is None, "truncate", "none with positions: pose, whose windows have sequence_length")
            require(self.pose_chunks >= 2, "pose_chunks", "at least 2")
            require(self.pose_chunks <= self.sequence_length // 2, "pose_chunks", "at most sequence_length / 2")
        self._check_short_steps(require)
        self._check_loss_weights(require)
        require(
            self.gradient_checkpointing or not self.offload_activations,
            "offload_activations",
            "it needs gradient_checkpointing: true",
        )
        require(
            self.gradient_checkpointing or not self.keep_attention,
            "keep_attention", "false without gradient_checkpointing, which keeps everything",
        )  # fmt: skip
        require(
            not (self.keep_attention and self.offload_activations),
            "keep_attention", "false with offload_activations: what attention returned would stay on the device",
        )  # fmt: skip
        require(self.lora or not self.lora_embeddings_and_norms, "lora_embeddings_and_norms", "it is for lora: true")
        require(self.lora or self.quantization is None, "quantization", "it is for lora: true")
        require(
            self.init is None or self.quantization is None, "quantization", "it is for a checkpoint, not for `init`"
        )
        require(
            self.sequence_parallel == 1 or self.quantization is None,
            "quantization", "none with sequence_parallel, which needs ZeRO-3",
        )  # fmt: skip
        self._check_context_parallel(require)
        windows = self.sliding_window_attention_schedule
        require(windows is None or (bool(windows) and min(windows) > 0), "sliding_window_attention_schedule", "above 0")
        require(bool(self.heldout_lengths) == (self.heldout is not None), "heldout_lengths", "give it with `heldout`")
        require(all(length >= 2 for length in self.heldout_lengths), "heldout_lengths", "2 tokens or more")

    def _check_schedule(self, require: Callable[[bool, str, str], None]) -> None:
        require(self.lr_floor is None or 0 <= self.lr_floor <= 1, "lr_floor", "a share of the peak, 0 to 1")
        require(self.lr_schedule != "constant" or self.lr_floor is None, "lr_floor", "none with lr_schedule: constant")
        if self.lr_schedule == "wsd":
            require(0 < self.lr_decay_share <= 1, "lr_decay_share", "a share of the steps: above 0, up to 1")
            require(self.lr_decay in LR_DECAYS, "lr_decay", f"one of: {', '.join(LR_DECAYS)}")
            most = (self.max_train_steps - self.warmup_steps) / self.max_train_steps
            require(
                self.warmup_steps + self.decay_steps <= self.max_train_steps,
                "lr_decay_share", f"at most {most:g}, what warmup_steps leave",
            )  # fmt: skip

    def _check_short_steps(self, require: Callable[[bool, str, str], None]) -> None:
        require(0 <= self.short_share < 1, "short_share", "a share of the steps: 0 or more, below 1")
        if self.short_share:
            require(self.scaling is not None, "scaling", "one to train for, with short_share")
            require(self.documents == "joined", "documents", "joined, with short_share, which cuts rows into windows")
            require(self.positions == "consecutive", "positions", "consecutive, with short_share")
            require(self.context_parallel == 1, "context_parallel", "1 with short_share: frequencies follow the length")

    def _check_loss_weights(self, require: Callable[[bool, str, str], None]) -> None:
        if self.loss_weights == "data":
            return
        require(self.long_ce_cap >= 1, "long_ce_cap", "at least 1, the weight of a token that far context leaves alone")
        longest = self.truncate or self.sequence_length
        most = longest - 2  # the first window is a step away from the beginning; the last token predicts nothing
        require(2 <= self.long_ce_context <= most, "long_ce_context", f"2 to {most}, below the rows' length")
        most = longest - self.long_ce_context - 1
        require(1 <= self.long_ce_step <= most, "long_ce_step", f"1 to {most}, or no window is left to weigh")
        require(self.documents == "joined", "documents", "joined, with loss_weights: long_ce")
        require(self.positions == "consecutive", "positions", "consecutive, with loss_weights: long_ce")
        for name in ("sequence_parallel", "context_parallel"):
            require(getattr(self, name) == 1, name, "1 with loss_weights: long_ce, which reads windows of a sequence")

    def _check_context_parallel(self, require: Callable[[bool, str, str], None]) -> None:
        size = self.context_parallel
        if size == 1:
            return
        require(self.sequence_parallel == 1, "sequence_parallel", "1 with context_parallel, which shares sequences too")
        require(self.documents == "joined", "documents", "joined, with context_parallel: ring attention takes no masks")
        require(
            self.sliding_window_attention_schedule is None,
            "sliding_window_attention_schedule", "none with context_parallel: ring attention has no windows",
        )  # fmt: skip
        require(self.attention in ("auto", "sdpa"), "attention", "auto or sdpa, with context_parallel")
        require(not self.keep_attention, "keep_attention", "false with context_parallel, which computes it in parts")
        require(self.quantization is None, "quantization", "none with context_parallel, which needs FSDP2")
        name = "sequence_length" if self.truncate is None else "truncate"
        require(
            getattr(self, name) % (2 * size) == 0,
            name, f"a multiple of {2 * size}, with context_parallel: {size}, where each rank gets two stretches",
        )  # fmt: skip

    @property
    def decay_steps(self) -> int:
        """Steps of the decay of `lr_schedule: wsd`; at least one."""
        return max(1, round(self.lr_decay_share * self.max_train_steps))

    def _check_scalings(self) -> None:
        """Refuse scalings of `evaluate` that no evaluator reads, before hours are spent on training."""
        words = [word for name in EVALUATE_FIELDS[1:] for word in shlex.split(self.evaluate.get(name, ""))]
        completed = any(word.partition("=")[0] in COMPLETING for word in words)
        for spec in self.evaluate.get("scalings", ()):
            try:
                method = Spec.parse(spec).method.removeprefix("dynamic-")
                if not completed or method not in METHODS:
                    check_spec(spec)
            except ConfigError as error:
                raise ConfigError(f"recipe {self.name!r}: evaluate: scalings: {error}") from None

    def _check_evaluate(self) -> None:
        for name, value in self.evaluate.items():
            if name not in EVALUATE_FIELDS:
                raise unknown(f"field of `evaluate` in recipe {self.name!r}", name, EVALUATE_FIELDS)
            said = f"recipe {self.name!r}: evaluate: {name} = {value!r}"
            try:
                if name == "scalings":
                    _bring(value, tuple[str, ...])
                    continue
                words = shlex.split(_bring(value, str))
            except ValueError:
                allowed = "a list of scalings" if name == "scalings" else "flags, in one text as a shell splits it"
                raise ConfigError(f"{said} is not allowed; {allowed}") from None
            if (flag := unknown_flag(words, script := name.removesuffix("_zero_shot"))) is not None:
                near = suggestion(flag, EVALUATE_FLAGS[script])
                raise ConfigError(f"{said} is not allowed: unknown flag {flag}; {near}(see eval/{script}.py --help)")
        self._check_scalings()
        if self.model is None and self.evaluate.get("scalings"):
            raise ConfigError(
                f"recipe {self.name!r}: evaluate: scalings = {self.evaluate['scalings']!r} is not allowed; leave it "
                "out: it is about the model before training, and this one begins with random weights"
            )
        for name in ("perplexity", "passkey"):
            if f"{name}_zero_shot" in self.evaluate and not self.evaluate.get(name):
                raise ConfigError(
                    f"recipe {self.name!r}: evaluate: {name}_zero_shot without {name} is not allowed; the unscaled "
                    f"base and the trained model are measured with the flags of {name}"
                )

    @property
    def compute_dtype(self) -> str:
        """The dtype that `precision` computes in, as torch names it; for "auto" that of a GPU."""
        return "float32" if self.precision == "fp32" else "bfloat16"

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step when every row is full."""
        return self.global_batch_size * (self.truncate or self.sequence_length)

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain YAML types."""
        plain = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


_TYPES = typing.get_type_hints(Recipe)
_WORDS: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple[str, ...]: "a list of texts",
    tuple[int, ...]: "a list of whole numbers",
    tuple[float, ...]: "a list of numbers",
    Mapping[str, Any]: "a block of `field: value` lines",
}
"""Field types of `Recipe` -> their names in error messages."""


def _bring(value: Any, kind: Any) -> Any:
    """Convert a plain value to type `kind`. Raises ValueError where that would change its meaning."""
    origin = typing.get_origin(kind) or kind
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_bring(entry, typing.get_args(kind)[0]) for entry in value)
    if origin is Mapping and isinstance(value, Mapping):
        return dict(value)
    if origin is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        number = float(value)  # YAML reads 2e-5 as a string
        if not math.isfinite(number):
            raise ValueError
        return number
    if isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
        return value
    raise ValueError


def coerce(name: str, value: Any) -> Any:
    """Bring a YAML or command-line value to the type of recipe field `name`.

    Raises:
        ConfigError: unknown field, or a value of another type.
    """
    if name not in _TYPES:
        raise unknown("recipe field", name, _TYPES)
    annotation = _TYPES[name]
    union = typing.get_args(annotation) if typing.get_origin(annotation) is types.UnionType else (annotation,)
    kind = next(member for member in union if member is not type(None))
    if value is None and type(None) in union:
        return None
    try:
        return _bring(value, kind)
    except ValueError:
        raise ConfigError(f"recipe field {name} = {value!r} is not allowed; {_WORDS[kind]}") from None


_PLACES = {"model", "tokenizer", "dataset", "heldout", "output_dir", "continue_from"}
"""Fields that may be paths."""


def make_recipe(fields: Mapping[str, Any], where: str) -> Recipe:
    """Make a recipe from plain values, each converted to its field's type; `where` names their origin in errors.

    Raises:
        ConfigError: an unknown field, a value that is not allowed, or a missing field.
    """
    values = {key: coerce(key, value) for key, value in fields.items()}
    for key in _PLACES & values.keys():
        if isinstance(values[key], str):
            values[key] = os.path.expanduser(values[key])  # YAML and quotes leave "~" as it is
    required = [f.name for f in dataclasses.fields(Recipe) if f.default is f.default_factory is dataclasses.MISSING]
    for key in required:
        if key not in values:
            raise ConfigError(f"{where}: field {key} is missing")
    return Recipe(**values)
