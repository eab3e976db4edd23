"""Command lines: what is wrong with them is told at once, before torch and transformers are imported."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scaled_rope.attention import backends
from scaled_rope.checkpoint import DEFAULT_MODEL
from scaled_rope.cli import main
from scaled_rope.command_line import Parser
from scaled_rope.errors import ConfigError
from scaled_rope.flags import evaluators, search, serving, shared
from scaled_rope.patching import loading, rotary_kernel
from scaled_rope.recipes.files import available
from scaled_rope.recipes.recipe import make_recipe
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.scaling.registry import METHODS
from scaled_rope.serving import export
from tests.helpers import ROOT

FIELDS = [field.name for field in dataclasses.fields(RopeScaling) if field.name not in ("method", "params")]

#: command lines with a mistake, and what is to be said about it
MISTAKES = {
    "eval/perplexity.py --lenghts 5": "unrecognized arguments: --lenghts 5; did you mean '--lengths' or '--weighting'? "
    "(see eval/perplexity.py --help)",
    "eval/perplexity.py --dataset x --protocol sliding --stride 600 --lengths 512,1024": "--stride 600 is not allowed; "
    "at most 512, the shortest window in tokens",
    "eval/perplexity.py --dataset x --protocol sliding --lengths 64": "--stride 256, the default, is not allowed; "
    "at most 64, the shortest window in tokens",
    "eval/perplexity.py --dataset x --control window=1": "--control window=1 is not allowed; at least 2 tokens",
    "eval/passkey.py --lengths 1": "--lengths 1 is not allowed; at least 2 tokens, the first of which has no context",
    "eval/passkey_hard.py --restrict-tokens maybe": "argument --restrict-tokens: 'maybe' is not allowed; true or false "
    "(see eval/passkey_hard.py --help)",
    "eval/perplexity.py --drop-layers a": "argument --drop-layers: 'a' is not allowed; indices of layers, as 3,7 "
    "(see eval/perplexity.py --help)",
    "finetune.py --output-dir x --batch-size two": "argument --batch-size: 'two' is not allowed; a whole number "
    "(see finetune.py --help)",
    "eval/passkey.py --wording needles": "unknown wording 'needles'; did you mean 'needle'? known: needle, passkey",
    "eval/passkey_hard.py --num-keys 0": "--num-keys 0 is not allowed; at least 1",
    "eval/quality.py -m nothere": "model 'nothere' does not exist, and a hub name is OWNER/NAME",
    "eval/harness.py --attention sdap": "unknown attention 'sdap'; did you mean 'sdpa'? known: auto, blockwise, eager, "
    "flash_attention_2, flash_attention_3, flash_attention_4, flex_attention, sdpa, sdpa_blocked",
    "eval/prompt_loop.py --top-k 0": "--top-k 0 is not allowed; at least 1",
    "eval/report.py --tabel 2": "unrecognized arguments: --tabel; did you mean '--table' or '--help'? "
    "(see eval/report.py --help)",
    "-m scaled_rope inspect nothere": "model 'nothere' does not exist, and a hub name is OWNER/NAME",
    "-m scaled_rope export ./nothere --for vllm": "model './nothere' does not exist",
    "-m scaled_rope certify ./nothere --server http://x/v1": "model './nothere' does not exist",
    "-m scaled_rope certify . --server http://x/v1 --lengths 1": "--lengths 1 is not allowed; at least 2 tokens",
    "-m scaled_rope plan": "give a recipe, or --serve MODEL",
    "-m scaled_rope plan demo --gpus 0": "--gpus 0 is not allowed; at least 1",
    "-m scaled_rope advise nothere --target 5": "model 'nothere' does not exist, and a hub name is OWNER/NAME",
    "-m scaled_rope advise . --target 9 --minutes 0": "--minutes 0 is not allowed; above 0, at most 1e+06 minutes",
    "-m scaled_rope search nothere --target 5": "model 'nothere' does not exist, and a hub name is OWNER/NAME",
    "-m scaled_rope search . --target 9 --strategy evoluton": "unknown strategy 'evoluton'; did you mean 'evolution'? "
    "known: cma-es, coordinate, evolution, grid",
    "-m scaled_rope search . --target 9 --evaluations 0": "--evaluations 0 is not allowed; at least 1",
    "-m scaled_rope tune --dataset x --output README.md": "--output README.md is a file; name a folder",
    "eval/quality.py -d README.md --output README.md": "--output README.md is of dataset README.md; name another file",
    "eval/quality.py --output docs": "--output docs is a folder; name a file for the rows",
    "eval/perplexity.py --dataset x --dtype int3": "unknown dtype 'int3'; known: auto, bfloat16, float16, float32",
    "-m scaled_rope tune --dataset x --dtype flaot32": "unknown dtype 'flaot32'; did you mean 'float32'? "
    "known: auto, bfloat16, float16, float32",
    "-m scaled_rope tune --dataset README.md --adapter docs": "--adapter 'docs' holds no adapter_config.json",
    "-m scaled_rope tune --dataset x --factors 0": "factors '0' is not allowed; finite numbers above 0",
    "-m scaled_rope tune --dataset x --factors 0.5": "factor=0.5: must be a finite number at least 1 and at most 1e+09",
    "-m scaled_rope tune --dataset x --grid 1,1.1": "grid '1,1.1' is not allowed; at least 3 different values",
    "-m scaled_rope tune --constants --dataset x --factors 1": "factors '1' is not allowed; with --constants above 1, "
    "where there is a loss beyond L",
    "-m scaled_rope tune --dataset x --beta-fast x": "beta-fast 'x' is not allowed; START:END:STEP or numbers "
    "separated by commas",
    "-m scaled_rope tune --dataset x --fields factor=2": "fields 'factor=2' is not allowed; attention_factor, mscale, "
    "factor, dynamic are what the search sets",
    "-m scaled_rope.report.paper table9 --shell": "unknown table or figure 'table9'; did you mean 'table6' or 'table5'?"
    " known: figure1, figure5, figure6, table1, table2, table3, table4, table5, table6",
    "eval/harness.py --tasks ,": "tasks=',': must name at least one task",
    "eval/passkey.py --output README.md/rows.jsonl": "file 'README.md/rows.jsonl' cannot be used: README.md is no "
    "folder that can be written to",
    "-m scaled_rope tune": "give --dataset: a path, a hub name or a corpus (books, demo)",
    "finetune.py demo --sequence-lenght 5": "unrecognized arguments: --sequence-lenght 5; did you mean "
    "'--sequence-length' or '--sequence-parallel'? (see finetune.py --help)",
    "finetune.py demo --attention sdap": "unknown attention 'sdap'; did you mean 'sdpa'? known: "
    + ", ".join(sorted(shared.ATTENTIONS)),
    "finetune.py demo --dataset x --model ./nothere --output-dir out/nothere": "model './nothere' does not exist",
    "finetune.py demo --output-dir README.md": "output_dir README.md is a file; name a folder with --output-dir",
    "tokenization.py --dataset x --output docs": "--output docs exists and is no packed set; remove it or "
    "choose another folder",
    "truncate.py 5 docs --dataset x": "output docs exists and is no packed set; remove it or choose another folder",
    "-m scaled_rope.recipes tble2 --shell --also table2": "unknown recipe 'tble2'; did you mean 'table2'? known: "
    + ", ".join(sorted([*available(), "table2"])),
    "tokenization.py --dataset x --output out/x --seed -1": "--seed -1 is not allowed; at least 0",
    "tokenization.py --dataset x": "--output is missing: name the folder to create",
    "eval/perplexity.py --dataset data/nothing": "dataset data/nothing does not exist",
    "eval/quality.py --dataset nothing.jsonl": "dataset nothing.jsonl does not exist",
    "eval/passkey_hard.py --dataset ./nothing": "dataset ./nothing does not exist",
    "tokenization.py --dataset data/nothing,0.5 --output x": "dataset data/nothing does not exist",
    "-m scaled_rope tune --dataset data/nothing": "dataset data/nothing does not exist",
    "eval/perplexity.py --dataset x --scaling yan:8": "unknown method 'yan'; did you mean 'yarn'? known: "
    + ", ".join(sorted(METHODS)),
    "eval/harness.py --scaling yarn:0.5": "factor=0.5: must be a finite number at least 1 and at most 1e+09",
    "finetune.py demo --scaling rerope,windw=64": "unknown scaling field 'windw'; did you mean 'window'? known: "
    + ", ".join(sorted([*FIELDS, "window", "logn"])),
    "-m scaled_rope inspect models/tiny-llama-256 --scaling yarn": "scaling 'yarn': factor is missing; write for "
    "example 'yarn:8'",
    "-m scaled_rope export models/tiny-llama-256 --for vllm --scaling ntk:8,beta_fast=3": "beta_fast=3.0: not for "
    "method 'ntk', which takes dynamic, factor",
}


@pytest.mark.parametrize("script", ["train.sh", "eval.sh", "eval-harness.sh"])
def test_a_script_explains_itself_without_any_package(script: str) -> None:
    done = subprocess.run(
        ["bash", script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=10, env={"PATH": "/usr/bin:/bin"}
    )
    assert (done.returncode, done.stderr) == (0, "") and f"./{script}" in done.stdout


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("plan demo --gpu-memory inf", "--gpu-memory inf is not allowed; above 0, at most 1e+06 GB"),
        ("plan --serve MODEL --gpu-memory 1e300", "--gpu-memory 1e+300 is not allowed; above 0, at most 1e+06 GB"),
        ("plan demo --peak-tflops nan", "--peak-tflops nan is not allowed; above 0, at most 1e+09 TFLOP/s"),
        ("plan demo --utilisation 1.5", "--utilisation 1.5 is not allowed; above 0, at most 1"),
        ("plan --serve MODEL --peak-tflops 3", "--peak-tflops 3 goes with a recipe"),
        ("plan --serve MODEL --utilisation 0.1", "--utilisation 0.1 goes with a recipe"),
        ("plan --serve MODEL --length 99999999999999999999", "--length 99999999999999999999 is not allowed; at least 1"
         " token, below 2^31"),
        ("export MODEL --for vllm --length 0", "--length 0 is not allowed; at least 1 token, below 2^31"),
        ("export --for vllm --scaling yarn:4", "the following arguments are required: model (see scaled-rope export"
         " --help)"),
        ("certify MODEL --server http://127.0.0.1:9/v1 --server-timeout inf", "--server-timeout inf is not allowed;"
         " above 0, at most 1e+06 seconds"),
    ],
)  # fmt: skip
def test_numbers_that_mean_nothing_are_refused(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(DEFAULT_MODEL) if word == "MODEL" else word for word in line.split()]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


@pytest.fixture(scope="module")
def light_commands() -> Iterator[Callable[[str], dict[str, Any]]]:
    """run(command line) -> what it did, see `tests.helpers.light_commands`."""
    command = [sys.executable, "tests/helpers/light_commands.py"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None

        def run(line: str) -> dict[str, Any]:
            print(line, file=server.stdin, flush=True)
            done: dict[str, Any] = json.loads(server.stdout.readline())
            return done

        yield run
        server.stdin.close()


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_told_before_anything_heavy_is_imported(
    light_commands: Callable[[str], dict[str, Any]], line: str
) -> None:
    assert light_commands(line) == {"code": 2, "out": "", "err": f"error: {MISTAKES[line]}\n", "imported": []}


def test_heavy_imports_are_seen(light_commands: Callable[[str], dict[str, Any]]) -> None:
    done = light_commands("-m torch.version")
    assert (done["code"], done["err"], done["imported"]) == (0, "", ["torch"])


def test_names_that_flags_restate_are_those_of_their_modules() -> None:
    assert shared.ATTENTIONS == backends.ATTENTIONS
    assert shared.KERNELS == rotary_kernel.KERNELS
    assert serving.TARGETS == tuple(export.TARGETS)
    assert shared.DTYPES == ("auto", *loading.DTYPES)
    assert shared.DTYPE_ALIASES == tuple(loading.DTYPE_ALIASES)


@pytest.mark.parametrize(
    "line", ["-m scaled_rope methods", "-m scaled_rope methods yarn", "-m scaled_rope.recipes --list"]
)
def test_lists_need_no_torch(light_commands: Callable[[str], dict[str, Any]], line: str) -> None:
    done = light_commands(line)
    assert done["code"] == 0 and done["out"] and done["imported"] == []


def parsed(*argv: str, texts: bool = False) -> argparse.Namespace:
    """The flags of an evaluator, checked."""
    parser = Parser("some script")
    evaluators.add_model_arguments(parser)
    if texts:
        evaluators.add_text_arguments(parser)
    args = parser.parse_args(list(argv))
    evaluators.check_model_arguments(args)
    if texts:
        evaluators.check_text_arguments(args)
    return args


def test_two_models_that_rows_would_record_alike_are_refused(tmp_path: Path) -> None:
    first, second = (tmp_path / run / "out" / "model" for run in ("x", "y"))
    for folder in (first, second):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    said = f"-m {first} and -m {second} are both recorded as 'out/model'; rename a folder"
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
        parsed("-m", str(first), "-m", str(second))
    parsed("-m", str(first), "-m", f"{first}/")  # one and the same
    other = second.rename(second.with_name("other"))
    parsed("-m", str(first), "-m", str(other))


def test_two_texts_that_rows_would_record_alike_are_refused(tmp_path: Path) -> None:
    first, second = (tmp_path / folder / "book.txt" for folder in ("A", "B"))
    for file in (first, second):
        file.parent.mkdir()
        file.write_text("text")
    for flag in ("-d", "--tokenized"):
        said = f"{flag} {first} and {flag} {second} are both recorded as 'book.txt'; rename a file or folder"
        with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
            parsed(flag, str(first), flag, str(second), texts=True)
    parsed("-d", str(first), "-d", f"{tmp_path}/A/../A/book.txt", texts=True)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--scaling", "yarn:2", "--factor", "4"], "--factor: is for a scaling that takes a factor and names none"),
        (["--scaling", "default", "--factor", "4"], "--factor: is for a scaling that takes a factor and names none"),
        (["--scaling", "dynamic-yarn:2", "--finetuned"], "--finetuned: is for a dynamic scaling that names no factor"),
        (["--yarn", "2", "--finetuned"], "--finetuned: is for a dynamic scaling that names no factor"),
        (["--finetuned"], "--finetuned: is for a dynamic scaling that names no factor"),
    ],
)
def test_a_flag_that_no_scaling_heeds_is_refused(argv: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^flag {said}, none of these "):
        parsed(*argv)


def test_grids() -> None:
    assert search.parse_grid("1.0:1.3:0.05") == (1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3)  # the end is in, without noise
    assert search.parse_grid("2,1, 1.5,2") == (1.0, 1.5, 2.0)
    assert search.parse_grid("0.9:1.0:0.03") == (0.9, 0.93, 0.96, 0.99)
    assert search.parse_grid("4") == (4.0,)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "START:END:STEP"),
        ("1,x", "START:END:STEP"),
        ("1:2", "START:END:STEP"),
        ("1:2:0.1:4", "START:END:STEP"),
        ("2:1:0.1", "START at most END"),
        ("1:2:0", "above 0"),
        ("1:2:-1", "above 0"),
        ("0,1,2", "above 0"),
        ("1,nan,2", "finite"),
        ("1:inf:1", "finite"),
        ("1:2:1e-9", "at most 200"),
        ("1,2,2", "at least 3 different values"),
    ],
)
def test_bad_grids(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        search.parse_grid(text, "some grid", least=3)
    assert "some grid" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("version", "files", "said"),
    [
        ("2.13.0+cpu", ["/dev/nvidia0"], "2.13.0+cpu is built without CUDA"),
        ("2.13.0", [], "there is no GPU here"),
    ],
)
def test_a_gpu_that_is_not_there(version: str, files: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "package_version", lambda _: version)
    monkeypatch.setattr(shared.sys, "platform", "linux")
    monkeypatch.setattr(shared.glob, "glob", lambda pattern: fnmatch.filter(files, pattern))

    def check(device: str) -> None:
        parser = Parser("some script")
        evaluators.add_model_arguments(parser)
        evaluators.check_model_arguments(parser.parse_args(["--device", device]))

    for device in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match=re.escape(said)):
            check(device)
    check("cpu")
    monkeypatch.setattr(shared, "package_version", lambda _: "2.13.0")
    files.append("/dev/nvidiactl")
    check("cuda")  # torch has to say more


def test_no_output_is_one_of_the_texts_or_in_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "word"}\n')
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    given = argparse.Namespace(output=str(tmp_path / "link.jsonl"), output_file=None)
    for text in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(ConfigError, match=r"--output .*link.jsonl is of dataset .*; name another file"):
            evaluators.check_output_apart(given, ["some/set", str(text)])
    given = argparse.Namespace(output=str(tmp_path / "rows"), output_file=str(tmp_path / "new.csv"))
    evaluators.check_output_apart(given, [str(tmp_path), str(tmp_path / "a.jsonl")])
    # By what would be read next time, there or not; a set of tokens reads its own files only.
    given = argparse.Namespace(output=str(tmp_path / "rows.jsonl"), output_file=None)
    with pytest.raises(ConfigError, match=r"--output .*rows.jsonl is of dataset"):
        evaluators.check_output_apart(given, [str(tmp_path)])
    evaluators.check_output_apart(argparse.Namespace(output=str(tmp_path / ".out" / "rows.jsonl")), [str(tmp_path)])
    (tmp_path / "meta.json").write_text("{}")
    evaluators.check_output_apart(given, [str(tmp_path)])
    with pytest.raises(ConfigError, match=r"--output .*meta.json is of dataset"):
        evaluators.check_output_apart(argparse.Namespace(output=str(tmp_path / "meta.json")), [str(tmp_path)])


def test_losses_are_not_kept_where_no_folder_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--save-nll .*file is a file; name a folder"):
        evaluators.check_losses_folder(str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="file is no folder that can be written to"):
        evaluators.check_losses_folder(str(tmp_path / "file" / "losses"))
    for good in (None, str(tmp_path), str(tmp_path / "new" / "losses")):
        evaluators.check_losses_folder(good)


def test_a_field_of_texts_that_have_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "meta.json").write_text("{}")
    args = parsed("-d", str(tmp_path / "a.txt"), texts=True)
    assert args.split == "test" and shared.said(args.split) is None
    for given in (("-d", str(tmp_path / "a.txt")), ("--tokenized", str(tmp_path / "set"))):
        with pytest.raises(ConfigError, match="feature 'body' is for records of JSON or Parquet"):
            parsed(*given, "-f", "body", texts=True)
    hub = ("-d", "some/set", "--split", "test", "-f", "body")
    assert parsed(*hub, texts=True).split == parsed(*hub, "-d", str(tmp_path / "a.txt"), texts=True).split == "test"


def test_a_corpus_has_no_splits(capsys: pytest.CaptureFixture[str]) -> None:
    search._check_text(argparse.Namespace(dataset="demo", split="validation", feature="text"))
    assert capsys.readouterr().err == (
        "note: dataset standin:demo has no splits: all of it is read, not 'validation' alone\n"
    )


def test_the_home_folder_is_found_by_its_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("word")
    assert parsed("-d", "~/a.txt", texts=True).dataset == [str(tmp_path / "a.txt")]
    fields = {"output_dir": "~/out", "model": "~/m", "dataset": "~/set"}
    recipe = make_recipe({"name": "r", "global_batch_size": 1, "sequence_length": 64, **fields}, "here")
    assert (recipe.output_dir, recipe.dataset) == (str(tmp_path / "out"), str(tmp_path / "set"))
