"""The training loop: one code path for one CPU, many accelerators and many processes."""

import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxseg.tasks import Task
from jaxseg.train import partition
from jaxseg.train.checkpoint import Checkpointer
from jaxseg.train.state import TrainState, merge_params
from jaxseg.train.writers import MetricWriter, Progress

log = logging.getLogger(__name__)


class NonFiniteLossError(ValueError):
    """The loss became infinite or not a number."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When things happen, in steps; 0 means never (besides at the end).

    Attributes:
      steps: length of the run.
      log_every, eval_every, checkpoint_every: intervals.
      average: decay of the parameters' moving average, 0 for none.
    """

    steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    average: float = 0.0


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
    params: Mapping[str, Any], optimizer: optax.GradientTransformation, average: float
) -> TrainState:
    """The state before the first step."""
    # The average is a copy: sharing buffers with the parameters would donate them twice.
    copy = jax.tree.map(jnp.copy, params) if average else None
    return TrainState(jnp.zeros((), jnp.int32), params, copy, optimizer.init(params))


def make_train_step(
    task: Task, optimizer: optax.GradientTransformation, *, seed: int, average: float = 0.0
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Returns `step(state, frozen, batch) -> (state, scalars)`; randomness is from (seed, step)."""

    def step(state: TrainState, frozen, batch):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_fn(params):
            return task.loss(merge_params(params, frozen), batch, rng)

        (loss, extra), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        mean = state.average
        if mean is not None:
            # Short memory at first, so that the average does not remember the initialisation.
            decay = jnp.minimum(average, (1 + state.step) / (10 + state.step))
            mean = optax.incremental_update(params, mean, 1.0 - decay)
        scalars = {"loss": loss, "gradient_norm": optax.global_norm(grads), **extra}
        return TrainState(state.step + 1, params, mean, opt_state), scalars

    return step


class _Pending:
    """Losses that are still on the device; reading them would make the host wait every step."""

    def __init__(self, checkpointer: Checkpointer):
        self._losses: list[tuple[int, jax.Array]] = []
        self._checkpointer = checkpointer

    def add(self, step: int, loss: jax.Array) -> None:
        self._losses.append((step, loss))

    def check(self) -> None:
        values = jax.device_get([loss for _, loss in self._losses])
        bad = [(s, v) for (s, _), v in zip(self._losses, values, strict=True) if not np.isfinite(v)]
        self._losses.clear()
        if bad:
            good = self._checkpointer.steps()
            last = (
                f"the last good checkpoint is step {good[-1]}"
                if good
                else "no checkpoint is saved yet"
            )
            raise NonFiniteLossError(
                f"the loss is {bad[0][1]} at step {bad[0][0]}; {last}. Lower config.optim.lr or set "
                "config.optim.clip_norm."
            )


def train(
    task: Task,
    optimizer: optax.GradientTransformation,
    params: Mapping[str, Any],
    frozen: Mapping[str, Any],
    *,
    mesh: Mesh,
    layout: str,
    batches: Callable[[int, int], Iterator[Mapping[str, np.ndarray]]],
    batch_size: int,
    schedule: Schedule,
    learning_rate: optax.Schedule,
    seed: int,
    workdir: Path,
    evaluate: Callable[[Mapping[str, Any]], Mapping[str, float]] | None = None,
) -> TrainState:
    """Trains from the newest checkpoint in `workdir`, else from `params`, to `schedule.steps`.

    Args:
      task: what is learned.
      optimizer: over `params`.
      params: initial trained parameters, equal on every process.
      frozen: parameters that never change, placed on the mesh.
      mesh, layout: see `partition`.
      batches: `batches(start, stop)` gives this process's share of the batches of those steps.
      batch_size: images in a global batch, for the images/s.
      schedule: lengths and intervals.
      learning_rate: for the log.
      seed: of augmentation and dropout.
      workdir: gets `checkpoints/`, `metrics.jsonl` and `tensorboard/`.
      evaluate: scores parameters on validation data; decides which checkpoint is the best.

    Returns:
      The state after the last step; it is saved.

    Raises:
      NonFiniteLossError: naming the step and the last good checkpoint.
      Interrupted: after SIGTERM, once the state is saved.
    """
    state = make_state(params, optimizer, schedule.average)
    shardings = partition.tree_sharding(mesh, state, layout)
    state = partition.put_tree(state, shardings)
    checkpointer = Checkpointer(workdir)
    restored = checkpointer.restore(state)
    start = 0
    if restored is not None:
        state, start = restored
        if start < schedule.steps:
            log.info("resuming at step %d of %d", start, schedule.steps)
    step_fn = jax.jit(
        make_train_step(task, optimizer, seed=seed, average=schedule.average),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
    writer = MetricWriter(workdir, start_step=start)
    progress = Progress("train", schedule.steps, start=start, unit_images=batch_size)
    pending = _Pending(checkpointer)
    try:
        with StopSignal() as stop:
            stream = batches(start, schedule.steps) if start < schedule.steps else ()
            for step, host_batch in enumerate(stream, start + 1):
                batch = partition.put_batch(mesh, host_batch)
                with jax.transfer_guard("disallow"):
                    state, scalars = step_fn(state, frozen, batch)
                pending.add(step, scalars["loss"])
                last = step == schedule.steps

                def due(every: int, step=step, last=last) -> bool:
                    return bool(every) and (step % every == 0 or last)

                if due(schedule.log_every) or step == 1:
                    pending.check()
                    values = {k: float(v) for k, v in jax.device_get(scalars).items()}
                    values["learning_rate"] = float(learning_rate(step - 1))
                    values["images_per_second"] = round(progress.images_per_second, 2)
                    values["time"] = round(time.time(), 3)
                    writer.write(step, values)
                    progress.update(step, f"loss {values['loss']:.4f}")
                metrics = None
                if evaluate is not None and due(schedule.eval_every):
                    pending.check()
                    metrics = evaluate(state)
                    writer.write(step, {f"val_{k}": v for k, v in metrics.items() if v is not None})
                stopping = stop.raised(step) and not last
                if last or metrics or stopping or due(schedule.checkpoint_every):
                    pending.check()
                    checkpointer.save(state, step, metrics)
                if stopping:
                    checkpointer.wait()
                    raise Interrupted(f"stopped by SIGTERM at step {step}; the state is saved")
        checkpointer.wait()
    finally:
        progress.close()
        writer.close()
        checkpointer.close()
    return state
