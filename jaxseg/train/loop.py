"""The training loop: one code path for one CPU, many accelerators and many processes."""

import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxseg.options import option
from jaxseg.train import partition
from jaxseg.train.speed import matmul_rate, product_flops
from jaxseg.train.state import ScoredState, TrainState, merge_params
from jaxseg.train.task import Learned
from jaxseg.train.writers import MetricWriter, Progress

if TYPE_CHECKING:
    import optax

log = logging.getLogger(__name__)


class NonFiniteLossError(ValueError):
    """The loss became infinite or not a number."""


@dataclasses.dataclass(frozen=True)
class Intervals:
    """When things happen in a run, in steps; 0 means never (besides at the end)."""

    log_every: int = option(20, low=1, high=2**31 - 1, free=True)
    eval_every: int = option(
        0,
        "on the val split, if there is one; picks the best checkpoint",
        low=0,
        high=2**31 - 1,
        free=True,
    )
    checkpoint_every: int = option(200, low=0, high=2**31 - 1, free=True)


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM), and its state is saved."""


class StopSignal:
    """Notes SIGTERM while active; between steps the loop asks `raised`.

    With several processes the step at which all stop is agreed on through `jax.distributed`'s
    preemption service, since the signal reaches them at different moments.
    """

    def __enter__(self):
        self._flag = False
        self._previous = None
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_):
        self._flag = True

    def __exit__(self, *_):
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def raised(self, step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._flag


def make_state(
    task: Learned,
    params: Mapping[str, Any],
    optimizer: "optax.GradientTransformation",
    average: float = 0.0,
) -> TrainState:
    """The state before the first step."""
    # The average is a copy: sharing buffers with the parameters would donate them twice.
    copy = jax.tree.map(jnp.copy, params) if average else None
    extra = jax.tree.map(jnp.copy, task.init_extra(params))
    return TrainState(jnp.zeros((), jnp.int32), params, copy, extra, optimizer.init(params))


def scored_state(task: Learned, params: Mapping[str, Any], average: float = 0.0) -> ScoredState:
    """What evaluation reads of the state of a run."""
    copy = params if average else None
    return ScoredState(jnp.zeros((), jnp.int32), params, copy, task.init_extra(params))


def _parts(batch: Mapping[str, jax.Array], count: int) -> Mapping[str, jax.Array]:
    """[B, ...] to [count, B / count, ...]; strided, so that each part lies on all devices."""
    return {k: jnp.swapaxes(v.reshape(-1, count, *v.shape[1:]), 0, 1) for k, v in batch.items()}


def make_train_step(
    task: Learned,
    optimizer: "optax.GradientTransformation",
    *,
    seed: int,
    average: float = 0.0,
    accumulate: int = 1,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Returns `step(state, frozen, batch) -> (state, scalars)`; randomness is from (seed, step).

    With `accumulate` the batch is taken in so many parts, one after the other, for less memory: loss,
    gradient and statistics are averaged, weighted by the parts' valid examples. That is the step of
    the whole batch, but that batch norm sees one part at a time, and a task may draw its noise by part.
    """
    import optax  # here, see train/optim.py

    def step(state: TrainState, frozen, batch):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_fn(params, part):
            return task.loss(merge_params(params, frozen), state.extra, part, rng, state.step)

        def whole(part):
            return jax.value_and_grad(loss_fn, has_aux=True)(state.params, part)

        def add(total, part):
            share = part["valid"].sum() / jnp.maximum(batch["valid"].sum(), 1)
            return jax.tree.map(lambda t, x: t + share * x, total, whole(part)), None

        if accumulate > 1:
            parts = _parts(batch, accumulate)
            like = jax.eval_shape(whole, jax.tree.map(lambda x: x[0], parts))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
            ((loss, statistics), grads), _ = jax.lax.scan(add, zeros, parts)
        else:
            (loss, statistics), grads = whole(batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        extra, logged = task.update_extra(state.extra, statistics, params, state.step)
        mean = state.average
        if mean is not None:
            # Short memory at first, so that the average does not remember the initialisation.
            decay = jnp.minimum(average, (1 + state.step) / (10 + state.step))
            mean = optax.incremental_update(params, mean, 1.0 - decay)
        scalars = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(grads),
            "update_ratio": optax.tree.norm(updates) / optax.tree.norm(params),
            **logged,
        }
        return TrainState(state.step + 1, params, mean, extra, opt_state), scalars

    return step


class _Pending:
    """Losses and gradients' norms still on the device: reading each at once would make the host wait.

    A gradient that is not finite spoils the parameters a step before the loss shows it.
    """

    def __init__(self):
        self._scalars: list[tuple[int, dict[str, jax.Array]]] = []

    def add(self, step: int, scalars: Mapping[str, jax.Array]) -> None:
        self._scalars.append((step, {k: scalars[k] for k in ("loss", "gradient_norm")}))

    def check(self, saved_steps: Sequence[int]) -> None:
        """Raises NonFiniteLossError for the first value since the last check that is not finite."""
        scalars = jax.device_get(self._scalars)
        self._scalars.clear()
        for step, values in scalars:
            for name, value in values.items():
                if not np.isfinite(value):
                    good = (
                        f"step {saved_steps[-1]}" if saved_steps else "none, nothing was saved yet"
                    )
                    raise NonFiniteLossError(
                        f"the {name.replace('_', ' ')} is {value} at step {int(step)}; last good "
                        f"checkpoint: {good}. Lower config.optim.lr, or set config.optim.clip_norm"
                    )


@dataclasses.dataclass
class Trainer:
    """Trains a task from the newest checkpoint of a workdir, else from given parameters.

    Attributes:
      task: what is learned.
      optimizer: over the trained parameters.
      learning_rate: by step, for the log; None where nobody knows.
      steps: length of the run.
      intervals: when things happen.
      average: decay of the parameters' moving average, 0 for none.
      evaluate_first: whether the untrained state is evaluated too, as step 0.
      mesh, layout: see `partition`.
      batches: `batches(start, stop)` gives this process's share of the batches of those steps.
      batch_size: images in a global batch, for the images/s.
      seed: of augmentation and dropout.
      workdir: gets `checkpoints/`, `metrics.jsonl` and `tensorboard/`.
      evaluate: scores a state on validation data, which picks the best checkpoint; or None.
      best_metric: the one that `evaluate` returns.
      accumulate: parts in which a batch is taken, see `make_train_step`.
      watch: sees the step and what is logged of it, and returns what else is; or None.
      precision: "float32" or "bfloat16" to log `share_of_peak`, the rate of the step's products and
        convolutions over that of one large product in this precision, measured at the start; "" not to.
    """

    task: Learned
    optimizer: "optax.GradientTransformation"
    learning_rate: "optax.Schedule | None"
    steps: int
    intervals: Intervals
    mesh: Mesh
    layout: str
    batches: Callable[[int, int], Iterator[Mapping[str, np.ndarray]]]
    batch_size: int
    seed: int
    workdir: Path
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None
    best_metric: str = "iou"
    accumulate: int = 1
    watch: Callable[[int, Mapping[str, float]], Mapping[str, Any]] | None = None
    precision: str = ""
    average: float = 0.0
    evaluate_first: bool = False

    def run(self, params: Mapping[str, Any], frozen: Mapping[str, Any]) -> TrainState:
        """Runs all steps that are left.

        Args:
          params: initial trained parameters, host arrays, equal on every process.
          frozen: parameters that never change, placed on the mesh.

        Returns:
          The state after the last step; it is saved.

        Raises:
          NonFiniteLossError: naming the step and the last good checkpoint.
          Interrupted: after SIGTERM, once the state is saved.
        """
        # Here, with Orbax: it takes long, and the command needs this module for its help.
        from jaxseg.train.checkpoint import Checkpointer

        state = make_state(self.task, params, self.optimizer, self.average)
        shardings = partition.tree_sharding(self.mesh, state, self.layout)
        state = partition.put_tree(state, shardings)
        self._checkpointer = Checkpointer(self.workdir, best_metric=self.best_metric)
        self._pending = _Pending()
        try:
            restored = self._checkpointer.restore(state)
            state, start = restored or (state, 0)
            if 0 < start < self.steps:
                log.info("resuming at step %d of %d", start, self.steps)
            self._writer = MetricWriter(self.workdir, start_step=start if restored else -1)
            self._progress = Progress("train", self.steps, start=start, unit_images=self.batch_size)
            if self.evaluate and self.evaluate_first and not restored:
                self._evaluate(0, state)
            step_fn = make_train_step(
                self.task,
                self.optimizer,
                seed=self.seed,
                average=self.average,
                accumulate=self.accumulate,
            )
            step_fn = jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, None))
            if start < self.steps:
                state = self._steps(step_fn, state, frozen, start)
            self._checkpointer.wait()
            self._progress.close()
            self._writer.close()
        finally:
            self._checkpointer.close()
        return state

    def _steps(self, step_fn, state: TrainState, frozen, start: int) -> TrainState:
        self._share_of_peak = None  # of a rate of one image/s
        with StopSignal() as stop:
            for step, batch in enumerate(self.batches(start, self.steps), start + 1):
                batch = partition.put_batch(self.mesh, batch)
                if self.precision and self._share_of_peak is None:
                    work = product_flops(step_fn, state, frozen, batch) / self.batch_size
                    self._share_of_peak = work / (matmul_rate(self.precision) * self.mesh.size)
                # What is left to transfer here would be a mistake: a copy in every step.
                with jax.transfer_guard("disallow"):
                    state, scalars = step_fn(state, frozen, batch)
                self._pending.add(step, scalars)
                self._after_step(step, state, scalars, stopping=stop.raised(step))
        return state

    def _after_step(self, step: int, state: TrainState, scalars, *, stopping: bool) -> None:
        last = step == self.steps

        def due(every: int) -> bool:
            return bool(every) and (step % every == 0 or last)

        evaluating = self.evaluate is not None and due(self.intervals.eval_every)
        saving = last or stopping or evaluating or due(self.intervals.checkpoint_every)
        logging_now = step == 1 or due(self.intervals.log_every)
        if saving or logging_now:
            self._pending.check(self._checkpointer.steps())
        if logging_now:
            self._log(step, jax.device_get(scalars))
        metrics = self._evaluate(step, state) if evaluating else None
        if saving:
            self._checkpointer.save(state, step, metrics)
        if stopping and not last:
            self._checkpointer.wait()
            raise Interrupted(
                f"stopped by SIGTERM at step {step}: the state is saved; start it again to go on"
            )

    def _evaluate(self, step: int, state: TrainState) -> Mapping[str, float]:
        begin = time.monotonic()
        metrics = self.evaluate(state)
        self._progress.skip(time.monotonic() - begin)
        self._writer.write(step, {f"val_{k}": v for k, v in metrics.items()})
        return metrics

    def _log(self, step: int, scalars: Mapping[str, np.ndarray]) -> None:
        self._progress.update(step, f"loss {scalars['loss']:.4f}")
        values = {k: float(v) for k, v in scalars.items()}
        if self.learning_rate is not None:
            values["learning_rate"] = float(self.learning_rate(step - 1))
        if rate := self._progress.images_per_second:
            values["images_per_second"] = round(rate, 2)
            if self._share_of_peak:
                values["share_of_peak"] = round(self._share_of_peak * rate, 4)
        values["time"] = round(time.time(), 3)
        if self.watch is not None:
            values |= self.watch(step, values)
        self._writer.write(step, values)
