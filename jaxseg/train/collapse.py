"""A monitor that names how a self-distillation collapses, from what each step logs."""

import logging
from collections.abc import Mapping

log = logging.getLogger(__name__)


class CollapseMonitor:
    def __init__(self, student_temperature: float):
        self._student_temperature = student_temperature

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        pass
