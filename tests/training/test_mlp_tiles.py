"""MLPs that work on a sequence one stretch after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scaled_rope.errors import ConfigError
from scaled_rope.training.mlp_tiles import tile_mlps
from scaled_rope.training.model import enable_checkpointing
from tests.helpers.models import Make
from tests.helpers.training_recipes import recipe


def _gradients(model: Any, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach()), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tiles", [2, 3, 7, 100])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_tiled_mlps_compute_the_same(tiny_model: Make, tokens: torch.Tensor, tiles: int, checkpointing: bool) -> None:
    model = tiny_model().train()
    loss, gradients = _gradients(model, tokens)
    sizes: list[int] = []
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda module, args, out: sizes.append(args[0].shape[1]))
    if checkpointing:
        enable_checkpointing(model, recipe(gradient_checkpointing=True))
    with torch.device("meta"):  # the trial is made where the model is, whatever the default device is
        tile_mlps(model, tiles)
    sizes.clear()  # a trial of a few tokens
    tiled_loss, tiled = _gradients(model, tokens)
    assert max(sizes) == -(-tokens.shape[1] // tiles)  # which is what saves the memory
    assert tiled_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():  # float32 sums over tokens in another order
        torch.testing.assert_close(tiled[name], gradient, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        model.eval()
        assert torch.isfinite(model(tokens).logits).all()


def test_one_tile_changes_nothing(tiny_model: Make) -> None:
    model = tiny_model()
    tile_mlps(model, 1)
    assert all("forward" not in vars(layer.mlp) for layer in model.model.layers)


def test_experts_are_not_tiled() -> None:
    """A router that sees a stretch may send tokens elsewhere; where it returns its scores, that is no MLP at all."""
    from transformers import AutoModelForCausalLM, GptOssConfig

    config = GptOssConfig(
        vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"],
        pad_token_id=None,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="mlp_tiles 4 is not possible: GptOssMLP does not treat each token by itself"):
        tile_mlps(AutoModelForCausalLM.from_config(config), 4)


def test_layers_without_an_mlp_of_a_known_name(tiny_model: Make) -> None:
    model = tiny_model()
    for layer in model.model.layers:
        layer.other = layer.mlp
        del layer.mlp
    with pytest.raises(ConfigError, match="layers of llama have no MLP of a known name"):
        tile_mlps(model, 2)


def test_an_mlp_that_mixes_tokens_is_noticed(tiny_model: Make) -> None:
    class Mixing(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.inner(hidden.cumsum(dim=1))

    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp = Mixing(layer.mlp)
    with pytest.raises(ConfigError, match="Mixing does not treat each token by itself"):
        tile_mlps(model, 2)
