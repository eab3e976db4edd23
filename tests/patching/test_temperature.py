"""Attention temperature inside models: the definition, caches, padding, layers, training, saving, refusals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from scaled_rope import RopeScaling, load_model, patch_model, unpatch_model
from scaled_rope.errors import ConfigError
from scaled_rope.patching.forward_pass import lengths
from tests.helpers import reference
from tests.helpers.caches import distance, one_layer, through_cache
from tests.helpers.models import DETECTED, FAMILIES, Make

# The tiny models have 32 positions, texts 80 tokens. float32 sums in another order through two layers; logits reach 10.
NOISE = 2e-4
L = 32
LOG, STRONG = "attention_temperature=log", "attention_temperature=log,temperature_slope=1.5"
KINDS = {
    "constant": (",attention_temperature=constant,temperature_slope=0.4", 0.4),
    "log": (f",{LOG}", None),
    "log with a slope": (f",{STRONG}", 1.5),
    "ministral": (",attention_temperature=ministral,temperature_slope=0.5", 0.5),
}


def full(model: PreTrainedModel, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **more).logits


def factors(kind: str, slope: float | None, count: int, s: float = 4.0) -> Tensor:
    return torch.tensor([reference.temperature(kind.split()[0], i, L, slope, s, None) for i in range(count)])


@contextmanager
def multiplied(
    model: PreTrainedModel, factor: Tensor, layers: Iterable[int] = (0, 1), part: str = "q_proj"
) -> Iterator[None]:
    """The model with all queries of some layers multiplied where a part of attention makes them: rotation is linear."""

    def change(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * factor[:, None]

    attention = [model.model.layers[index].self_attn for index in layers]
    handles = [getattr(one, part).register_forward_hook(change) for one in attention]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("method", ["yarn:4", "linear:4", "ntk:4"])
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_method_with_its_queries_multiplied(method: str, kind: str, tiny_model: Make, text: Tensor) -> None:
    model = tiny_model()
    more, slope = KINDS[kind]
    patch_model(model, method)
    plain = full(model, text)
    with multiplied(model, factors(kind, slope, text.shape[1])):
        wanted = full(model, text)
    patch_model(model, method + more)
    found = full(model, text)
    assert distance(found, wanted) < NOISE
    assert distance(found, plain) > 100 * NOISE
    if kind != "constant":
        assert torch.equal(full(model, text[:, :L]), plain[:, :L])  # nothing within L, bit by bit


@pytest.mark.parametrize("method", ["rerope,window=10", "self-extend,group=3,window=8", "dual-chunk,chunk=12"])
def test_goes_with_methods_that_change_attention(method: str, tiny_model: Make, text: Tensor) -> None:
    model = tiny_model()
    for kind in ("log with a slope", "ministral"):
        more, slope = KINDS[kind]
        patch_model(model, method)
        with multiplied(model, factors(kind, slope, text.shape[1])):
            wanted = full(model, text)
        patch_model(model, method + more)
        assert distance(full(model, text), wanted) < NOISE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["yarn:4", "dynamic-yarn", "rerope:4,window=10"])
def test_every_way_through_a_cache_is_the_full_pass(kind: str, method: str, tiny_model: Make, text: Tensor) -> None:
    model = tiny_model()
    patch_model(model, method + KINDS[kind][0])
    # Under a dynamic method the pieces of one text have its scale, see `forward_pass.lengths`.
    with lengths(torch.tensor([80]) if "dynamic" in method else None):
        wanted = full(model, text)
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=90)):
            found = []
            for first, end in ((0, 15), (15, 16), (16, 40), (40, 41), (41, 80)):
                with torch.no_grad():
                    found.append(model(text[:, first:end], past_key_values=cache, use_cache=True).logits)
            assert distance(torch.cat(found, dim=1), wanted) < NOISE, type(cache).__name__


@pytest.mark.parametrize("step", [None, 1.5])
def test_a_constant_under_dynamic_scaling_grows_with_each_row(
    step: float | None, tiny_model: Make, text: Tensor
) -> None:
    model = one_layer(tiny_model)
    steps = "" if step is None else f",dynamic_step={step}"
    patch_model(model, f"dynamic-ntk-by-parts{steps},attention_temperature=constant,temperature_slope=0.4")
    found = through_cache(model, text, [30, 50, 70, 71, 80])
    assert distance(found[:, -1], full(model, text)[:, -1]) < NOISE
    s = 80 / L if step is None else 1.5**3
    patch_model(model, f"ntk-by-parts:{s!r},attention_temperature=constant,temperature_slope=0.4")
    assert distance(found[:, -1], full(model, text)[:, -1]) < NOISE


@pytest.mark.parametrize("spec", [f"yarn:4,{STRONG}", f"dynamic-yarn,dynamic_step=2,{STRONG}"])
def test_generates_as_without_a_cache_and_padding_changes_nothing(spec: str, tiny_model: Make, text: Tensor) -> None:
    model = tiny_model()
    patch_model(model, spec)
    prompt, mask = text[:, :50].clone(), torch.ones(2, 50, dtype=torch.long)
    mask[0, :7] = 0
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "attention_mask": mask}
    found = model.generate(prompt, **options)
    if "dynamic" not in spec:  # where layers are several, earlier ones keep what they made of an earlier scale
        assert torch.equal(found, model.generate(prompt, use_cache=False, **options))
    alone = model.generate(prompt[:1, 7:], **{**options, "attention_mask": mask[:1, 7:]})
    assert torch.equal(found[:1, 7:], alone)


def test_packed_documents_count_apart(tiny_model: Make, text: Tensor) -> None:
    model = tiny_model()
    patch_model(model, f"linear:4,{STRONG}")
    positions = torch.cat((torch.arange(40), torch.arange(40)))[None]
    found = full(model, text[:1], position_ids=positions)
    apart = torch.cat((full(model, text[:1, :40]), full(model, text[:1, 40:])), dim=1)
    assert distance(found, apart) < NOISE


@pytest.mark.parametrize("left", [0, 9])
def test_activation_checkpointing_gives_the_same_gradients(left: int, tiny_model: Make, text: Tensor) -> None:
    mask = torch.ones_like(text)
    mask[:, :left] = 0
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model()
        patch_model(model, f"yarn:4,{STRONG}")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(text, attention_mask=mask, labels=text.where(mask.bool(), -100)).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_compiled(tiny_model: Make, text: Tensor) -> None:
    model = tiny_model()
    patch_model(model, f"yarn:4,{STRONG}")
    wanted = full(model, text)
    assert distance(full(torch.compile(model, backend="eager"), text), wanted) < NOISE


# Layers --------------------------------------------------------------------------------------------------------------


def test_llama_4s_acts_in_layers_without_rope_only(tiny_model: Make, text: Tensor) -> None:
    spec, slope = "yarn:4,attention_temperature=llama4,temperature_slope=0.5", 0.5
    model = tiny_model("smollm3", no_rope_layers=[1, 0])
    patch_model(model, "yarn:4")
    with multiplied(model, factors("llama4", slope, 80), layers=[1]):
        wanted = full(model, text)
    patch_model(model, spec)
    assert distance(full(model, text), wanted) < NOISE
    model = tiny_model()
    patch_model(model, "yarn:4", drop_layers=[0])
    with multiplied(model, factors("llama4", slope, 80), layers=[0]):
        wanted = full(model, text)
    patch_model(model, spec, drop_layers=[0])
    assert distance(full(model, text), wanted) < NOISE


@pytest.mark.parametrize("drop", [[0], [0, 1]])
def test_acts_in_dropped_layers(drop: list[int], tiny_model: Make, text: Tensor) -> None:
    model = tiny_model()
    patch_model(model, "yarn:4", drop_layers=drop)
    with multiplied(model, factors("log", 1.5, 80)):
        wanted = full(model, text)
    report = patch_model(model, f"yarn:4,{STRONG}", drop_layers=drop)
    assert distance(full(model, text), wanted) < NOISE
    assert any("acts by its attention_temperature alone" in note for note in report.notes) == (len(drop) == 2)


def test_layer_types_have_their_own(tiny_model: Make, text: Tensor) -> None:
    model = tiny_model("gemma3_text")  # the second layer is the one with full attention
    patch_model(model, "linear:4")
    with multiplied(model, factors("log", 1.5, 80), layers=[1], part="q_norm"):
        wanted = full(model, text)
    patch_model(model, f"linear:4,{STRONG}")
    assert distance(full(model, text), wanted) < NOISE


def test_a_window_bounds_what_a_query_sees(tiny_model: Make, text: Tensor) -> None:
    model = tiny_model("mistral", sliding_window=L)
    patch_model(model, "linear:4")
    plain = full(model, text)
    patch_model(model, f"linear:4,{STRONG}")
    assert torch.equal(full(model, text), plain)
    patch_model(model, "linear:4,attention_temperature=ministral")  # follows positions, as in the model it is from
    assert distance(full(model, text), plain) > 10 * NOISE


# Families, saving, refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name in FAMILIES | DETECTED if name not in ("falcon", "ministral3")])
def test_reaches_every_family_and_leaves_no_trace(family: str, tiny_model: Make, text: Tensor) -> None:
    model = tiny_model(family)
    original = full(model, text)
    patch_model(model, "linear:4")
    plain = full(model, text)
    patch_model(model, f"linear:4,{STRONG}")
    found = full(model, text)
    assert distance(found[:, :L], plain[:, :L]) < NOISE and distance(found[:, L:], plain[:, L:]) > 10 * NOISE
    with torch.no_grad():
        first = model(text[:, :50], use_cache=True)
        rest = model(text[:, 50:], past_key_values=first.past_key_values)
    assert distance(torch.cat((first.logits, rest.logits), dim=1), found) < NOISE
    unpatch_model(model)
    assert torch.equal(full(model, text), original)


@pytest.mark.parametrize(
    "spec", [f"yarn:4,{LOG}", f"rerope,window=10,{STRONG}", "default,attention_temperature=ministral"]
)
def test_saved_and_loaded(spec: str, tiny_model: Make, text: Tensor, tmp_path: Path) -> None:
    model = tiny_model()
    report = patch_model(model, spec)
    assert not report.native and report.scaling.attention_temperature in spec
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu")
    assert RopeScaling.from_config(loaded.config) == report.scaling
    assert torch.equal(full(loaded, text), full(model, text))


def test_a_failed_patch_keeps_the_former_one(tiny_model: Make, text: Tensor) -> None:
    model = tiny_model()
    patch_model(model, f"yarn:4,{STRONG}")
    wanted = full(model, text)
    with pytest.raises(ConfigError):
        patch_model(model, "yarn:4,attention_temperature=llama4")
    assert torch.equal(full(model, text), wanted)


@pytest.mark.parametrize(
    ("family", "spec", "said"),
    [
        (
            "llama",
            "linear:4,attention_temperature=llama4",
            "this llama model, all of whose layers have rotary embedding",
        ),
        ("ministral3", f"linear:4,{LOG}", "which multiplies queries itself .llama_4_scaling_beta=0.1."),
        ("falcon", f"linear:4,{LOG}", "because FalconAttention does not use transformers' attention interface"),
        ("llama", f"rerope,window=8,{LOG.replace('log', 'llama4')}", "all of whose layers have rotary embedding"),
    ],
)
def test_families_that_do_not_fit_are_named(family: str, spec: str, said: str, tiny_model: Make, text: Tensor) -> None:
    model = tiny_model(family)
    plain = full(model, text)
    with pytest.raises(ConfigError, match=f"attention_temperature='.*': cannot be used with .*{said}"):
        patch_model(model, spec)
    assert torch.equal(full(model, text), plain)


def test_a_family_that_has_its_own_switched_off_can_have_another(tiny_model: Make, text: Tensor) -> None:
    model = tiny_model("ministral3")
    model.config.rope_parameters["llama_4_scaling_beta"] = 0.0
    plain = full(model, text)
    patch_model(model, f"default,{STRONG}")
    assert distance(full(model, text)[:, L:], plain[:, L:]) > 10 * NOISE
