"""Each agent alone on held-out questions before and after training, and on validation questions in between.

What has been measured stands in the run folder's results.json, so that a run which goes on does not measure it again.
"""

from __future__ import annotations

from ilr_fast.alone import answer_alone
from ilr_fast.evaluate import evaluate_agents, evaluate_base, method_of, open_grader, record
from ilr_fast.protocols import load_protocol
from ilr_fast.runfolder import read_results
from ilr_fast.session import Session


def measure_base(session: Session) -> None:
    """The models before training, with the run's prompt and with worked examples (`evaluate.few_shot`)."""
    if session.config.evaluate.base:
        _measure_base(session)
        _measure_benchmarks(session, "base", None)


def _measure_base(session: Session) -> None:
    wanted = {("base", None), *(("base_few_shot", count) for count in session.config.evaluate.few_shot)}
    if wanted <= _measured(session):
        return
    session.team.forget()
    found = evaluate_base(
        session.team.seats, session.ready.splits["test"], session.grader,
        train_questions=session.ready.splits["train"], config=session.config, benchmark="test",
        modes=session.config.evaluate.modes, samples=session.config.evaluate.samples, seed=session.config.seed,
        progress=session.progress,
    )  # fmt: skip
    record(session.folder.path, found)


def measure_after(session: Session) -> None:
    """The trained agents, each alone with the run's prompt (and in `evaluate.modes`); each mode is written as it is
    done."""
    config, method, checkpoint = session.config, method_of(session.config), f"step_{session.config.steps:06d}"
    for mode in config.evaluate.modes:
        session.team.forget()
        found = evaluate_agents(
            session.team.seats, session.ready.splits["test"], session.grader, config=config, benchmark="test",
            method=method, modes=[mode], samples=config.evaluate.samples, examples=session.ready.examples,
            seed=config.seed, checkpoint=checkpoint, progress=session.progress,
        )  # fmt: skip
        record(session.folder.path, found)
    _measure_benchmarks(session, method, checkpoint)


def _measure_benchmarks(session: Session, method: str, checkpoint: str | None) -> None:
    """The agents on `evaluate.benchmarks`, which training does not see; those with rows already are left out."""
    measured = {(row["benchmark"], row["method"], row.get("checkpoint")) for row in read_results(session.folder.path)}
    for one in session.ready.benchmarks:
        if (one.benchmark, method, checkpoint) in measured:
            continue
        session.team.forget()
        with open_grader(one.config) as grader:
            found = evaluate_agents(
                session.team.seats, one.questions, grader, config=one.config, benchmark=one.benchmark, method=method,
                modes=session.config.evaluate.modes, samples=session.config.evaluate.samples, examples=one.examples,
                seed=session.config.seed, checkpoint=checkpoint, progress=session.progress,
            )  # fmt: skip
        record(session.folder.path, found)


def validate(session: Session) -> dict[str, float]:
    """Accuracy of every agent that learns, alone and greedy, on validation questions."""
    config = session.config
    questions = list(session.ready.splits["validation"])[: config.evaluate.validation_limit]
    protocol = load_protocol("single", config)
    session.team.forget()
    scores = {}
    for name in session.team.names:
        if session.team.hosts[name].trains:
            with session.progress.phase(f"validation of {name}", len(questions)) as advance:
                grades = answer_alone(
                    name, session.team.seats[name], questions, session.grader, config.rollout, protocol,
                    examples=session.ready.examples, seed=config.seed, on_done=advance,
                )  # fmt: skip
            scores[name] = sum(grade.correct for (grade,) in grades) / len(questions)
    return scores


def _measured(session: Session) -> set[tuple[str, int | None]]:
    """(method, number of worked examples) of the rows that exist for every agent and mode."""
    rows = [row for row in read_results(session.folder.path) if row["benchmark"] == "test"]
    needed = {(name, mode) for name in session.team.names for mode in session.config.evaluate.modes}
    methods = {(row["method"], row.get("examples")) for row in rows}
    return {
        method for method in methods
        if needed <= {(r["agent"], r["mode"]) for r in rows if (r["method"], r.get("examples")) == method}
    }
