"""Training, which reads as the pipeline:

    questions → dialogues → rewards → calibrated advantages → updates (batch → loss → step) → weights → log

With `rollout.ahead` the next step's dialogues are sampled while agents learn, from weights that are one update older.

`train(config)` checks what needs no model, opens the run folder and the agents, measures the base models, runs the
steps, and measures each agent alone again. A run that was cut off goes on from its newest good checkpoint: nothing
random is kept between steps (every seed comes from the run's seed, the step, the question, the sample, the agent and
the stage), so weights, optimizer and step number are all that it needs.

    ilr-fast train configs/cpu/quickstart.yaml steps=4
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from ilr_fast.background import Background
from ilr_fast.card import PeakSampler
from ilr_fast.checkpoint import newest_good, save
from ilr_fast.config import Config, calibration_is_noop
from ilr_fast.credit import credit, has_gradient, training_sequences
from ilr_fast.data import QuestionStream
from ilr_fast.errors import RunError
from ilr_fast.failures import Failures, step_failures
from ilr_fast.groups import Groups, OnDone, gathered
from ilr_fast.heldout import measure_after, measure_base, validate
from ilr_fast.hosts import HostLost
from ilr_fast.interaction import Interactions
from ilr_fast.interrupt import Interrupt
from ilr_fast.kernels_ahead import kernels_ahead
from ilr_fast.metrics import MetricsLog, Timer, complete
from ilr_fast.plan_command import settle
from ilr_fast.progress import Progress
from ilr_fast.rollout import DialogueJob, request_seed, run_dialogues
from ilr_fast.runfolder import RunFolder
from ilr_fast.score import penalise_divergence, score
from ilr_fast.session import Session, open_session, prepare
from ilr_fast.steplog import diverging, metrics_row
from ilr_fast.types import Credited, Dialogue, Question, Scored, StepResult


@dataclass(frozen=True, slots=True)
class Rollout:
    """A step's dialogues up to the advantages: nothing has been learned from them yet. Counters of the hosts around."""

    groups: Groups
    credited: Sequence[Credited]
    before: Mapping[str, Mapping[str, float]]
    after: Mapping[str, Mapping[str, float]]


def train(config: Config, *, fresh: bool = False, command: str = "ilr-fast train") -> Path:
    """Trains and returns the run folder. UserError for the user's mistakes, RunError for a run that can't go on."""
    ready = prepare(config)
    config, planned = settle(config, ready.contexts)
    ready = replace(ready, config=config)
    with (
        RunFolder.open(config, fresh=fresh, command=command) as folder,
        Progress(config.steps) as progress,
        Interrupt() as interrupt,
        PeakSampler() as card,  # before this process uses a card
        kernels_ahead(config, folder.path, room=planned.room) as ahead,
        open_session(ready, folder, progress, card) as session,
    ):
        if calibration_is_noop(config):
            progress.warn(
                "rewards of two values, divided by their std: calibration changes nothing here; "
                "set reward.format_weight above 0 or credit.calibrate to advantage (docs/calibration.md)"
            )
        if not planned.fits:
            progress.warn(f"by its plan the run takes {planned.peak / 2**30:.1f} GiB, more than there is")
        start, last_row = _resume(session)
        if start == 0:
            measure_base(session)
        interactions = Interactions.open(session, start)
        ahead.wait()
        with MetricsLog(folder.path, config, resume_step=start, last_row=last_row) as log:
            _Steps(session, interactions, log, interrupt, start).run()
        measure_after(session)
    return folder.path


def _resume(session: Session) -> tuple[int, Mapping[str, Any] | None]:
    """Restores the newest good checkpoint; returns its step and its metrics row, (0, None) where there is none."""
    folder = session.folder
    checkpoint = newest_good(folder.checkpoints, folder.fingerprint)
    if checkpoint is None:
        folder.discard_after(0)
        return 0, None
    checkpoint.restore(session.team.hosts)
    folder.discard_after(checkpoint.step)
    session.progress.note(f"going on from step {checkpoint.step}")
    return checkpoint.step, checkpoint.state.get("row")


class _Steps:
    """The steps of a run, and what must be saved when they are cut off."""

    def __init__(self, session: Session, interactions: Interactions, log: MetricsLog, interrupt: Interrupt, start: int):
        self.session, self.interactions, self.log, self.interrupt = session, interactions, log, interrupt
        self.config = session.config
        self.stream = QuestionStream(session.ready.splits["train"], self.config.seed)
        self.failures = Failures(session.folder.path / "failures.jsonl", self.config.max_failed_share)
        self.done = self.saved = start
        self.whole = True  # False while some agents are updated and others not
        self.saving, self.writing = Background("checkpoint"), Background("dialogues")
        self.read = Event()  # a checkpoint's weights stand in copies or files: what is left needs them no more
        self.ahead: Rollout | None = None  # the next step's
        self.late: BaseException | None = None  # what ended it, raised once this step is whole
        self.row: dict[str, Any] = {}
        self.warned: set[str] = set()

    def run(self) -> None:
        """Runs to the last step. What is cut off leaves a checkpoint of the last whole step."""
        try:
            for step in range(self.done + 1, self.config.steps + 1):
                self.step(step)
            self.saving.wait()
        except HostLost:
            raise
        except (KeyboardInterrupt, RunError):
            with self.interrupt.held():
                self.checkpoint(score=None)
                self.saving.wait()
            raise
        finally:
            self.saving.close()
            self.writing.close()

    def step(self, step: int) -> None:
        """One rollout, one update of every agent, one row. All agents are updated, or none."""
        session, timer = self.session, Timer()
        session.team.measure(timer)
        rollout, self.ahead = self.ahead or self.talk(step, timer), None
        if self.saving.busy:
            with timer("checkpoint"):
                self.saving.reached(self.read)  # weights must not change before they are copied
        with self.interrupt.held():
            self.whole = False
            self.writing.start(partial(session.folder.write_dialogues, step, rollout.credited))
            results = update(session, rollout.credited, step, timer, self.meanwhile(step, timer))
            failed = step_failures(step, rollout.groups.dialogues, rollout.groups.scored, results)
            self.failures.add(failed)
            self.writing.wait()
            self.row = metrics_row(step, rollout.credited, results, rollout.before, rollout.after, failed)
            self.row["questions"] = {"replaced": rollout.groups.replaced, "stopped": rollout.groups.stopped}
            self.done, self.whole = step, True
            if self.late is not None:
                raise self.late
        self.warn()
        self.finish(step, timer)
        self.failures.check(failed, len(rollout.groups.dialogues), step)

    def talk(self, step: int, timer: Timer) -> Rollout:
        """The step's dialogues, with the weights that engines have now."""
        self.interactions.refresh(step)
        settings = self.config.rollout
        questions = self.stream.questions_at(step, settings.questions + settings.refill)
        return roll_out(self.session, self.interactions, questions, step, timer)

    def meanwhile(self, step: int, timer: Timer) -> Callable[[], None] | None:
        """What is to be done while agents learn: the next step's dialogues, where the config wants them ahead."""

        def talk() -> None:
            try:
                self.ahead = self.talk(step + 1, timer)
            except BaseException as failure:
                self.late = failure

        return talk if self.config.rollout.ahead and step < self.config.steps else None

    def warn(self) -> None:
        """Says, once for each agent, that the trainer does not see the distribution that the engine sampled from."""
        exact = [name for name, agent in self.config.agents.items() if agent.engine.exact]
        for name, difference in diverging(self.row, self.config.log, exact).items():
            if name not in self.warned:
                self.warned.add(name)
                remedy = "compare their precision, or correct for it with loss.importance"
                if self.config.rollout.ahead:
                    remedy = "with rollout.ahead an update lies between them: a lower learning rate makes it less"
                self.session.progress.warn(f"{name}: {difference}; {remedy}")

    def finish(self, step: int, timer: Timer) -> None:
        """Validates and saves where they are due, and writes the row."""
        every = self.config.checkpoint.every
        due = every is not None and (step % every == 0 or step == self.config.steps)
        scores: Mapping[str, float] = {}
        if step == self.config.steps or (self.config.evaluate.every and step % self.config.evaluate.every == 0):
            with timer("evaluate"):
                scores = validate(self.session)
        for name, accuracy in scores.items():
            self.row["agents"][name]["validation_accuracy"] = accuracy
        with self.interrupt.held():
            if due:
                with timer("checkpoint"):
                    self.checkpoint(sum(scores.values()) / len(scores) if scores else None)
            peak = self.session.card.take()
            self.row["memory_peak_gib"] = None if peak is None else peak / 2**30
            self.row["seconds"] = timer.seconds()
            self.log.write(self.row)
            self.session.progress.step(self.row)

    def checkpoint(self, score: float | None) -> None:
        """Saves the last whole step, once, unless an update was cut off in its middle; where nothing moves the weights
        meanwhile, in a thread beside the next step."""
        if not self.whole or self.done == self.saved:
            return
        state = {"fingerprint": self.session.folder.fingerprint, "row": complete(self.row)}
        self.read = Event()
        write = partial(save, self.session.folder.checkpoints, self.done, self.session.team.hosts, state,
                        keep=self.config.checkpoint.keep, score=score, on_read=self.read.set)
        self.saving.start(write)
        if not self.session.team.stays:
            self.saving.wait()
        self.saved = self.done


def roll_out(
    session: Session, interactions: Interactions, questions: Sequence[Question], step: int, timer: Timer
) -> Rollout:
    """Questions → dialogues → rewards, as each dialogue ends → calibrated advantages."""
    config, ready = session.config, session.ready
    session.team.forget()
    before = {name: host.stats() for name, host in session.team.hosts.items()}
    seed = request_seed(config.seed, "step", step)

    def converse(question: Question, on_done: OnDone) -> Coroutine[Any, Any, list[Dialogue]]:
        samples = range(config.rollout.samples)
        jobs = [DialogueJob(question, sample, interactions.of(question), seed) for sample in samples]
        return run_dialogues(jobs, ready.protocol, session.team.seats, config.rollout,
                             examples=ready.examples, on_done=lambda dialogue: (on_done(dialogue), advance()))

    def rewards(dialogues: Sequence[Dialogue]) -> list[Scored]:
        return score(dialogues, session.grader, ready.protocol, config)

    def live(scored: Sequence[Scored]) -> bool:
        learners = [name for name, host in session.team.hosts.items() if host.trains]
        return has_gradient(credit(scored, session.team.names, config.credit), learners)

    dialogues = config.rollout.questions * config.rollout.samples
    with timer("generate"), session.progress.phase("dialogues", dialogues) as advance:
        groups = gathered(questions, config.rollout, converse=converse, score=rewards, live=live,
                          inline=config.deterministic)  # fmt: skip
    timer.move(groups.behind, "generate", "reward")
    with timer("reward"):
        scored = penalise_divergence(groups.scored, session.team.hosts, config.loss)
        credited = credit(scored, session.team.names, config.credit)
    return Rollout(groups, credited, before, {name: host.stats() for name, host in session.team.hosts.items()})


def update(
    session: Session, credited: Sequence[Credited], step: int, timer: Timer, meanwhile: Callable[[], None] | None
) -> dict[str, StepResult]:
    """Every agent that learns takes its step on its own turns, beside the others where their hosts can; its engine
    samples from the new weights from then on. `meanwhile` uses the engines while all learn."""
    hosts, beside = session.team.hosts, meanwhile is not None
    if not beside:
        session.team.forget()  # one agent's update has the memory of all caches
    begun: dict[str, Callable[[], StepResult]] = {}
    results: dict[str, StepResult] = {}
    with _none_left(begun if beside else {}):
        with timer("train"):
            for name, host in hosts.items():
                if host.trains:
                    begun[name] = host.start_update(training_sequences(credited, name), step, beside)
        try:
            if meanwhile is not None:
                meanwhile()
        finally:  # whatever happened there, no update is left in its middle
            with timer("train"), session.progress.phase("update", len(hosts)) as advance:
                for name in hosts:
                    results[name] = begun.pop(name)() if name in begun else StepResult({}, 0, 0)
                    if results[name].note:
                        session.progress.warn(f"{name}: {results[name].note}")
                    advance()
    return results


@contextmanager
def _none_left(begun: Mapping[str, Callable[[], object]]) -> Iterator[None]:
    """Where one agent's update fails, those that run beside it come to their end before anything is closed."""
    try:
        yield
    except BaseException:
        for ended in begun.values():
            with suppress(Exception):
                ended()
        raise
