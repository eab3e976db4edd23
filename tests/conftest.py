"""Fixtures of all tests, and what must be so before Triton and transformers are imported."""

from __future__ import annotations

import contextlib
import gc
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

# One thread, also in the programs that tests start: their tensors are tiny, so threads cost more than they give, and on
# busy cores they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Torch, transformers and the tests are millions of objects that stay. Python's rates were chosen for small programs: a
# fifth of the time of these imports and a tenth of that of small tests went into looking through all that is there.
gc.set_threshold(50_000, 20, 20)

import pytest
import torch

pytest.register_assert_rewrite("tests.helpers")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, and the next line does that

from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from scaled_rope.evaluation.passkey_prompts import OPENING
from tests.helpers.models import DETECTED, FAMILIES, VOCABULARY
from tests.helpers.runs import Ranks, make_workspace

with contextlib.suppress(ImportError):  # without triton
    import scaled_rope.kernels.decode_triton  # noqa: F401 - mends old interpreters, for kernels of others too

# On a machine with a GPU patched models would get the rotary kernel, and would no longer equal vanilla ones bit by bit.
os.environ.setdefault("SCALED_ROPE_KERNEL", "none")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take most of a minute or more, too")


# Files in the order of how long they take, for `--dist loadfile --no-loadscope-reorder`: a worker that got one of these
# last would go on alone for minutes. Those that start many programs stand apart. The others follow, most tests first.
LONGEST = (
    "test_ranks.py", "training/test_planning.py", "patching/test_patch_families.py", "training/test_run_state.py",
    "training/test_traced_memory.py", "certificate/test_certify.py", "benchmarks/test_engines.py",
    "training/test_loop.py", "tuning/test_divisor_search.py", "evaluation/test_ranks.py",
    "patching/test_device_maps.py", "evaluation/test_generated_prompts.py", "advice/test_rounds.py", "test_fuzz.py",
    "test_shell_scripts.py", "benchmarks/test_smollm2_32k.py", "test_wheel.py", "evaluation/test_runner.py",
    "patching/test_loss_fused.py", "benchmarks/test_gpu.py",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("numprocesses", None) is not None or hasattr(config, "workerinput"):
        tests = Counter(item.path for item in items)
        first = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
        assert all(path.exists() for path in first), first
        items.sort(key=lambda item: (first.get(item.path, len(first)), -tests[item.path], item.path))
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow; --slow runs it"))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what was imported stays


def pytest_unconfigure() -> None:
    gc.unfreeze()  # extension modules complain of what is never freed


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """make(family="llama", seed=0, **config): a random model with 2 layers, head_dim 16 and 32 positions.

    Equal seeds give equal weights. The weights are large, so that attention depends sharply on positions.
    """

    def make(family: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
        settings: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 32,
            "initializer_range": 0.3,
            "bos_token_id": 0,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        settings |= (FAMILIES | DETECTED)[family] | overrides
        torch.manual_seed(seed)
        # A copy of what is nested: configs change it in place.
        config = CONFIG_MAPPING[family](**{name: _copy(value) for name, value in settings.items()})
        # transformers before 5.21 takes sdpa for gemma2, which leaves out the soft cap of its scores.
        more = {"attn_implementation": "eager"} if family == "gemma2" else {}
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **more)
        return model.eval()

    return make


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copy(entry) for name, entry in value.items()}
    return list(value) if isinstance(value, list) else value


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make_workspace` fills."""
    folder = tmp_path_factory.mktemp("training")
    make_workspace(folder)
    return folder


@pytest.fixture(scope="session")
def straight(workspace: Path) -> Path:
    """The run that others are compared with: one process, no interruption."""
    Ranks(workspace, workspace / "straight", 1, extra=("--log-loss", str(workspace / "losses.csv"))).succeed()
    return workspace / "straight"


@pytest.fixture(scope="session")
def tied(workspace: Path) -> Path:
    """`straight` with embeddings that are the projection as well."""
    Ranks(workspace, workspace / "straight-tied", 1, extra=("--model", str(workspace / "tied"))).succeed()
    return workspace / "straight-tied"


@pytest.fixture
def tokens() -> torch.Tensor:
    """Random token ids [2, 48], longer than the tiny models' 32 positions."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, VOCABULARY, (2, 48), generator=generator)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with single digits, BOS 0 and EOS 1, trained on the passkey wording."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([OPENING * 3], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder
