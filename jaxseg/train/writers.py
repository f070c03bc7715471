"""What a run tells: `metrics.jsonl`, TensorBoard, and progress on the terminal. Process 0 only."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxseg.files import replacing


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON so that the file is either the old one or the whole new one."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The objects of `metrics.jsonl`; a last line cut short by a kill is left out."""
    path = Path(workdir) / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricWriter:
    """Appends logged steps to `metrics.jsonl` and `tensorboard/`.

    Args:
      workdir: the run's folder.
      start_step: what was logged after this step is dropped: the run does those steps again. -1 for
        a run that starts anew.
    """

    def __init__(self, workdir: Path, *, start_step: int):
        self._file = self._board = None
        if jax.process_index() != 0:
            return
        from tensorboardX import SummaryWriter

        path = Path(workdir) / "metrics.jsonl"
        kept = [row for row in read_metrics(workdir) if row["step"] <= start_step]
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a")
        self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one object `{"step": step, **values}`."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()


class Progress:
    """A progress bar on a terminal, plain lines otherwise, with images/s and the time left."""

    def __init__(self, label: str, total: int, *, start: int = 0, unit_images: int = 1):
        self._label, self._total, self._images = label, total, unit_images
        self._start = self._done = start
        self._begin = self._last_line = time.monotonic()
        self._first = start
        self._bar = None
        self._silent = jax.process_index() != 0
        if not self._silent and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=start, desc=label, unit="step", dynamic_ncols=True
            )

    @property
    def images_per_second(self) -> float:
        """Mean rate since the first update, as what came before it was mostly compilation."""
        return (self._done - self._first) * self._images / max(time.monotonic() - self._begin, 1e-9)

    def skip(self, seconds: float) -> None:
        """Leaves time that went into something else, as evaluation, out of the rate."""
        self._begin += seconds

    def update(self, done: int, note: str = "") -> None:
        """`done` steps are finished; a plain line appears at most every five seconds."""
        now = time.monotonic()
        if self._done == self._start < done < self._total:
            self._begin, self._first = now, done
        before, self._done = self._done, done
        rate = self.images_per_second
        if self._bar is not None:
            self._bar.set_postfix_str(f"{rate:.1f} images/s {note}", refresh=False)
            self._bar.update(done - before)
        due = now - self._last_line > 5 or done == self._total
        if self._bar is None and not self._silent and due and done > self._first:
            self._last_line = now
            left = (self._total - done) * self._images / rate
            print(
                f"{self._label} {done}/{self._total}  {rate:.1f} images/s  {left:.0f} s left  {note}",
                flush=True,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
