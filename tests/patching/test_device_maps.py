"""Models that are split over devices compute what they compute on one: on stand-ins for GPUs, where two devices do not
mix, and with weights that are offloaded to disk."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import eval.passkey as passkey
import eval.passkey_hard as passkey_hard
import eval.perplexity as perplexity
from scaled_rope.checkpoint import DEFAULT_MODEL
from scaled_rope.command_line import Parser
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation import jobs
from scaled_rope.evaluation.continuations import Continuation, score
from scaled_rope.evaluation.decoding import decode_numbers
from scaled_rope.evaluation.ranks import Ranks
from scaled_rope.evaluation.time_estimate import time_passes
from scaled_rope.flags import evaluators, shared
from scaled_rope.patching.device_maps import DEVICE_MAPS, Placement, computing_devices, input_device, is_offloaded
from scaled_rope.patching.loading import load_model
from scaled_rope.patching.loss import token_nll
from scaled_rope.patching.patch import patched_scaling
from scaled_rope.results import read_rows
from scaled_rope.scaling.record import RopeScaling
from tests.helpers.evaluators import evaluate
from tests.helpers.stand_in_devices import NAME, Placed, split_over_stand_ins, stand_in_devices

pytest.importorskip("accelerate")

SPECS = ("default", "yarn:4", "dynamic-yarn", "rerope,window=128")
LAYERS = 6


@pytest.mark.parametrize("spec", [*SPECS[2:], *(pytest.param(spec, marks=pytest.mark.slow) for spec in SPECS[:2])])
def test_layers_on_two_devices(spec: str) -> None:
    """The same operations on the same numbers, so the same bits."""
    model, split = (load_model(str(DEFAULT_MODEL), scaling=spec, device="cpu") for _ in range(2))
    ids = torch.randint(4, 4000, (2, 320), generator=torch.Generator().manual_seed(0))
    with stand_in_devices(), torch.inference_mode():
        split_over_stand_ins(split)
        assert input_device(split) == torch.device(NAME, 0)
        for chunk in (None, 150):  # with a cache in the second case
            given = ids.to(input_device(split))
            nll = token_nll(split, given, given, prefill_chunk=chunk)
            assert nll.device == torch.device(NAME, 1)
            assert torch.equal(nll.cpu(), token_nll(model, ids, ids, prefill_chunk=chunk))
        asked = [Continuation(ids[row, :280].tolist(), ids[row, 280:290].tolist()) for row in range(2)]
        scaling = patched_scaling(model) or RopeScaling.from_config(model.config)
        assert score(split, scaling, asked) == score(model, scaling, asked)


def test_a_cache_on_two_devices_decodes_as_on_one() -> None:
    from scaled_rope.checkpoint import load_tokenizer

    model, split = (load_model(str(DEFAULT_MODEL), scaling="dynamic-yarn", device="cpu") for _ in range(2))
    tokenizer = load_tokenizer(str(DEFAULT_MODEL))
    ids = torch.randint(4, 4000, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    options: dict[str, Any] = {"length_dependent": True, "cached": True, "rows_per_pass": 2, "max_new_tokens": 4}
    expected = [answer.ids for _, answer in decode_numbers(model, tokenizer, [(ids, [5], 12345)], **options)]
    with stand_in_devices():
        with torch.inference_mode():
            split_over_stand_ins(split)
        found = [answer.ids for _, answer in decode_numbers(split, tokenizer, [(ids, [5], 12345)], **options)]
    assert found == expected and len(expected[0]) >= 1


def test_two_devices_do_not_mix() -> None:
    with stand_in_devices():
        one, other = (torch.ones(2).to(torch.device(NAME, index)) for index in range(2))
        assert isinstance(one, Placed) and torch.equal((one + one).cpu(), torch.full((2,), 2.0))
        with pytest.raises(RuntimeError, match="same device"):
            one + other
        with pytest.raises(RuntimeError, match="same device"):
            one + torch.ones(2)


@pytest.fixture(scope="module")
def offloaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags that put every other layer on disk."""
    folder = tmp_path_factory.mktemp("offloaded")
    places = {f"model.layers.{index}": "disk" if index % 2 else "cpu" for index in range(LAYERS)}
    places |= {"model.embed_tokens": "cpu", "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    (folder / "map.json").write_text(json.dumps(places))
    return "--device-map", str(folder / "map.json"), "--offload-folder", str(folder / "weights")


def run(main: Any, output: Path, *argv: str) -> list[dict[str, Any]]:
    """The measured fields of an evaluator's rows."""
    assert main(["-m", str(DEFAULT_MODEL), *argv, "--hide-progress", "--output", str(output)]) == 0
    names = ("perplexity", "perplexity_bucket", "bucket_nats", "prompts", "label", "length")
    return [{name: row[name] for name in names if name in row} for row in read_rows(output)]


def test_offloaded_layers_measure_the_same(offloaded: tuple[str, ...], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the house by the river was dark and the stone was cold . " * 60)
    specs = [word for spec in SPECS for word in ("--scaling", spec)]
    lengths = ("--lengths", "128,300")
    for main, argv in (
        (perplexity.main, ("-d", str(text), "--control", "--prefill-chunk", "100")),
        (passkey.main, ("--iterations", "2", "--shared-prefill")),
        (passkey_hard.main, ("-d", str(text), "--iterations", "2")),
    ):
        some = specs if main is perplexity.main else ["--scaling", "dynamic-yarn", "--scaling", "yarn:4"]
        if main is perplexity.main:
            some = specs[:-2]  # no cache where attention is changed
        expected = run(main, tmp_path / "one", *argv, *some, *lengths, "--device", "cpu")
        assert run(main, tmp_path / "split", *argv, *some, *lengths, *offloaded) == expected
        for name in ("one", "split"):
            (tmp_path / name).unlink()


def test_an_offloaded_model(offloaded: tuple[str, ...]) -> None:
    placement = Placement.parse(offloaded[1], None, offloaded[3])
    model = load_model(str(DEFAULT_MODEL), scaling="yarn:4", placement=placement)
    assert is_offloaded(model) and input_device(model).type == "cpu"
    whole = load_model(str(DEFAULT_MODEL), scaling="yarn:4", device="cpu")
    assert not is_offloaded(whole) and input_device(whole).type == "cpu"


def test_the_devices_on_which_a_model_computes() -> None:
    model = load_model(str(DEFAULT_MODEL), device="cpu")
    assert computing_devices(model) == (torch.device("cpu"),)
    model.hf_device_map = {"model.embed_tokens": 1, "model.layers.0": "cuda:0", "model.norm": "cpu", "lm_head": "disk"}
    assert computing_devices(model) == (torch.device("cuda", 0), torch.device("cuda", 1))
    model.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    assert computing_devices(model) == (torch.device("cpu"),)


def test_time_and_memory_are_those_of_all_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that says it is on two GPUs, which are not there."""
    asked: set[tuple[str, torch.device]] = set()

    def answer(name: str, device: torch.device) -> int:
        asked.add((name, device))
        return 1000 * (1 + device.index)

    for name in ("reset_peak_memory_stats", "synchronize", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, functools.partial(answer, name))
    wanted = {
        (name, torch.device("cuda", index))
        for name in ("reset_peak_memory_stats", "synchronize", "max_memory_allocated") for index in (0, 1)
    }  # fmt: skip

    def load(*given: Any, **more: Any) -> Any:
        model = load_model(*given, **more)
        model.hf_device_map = {"model": 0, "lm_head": 1}
        return model

    monkeypatch.setattr(jobs, "load_model", load)
    text = tmp_path / "text.txt"
    text.write_text("the house by the river was dark and the stone was cold . " * 60)
    for main, argv in ((passkey.main, ("--iterations", "1")), (perplexity.main, ("-d", str(text)))):
        rows = evaluate(main, tmp_path / main.__module__, "-m", str(DEFAULT_MODEL), "--lengths", "128", *argv)
        assert {row["peak_memory"] for row in rows if "seconds" in row} == {3000} and asked == wanted
        asked.clear()
    time_passes(load(str(DEFAULT_MODEL), device="cpu"), [16])
    assert {device.index for name, device in asked if name == "synchronize"} == {0, 1}


def test_memory_decides(tmp_path: Path) -> None:
    placement = Placement.parse("auto", "cpu=5MB", str(tmp_path / "weights"))
    assert placement is not None and placement.options()["max_memory"] == {"cpu": "5MB"}
    assert is_offloaded(load_model(str(DEFAULT_MODEL), placement=placement))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("bogus", None, None), "unknown device-map 'bogus'"),
        ((None, "cpu=1GB", None), "--max-memory cpu=1GB goes with --device-map"),
        ((None, None, "x"), "--offload-folder x goes with --device-map"),
        (("auto", "cpu", None), "--max-memory cpu is not allowed"),
        (("auto", "gpu=1GB", None), "--max-memory gpu=1GB is not allowed"),
        (("nowhere.json", None, None), "--device-map nowhere.json cannot be read"),
    ],
)
def test_what_is_refused(given: tuple[str | None, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Placement.parse(*given)


def test_maps_that_are_none(tmp_path: Path) -> None:
    for index, content in enumerate(("[]", "{}", '{"lm_head": [1]}')):
        path = tmp_path / f"{index}.json"
        path.write_text(content)
        with pytest.raises(ConfigError, match="must hold an object of parts and devices"):
            Placement.parse(str(path))
    (tmp_path / "some.json").write_text('{"model.embed_tokens": "cpu", "model.norm": "disk"}')
    with pytest.raises(ConfigError, match="does not give any device") as caught:
        load_model(str(DEFAULT_MODEL), placement=Placement.parse(str(tmp_path / "some.json")))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        Placement.parse("auto", None, str(tmp_path / "some.json"))


def test_flags_that_do_not_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = Parser("some script")
    evaluators.add_model_arguments(parser)
    with pytest.raises(ConfigError, match="--device cpu is not allowed with --device-map"):
        jobs.placement_of(parser.parse_args(["--device-map", "auto", "--device", "cpu"]))
    monkeypatch.setattr(jobs, "current", lambda: Ranks(0, 2))
    with pytest.raises(ConfigError, match="--device-map auto is for one process, not 2"):
        jobs.placement_of(parser.parse_args(["--device-map", "auto"]))
    with pytest.raises(ConfigError, match="unknown device-map 'atuo'"):
        evaluators.check_model_arguments(parser.parse_args(["--device-map", "atuo"]))
    assert shared.DEVICE_MAPS == DEVICE_MAPS


def test_an_evaluator_without_a_map_is_as_before(tmp_path: Path) -> None:
    rows = evaluate(passkey.main, tmp_path / "rows", "-m", str(DEFAULT_MODEL), "--lengths", "120", "--iterations", "1")
    assert rows[0]["n"] == 1
