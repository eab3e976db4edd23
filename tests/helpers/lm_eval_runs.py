"""A tiny checkpoint for lm-eval, and its scores one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from scaled_rope.evaluation.continuations import Continuation
from scaled_rope.scaling.record import RopeScaling
from tests.helpers.models import Make

TRAINED = 32  # the tiny models' positions


def scaling_of(spec: str) -> RopeScaling:
    return RopeScaling.from_spec(spec, RopeScaling(method="default", original_max_position_embeddings=TRAINED))


@torch.inference_mode()
def one_by_one(model: PreTrainedModel, request: Continuation) -> tuple[float, bool]:
    """The definition: one unpadded pass, whole logits."""
    ids = torch.tensor([[*request.context, *request.continuation]])
    logs = model(ids[:, :-1], use_cache=False).logits[0].double().log_softmax(-1)[len(request.context) - 1 :]
    targets = torch.tensor(request.continuation)
    return float(logs.gather(1, targets[:, None]).sum()), bool((logs.argmax(-1) == targets).all())


@pytest.fixture
def checkpoint(tiny_model: Make, tmp_path: Path) -> str:
    """A tiny model with a tokenizer of 60 words, whose end of text is a token that the model does not have."""
    vocabulary = {"<s>": 0, **{f"w{index}": index for index in range(1, 61)}, "</s>": 61}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<s>")
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def words(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{index}" for index in torch.randint(1, 61, (count,), generator=generator).tolist())
