"""train.sh, eval.sh and eval-harness.sh."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time

import pytest
import yaml

from scaled_rope.recipes.files import read_recipe
from tests.helpers import ROOT


def test_eval_sh_measures_tables_and_then_reports(tmp_path):
    """With an interpreter that writes the evaluators' command lines down instead of running them."""
    python, log, rows = tmp_path / "python", tmp_path / "log", tmp_path / "rows.jsonl"
    python.write_text(
        f"""#!/usr/bin/env bash
        if [[ "$1" != eval/* ]]; then exec {sys.executable} "$@"; fi
        echo "$@" >> {log}
        [[ "$*" != *missing* ]] || exit 3
        echo '{{}}' >> {rows}
        """
    )
    python.chmod(python.stat().st_mode | stat.S_IEXEC)
    variables = {"PYTHON": str(python), "PYTHONPATH": str(ROOT), "OUTPUT": str(rows), "TASKS": "mmlu"}
    variables |= {"MODELS": "a/b missing", "DATASET": "x.txt"}  # the one for table 3, the other for table 4
    command = ["./eval.sh", "table4", "table3", "--", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    flags = "--protocol sliding --stride 256 --weighting window --samples 50 --dataset-min-tokens 16384 --lengths 32768"
    lines = log.read_text().splitlines()
    assert lines[:4] == [
        f"eval/perplexity.py -m a/b --dataset x.txt {flags} --seed 1 --output {rows}",
        f"eval/perplexity.py -m missing --dataset x.txt {flags} --seed 1 --output {rows}",
        f"eval/harness.py -m a/b --tasks mmlu --output {rows} --seed 1",  # through eval-harness.sh
        f"eval/harness.py -m missing --tasks mmlu --output {rows} --seed 1",
    ]
    assert lines[4].startswith(f"eval/report.py {rows} --table 4 --table 3 ") and len(lines) == 5
    assert lines[4].endswith(f"--output {tmp_path}")
    # A model that fails does not keep the others from being measured, and is named in the end.
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["failed: missing: mmlu", "failed: table4: missing", "failed: table3"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_train_sh_alone_ends_every_process_and_lets_them_save(tmp_path, number, code):
    """Training is a launcher that the signal kills at once, and its worker, which takes its time to save."""
    for name in ("train.sh", "environment.sh"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "worker.py").write_text(
        "import signal, sys, time\nfrom pathlib import Path\n\n"
        "def save(*_):\n    time.sleep(0.5)\n    Path('saved').touch()\n    sys.exit(0)\n\n"
        f"signal.signal({int(number)}, save)\n"
        "import os\nPath('begun').write_text(os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT'])\ntime.sleep(60)\n"
    )
    (tmp_path / "launcher.py").write_text(
        "import signal, subprocess, sys\nsignal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "subprocess.run([sys.executable, 'worker.py'])\n"
    )
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "LAUNCH": "python launcher.py"}
    script = subprocess.Popen(
        ["bash", "train.sh", "llama-2-7b-128k"], cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # nohup and the like ignore it
    )  # fmt: skip
    deadline = time.monotonic() + 120  # a machine may be busy
    while not (tmp_path / "begun").exists():
        assert script.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    script.send_signal(number)
    script.communicate(timeout=120)  # to the end of its output, which the worker holds as well
    assert script.returncode == code
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "begun").read_text() == "1800"  # seconds that torch's own launcher gives it to save


def test_train_sh_does_not_go_on_after_a_run_that_was_stopped(tmp_path):
    for name in ("train.sh", "environment.sh"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "finetune.py").write_text("print('ran')")  # ends with 0, as a launcher may whose run was stopped
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "train.sh", "llama-2-7b-128k"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 143 and done.stdout.endswith("ran\n")
    assert done.stderr == "llama-2-7b-64k is not finished; the same command continues\n"


def test_names_are_only_names_to_the_scripts(tmp_path):
    """Blanks, quotes and what a shell would run, in the names of files and in a recipe's fields."""
    for name in ("train.sh", "eval.sh", "environment.sh"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    strange = 'my "runs" $(touch ran) `touch ran` it\'s; touch ran #'
    folder = tmp_path / strange.replace("/", "")
    folder.mkdir()
    recipe = folder / f"{strange}.yaml"
    fields = {"model": strange, "dataset": strange, "output_dir": f"out/{strange}", "sequence_length": 8,
              "global_batch_size": 1, "description": strange,
              "evaluate": {"perplexity": f"--dataset {shlex.quote(strange)}",
                           "report": f"--title {shlex.quote(strange)}"}}  # fmt: skip
    recipe.write_text(yaml.safe_dump(fields))
    record = "import json, sys; print('ARGS', json.dumps(sys.argv[1:]))"
    (tmp_path / "finetune.py").write_text(record)
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    relative = str(recipe.relative_to(tmp_path))
    done = subprocess.run(["bash", "train.sh", relative], cwd=tmp_path, env=environment, capture_output=True, text=True)
    (shown,) = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("ARGS")]
    assert shown == [relative] and done.returncode == 143  # it was not trained
    done = subprocess.run(
        ["bash", "train.sh", "a\nb.yaml"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and "error: recipe 'a\\nb.yaml' is not allowed" in done.stderr
    recipe.write_text(yaml.safe_dump(fields | {"evaluate": {"scalings": [strange]}}))
    done = subprocess.run(["bash", "train.sh", relative], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "evaluate: scalings: unknown method" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_train_sh_runs_a_chain_and_hands_over_what_is_finished(tmp_path):
    """train.sh with a program in place of training, which notes the recipe's name and leaves a finished run behind."""
    for name in ("train.sh", "environment.sh"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "finetune.py").write_text("")
    trainer = tmp_path / "trainer.sh"
    for name in ("llama-2-7b-64k", "llama-2-7b-128k"):
        (tmp_path / name).write_text(json.dumps({"step": read_recipe(name).max_train_steps}) + "\n")
    trainer.write_text(
        'echo "$2" >> order\nmkdir -p out/$2/model\necho {} > out/$2/model/config.json\ncp $2 out/$2/train_log.jsonl\n'
    )
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "LAUNCH": f"bash {trainer}"}

    def train(*names: str) -> None:
        done = subprocess.run(
            ["bash", "train.sh", *names], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    train("llama-2-7b-128k")
    assert (tmp_path / "order").read_text().split() == ["llama-2-7b-64k", "llama-2-7b-128k"]
    train("llama-2-7b-64k")
    assert (tmp_path / "order").read_text().split()[2:] == ["llama-2-7b-64k"]


@pytest.mark.parametrize("script", ["train.sh", "eval.sh", "eval-harness.sh"])
def test_scripts_show_their_comment_for_help_and_refuse_other_flags(script):
    environment = os.environ | {"PYTHON": sys.executable}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", script, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)

    shown = run("--help")
    assert (shown.returncode, shown.stderr) == (0, "") and f"./{script} --list" in shown.stdout
    refused = run("--force")
    assert refused.returncode == 2 and "error: flag --force is not allowed" in refused.stderr


def test_an_empty_name_is_not_the_demo():
    for script in ("train.sh", "eval.sh"):
        command = ["bash", script, ""]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 2 and "unknown recipe ''" in done.stderr


def refusal(script: str, *words: str, **variables: str) -> str:
    """What a script says that refuses its words or variables, having begun nothing; it may print no more than that."""
    environment = os.environ | {"PYTHON": sys.executable} | variables
    command = ["bash", script, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1, done
    return done.stderr


@pytest.mark.parametrize("flag", ["--list", "--help"])
@pytest.mark.parametrize("words", [("eval.sh", "demo"), ("eval.sh", "long"), ("train.sh", "demo")])
def test_a_flag_among_the_names_is_refused(words: tuple[str, ...], flag: str) -> None:
    """It would make what is evaluated as assignments a listing."""
    assert refusal(*words, flag).startswith(f"error: flag {flag} is not allowed here; flags ")


@pytest.mark.parametrize(
    ("script", "name", "value"),
    [
        ("eval-harness.sh", "TASKS", " "), ("eval-harness.sh", "MODELS", " "), ("eval-harness.sh", "MODELS", ""),
        ("eval.sh", "MODELS", " \n"), ("eval.sh", "DATASET", "\t"), ("train.sh", "LAUNCH", " "),
    ],
)  # fmt: skip
def test_a_variable_without_a_word_is_not_taken_for_none(script: str, name: str, value: str) -> None:
    said = refusal(script, **{name: value})
    assert said.startswith(f"error: {name}=") and said.endswith(" is not allowed; at least one word, or unset it\n")


@pytest.mark.parametrize("words", [("eval-harness.sh", "", "--", "--limit", "1"), ("eval.sh", "long", "m", "")])
def test_an_empty_model_is_refused(words: tuple[str, ...]) -> None:
    assert refusal(*words) == "error: model '' is not allowed; the name is empty\n"


@pytest.mark.parametrize(
    ("words", "said"), [(["--bogus", "1"], "flag --bogus"), (["nothere"], "unknown recipe 'nothere'")]
)
def test_train_sh_reads_all_names_before_it_trains(words, said):
    done = subprocess.run(
        ["bash", "train.sh", "demo", *words], cwd=ROOT, capture_output=True, text=True, timeout=240,
        env=os.environ | {"PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 2 and said in done.stderr and "step" not in done.stdout


@pytest.mark.parametrize(
    ("name", "said"), [("table9", "unknown table or figure 'table9'"), ("nothere", "unknown recipe 'nothere'")]
)
def test_eval_sh_reads_all_names_before_it_measures(name, said):
    done = subprocess.run(
        ["bash", "eval.sh", "table2", name], cwd=ROOT, capture_output=True, text=True, timeout=240,
        env=os.environ | {"PYTHON": sys.executable, "MODELS": "models/tiny-llama-256"},
    )  # fmt: skip
    assert done.returncode == 2 and said in done.stderr and done.stdout == ""


def test_eval_sh_measures_a_recipe_with_the_control(tmp_path):
    """With an interpreter that prints the evaluators' command lines instead of running them."""
    python, recipe = tmp_path / "python", tmp_path / "mine.yaml"
    python.write_text(f'#!/usr/bin/env bash\n[[ "$1" == eval/* ]] || exec {sys.executable} "$@"\necho "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IEXEC)

    def measured(flags: str, **variables: str) -> str:
        recipe.write_text(
            f"model: m\nscaling: yarn:4\noutput_dir: {tmp_path}\ndataset: d\n"
            "sequence_length: 64\nglobal_batch_size: 1\n"
            f"evaluate: {{scalings: [default], perplexity: '{flags}'}}\n"
        )
        environment = os.environ | {"PYTHON": str(python), "PYTHONPATH": str(ROOT)} | variables
        command = ["./eval.sh", str(recipe)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        told = next(line for line in done.stdout.splitlines() if line.startswith("eval/report.py"))
        assert "--base m " in told and "--finetuned" not in told  # nothing has been trained yet
        return next(line for line in done.stdout.splitlines() if line.startswith("eval/perplexity.py"))

    assert "--control trained --dataset x --output" in measured("--dataset x")
    assert "--control window=9 --dataset x --output" in measured("--dataset x", CONTROL="window=9")
    assert "--control off --output" in measured("--dataset x --control off")  # the recipe's word is the last
    assert "--control trained --dataset x --protocol sliding" in measured("--dataset x --protocol sliding --stride 4")


def test_eval_sh_measures_what_began_with_random_weights(tmp_path):
    """There is no model before training to measure, or to compare with."""
    python, recipe = tmp_path / "python", tmp_path / "mine.yaml"
    python.write_text(f'#!/usr/bin/env bash\n[[ "$1" == eval/* ]] || exec {sys.executable} "$@"\necho "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IEXEC)
    text = f"init: {{model_type: llama}}\ntokenizer: t\noutput_dir: {tmp_path}\ndataset: d\n"
    text += "sequence_length: 64\nglobal_batch_size: 1\n"
    environment = os.environ | {"PYTHON": str(python), "PYTHONPATH": str(ROOT)}
    (tmp_path / "model").mkdir()

    def evaluate(fields: str) -> subprocess.CompletedProcess[str]:
        recipe.write_text(f"{text}evaluate: {{{fields}perplexity: --dataset x, passkey: --lengths 8}}\n")
        command = ["./eval.sh", str(recipe)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)

    done = evaluate("")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("eval/")]
    assert [line.split()[0] for line in lines] == ["eval/perplexity.py", "eval/passkey.py", "eval/report.py"]
    assert all(f"-m {tmp_path}/model" in line for line in lines[:2]) and "--base" not in lines[2]
    assert f"--finetuned {tmp_path}/model" in lines[2]
    done = evaluate("scalings: [default], ")
    assert done.returncode == 2 and "scalings = ['default'] is not allowed; leave it out" in done.stderr
    (tmp_path / "model").rmdir()
    done = evaluate("")
    assert done.returncode == 2 and "has no model to measure yet; train it first: ./train.sh" in done.stderr


def test_tables_of_the_paper_have_a_control_where_it_is_asked_for(tmp_path):
    """With an interpreter that prints the evaluators' command lines instead of running them."""
    python = tmp_path / "python"
    python.write_text(f'#!/usr/bin/env bash\n[[ "$1" == eval/* ]] || exec {sys.executable} "$@"\necho "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IEXEC)
    for control in ("", "trained"):
        environment = os.environ | {"PYTHON": str(python), "PYTHONPATH": str(ROOT), "MODELS": "m", "CONTROL": control}
        environment |= {"OUTPUT": str(tmp_path / "rows")}
        command = ["./eval.sh", "table1", "table2", "table4", "table5", "table6", "figure5"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith("eval/")]
        with_control = [line.split()[0] for line in lines if f" --control {control} " in line]
        assert with_control == (["eval/perplexity.py"] * 5 if control else [])
        assert [line.split()[0] for line in lines].count("eval/passkey.py") == 1


def python_and_launcher(folder):
    """Programs that print an evaluator's command line after "alone" or "launched" instead of running it."""
    python, launcher = folder / "python", folder / "launcher"
    python.write_text(f'#!/usr/bin/env bash\n[[ "$1" == eval/* ]] || exec {sys.executable} "$@"\necho "alone $@"\n')
    launcher.write_text('#!/usr/bin/env bash\necho "launched $@"\n')
    for program in (python, launcher):
        program.chmod(program.stat().st_mode | stat.S_IEXEC)
    return python, launcher


def test_evaluators_are_started_by_a_launcher(tmp_path):
    python, launcher = python_and_launcher(tmp_path)
    environment = os.environ | {"PYTHON": str(python), "PYTHONPATH": str(ROOT), "MODELS": "m", "TASKS": "mmlu"}
    environment |= {"OUTPUT": str(tmp_path / "rows"), "LAUNCH": f"{launcher} --nproc-per-node 2"}
    command = ["./eval.sh", "table2", "table3"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("launched", "alone"))]
    assert [line[:45] for line in lines] == [
        "launched --nproc-per-node 2 eval/perplexity.p", "launched --nproc-per-node 2 eval/harness.py -"
    ]  # fmt: skip


def test_eval_sh_long_measures_a_base_and_what_became_of_it(tmp_path):
    """With an interpreter that writes the evaluators' command lines down instead of running them."""
    python, log, rows = tmp_path / "python", tmp_path / "log", tmp_path / "rows.jsonl"
    python.write_text(
        f"""#!/usr/bin/env bash
        if [[ "$1" != eval/* ]]; then exec {sys.executable} "$@"; fi
        echo "$@" >> {log}
        echo '{{}}' >> {rows}
        [[ "$*" != *"harness.py -m tuned"* && "$*" != *"-m broken"* ]] || exit 1
        """
    )
    python.chmod(python.stat().st_mode | stat.S_IEXEC)
    environment = os.environ | {"PYTHON": str(python), "PYTHONPATH": str(ROOT), "OUTPUT": str(rows)}

    def run(*words: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        log.write_text("")
        command = ["./eval.sh", "long", *words]
        done = subprocess.run(command, cwd=ROOT, env=environment | variables, capture_output=True, text=True)
        return done, log.read_text().splitlines()

    done, lines = run("--", "--chat-template", MODELS="base tuned", LENGTHS="64,128", DATASET="x.txt", LIMIT="7")
    texts = "--control trained --dataset x.txt --windows 12 --lengths 64,128"
    asked = f"--tasks ruler --lengths 64,128 --limit 7 --chat-template --output {rows}"
    assert lines == [
        f"eval/perplexity.py -m base --scaling default {texts} --output {rows}",
        f"eval/perplexity.py -m tuned {texts} --output {rows}",
        f"eval/passkey.py -m base --scaling default --lengths 64,128 --iterations 20 --output {rows}",
        f"eval/passkey.py -m tuned --lengths 64,128 --iterations 20 --output {rows}",
        f"eval/harness.py -m base --scaling default {asked}",
        f"eval/harness.py -m tuned {asked}",
        f"eval/report.py {rows} --base base --finetuned tuned --title Long texts --output {tmp_path}",
    ]
    assert done.returncode == 1 and done.stderr.splitlines() == ["failed: long: harness of tuned"]
    for models, named in (("broken tuned", "--finetuned tuned"), ("base broken", "--base base")):
        done, lines = run(MODELS=models, LENGTHS="64,128")  # the report knows a model that was measured
        assert lines[-1] == f"eval/report.py {rows} {named} --title Long texts --output {tmp_path}"
    done, lines = run("--", "--plan")  # the embedded model
    both = "-m models/tiny-llama-256 --scaling default --scaling yarn:4"
    asked = f"--tasks ruler-offline --lengths 256,512,1024 --limit 10 --plan --output {rows}"
    assert (done.returncode, lines) == (0, [f"eval/harness.py {both} {asked}"])
    done, lines = run(LIMIT="0")
    assert (done.returncode, lines) == (2, []) and "error: LIMIT=0 is not allowed" in done.stderr


def test_eval_sh_long_is_started_by_a_launcher(tmp_path):
    python, launcher = python_and_launcher(tmp_path)
    environment = os.environ | {"PYTHON": str(python), "PYTHONPATH": str(ROOT), "OUTPUT": str(tmp_path / "rows")}
    environment |= {"LAUNCH": str(launcher), "MODELS": "a b", "LENGTHS": "64"}
    evaluators = [f"launched eval/{name}.py" for name in ("perplexity", "passkey", "harness") for _ in range(2)]
    for more, expected in (([], evaluators), (["--", "--plan"], ["alone eval/harness.py"] * 2)):
        command = ["./eval.sh", "long", *more]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        lines = [line for line in done.stdout.splitlines() if line.startswith(("launched", "alone"))]
        assert [" ".join(line.split()[:2]) for line in lines] == expected, done.stderr


@pytest.mark.parametrize("name", ["MODELS", "DATASET", "OUTPUT"])
def test_eval_sh_refuses_variables_that_recipes_do_not_read(name):
    done = subprocess.run(
        ["bash", "eval.sh", "demo"], cwd=ROOT, capture_output=True, text=True, timeout=240,
        env=os.environ | {"PYTHON": sys.executable, name: "x"},
    )  # fmt: skip
    said = f"error: {name}=x is not allowed with recipe 'demo', which says it itself\n"
    assert (done.returncode, done.stderr, done.stdout) == (2, said, "")


@pytest.mark.parametrize(
    ("words", "name", "what"),
    [
        *((("eval.sh", "demo"), name, "'demo'") for name in ("LENGTHS", "LIMIT", "ITERATIONS", "WINDOWS", "SCALING")),
        *((("eval.sh", "demo"), name, "'demo'") for name in ("TASKS", "PUBLISHED")),
        *((("eval.sh", "table2"), name, "'table2'") for name in ("LENGTHS", "LIMIT", "WINDOWS", "SCALING", "TASKS")),
        *((("eval.sh", "table3"), name, "'table3'") for name in ("DATASET", "CONTROL")),
        (("eval.sh", "table4", "table3"), "SCALING", "'table4 table3'"),
        (("eval.sh", "long"), "PUBLISHED", "'long'"),
        (("eval.sh", "long", "m"), "MODELS", "'long MODEL ...'"),
        (("eval-harness.sh", "m"), "MODELS", "'MODEL ...'"),
        *((("eval-harness.sh",), name, "eval-harness.sh") for name in ("DATASET", "LIMIT", "SCALING", "LENGTHS")),
        *((("train.sh", "demo"), name, "'demo'") for name in ("MODELS", "DATASET", "OUTPUT", "SCALING")),
    ],
)
def test_a_variable_that_is_not_read_is_refused(words: tuple[str, ...], name: str, what: str) -> None:
    assert refusal(*words, **{name: "x"}) == f"error: {name}=x is not allowed with {what}, which does not read it\n"


def test_a_listing_takes_any_variables() -> None:
    environment = os.environ | {"PYTHON": sys.executable, "SCALING": "yarn:4", "DATASET": "x"}
    command = ["bash", "eval-harness.sh", "--list", "m"]
    listed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert listed.startswith("model  m\ntask ")


def test_eval_sh_long_takes_a_scaling_for_one_model_alone() -> None:
    said = "error: SCALING=yarn:8 is not allowed with several models, which have scalings of their own; only with one\n"
    assert refusal("eval.sh", "long", "a", "b", SCALING="yarn:8") == said


@pytest.mark.parametrize(
    ("page", "ends", "code"), [("written", 0, 0), ("written", 1, 1), ("missing", 1, 1), ("written", 2, 2)]
)
def test_a_verdict_that_fails_is_told_in_the_end_and_a_broken_report_at_once(tmp_path, page, ends, code):
    python, recipe = tmp_path / "python", tmp_path / "mine.yaml"
    write = f"echo x > {tmp_path}/report.html" if page == "written" else "true"
    python.write_text(
        f'#!/usr/bin/env bash\n[[ "$1" == eval/* ]] || exec {sys.executable} "$@"\n'
        f'[[ "$1" == eval/report.py ]] || exit 0\n{write}\nexit {ends}\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IEXEC)
    recipe.write_text(
        f"model: m\nscaling: yarn:4\noutput_dir: {tmp_path}\ndataset: d\nsequence_length: 64\n"
        "global_batch_size: 1\nevaluate: {scalings: [default], perplexity: '--dataset x', report: --verdict demo}\n"
    )
    (tmp_path / "report.html").write_text("of an earlier run")
    environment = os.environ | {"PYTHON": str(python), "PYTHONPATH": str(ROOT)}
    command = ["./eval.sh", str(recipe)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == code
    told = f"failed: {recipe}: the verdict, see {tmp_path}/report.html" in done.stderr
    assert told is ((page, ends) == ("written", 1))


def test_a_recipe_is_worked_through_in_numbered_steps(tmp_path):
    """train.sh and eval.sh with programs in place of the real ones, which print what they are told of their step."""
    for name in ("train.sh", "eval.sh", "environment.sh"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    record = json.dumps({"step": 2})
    (tmp_path / "mine.yaml").write_text(
        "model: m\nscaling: yarn:4\noutput_dir: out\ndataset: d\nsequence_length: 64\nglobal_batch_size: 1\n"
        "max_train_steps: 2\nwarmup_steps: 0\nprepare: ['echo data']\n"
        "evaluate: {scalings: [default], perplexity: '--dataset x --lengths 8,16', passkey: --lengths 64}\n"
    )
    python = tmp_path / "python"
    python.write_text(
        f"""#!/usr/bin/env bash
        case $1 in
            finetune.py)
                mkdir -p out/model; echo '{{}}' > out/model/config.json; echo '{record}' > out/train_log.jsonl ;;
            eval/*) ;;
            *) exec {sys.executable} "$@" ;;
        esac
        echo "$1 is ${{SCALED_ROPE_STEP##* }} of ${{SCALED_ROPE_STEP%% *}}"
        """
    )
    python.chmod(python.stat().st_mode | stat.S_IEXEC)
    environment = os.environ | {"PYTHON": str(python), "PYTHONPATH": str(ROOT)}

    def run(script: str) -> list[str]:
        command = ["bash", script, "mine.yaml"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "\r" not in done.stdout + done.stderr
        return done.stdout.splitlines()

    assert run("train.sh") == ["step 1 of 7: texts", "data", "step 2 of 7: training", "finetune.py is training of 2"]
    lines = run("eval.sh")
    assert lines[0] == "data" and [line.partition(", about")[0] for line in lines[1::2]] == [
        "step 3 of 7: perplexity before training",
        "step 4 of 7: perplexity after training",
        "step 5 of 7: passkeys before training",
        "step 6 of 7: passkeys after training",
        "step 7 of 7: report",
    ]
    assert lines[2] == "eval/perplexity.py is training of 3" and lines[3].endswith(", about 1 min left")
