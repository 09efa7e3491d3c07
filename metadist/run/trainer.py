"""The training loop, and what it does every so often: log, validate, save."""

import math
import os
import time
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from metadist.checkpoint.format import Checkpoint
from metadist.config import dump_config
from metadist.core.errors import Diverged, HeadLost, Interrupted, StorageFailed, doing_it_again
from metadist.core.messages import PHASES, Weights, plan
from metadist.evaluation.protocol import count_diverged, interval, measure, round_loss
from metadist.fleet.dispatch import Ahead
from metadist.fleet.server import Stats
from metadist.run.directory import Run
from metadist.run.mirror import TARGET_FILE, asked_target
from metadist.run.prepare import Prepared
from metadist.run.signals import Stop
from metadist.run.watch import Watch, replay_command

LOG_EVERY_S = 5.0


@dataclass
class Progress:
    """What the trainer must remember beside the server's state; all of it is in the checkpoint."""

    measure: dict[str, str] | None = None  # what `best` is of
    best: float | None = None
    since_best: int = 0
    round_losses: dict[int, float] = field(default_factory=dict)
    validated: int = 0  # meta-steps done at the last validation


@dataclass
class Window:
    """Times and tasks since the last logged step, in seconds."""

    began: float = field(default_factory=time.perf_counter)
    steps: int = 0
    tasks: int = 0
    compute_s: float = 0.0
    update_s: float = 0.0
    last_s: float = 0.0


class Trainer:
    """The training loop: has the fleet compute a step's tasks and the server apply them; logs, validates and saves.

    `weights` and gradients are whatever fleet and server hand around (references, where there are actors); the
    trainer does not look inside.
    """

    def __init__(self, run: Run, prepared: Prepared, fleet: Any):
        self.config = run.config
        self._run = run
        self.engine = prepared.engine
        self.fleet = fleet
        self.chunk_size = prepared.chunk_size
        self.measure = prepared.job.measure
        run.journal.append({"measure": self.measure.saved()})
        self.tracker, self.saver = run.tracker, run.saver
        self.planned = run.planned
        state = run.checkpoint.trainer if run.checkpoint else {}
        behind = state.get("behind")
        self.server = fleet.start_server(
            prepared.theta,
            prepared.job.optimization(prepared.engine),
            state.get("server"),
            None if behind is None else behind.numpy(),
            self.config.optimizer.delay,
        )
        progress = state["progress"] if state and run.checkpoint_is_own else {}
        progress = {"validated": run.checkpoint.step if run.checkpoint else 0, **progress}
        self.progress = replace(Progress(**progress), measure=self.measure.saved())
        job = prepared.job
        self._facts = {"identity": run.identity, "shapes": job.shapes._asdict(), "run_dir": run.name}
        self._facts |= {"preprocessing": job.preprocessing}
        self._config_text = dump_config(self.config)
        self._said = set[str]()
        self._window = Window()
        self._watch = Watch(self._say_once, prepared)
        self._logged = False
        self._validated: dict[str, float] = {}
        self._saved_at, self._saved_step = time.monotonic(), -1
        self._target_file, self._target_changed_ns = str(run.path / TARGET_FILE), 0
        self._targets: dict[int, int] = {}  # that steps were planned with which are yet to be applied
        self._applied_at: float | None = None
        """When the last step was applied, where workers went on with this one meanwhile."""

    def run(self, start: int, stop: Stop) -> tuple[Weights, str]:
        """Meta-steps `start`, ..., meta_steps - 1: the last weights, and why it ended ("done", or Stop's reason).

        Raises Diverged, Interrupted (while waiting for workers) or HeadLost, after saving the weights at which it
        happened.
        """
        try:
            return self._loop(start, stop)
        except HeadLost as error:
            saved = "could not be saved as it is, and goes on from its newest checkpoint"
            if self.server.whole:
                self._save(self.server.done(), best=False, now=True)
                saved = f"is saved at step {self.server.done()}"
            raise HeadLost(f"{error}, by {doing_it_again()}: the run {saved}") from None
        except Interrupted:
            if self.server.whole:
                self._save(self.server.done(), best=False, now=True)
            raise

    def _loop(self, start: int, stop: Stop) -> tuple[Weights, str]:
        if start and self._validate(start):  # where the one that was due was cut off
            self._save(start, best=True, now=True)
        reason = stop.reason(self.progress.since_best)
        for step in range(start, self.config.meta_steps):
            if reason is not None:
                break
            self._begin_round(step)
            num_tasks = self._plan_batch(step)
            chunks, ahead = plan("train", step, num_tasks, self.chunk_size), self._plan_ahead(step)
            then = self._plan_next(step)
            began = self._applied_at or time.perf_counter()
            gradients = self.fleet.meta_gradients(self.server.used(), chunks, ahead)
            computed = time.perf_counter()
            try:
                _, stats = self.server.apply(step, *gradients, num_tasks=num_tasks, then=then)
            except Diverged as error:
                raise self._explain(error, step) from None
            applied = time.perf_counter()
            self._applied_at = applied if then else None
            self._run.journal.append({"applied": step, "bundles": self.fleet.account()})
            self._watch.norm(step, stats.gradient_norm)
            if step == 0:
                self._watch.first_loss(stats.loss)
            self._count(stats, computed - began, applied - computed)
            self.fleet.report(stats, applied - began)
            self._log(step + 1, stats, self._targets.pop(step, self.fleet.target))
            del gradients  # which would stay in the object store while the next ones come
            improved = self._validate(step + 1)
            reason = stop.reason(self.progress.since_best)
            last = reason is not None or step + 1 == self.config.meta_steps
            self._save(step + 1, best=improved, now=last)
        return self.fleet.fetch(self.server.weights()), reason or "done"

    def _begin_round(self, step: int) -> None:
        """Online: judge a task that arrives with this step, before theta learns from it."""
        rounds, losses = self.config.task.steps_per_round, self.progress.round_losses
        if not rounds or step % rounds or step // rounds in losses:
            return
        began, number = time.perf_counter(), step // rounds
        losses[number] = round_loss(
            self.fleet, self.server.weights(), number, self.config.evaluation.tasks, self.chunk_size
        )
        if not math.isfinite(losses[number]):
            self._say_once(
                "round",
                f"round {number} diverged: its loss is not finite, so the regret will have no value (said once): "
                f"{self._watch.steadier()}",
            )
        self.tracker.metrics({"online/loss": losses[number], "online/loss_sum": sum(losses.values())}, step)
        self._window.began += time.perf_counter() - began

    def _plan_batch(self, step: int) -> int:
        """The step's number of tasks, journalled before any is computed, so that a repetition has the same."""
        self._follow_target()
        if step not in self.planned:
            self._targets[step] = self.fleet.target
            self.planned[step] = self.config.batch_size(self.fleet.target)
            self._run.journal.append({"step": step, "target": self.fleet.target, "tasks": self.planned[step]})
        return self.planned[step]

    def _plan_ahead(self, step: int) -> Ahead | None:
        """The steps that the fleet may begin, with the weights of now, before this one is applied."""
        own = self.config.optimizer
        last = min(step + (own.delay or own.max_staleness), self.config.meta_steps - 1)
        steps = [plan("train", s, self._plan_batch(s), self.chunk_size) for s in range(step + 1, last + 1)]
        return Ahead(self.server.weights(), steps, stale=own.max_staleness > 0) if steps else None

    def _plan_next(self, step: int) -> partial[None] | None:
        """What has workers begin the next step with the weights of this one, as soon as the server sends them, where
        nothing else comes between."""
        own, done = self.config, step + 1
        validates = own.evaluation.every and done % own.evaluation.every == 0
        begun = own.optimizer.delay or own.optimizer.max_staleness or own.task.steps_per_round
        if validates or begun or done == own.meta_steps:
            return None
        chunks = plan("train", done, self._plan_batch(done), self.chunk_size)
        return partial(self.fleet.begin_next, chunks)

    def _follow_target(self) -> None:
        """Take up a new number of workers that `metadist scale` has asked for."""
        try:
            changed_ns = os.stat(self._target_file).st_mtime_ns
        except FileNotFoundError:
            return
        if changed_ns != self._target_changed_ns:
            self._target_changed_ns = changed_ns
            self.fleet.resize(asked_target(self._run.path) or self.fleet.target)

    def _count(self, stats: Stats, compute_s: float, update_s: float) -> None:
        window = self._window
        window.steps += 1
        window.tasks += stats.num_tasks
        window.last_s = compute_s + update_s
        window.compute_s += compute_s
        window.update_s += update_s

    def _log(self, done: int, stats: Stats, target: int) -> None:
        window, elapsed = self._window, time.perf_counter() - self._window.began
        due = done % self.config.tracking.log_every == 0 or elapsed >= LOG_EVERY_S
        if self._logged and not due and done < self.config.meta_steps:
            return
        self._logged = True
        reports = self.fleet.reports()
        self._watch.tasks(reports, done)
        slowest: dict[str, float] = {}
        for report in reports:
            slowest[report.worker] = slowest.get(report.worker, 0.0) + report.computing_s
        values = {
            "train/loss": stats.loss,
            "train/meta_gradient_norm": stats.gradient_norm,
            "train/task_gradient_norm": stats.task_norm,
            "train/meta_gradient_agreement": stats.agreement,
            "train/noise_scale_tasks": stats.noise_scale,
            "train/meta_lr": stats.meta_lr,
            "train/meta_batch_size": stats.num_tasks,
            "workers/tasks_per_s": window.tasks / elapsed,
            "workers/steps_per_s": window.steps / elapsed,
            "workers_time/compute_s": window.compute_s / window.steps,
            "workers_time/update_s": window.update_s / window.steps,
            "workers_time/outside_slowest_worker_share": 1 - max(slowest.values()) / window.last_s,
            "workers/alive": self.fleet.num_workers,
            "workers/target": target,
        }
        if self.config.optimizer.max_staleness:
            tasks = self.fleet.staleness
            values["train/staleness_steps"] = sum(lag * n for lag, n in tasks.items()) / max(1, sum(tasks.values()))
        learner = self.engine.learner
        means = {
            name: float(np.concatenate([report.diagnostics[name] for report in reports]).mean())
            for name in learner.diagnostics
        }
        values |= {f"train/{name}": mean for name, mean in means.items()}
        if means and (concern := learner.concern(means)):
            self._say_once("concern", f"{concern} (said once, at meta-step {done})")
        for phase in PHASES:
            spent = sum(report.seconds[phase] for report in reports)
            values[f"workers_time/{phase}_s_per_task"] = spent / stats.num_tasks
        values |= self.fleet.machines.metrics(reports)
        self.tracker.metrics(values, done)
        self._window = Window()

    def _validate(self, done: int) -> bool:
        """Measure on the fixed validation tasks when it is time; whether they say this is the best so far."""
        own = self.config.evaluation
        due = own.every and (done % own.every == 0 or done == self.config.meta_steps)
        if not due or done == self.progress.validated:
            return False
        began, seen = time.perf_counter(), partial(self._run.doing, "validation tasks")
        beside = self._watch.baselines
        weights = self.server.weights()
        results = measure(self.fleet, weights, "validation", own.tasks, self.chunk_size, beside, progress=seen)
        self._watch.validation(results, done)
        results = {name: by_step for name, by_step in results.items() if "/" not in name}
        diverged = count_diverged(*(by_step[:, -1] for by_step in results.values()))
        values = {"validation/diverged_tasks": float(diverged)}
        for name, by_step in results.items():
            values[f"validation/{name}"], values[f"validation/{name}_ci95"] = interval(by_step[:, -1])
            values[f"validation/{name}_before"] = interval(by_step[:, 0]).mean
        if diverged:
            self._say_once(
                "validation",
                f"validation at step {done}: {diverged} of {own.tasks} tasks diverged (an output or loss is not "
                "finite), so it has no mean and cannot be the best (said once, see validation/diverged_tasks): "
                f"{self._watch.steadier(evaluation=True)}",
            )
        values["workers_time/validation_s"] = time.perf_counter() - began
        self.tracker.metrics(values, done)
        self._validated = values
        self._window.began += values["workers_time/validation_s"]
        score = self.measure.sign * values[f"validation/{self.measure.name}"]
        improved = not diverged and (self.progress.best is None or score > self.progress.best)
        best, since = (score, 0) if improved else (self.progress.best, self.progress.since_best + 1)
        self.progress = replace(self.progress, best=best, since_best=since, validated=done)
        return improved

    def _say_once(self, kind: str, text: str) -> None:
        """Say it unless something of its kind has been said in this run."""
        if kind not in self._said:
            self._said.add(kind)
            self._run.say(text)

    def _save(self, done: int, *, best: bool, now: bool) -> None:
        """Checkpoint when it is time, when it is the best, or when it must be now: then all is written at return."""
        self.saver.check()
        own = self.config.checkpoint
        due = done % own.every == 0 or time.monotonic() - self._saved_at >= own.every_s
        if (due or best or now) and done != self._saved_step:
            self.saver.save(*self._snapshot(done), best=best)
            self._saved_at, self._saved_step = time.monotonic(), done
        if now:
            self.saver.flush()

    def _snapshot(self, done: int) -> tuple[Checkpoint, np.ndarray]:
        """The run as it is now, and its theta; nothing in them moves on with the run."""
        theta = self.fleet.fetch(self.server.weights()).theta
        constants = {name: value.cpu().numpy().copy() for name, value in self.engine.learner.model.constants.items()}
        named = self.engine.layout.named_arrays(theta) | constants
        progress = deepcopy(vars(self.progress))
        trainer = {"server": self.server.snapshot(), "progress": progress, "target": self.fleet.target}
        if self.config.optimizer.delay:
            trainer["behind"] = torch.from_numpy(self.fleet.fetch(self.server.used()).theta.copy())
        facts = {
            **self._facts,
            "mlflow_run_id": self._run.mlflow_run_id(),
            "proof": self.fleet.proof,
            "server_proof": self.fleet.server_proof,
            "drifted": self._run.drifted,
        }
        return Checkpoint(done, named, trainer, self._config_text, dict(self._validated), facts), theta

    def _explain(self, error: Diverged, step: int) -> Diverged:
        """Save the run as it was before the step; the error with what to do about it."""
        with suppress(StorageFailed):  # which was said
            self._save(step, best=False, now=True)
        if error.element is not None:
            name = self.engine.layout.name_at(error.element)
            usual = f"; the usual norm is {median(self._watch.norms):.3g}" if self._watch.norms else ""
            return Diverged(f"meta-step {step}: {error} (it begins in {name}{usual}); what was before it is saved")
        again = replay_command(self.config, self._run.place, error.task)
        return Diverged(
            f"{error} at meta-step {step}: {self._watch.steadier(updated=step > 0)}; `{again}` computes it again, step "
            "by step"
        )
