"""Orbax checkpoints of a run: asynchronous, best and latest kept, damaged ones passed over.

Layout below the workdir:

    checkpoints/<step>/   the `TrainState` with a checksum of every leaf, and the metrics at that step
    frozen/               the parameters that never change, written once

The checksum (`checksums.py`) is our own: a flipped byte inside a data file is not noticed on reading.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxseg.checksums import CheckpointError, first_line, verified, with_checksums
from jaxseg.quiet import Quiet

with Quiet():
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers

log = logging.getLogger(__name__)

# So that there is one to fall back on.
_KEEP_LATEST = 2


def _abstract(tree: Any) -> Any:
    """What `with_checksums` saves for `tree` (arrays or `ShapeDtypeStruct`s with shardings), as targets."""
    sharding = jax.tree.leaves(tree)[0].sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    number = jax.ShapeDtypeStruct((), jnp.uint32, sharding=sharding)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
    return {"tree": target, "sum": jax.tree.map(lambda _: number, tree)}


class Checkpointer:
    """Saves and restores the `TrainState`s of one workdir: the latest, and the best.

    Args:
      workdir: the run's folder.
      read_only: never write, delete or move anything (evaluation, prediction).
      best_metric: the highest is the best.
    """

    def __init__(self, workdir: Path, *, read_only: bool = False, best_metric: str = "iou"):
        self._folder = Path(workdir).absolute() / "checkpoints"
        self._read_only = read_only
        self._best = best_metric
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        keep = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(_KEEP_LATEST),
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics[self._best],
                    reverse=False,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=lambda metrics: metrics[self._best],
            best_mode="max",
            preservation_policy=None if self._read_only else keep,
            cleanup_tmp_directories=not self._read_only,
            read_only=self._read_only,
            create=not self._read_only,
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: Any, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Starts to save; returns once the arrays are copied, and the rest happens in the background."""
        if step in self._manager.all_steps():
            return
        known = metrics is not None and self._best in metrics
        self._manager.save(
            step,
            args=ocp.args.StandardSave(with_checksums(state)),
            metrics={self._best: float(metrics[self._best])} if known else None,
            force=True,
        )

    def restore(
        self, like: Any, *, which: str = "latest", whole: bool = True
    ) -> tuple[Any, int] | None:
        """Restores the newest checkpoint that can be read, or None where there is none at all.

        Args:
          like: a state of the wanted structure, shapes and shardings.
          whole: whether that is all that was saved; else what else there is is not read.
          which: `latest` or `best` (by `best_metric`; the latest where it was not measured).

        Raises:
          CheckpointError: there are checkpoints, and none can be read.
        """
        steps = self.steps()[::-1]
        if which == "best" and self._manager.best_step() is not None:
            best = self._manager.best_step()
            steps = [best] + [s for s in steps if s != best]
        damaged = []
        for step in steps:
            path = self._folder / str(step)
            try:
                state = verified(path, self._read(step, _abstract(like), whole))
            except Exception as error:  # Orbax and TensorStore raise many kinds here.
                log.warning(
                    "checkpoint %s cannot be read (%s): trying the one before",
                    path,
                    first_line(error),
                )
                damaged.append(path)
                continue
            if damaged and not self._read_only:
                self._set_aside(damaged)
            if damaged:
                log.warning("restored %s instead of %s", path, damaged[0])
            return state, step
        if damaged:
            raise CheckpointError(
                f"none of the checkpoints in {self._folder} can be read (steps {steps}): they are "
                "damaged or belong to another model. Remove the folder to start over."
            )
        return None

    def _read(self, step: int, like: Any, whole: bool) -> Any:
        if whole:
            return self._manager.restore(step, args=ocp.args.StandardRestore(like))
        arguments = ocp.args.PyTreeRestore(
            item=like,
            restore_args=ocp.checkpoint_utils.construct_restore_args(like),
            partial_restore=True,
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(self._folder / str(step) / "default", args=arguments)
        if missing := [x for x in jax.tree.leaves(found) if not isinstance(x, jax.Array)]:
            raise ValueError(f"{len(missing)} arrays of the model are not in it")
        return found

    def _set_aside(self, damaged: list[Path]) -> None:
        """Renames damaged checkpoints, so that the run can save at those steps again."""
        self._manager.close()
        if jax.process_index() == 0:
            for path in damaged:
                target = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(target, ignore_errors=True)
                path.rename(target)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._manager = self._open()

    def wait(self) -> None:
        """Returns once everything saved is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def save_frozen(workdir: Path, frozen: Any) -> None:
    """Writes the parameters that never change, once; a copy that cannot be read is written anew."""
    folder = Path(workdir).absolute() / "frozen"
    if not jax.tree.leaves(frozen):
        return
    if folder.exists():
        try:
            restore_frozen(workdir, frozen)
            return
        except CheckpointError as error:
            log.warning("%s; it is written anew", error)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, with_checksums(frozen), force=True)


def restore_frozen(workdir: Path, like: Any) -> Any:
    """Reads what `save_frozen` wrote, into the structure and shardings of `like`.

    Raises:
      CheckpointError: the copy is missing or damaged.
    """
    if not jax.tree.leaves(like):
        return like
    folder = Path(workdir).absolute() / "frozen"
    if not folder.exists():
        raise CheckpointError(
            f"{folder} is missing: it holds the frozen parameters of this run. Start the training "
            "again with the same weights to write it anew"
        )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return verified(folder, checkpointer.restore(folder, _abstract(like)))
    except Exception as error:  # Orbax and TensorStore raise many kinds here.
        raise CheckpointError(
            f"{folder} is damaged. Start the training again with the same weights to write it anew"
        ) from error
