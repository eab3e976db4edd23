"""The plan of a run of benchmarks on one model: lengths, tasks, their texts, and the time it will take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.continuations import NO_LIMIT, context_limit
from scaled_rope.evaluation.generated_prompts import unreachable
from scaled_rope.evaluation.jobs import ModelJob, ModelLoader
from scaled_rope.evaluation.lm_eval_tasks import TaskFacts
from scaled_rope.evaluation.task_presets import doubled
from scaled_rope.evaluation.time_estimate import estimate, measure_pace, plan_table, timed_lengths
from scaled_rope.results import Row


def doubled_lengths(job: ModelJob) -> list[int]:
    """The length in tokens that a job's model was trained on and its doubles, up to the one that its scaling is for.

    Raises:
        ConfigError: the trained length is not known.
    """
    trained = job.scaling.original_max_position_embeddings
    if trained is None:
        raise ConfigError(f"lengths: the trained length of {job.name} is unknown; say --lengths L1,L2,...")
    return doubled(trained, None if job.scaling.is_length_dependent else job.made_for)


def lengths_note(job: ModelJob, lengths: Sequence[int]) -> str | None:
    """A remark on lengths beyond the one that a job's model is for; None where there are none."""
    claimed = job.made_for or job.scaling.original_max_position_embeddings
    beyond = [str(length) for length in lengths if claimed is not None and length > claimed]
    if not beyond or job.scaling.is_length_dependent:
        return None
    return f"{job.name} is for {claimed} tokens; {', '.join(beyond)} {'are' if len(beyond) > 1 else 'is'} beyond that"


def measured_already(rows: Iterable[Row], job: ModelJob, limit: int | None) -> set[tuple[str, int | None]]:
    """Tasks, with lengths in tokens, of which rows hold a result of a job.

    Their prompts are not made anew to be compared, so it is what a rerun skips unless the prompts have changed.
    """
    described = {name: value for name, value in job.fields().items() if name != "model"}
    return {
        (row["protocol"]["task"], row["length"])
        for row in rows
        if row.get("metric") == "benchmark"
        and row["protocol"].get("limit") == limit
        and not unreachable(row.get("error") or "")
        and all(row.get(name) == value for name, value in described.items())
    }


def plan_text(
    job: ModelJob,
    facts: Sequence[TaskFacts],
    lengths: Sequence[int] | None,
    limit: int | None,
    max_length: int | None,
    load: ModelLoader,
    rows: Iterable[Row] = (),
) -> str:
    """The plan of one job for the terminal. The model is loaded and timed.

    Args:
        lengths: in tokens, for tasks that are made for them; None: their own.
        max_length: longest prompt in tokens; None: the model's context.
        rows: those of earlier runs.

    Raises:
        ConfigError: a task that is made for lengths, without any.
    """
    need = [task.name for task in facts if task.takes_lengths]
    if need and not lengths:
        raise ConfigError(f"lengths: must be given to plan {', '.join(need[:3])}{' and others' if need[3:] else ''}")
    done = measured_already(rows, job, limit)
    left: dict[tuple[int, ...], list[TaskFacts]] = {}
    for task in facts:
        missing = tuple(one for one in lengths or () if (task.name, one) not in done)
        if missing if task.takes_lengths else (task.name, None) not in done:
            left.setdefault(missing if task.takes_lengths else (), []).append(task)
    count = len(facts) - sum(map(len, left.values()))
    at = f", at {', '.join(map(str, lengths))} tokens" if lengths else ""
    head = f"{job.name}{at}:"
    if not left:
        return f"{head} all {count} tasks have rows already"
    model = load(job)
    context = max_length or context_limit(model.config, job.scaling)
    timed = timed_lengths(lengths or [min(context, 4096)])
    pace = measure_pace(model, timed)
    parts = []
    for missing, tasks in left.items():
        parts += estimate(tasks, pace, missing, limit, None if context == NO_LIMIT else context)
    order = {task.name: index for index, task in enumerate(facts)}
    parts.sort(key=lambda part: order[part.facts.name])
    measured = " and ".join(
        f"{length} tokens {seconds:.2g} s" for length, seconds in zip(timed, pace.passes, strict=True)
    )
    how = f"one by one with the longest answers; timed: a pass over {measured}"
    skipped = f"\n{count} tasks have rows already" if count else ""
    return f"{head}\n{plan_table(parts)} ({how}){skipped}"
