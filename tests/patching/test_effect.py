"""A patch is made only where a model's layers take their angles from the modules that are replaced."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from benchmarks.small_models import small_model
from scaled_rope import ConfigError, patch_model, unpatch_model
from scaled_rope.patching.base_model import Place, rotary_places
from scaled_rope.patching.effect import follow_tables, used_places
from tests.helpers.families import distance, logits

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def _model(base_class: type[LlamaModel]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model.model.__class__ = base_class
    return model


class _AsksAnother(LlamaModel):
    """Has a rotary module under the usual name and asks another one, of which nobody knows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tables = vars(self).setdefault("tables", LlamaRotaryEmbedding(config=self.config))
        usual = self.rotary_emb
        self._modules["rotary_emb"] = tables
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._modules["rotary_emb"] = usual


class _AsksTwo(LlamaModel):
    """The last layer gets tables that are made on the spot."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, position_ids: Any = None, **_: Any) -> Any:
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        positions = torch.arange(hidden.shape[1])[None]
        tables = self.rotary_emb(hidden, position_ids=positions)
        for index, layer in enumerate(self.layers):
            own = tuple(torch.rand_like(table) for table in tables) if index == 2 else tables
            hidden = layer(hidden, position_embeddings=own)
        return (self.norm(hidden),)


@pytest.mark.parametrize(
    ("base_class", "message"),
    [
        (_AsksAnother, "layers.0 takes its angles from elsewhere than rotary_emb"),
        (_AsksTwo, "layers.2 takes its angles from elsewhere than rotary_emb"),
    ],
)
def test_tables_from_elsewhere_are_refused_and_nothing_changes(base_class: type[LlamaModel], message: str) -> None:
    model = _model(base_class)
    modules, config = list(model.named_modules()), model.config.to_dict()
    with pytest.raises(ConfigError, match=f"architecture 'llama': {message}"):
        patch_model(model, "yarn:4")
    assert list(model.named_modules()) == modules and model.config.to_dict() == config


def test_a_module_that_no_layer_asks_is_refused_or_passed_over(tokens: Tensor) -> None:
    # Granite with windows keeps one under the usual name, and asks those in a list.
    model = small_model("granite_swa")
    before = logits(model, tokens)
    report = patch_model(model, "yarn:4")
    assert report.modules == ("model.rotary_embs.0",)
    assert distance(logits(model, tokens), before) > 0.1
    unpatch_model(model)
    assert torch.equal(logits(model, tokens), before)
    base: Any = model.model
    idle = Place("rotary_emb", base.rotary_emb)
    with pytest.raises(ConfigError, match="takes its angles from elsewhere than rotary_emb"):
        used_places(base, [idle])


def test_several_bases_each_keep_their_own(tokens: Tensor) -> None:
    thetas = [1e4, 1e6, 0.0, 1e6]  # 0: no RoPE in that layer
    model = small_model("granite_swa", layer_rope_theta=thetas)
    report = patch_model(model, "linear:4")
    assert report.modules == ("model.rotary_embs.0", "model.rotary_embs.1")
    base: Any = model.model
    found = [float(base.rotary_embs[index].inv_freq[1]) for index in (0, 1)]
    assert found == pytest.approx([1e4 ** (-2 / 16) / 4, 1e6 ** (-2 / 16) / 4])
    # A change of base cannot be said in this config, whose layers name their own.
    assert report.native and not patch_model(model, "ntk:4").native


def test_weights_are_not_needed(tokens: Tensor) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert patch_model(model, "yarn:4").modules == ("model.rotary_emb",)
    sharded = _model(LlamaModel)
    for parameter in sharded.parameters():  # as ZeRO-3 leaves them
        parameter.data = torch.empty(0)
    use = follow_tables(sharded.model, rotary_places(sharded.model))
    assert use.fed == {"rotary_emb": {"layers.0", "layers.1", "layers.2"}} and not use.elsewhere


def test_nothing_is_seen_of_the_trial(tokens: Tensor) -> None:
    model = _model(LlamaModel)
    calls: list[nn.Module] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: calls.append(module))
    modules, state = list(model.named_modules()), torch.get_rng_state()
    used_places(model.model, rotary_places(model.model))
    assert not calls and list(model.named_modules()) == modules and torch.equal(torch.get_rng_state(), state)


def test_it_takes_milliseconds() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=80))
    places, times = rotary_places(model.model), []
    for _ in range(3):
        start = time.process_time()
        used_places(model.model, places)
        times.append(time.process_time() - start)
    assert min(times) < 0.2  # 0.02 s on two cores of an EPYC
