"""Attention implementations: which is chosen, what is refused, and sdpa in pieces against transformers' own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AttentionInterface, PreTrainedModel

from scaled_rope import ConfigError, patch_model, unpatch_model
from scaled_rope.attention import backends as backends_module
from scaled_rope.attention.backends import (
    IMPLEMENTATIONS,
    attention_for,
    blocked_sdpa,
    check_attention,
    has_window,
    refusal,
    resolve_attention,
)
from scaled_rope.patching.loading import load_model
from scaled_rope.training.model import set_sliding_window
from tests.helpers import ROOT
from tests.helpers.models import DETECTED, FAMILIES, Make
from tests.helpers.optional import transformers_is

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ALL = [*FAMILIES, *DETECTED]
# Sums of up to 300 float32 terms in another order, through two layers, in logits of up to 12.
SAME = 1e-4


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


@pytest.fixture
def long_tokens() -> Tensor:
    """[2, 300]: longer than two blocks."""
    return torch.randint(1, 61, (2, 300), generator=torch.Generator().manual_seed(0))


def logits(model: PreTrainedModel, attention: str, tokens: Tensor, **more: Any) -> Tensor:
    model.set_attn_implementation(attention)
    with torch.no_grad():
        result: Tensor = model(tokens, use_cache=False, **more).logits
    return result


def windowed(make: Make, family: str, window: int = 48) -> PreTrainedModel:
    model = make(family)
    return make(family, sliding_window=window) if getattr(model.config, "sliding_window", None) else model


@pytest.mark.parametrize("family", [name for name in ALL if name not in ("falcon", "gemma2", "gpt_oss", "persimmon")])
def test_blocked_sdpa_equals_sdpa(tiny_model: Make, long_tokens: Tensor, family: str) -> None:
    model = windowed(tiny_model, family)
    if family == "ministral3" and not transformers_is("5.23"):
        with pytest.raises(ConfigError, match="'sdpa_blocked': gets no position_ids"):
            logits(model, "sdpa_blocked", long_tokens)
        return
    left, right = torch.ones_like(long_tokens), torch.ones_like(long_tokens)
    left[0, :70], right[1, 150:] = 0, 0
    lengths = 100, 37, 163
    documents = torch.cat([torch.arange(n) for n in lengths])[None]
    cases: list[dict[str, Any]] = [{}, {"attention_mask": left}, {"attention_mask": right}, {"position_ids": documents}]
    for case in cases:
        wanted, found = (logits(model, name, long_tokens, **case) for name in ("sdpa", "sdpa_blocked"))
        real = case.get("attention_mask", torch.ones_like(long_tokens)).bool()
        if family == "afmoe" and "position_ids" in case:
            # transformers 5.23 doesn't hand positions to the mask of this family, so its documents see one another.
            assert (wanted - found).abs().max() > SAME
        else:
            assert (wanted - found)[real].abs().max() < SAME
    # Documents next to each other are documents alone.
    alone = torch.cat([logits(model, "sdpa", part) for part in long_tokens.split(lengths, dim=1)], dim=1)
    assert (alone - found).abs().max() < SAME


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_generation_through_caches(tiny_model: Make, long_tokens: Tensor, family: str) -> None:
    """One token at a time and several, left of them padding, windows shorter than the prompt."""
    model = tiny_model(family, sliding_window=48) if family != "llama" else tiny_model()
    mask = torch.ones_like(long_tokens)
    mask[0, :70] = 0
    steps = []
    for name in ("sdpa", "sdpa_blocked"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            cache = model(long_tokens[:, :150], attention_mask=mask[:, :150], use_cache=True).past_key_values
            results = []
            for start, end in ((150, 151), (151, 200), (200, 201)):
                more = {"attention_mask": mask[:, :end], "past_key_values": cache}
                results.append(model(long_tokens[:, start:end], **more).logits)
            steps.append(torch.cat(results, dim=1))
    assert (steps[0] - steps[1]).abs().max() < SAME


def test_gradients_and_memory_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients as with a T x T mask; no tensor of T x T goes into attention."""
    torch.manual_seed(0)
    tokens, window = 700, 200
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    inputs = [torch.randn(1, heads, tokens, 8, requires_grad=True) for heads in (4, 2, 2)]
    position_ids = torch.arange(tokens)[None]
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watch(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        seen.append(0 if attn_mask is None else attn_mask.numel())
        return original(q, k, v, attn_mask=attn_mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    found, _ = blocked_sdpa(module, *inputs, None, sliding_window=window, position_ids=position_ids)
    at = torch.arange(tokens)
    mask = (at[None] <= at[:, None]) & (at[None] > at[:, None] - window)
    repeated = [inputs[0], *(x.repeat_interleave(2, dim=1) for x in inputs[1:])]
    wanted = original(*repeated, attn_mask=mask).transpose(1, 2)
    assert (found - wanted).abs().max() < 1e-5
    weights = torch.randn_like(wanted)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((wanted * weights).sum(), inputs),
        strict=True,
    ):
        assert (one - other).abs().max() < 1e-4  # sums of up to 200 terms
    assert len(seen) > 3 and 0 < max(seen) < tokens * tokens / 4


def test_a_schedule_of_windows(tiny_model: Make, long_tokens: Tensor) -> None:
    """Training may change the window from step to step."""
    model = tiny_model("mistral", sliding_window=300)
    results = []
    for window in (300, 40, 160):
        set_sliding_window(model, window)
        wanted, found = (logits(model, name, long_tokens) for name in ("sdpa", "sdpa_blocked"))
        assert (wanted - found).abs().max() < SAME
        results.append(found)
    assert (results[1] - results[2]).abs().max() > 0.1 < (results[0] - results[1]).abs().max()


def test_no_mask_of_all_pairs(tiny_model: Make, long_tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice of `auto` for a plain and for a windowed family hands no T x T mask to attention."""
    sizes = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watch(*args: Any, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        sizes.append(0 if attn_mask is None else attn_mask.numel())
        return original(*args, attn_mask=attn_mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    for family in ("llama", "qwen3", "mistral"):
        model = tiny_model(family) if family == "llama" else tiny_model(family, sliding_window=32)
        logits(model, attention_for(model.config, "sdpa", CPU), long_tokens)
    assert sizes and max(sizes) < 300 * 300 * 2 / 2
    sizes.clear()
    logits(model, "sdpa", long_tokens)
    assert max(sizes) == 300 * 300 * 2  # as it would be


def test_documents_by_their_bounds(tiny_model: Make, long_tokens: Tensor) -> None:
    model = tiny_model()
    documents = torch.cat((torch.arange(200), torch.arange(100)))[None]
    wanted = logits(model, "sdpa_blocked", long_tokens[:1], position_ids=documents)
    cu_seqlens = torch.tensor([0, 200, 300], dtype=torch.int32)
    more = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 200, "max_length_k": 200}
    found = logits(model, "sdpa_blocked", long_tokens[:1], position_ids=documents, **more)
    assert torch.equal(wanted, found)
    # Collators repeat borders, so that their number is fixed: documents without tokens.
    padded = torch.tensor([0, 0, 200, 200, 300, 300], dtype=torch.int32)
    more |= {"cu_seq_lens_q": padded, "cu_seq_lens_k": padded}
    assert torch.equal(wanted, logits(model, "sdpa_blocked", long_tokens[:1], position_ids=documents, **more))


@pytest.mark.parametrize("spec", ["rerope,window=16", "yarn:4"])
def test_borders_that_do_not_fit_are_refused(spec: str, tiny_model: Make, long_tokens: Tensor) -> None:
    """Each of these would leave queries out, or let documents see each other."""
    model = tiny_model()
    patch_model(model, spec, attn="sdpa_blocked")
    tokens = long_tokens[:1, :100]

    def refused(said: str, ids: Tensor, *borders: int, k: tuple[int, ...] = (), **more: Any) -> None:
        starts, others = (torch.tensor(each, dtype=torch.int32) for each in (borders, k or borders))
        with pytest.raises(ConfigError, match=f"^{said}[^\n]*$"), torch.no_grad():
            model(ids, cu_seq_lens_q=starts, cu_seq_lens_k=others, **{"use_cache": False} | more)

    refused("cu_seq_lens_q: goes with one row, got 2", long_tokens[:2, :100], 0, 50, 100)
    refused("cu_seq_lens_q: goes with one row, got 2", long_tokens[:2, :100], 0, 100, 200)
    for borders in ((50, 100), (0, 50, 200), (0, 70, 50, 100), (0,), ()):
        refused(r"cu_seq_lens_q: must rise from 0 to at most the number of tokens, 100, got \[", tokens, *borders)
    refused("cu_seq_lens_k: must be the same as cu_seq_lens_q", tokens, 0, 50, 100, k=(0, 40, 100))
    mask = torch.ones_like(tokens)
    mask[:, :10] = 0
    refused("cu_seq_lens_q: goes without padding", tokens, 0, 50, 100, attention_mask=mask)
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    refused(
        "cu_seq_lens_q: goes with a pass that reads no cache",
        tokens[:, :1],
        0,
        1,
        use_cache=True,
        past_key_values=cache,
    )

    # With a mask that leaves nothing out they count as well, as under FlashAttention.
    borders, positions = torch.tensor([0, 50, 100]), torch.arange(50).repeat(2)[None]
    more = {"attention_mask": torch.ones_like(tokens), "position_ids": positions, "use_cache": False}
    if spec == "yarn:4":
        with torch.no_grad():
            wanted = model(tokens, position_ids=positions, use_cache=False).logits
            assert torch.equal(model(tokens, cu_seq_lens_q=borders, **more).logits, wanted)


def test_blockwise_takes_no_borders() -> None:
    x, module = torch.zeros(1, 2, 4, 8), torch.nn.Module()
    attend = AttentionInterface()["blockwise"]
    with pytest.raises(
        ConfigError, match="^cu_seq_lens_q: attention 'blockwise' takes no borders of documents;[^\n]*$"
    ):
        attend(module, x, x, x, None, cu_seq_lens_q=torch.tensor([0, 2, 4]))


def test_compiled_without_a_mask(tiny_model: Make, long_tokens: Tensor) -> None:
    """One graph; packed documents, which cannot be seen while compiling, fail instead of mixing."""
    model = tiny_model("mistral", sliding_window=100, num_hidden_layers=1)
    wanted = logits(model, "sdpa", long_tokens)
    model.set_attn_implementation("sdpa_blocked")
    torch.compiler.reset()  # models of other tests count towards the limit of recompilations
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert (compiled(long_tokens, use_cache=False).logits - wanted).abs().max() < SAME
        documents = torch.cat((torch.arange(200), torch.arange(100)))[None]
        with pytest.raises(RuntimeError, match="packed documents"):
            compiled(long_tokens, use_cache=False, position_ids=documents)


# ------------------------------------------------------------------------------------------------- what auto chooses


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """installed(*names, capability=9): a machine with a GPU of that capability and these packages."""

    def pretend(*names: str, capability: int = 9) -> None:
        monkeypatch.setattr(backends_module, "_is_installed", names.__contains__)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (capability, 0))

    return pretend


def test_auto_takes_the_newest_that_runs(installed: Callable[..., None]) -> None:
    two, three, four = "flash_attention_2", "flash_attention_3", "flash_attention_4"
    installed(two, three, four)
    assert resolve_attention("auto", GPU, "bfloat16") == four
    installed(two, three)
    assert resolve_attention("auto", GPU, "float16") == three
    installed(two, three, capability=8)
    assert resolve_attention("auto", GPU, "bfloat16") == two
    assert resolve_attention("auto", GPU, "float32") == resolve_attention("auto", CPU, "bfloat16") == "sdpa"
    installed()
    assert resolve_attention("auto", GPU, "bfloat16") == "sdpa"
    with pytest.raises(ConfigError, match="'flash_attention_3' needs a GPU, a half-precision dtype and: the hopper"):
        resolve_attention(three, GPU, "bfloat16")
    installed(two, three, four, capability=8)
    with pytest.raises(ConfigError, match="'flash_attention_4' needs a GPU of CUDA capability 9.0 or more, not 8.x"):
        resolve_attention(four, GPU, "bfloat16")
    with pytest.raises(ConfigError, match="'flex_attention' needs a GPU"):
        resolve_attention("flex_attention", CPU, "float32")
    with pytest.raises(ConfigError, match="unknown attention 'flash'"):
        resolve_attention("flash", GPU, "bfloat16")


CHOICES = {
    "llama": ("flash_attention_2", "sdpa", "sdpa"),
    "mistral": ("flash_attention_2", "sdpa_blocked", "sdpa_blocked"),
    "qwen3": ("flash_attention_2", "sdpa_blocked", "sdpa_blocked"),
    "gemma2": ("flash_attention_2", "flex_attention", "eager"),
    "gpt_oss": ("flex_attention", "flex_attention", "eager"),
    "falcon": ("flash_attention_2", "sdpa", "sdpa"),
}
"""With FlashAttention 2, on a GPU without it, on the CPU."""


@pytest.mark.parametrize("family", CHOICES)
def test_auto_suits_the_architecture(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends_module, "triton_lacks", lambda device: "")
    window = {"sliding_window": 64} if family == "mistral" else {}
    config = CONFIG_MAPPING[family](num_hidden_layers=2, **copy.deepcopy(FAMILIES[family] | window))
    asked = (("flash_attention_2", GPU), ("sdpa", GPU), ("sdpa", CPU))
    found = [attention_for(config, name, device) for name, device in asked]
    assert found == list(CHOICES[family])
    # What is chosen is never what is refused.
    assert not any(refusal(config, name) for name in found)
    monkeypatch.setattr(backends_module, "triton_lacks", lambda device: "a C compiler" if device == GPU else "")
    assert "flex_attention" not in [attention_for(config, name, device) for name, device in asked]


@pytest.mark.parametrize(
    "family, name, change, message",
    [
        ("gemma2", "sdpa", {}, "'sdpa': cannot be used with gemma2 models, whose scores have a soft cap"),
        ("gemma2", "sdpa_blocked", {}, "whose scores have a soft cap"),
        ("gpt_oss", "flash_attention_2", {}, "whose attention needs sinks"),
        ("falcon", "sdpa_blocked", {}, "they do not use transformers' attention interface"),
        ("falcon", "flex_attention", {}, "says transformers"),
        ("llama", "flash_attention_2", {"head_dim": 512}, "head_dim 512 is more than 256"),
    ],
)
def test_what_cannot_work_is_refused(
    installed: Callable[..., None], family: str, name: str, change: dict[str, Any], message: str
) -> None:
    installed("flash_attention_2")
    config = CONFIG_MAPPING[family](num_hidden_layers=2, **copy.deepcopy(FAMILIES[family] | change))
    with pytest.raises(ConfigError, match=message):
        check_attention(config, name, GPU, "bfloat16")


def test_refused_when_loading_and_when_patching(tiny_model: Make, tmp_path: Path) -> None:
    model = tiny_model("gemma2")
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="'sdpa_blocked': cannot be used with gemma2"):
        load_model(str(tmp_path), device="cpu", attn_implementation="sdpa_blocked")
    config, before = copy.deepcopy(model.config.to_dict()), model.config._attn_implementation
    for name, message in (("sdpa", "soft cap"), ("flash_attention_2", "needs a GPU"), ("flsh", "unknown attention")):
        with pytest.raises(ConfigError, match=message):
            patch_model(model, "yarn:4", attn=name)
    assert model.config.to_dict() == config and model.config._attn_implementation == before


def test_patching_sets_and_unpatching_restores(tiny_model: Make, tokens: Tensor) -> None:
    model = tiny_model("qwen3")
    before = model.config._attn_implementation
    wanted = logits(model, before, tokens)
    report = patch_model(model, "default", attn="auto")
    assert report.attention == model.config._attn_implementation == "sdpa_blocked"
    with torch.no_grad():
        assert (model(tokens).logits - wanted).abs().max() < SAME
    patch_model(model, "default", attn="eager")
    assert patch_model(model, "default").attention is None and model.config._attn_implementation == before
    unpatch_model(model)
    assert model.config._attn_implementation == before and torch.equal(logits(model, before, tokens), wanted)


def test_windows_of_the_loaded_model(tiny_model: Make, tmp_path: Path) -> None:
    tiny_model("mistral", sliding_window=None).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), device="cpu").config._attn_implementation == "sdpa"
    loaded = load_model(str(tmp_path), device="cpu", sliding_window=16)
    assert loaded.config._attn_implementation == "sdpa_blocked"


def test_unusual_calls_are_refused(tiny_model: Make, long_tokens: Tensor) -> None:
    module, x = torch.nn.Module(), torch.zeros(1, 2, 4, 8)
    for more in ({"softcap": 50.0}, {"s_aux": torch.zeros(2)}, {"is_causal": False}):
        with pytest.raises(ConfigError, match="'sdpa_blocked'"):
            blocked_sdpa(module, x, x, x, None, position_ids=torch.arange(4)[None], **more)  # type: ignore[arg-type]
    for shape in ((1, 1, 4, 4), (4,)):
        with pytest.raises(ConfigError, match="'sdpa_blocked': attention_mask of shape .* is not allowed"):
            blocked_sdpa(module, x, x, x, torch.ones(shape), position_ids=torch.arange(4)[None])
    with pytest.raises(ConfigError, match="attention_mask: row 0 leaves out tokens between 0 and 3"):
        blocked_sdpa(module, x, x, x, torch.tensor([[1, 0, 1, 1]]), position_ids=torch.arange(4)[None])
    model = tiny_model("persimmon")
    with pytest.raises(ConfigError, match="gets no position_ids"):
        logits(model, "sdpa_blocked", long_tokens)


def test_the_table_in_the_docs_says_what_the_code_does() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for name, row in IMPLEMENTATIONS.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        _, _, needs, windows, documents, softcap, matrix, _ = (cell.strip() for cell in line.split("|"))
        assert row.install in needs.replace("`", "") and ("GPU" in needs) == row.gpu
        assert not row.capability or f"({row.capability}.0)" in needs
        assert (windows == "yes", documents == "yes", softcap == "yes") == (row.windows, row.documents, row.softcap)
        assert matrix == row.matrix


@pytest.mark.parametrize(
    ("types", "found"),
    [
        (["full_attention"] * 2, False),
        (["full_attention", "sliding_attention"], True),
        (["hybrid", "hybrid_sliding"], True),
    ],
)
def test_a_window_counts_where_a_layer_has_it(types: list[str], found: bool) -> None:
    assert has_window(SimpleNamespace(sliding_window=16, layer_types=types)) == found
    assert not has_window(SimpleNamespace(sliding_window=None, layer_types=types))
