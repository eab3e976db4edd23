"""Training in other programs: the callback, and the examples of docs/integrations.md as they stand there."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import re
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, GPTJForCausalLM

import eval.report as report
import finetune
from scaled_rope import RopeScaling, patch_model
from scaled_rope.errors import ConfigError
from scaled_rope.integrations import ContextCallback, card, check_scaling, save_adapter_scaling
from scaled_rope.patching.loading import apply_scaling, load_model
from scaled_rope.patching.loss import token_nll
from scaled_rope.patching.patch import lost_part, patched_plan, patched_scaling
from scaled_rope.results import read_rows
from scaled_rope.serving.inspect_model import check_model
from tests.helpers import ROOT
from tests.helpers.number_texts import (
    TRAINED,
    bodies,  # noqa: F401
    checkpoint,  # noqa: F401
    texts,  # noqa: F401
)

PAGE = (ROOT / "docs" / "integrations.md").read_text()
LENGTHS = [16, 32, 40]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def rows_of(bodies: list[list[int]], size: int = 40) -> list[dict[str, list[int]]]:  # noqa: F811
    cut = [body[begin : begin + size] for body in bodies for begin in range(0, len(body) - size + 1, size)]
    return [{"input_ids": ids, "labels": ids} for ids in cut]


@pytest.fixture
def trained(checkpoint: str, texts: str, bodies: list[list[int]], tmp_path: Path) -> Any:  # noqa: F811
    """A function that trains two steps with a callback and returns the trainer."""

    def train(model: Any, callback: ContextCallback, steps: int = 2, resume: str | None = None, **more: Any) -> Any:
        from transformers import AutoTokenizer, Trainer, TrainingArguments

        arguments = TrainingArguments(
            str(tmp_path / "out"), max_steps=steps, per_device_train_batch_size=1, report_to=[], use_cpu=True,
            learning_rate=5e-2, disable_tqdm=True, **{"save_strategy": "no", **more},
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, pad_token="<unk>")
        trainer = Trainer(model, arguments, train_dataset=rows_of(bodies), eval_dataset=rows_of(bodies)[:1],
                          processing_class=tokenizer, callbacks=[callback])  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def perplexities(model: Any, bodies: list[list[int]]) -> list[float]:  # noqa: F811
    """By bucket, of the documents that have 40 tokens with the BOS, straight from the definition."""
    sums, counts = [0.0] * 3, [0] * 3
    for body in bodies:
        if len(body) < 39:
            continue
        ids = torch.tensor([[0, *body[:39]]])
        nll = token_nll(model, ids[:, :-1], ids[:, 1:]).detach()[0].double()
        for index, (start, end) in enumerate(((1, 16), (16, 32), (32, 40))):
            sums[index] += float(nll[start - 1 : end - 1].sum())
            counts[index] += end - start
    return [math.exp(total / count) for total, count in zip(sums, counts, strict=True)]


def test_perplexity_before_during_and_after(
    trained: Any, checkpoint: str, texts: str, bodies: list[list[int]], tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    patch_model(model, "yarn:4")
    first = perplexities(model, bodies)
    callback = ContextCallback(texts, LENGTHS, every=2)
    trainer = trained(model, callback, steps=3)
    assert model.training
    rows = read_rows(tmp_path / "out" / "context.jsonl")
    assert rows == callback.rows
    found = {step: [row["perplexity_bucket"] for row in rows if row["model_fingerprint"] == f"step {step}"]
             for step in (0, 2, 3)}  # fmt: skip
    assert len(rows) == 9 and found[0] == pytest.approx(first, rel=1e-5)
    model.eval()
    assert found[3] == pytest.approx(perplexities(model, bodies), rel=1e-5)
    assert abs(found[3][0] / found[0][0] - 1) > 1e-3  # it did learn something between
    logged = [entry for entry in trainer.state.log_history if "context/16" in entry]
    assert [entry["step"] for entry in logged] == [0, 2, 3]
    assert [logged[-1][f"context/{length}"] for length in LENGTHS] == found[3]
    assert report.main([str(tmp_path / "out" / "context.jsonl")]) == 0
    table = (tmp_path / "out" / "context.md").read_text()
    assert table == card(rows, RopeScaling.from_dict(rows[0]["scaling"])) and "| 3 | " in table


def test_a_run_that_is_resumed_keeps_what_it_measured_before(
    trained: Any, checkpoint: str, texts: str, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    def run(steps: int, **more: Any) -> None:
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        patch_model(model, "yarn:4")
        trained(
            model, ContextCallback(texts, [16, 40], every=1), steps=steps, save_strategy="steps", save_steps=2, **more
        )

    run(3)
    other = {"metric": "perplexity", "model_fingerprint": "0123456789abcdef"}  # of another program, in the same file
    with (tmp_path / "out" / "context.jsonl").open("a") as file:
        file.write(json.dumps(other) + "\n")
    run(4, resume=str(tmp_path / "out" / "checkpoint-2"))
    rows = read_rows(tmp_path / "out" / "context.jsonl")
    assert other in rows
    steps = [row["model_fingerprint"] for row in rows if row != other]
    assert steps == [f"step {step}" for step in (0, 0, 1, 1, 2, 2, 3, 3, 4, 4)]
    table = (tmp_path / "out" / "context.md").read_text().splitlines()
    assert [line.split(" ")[1] for line in table if line.startswith("| ")][1:] == ["0", "1", "2", "3", "4"]


def test_whenever_the_trainer_evaluates(trained: Any, checkpoint: str, texts: str) -> None:  # noqa: F811
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    patch_model(model, "yarn:4")
    callback = ContextCallback(texts, [16], samples=1)
    trained(model, callback, steps=3, eval_strategy="steps", eval_steps=1)
    assert [row["model_fingerprint"] for row in callback.rows] == [f"step {step}" for step in range(4)]


def test_the_wrong_scaling_is_noticed_before_the_first_step(trained: Any, checkpoint: str, texts: str) -> None:  # noqa: F811
    wrong = ContextCallback(texts, [16], scaling="yarn:4")
    with pytest.raises(ConfigError, match="does not compute with yarn x4"):
        trained(AutoModelForCausalLM.from_pretrained(checkpoint), wrong)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    patch_model(model, "yarn:2")
    with pytest.raises(ConfigError, match="computes with yarn x2, not with yarn x4"):
        trained(model, ContextCallback(texts, [16], scaling="yarn:4"))
    assert not wrong.rows


def test_a_config_that_says_what_the_model_does_not_do(checkpoint: str) -> None:  # noqa: F811
    """As a program leaves it that writes into the config of a model that is loaded already."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert check_scaling(model).method == "default"
    model.config.rope_parameters = {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED, "rope_theta": 10000.0,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="does not compute with yarn x4"):
        check_scaling(model)


def test_a_checkpoint_that_carries_its_scaling(checkpoint: str, tmp_path: Path) -> None:  # noqa: F811
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    patch_model(model, "yarn:4")
    model.save_pretrained(tmp_path / "saved")
    assert check_scaling(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")).label == "yarn x4"


@pytest.mark.parametrize("make", [GPT2LMHeadModel, GPTJForCausalLM])
def test_a_model_that_cannot_have_a_scaling_confirms_none(make: Any) -> None:
    said = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    small = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = make(make.config_class(**small, rotary_dim=16, rope_parameters=said))
    wanted = RopeScaling.from_config(model.config)
    assert wanted.label == "yarn x4"
    for given in (None, wanted):
        with pytest.raises(ConfigError, match="whether the model computes with yarn x4 cannot be told: architecture"):
            check_scaling(model, given)
    assert check_scaling(make(make.config_class(**small, rotary_dim=16))).method == "default"


def test_scalings_by_length_are_held_against_the_rotary_module(checkpoint: str) -> None:  # noqa: F811
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    built = AutoModelForCausalLM.from_pretrained(checkpoint, rope_parameters=dict(rope))
    own = check_scaling(built)
    assert own.label == "dynamic-ntk x4"
    built(torch.ones(1, 3 * TRAINED, dtype=torch.long))  # which its rotary module remembers
    assert check_scaling(built) == check_scaling(built, own) == own
    edited = AutoModelForCausalLM.from_pretrained(checkpoint)
    edited.config.rope_parameters |= rope
    for given in (None, own):
        with pytest.raises(ConfigError, match="does not compute with dynamic-ntk x4"):
            check_scaling(edited, given)
    built.config.rope_parameters = edited.config.rope_parameters | {"factor": 2.0}
    with pytest.raises(ConfigError, match="does not compute with yarn x4"):
        check_scaling(built, RopeScaling("yarn", 4.0, TRAINED))


def _swapped(model: Any, before: Any) -> None:
    model.model.rotary_emb = before.model.rotary_emb


def _other_factor(model: Any, before: Any) -> None:
    model.model.rotary_emb.attention_scaling = 1.0


def _other_frequencies(model: Any, before: Any) -> None:
    model.model.rotary_emb.inv_freq = before.model.rotary_emb.inv_freq


def _own_forward(model: Any, before: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.forward = MethodType(type(attention).forward, attention)


def _other_layer(model: Any, before: Any) -> None:
    model.model.layers[1] = before.model.layers[1]


def _no_hooks(model: Any, before: Any) -> None:
    for layer in model.model.layers:
        layer._forward_pre_hooks.clear()


@pytest.mark.parametrize("spec", ["yarn:4", "dynamic-yarn:4", "ntk:4", "rerope,window=8"])
def test_a_config_that_was_edited_after_the_patch_is_noticed(checkpoint: str, spec: str) -> None:  # noqa: F811
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    patch_model(model, spec)
    wanted = model.config.rope_parameters
    model.config.rope_parameters = {**wanted, "partial_rotary_factor": 1.0}  # says the same
    assert check_scaling(model) == patched_scaling(model)
    model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ConfigError, match="lost it: the rope_parameters of its config were edited and say linear x2"):
        check_scaling(model)
    model.config.rope_parameters = {"rope_type": "yarn", "factor": "two", "rope_theta": 1e4}
    assert "its config was edited and cannot be read, " in lost_part(model) and not lost_part(model, of_modules=True)
    patch_model(model, spec)
    assert model.config.rope_parameters == wanted and check_scaling(model) == patched_scaling(model)


@pytest.mark.parametrize(
    ("spec", "undo", "said"),
    [
        ("yarn:4", _swapped, "rotary_emb is a LlamaRotaryEmbedding"),
        ("yarn:4", _other_factor, "rotary_emb holds another attention factor"),
        ("yarn:4", _other_frequencies, "rotary_emb holds other frequencies"),
        ("yarn:4,attention_temperature=log", _own_forward, "LlamaAttention does not call the ALL_ATTENTION_FUNCTIONS"),
        ("dynamic-yarn:4", _other_layer, "LlamaAttention does not call the apply_rotary_pos_emb"),
        ("self-extend,group=4,window=8", _own_forward, "LlamaAttention does not call the apply_rotary_pos_emb"),
        ("yarn:4", _no_hooks, "a hook of the patch is gone"),
    ],
)
def test_a_patch_that_was_undone_in_part_is_noticed(checkpoint: str, spec: str, undo: Any, said: str) -> None:  # noqa: F811
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    before = copy.deepcopy(model)
    patch_model(model, spec, drop_layers=[0] if undo is _no_hooks else [])
    whole = copy.deepcopy(model)
    undo(model, before)
    with pytest.raises(ConfigError, match=f"was patched with .* and lost it: {said}"):
        check_scaling(model)
    (finding,) = check_model(model)
    assert finding.code == "patch-undone" and said in finding.text
    for one in (whole, whole.to(torch.bfloat16), copy.deepcopy(whole)):  # these have it all
        assert check_scaling(one) == patched_scaling(model) and not check_model(one)
    apply_scaling(model, check_scaling(whole), patched_plan(whole))
    assert check_scaling(model) == check_scaling(whole)


def test_a_checkpoint_of_an_adapter_says_its_scaling(checkpoint: str, texts: str, tmp_path: Path) -> None:  # noqa: F811
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    patch_model(model, "yarn:4")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "checkpoint-5")
    where, state = SimpleNamespace(output_dir=tmp_path), SimpleNamespace(global_step=5, is_world_process_zero=True)
    ContextCallback(texts, [16]).on_save(where, state, None, model=adapted)
    loaded = load_model(checkpoint, adapter=str(tmp_path / "checkpoint-5"))
    assert check_scaling(loaded) == check_scaling(model) and check_scaling(model).label == "yarn x4"


def test_adapters_with_names_say_their_scaling(
    checkpoint: str,  # noqa: F811
    texts: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """PEFT saves each in a folder of its own. Adapters of other checkpoints in the output folder are left alone."""
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    patch_model(model, "yarn:4")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    adapted = peft.get_peft_model(model, config, adapter_name="long")
    adapted.add_adapter("default", config)
    where, state = SimpleNamespace(output_dir=tmp_path), SimpleNamespace(global_step=5, is_world_process_zero=True)
    callback, folder = ContextCallback(texts, [16]), tmp_path / "checkpoint-5"
    folder.mkdir()
    capsys.readouterr()
    callback.on_save(where, state, None, model=adapted)
    said = f"note: {folder} holds no adapter, so the scaling is not written beside one\n"
    assert capsys.readouterr().err == said and not list(folder.iterdir())
    with pytest.raises(ConfigError, match="holds no adapter_config.json, nor in long, so no adapter"):
        save_adapter_scaling(adapted, folder)
    adapted.save_pretrained(folder)
    callback.on_save(where, state, None, model=SimpleNamespace(module=adapted))
    found = sorted(file.relative_to(folder) for file in folder.rglob("scaled_rope.json"))
    assert found == [Path("long/scaled_rope.json"), Path("scaled_rope.json")]
    assert "note:" not in capsys.readouterr().err
    loaded = load_model(checkpoint, adapter=str(folder / "long"))
    assert check_scaling(loaded) == check_scaling(model) and check_scaling(model).label == "yarn x4"
    save_adapter_scaling(adapted, tmp_path / "checkpoint-5" / "long")
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)  # not one that PEFT has been in
    callback.on_save(where, SimpleNamespace(global_step=6, is_world_process_zero=True), None, model=plain)
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig", "aLoRA"])
def test_adapters_outside_of_the_model_are_refused(kind: str, checkpoint: str, texts: str, tmp_path: Path) -> None:  # noqa: F811
    """The base model computes without them, so that every step would show the same perplexity."""
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    patch_model(model, "yarn:4")
    if kind == "aLoRA":
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[1, 2])
    else:
        config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    adapted = peft.get_peft_model(model, config)
    wrapped = SimpleNamespace(module=adapted)
    where, state = SimpleNamespace(output_dir=tmp_path), SimpleNamespace(global_step=0, is_world_process_zero=True)
    with pytest.raises(ConfigError, match=r"^ContextCallback cannot measure \w+Config of PEFT, which acts [^\n]*$"):
        ContextCallback(texts, [16]).on_train_begin(where, state, None, model=wrapped)


def test_layers_without_rotary_embedding_are_not_counted_as_scaled(checkpoint: str) -> None:  # noqa: F811
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    patch_model(model, "yarn:4", drop_layers=range(model.config.num_hidden_layers))
    wanted = check_scaling(model)
    with pytest.raises(ConfigError, match="computes with yarn x4, but layers 0.* have no rotary embedding"):
        check_scaling(model, wanted)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lengths": []}, "lengths"),
        ({"lengths": [1, 8]}, "at least 2"),
        ({"lengths": 64}, "lengths 64 are not allowed; a list of whole numbers"),
        ({"lengths": ["64"]}, "lengths"),
        ({"lengths": [8, "64"]}, "lengths"),
        ({"lengths": [8], "every": 0}, "every 0"),
        ({"lengths": [8], "samples": 0}, "samples 0 is not allowed; a whole number of at least 1"),
        ({"lengths": [8], "scaling": 3}, "scaling 3 is not allowed; a RopeScaling or a text such as 'yarn:8'"),
    ],
)
def test_refusals(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ContextCallback("texts", **given)
    assert ContextCallback("texts", {64, 16}).lengths == ContextCallback("texts", range(16, 65, 48)).lengths == [16, 64]


def test_a_scaling_is_checked_by_its_text(checkpoint: str) -> None:  # noqa: F811
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    scaling = patch_model(model, "yarn:4").scaling
    assert check_scaling(model, "yarn:4") == scaling
    with pytest.raises(ConfigError, match="computes with yarn x4, not with yarn x8"):
        check_scaling(model, "yarn:8")
    with pytest.raises(ConfigError, match=r"scaling \{\} is not allowed"):
        check_scaling(model, {})  # type: ignore[arg-type]


def test_texts_that_are_too_short(trained: Any, checkpoint: str, texts: str) -> None:  # noqa: F811
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ConfigError, match="0 of 5 documents have 500 tokens"):
        trained(model, ContextCallback(texts, [500]))


# ------------------------------------------------------------------------------------------------- the page's examples


@pytest.mark.parametrize(("index", "needs"), [(0, "transformers"), (1, "trl")])
def test_the_examples_run(
    checkpoint: str, texts: str, bodies: list[list[int]], tmp_path: Path, index: int, needs: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    datasets = pytest.importorskip("datasets")
    words = datasets.Dataset.from_dict({"text": [" ".join(map(str, body)) for body in bodies]})
    given = {
        "MODEL": checkpoint, "HELDOUT": texts, "LENGTHS": LENGTHS, "OUTPUT": str(tmp_path / "out"), "STEPS": 2,
        "TOKENIZED": rows_of(bodies), "TEXTS": words,
    }  # fmt: skip
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    add_end(checkpoint, tmp_path / "model")
    given["MODEL"] = str(tmp_path / "model")
    code = blocks("python")[index].replace("report_to=[]", "report_to=[], use_cpu=True, bf16=False")
    exec(compile(code, "docs/integrations.md", "exec"), given)
    rows = read_rows(tmp_path / "out" / "context.jsonl")
    assert {row["label"] for row in rows} == {"yarn x4, step 0", "yarn x4, step 2"}
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert check_scaling(saved).label == "yarn x4"


def test_the_reference_model_of_dpo(
    checkpoint: str,
    bodies: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,  # noqa: F811
) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    add_end(checkpoint, tmp_path / "model")
    model, tokenizer = (
        made.from_pretrained(tmp_path / "model") for made in (AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    tokenizer.pad_token = tokenizer.eos_token
    patch_model(model, "yarn:4")
    words = [" ".join(map(str, body[:8])) for body in bodies]
    pairs = datasets.Dataset.from_dict({"prompt": words, "chosen": words, "rejected": words[::-1]})
    given = {"OUTPUT": str(tmp_path / "out"), "LENGTHS": LENGTHS, "STEPS": 1, "PAIRS": pairs}
    given |= {"model": model, "tokenizer": tokenizer}
    code = blocks("python")[2].replace("report_to=[]", "report_to=[], use_cpu=True, bf16=False")
    exec(compile(code, "docs/integrations.md", "exec"), given)
    own = trl.DPOTrainer(model, args=given["arguments"], train_dataset=pairs, processing_class=tokenizer)
    with pytest.raises(ConfigError, match="does not compute with yarn x4"):  # as the page says
        check_scaling(own.ref_model, check_scaling(model))


def add_end(model: str, folder: Path) -> None:
    """Save a model with a tokenizer that has an EOS, as those of real models do."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = "<unk>"
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_the_checkpoint_for_programs_that_take_a_path(checkpoint: str, tmp_path: Path) -> None:  # noqa: F811
    command = blocks("bash")[0].splitlines()[0].split()
    output = tmp_path / "scaled"
    argv = [{"BASE": checkpoint, "out/scaled": str(output)}.get(word, word) for word in command[2:]]
    assert finetune.main(argv) == 0
    assert check_scaling(AutoModelForCausalLM.from_pretrained(output / "model")).label == "yarn x4"
    for text in blocks("yaml"):
        assert "out/scaled/model" in yaml.safe_load(text).values() and "rope" not in text
