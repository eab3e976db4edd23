"""Which layers of a model rotate at all, and how far they look back."""

from __future__ import annotations

from collections.abc import Iterator

from scaled_rope.patching.families import ADAPTERS
from scaled_rope.scaling.hf_config import has_rope
from scaled_rope.scaling.known_lengths import DUAL_CHUNK_KEY, dual_chunks
from scaled_rope.scaling.registry import METHODS
from scaled_rope.serving.config_facts import ConfigFacts, keys_that_nothing_reads
from scaled_rope.serving.inspect_report import Finding


def family_without_rope(facts: ConfigFacts) -> Iterator[Finding]:
    """Whether there is anything to scale."""
    if facts.built is None or has_rope(facts.built):
        return
    said = keys_that_nothing_reads(facts)
    text = f"transformers takes no RoPE parameters for models of type {facts.model_type!r}: "
    if said:
        text += f"{' and '.join(said)} {'has' if len(said) == 1 else 'have'} no effect."
        yield Finding("no-rope", "error", text, "Delete it; a scaling of RoPE does nothing for this model.")
    elif hasattr(type(facts.built), "rope_theta"):
        text += (
            f"it rotates in a way of its own, with rope_theta={facts.text.get('rope_theta')!r}, and cannot be scaled."
        )
        yield Finding("no-rope", "warning", text)
    else:
        text += "most likely it has no rotary embedding, and then nothing in this report applies."
        yield Finding("no-rope", "warning", text)


def window_shorter_than_context(facts: ConfigFacts) -> Iterator[Finding]:
    """Every layer looks back less far than the scaling reaches."""
    scaling, window, types = facts.scaling, facts.window, facts.layer_types
    if scaling is None:
        return
    told = METHODS[scaling.method].factor_times_original != "least"
    context = (facts.reach if told else None) or facts.context
    slides = not types or set(types) == {"sliding_attention"}
    if window is not None and context is not None and window < context and slides:
        yield Finding(
            "sliding-window",
            "warning" if scaling.method != "default" and scaling.factor > 1 else "info",
            f"Every layer looks back {window} tokens only, the context is {context}: what is further back reaches "
            "a token through other layers or not at all.",
            "The Yarn-Mistral models were trained and evaluated with the window as wide as the context: set "
            f"sliding_window to {context} or null.",
        )


def layers_that_do_not_rotate(facts: ConfigFacts) -> Iterator[Finding]:
    """Layers without RoPE, and whether those with it see far enough for a scaling to matter."""
    scaling = facts.scaling
    if scaling is None or not facts.without_rope:
        return
    total = facts.complete.get("num_hidden_layers") or len(facts.layer_types)
    adapter = ADAPTERS.get(str(facts.model_type))
    only_near = adapter is not None and bool(adapter.rope_layer_type) and scaling.factor > 1
    why = "they were dropped" if facts.dropped else "by design"
    text = f"{len(facts.without_rope)} of {total} layers use no rotary embedding, {why}; a scaling leaves them alone."
    if only_near:
        text += f" Those that use it look back {facts.window} tokens only, so a scaling has nothing to extend."
    remedy = "Leave RoPE unscaled." if only_near else ""
    yield Finding("layers-without-rope", "warning" if only_near else "info", text, remedy)


def attention_in_chunks(facts: ConfigFacts) -> Iterator[Finding]:
    """Qwen2.5-1M, whose positions some servers rotate chunk by chunk."""
    if facts.scaling is None or not (chunks := dual_chunks(facts.text.get(DUAL_CHUNK_KEY))):
        return
    sizes = ", ".join(f"{name}={value!r}" for name, value in chunks.items())
    scaled = facts.scaling.method != "default" and facts.scaling.factor > 1
    yield Finding(
        "dual-chunk",
        "warning",
        f"{DUAL_CHUNK_KEY} ({sizes}) asks for Dual Chunk Attention, in which positions start again in each chunk, so "
        "that the model reads beyond the length of its training. transformers and this package do not compute it: they "
        f"rotate positions up to {facts.context} as they are" + (", scaled." if scaled else "."),
        f"For a scaling by itself delete {DUAL_CHUNK_KEY}; `scaled-rope export` says what is known of the program at "
        "hand.",
    )


def alibi_instead_of_rope(facts: ConfigFacts) -> Iterator[Finding]:
    """A Falcon that adds ALiBi's biases and leaves its rotary module idle."""
    if facts.scaling is None or facts.raw.get("alibi") is not True or facts.model_type != "falcon":
        return
    scaled = facts.scaling.method != "default"
    yield Finding(
        "alibi",
        "error" if scaled else "info",
        "alibi=true: the model has no rotary embedding, and what the config says about RoPE has no effect.",
        "Remove the scaling; for longer contexts ALiBi has to be changed, not RoPE." if scaled else "",
    )
