"""Orbax and Grain without their chatter, and without what importing and calling them does to logging."""

import contextlib
import logging
import threading
from typing import Any


class Quiet(contextlib.ContextDecorator):
    """Leaves out absl's warnings while it lasts, in whatever thread, and leaves the root logger as it was.

    absl sets up the root of a program that has not done so itself as soon as it has anything to say.
    """

    _lock, _calls = threading.Lock(), 0

    def __enter__(self) -> None:
        from absl import logging as absl_logging

        with Quiet._lock:
            Quiet._calls += 1
            absl_logging.get_absl_logger().addFilter(_is_error)
            if not logging.root.handlers:
                # What the root does without any.
                logging.root.addHandler(logging.lastResort)

    def __exit__(self, *_: Any) -> None:
        with Quiet._lock:
            Quiet._calls -= 1
            if not Quiet._calls:
                logging.getLogger("absl").removeFilter(_is_error)
                logging.root.removeHandler(logging.lastResort)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
