"""Names how a self-distillation fails, and the remedy, from what each logged step tells.

The loss is no part of it: it falls to 0 when every image gets the same sharp output, rests at ln K
when all outputs are uniform, and rises in a healthy run when the last layer is let go.
"""

import logging
from collections.abc import Mapping

log = logging.getLogger(__name__)

# Teacher outputs as far from their mean as this share of what they have been are collapsed, ...
_FALLEN = 0.1
# ... if they are this close (KL divergence over ln K) ...
_CLOSE = 0.02
# ... for so many steps.
_STEPS = 40
# Outputs that never came apart are reported after so many.
_PATIENCE = 1000
_FAR = 0.5
# A student farther from its teacher than the teacher is long, for `_STEPS`, runs away: whether its outputs
# then collapse within 200 steps or later is decided by rounding errors. Healthy ones are at some 0.1.
_AWAY = 1.0
# A slower teacher is farther behind: from so many steps that it averages over, in proportion more is allowed.
_WINDOW = 250
# A teacher that keeps so little of itself is the student: one step apart they are momentum * update.
_SAME = 0.1

MESSAGES = {
    "centre": (
        "the centre does not move, so nothing keeps one output from winning everywhere: the outputs "
        "will become constant and the loss 0. Set config.dino.center_momentum below 1 (0.9)"
    ),
    "shared": (
        "student and teacher are equal after the step, so the student chases itself: the outputs will "
        "become constant. Set config.dino.momentum near 1 (0.996), and share no parameters"
    ),
    "sharpening": (
        "the teacher's temperature is not below the student's, so nothing sharpens the targets: the "
        "outputs will become uniform and the loss rest at ln K. Set config.dino.teacher_temperature "
        "to 0.04 to 0.07"
    ),
    "learning rate": (
        "the student is far from its teacher, for long or with the same output for all images: the "
        "learning rate is too high. Lower config.optim.lr, or lengthen config.optim.warmup"
    ),
    "uniform": (
        "all images get the same, uniform output; the loss rests at ln K. Lower "
        "config.dino.teacher_temperature, or raise config.dino.momentum"
    ),
    "constant": (
        "all images get the same, sharp output; the loss goes to 0. Raise "
        "config.dino.teacher_temperature, lower config.dino.center_momentum, or freeze the last layer "
        "for longer (config.dino.freeze_last_layer)"
    ),
}


class CollapseMonitor:
    """Watches a run of `tasks.dino`; see `DinoTask.update_extra` for what it reads.

    Args:
      student_temperature: the teacher's has to be below it.
      highest: the largest `teacher_kl` of the run so far, where it goes on.

    Attributes:
      found: modes of `MESSAGES` that have been named, in order; each is logged once.
    """

    def __init__(self, student_temperature: float, *, highest: float = 0.0):
        self.found: list[str] = []
        self._student_temperature = student_temperature
        self._highest = highest
        self._since: int | None = None  # the step from which it has been low
        self._away: int | None = None  # the step from which the student has been away

    def __call__(self, step: int, values: Mapping[str, float]) -> str | None:
        """Takes what is logged at `step`; returns the mode, at every step at which it shows."""
        mode = self._mode(step, values)
        if mode and mode not in self.found:
            self.found.append(mode)
            log.warning("COLLAPSE at step %d (%s): %s", step, mode, MESSAGES[mode])
        return mode

    def _mode(self, step: int, values: Mapping[str, float]) -> str | None:
        if values["teacher_temperature"] >= self._student_temperature:
            return "sharpening"
        if step > 1 and values["center_norm"] == 0:
            return "centre"
        if step > 1 and values["teacher_distance"] < _SAME * values["update_ratio"]:
            return "shared"
        window = min(step, 1 / max(1 - values["teacher_momentum"], 1e-9))
        away = values["teacher_distance"] > _AWAY * max(1.0, window / _WINDOW)
        self._away = (self._away or step) if away else None
        if away and step - self._away >= _STEPS:
            return "learning rate"
        divergence = values["teacher_kl"]
        self._highest = max(self._highest, divergence)
        if divergence >= min(_CLOSE, _FALLEN * self._highest):
            never = divergence < _FALLEN * _CLOSE and step >= _PATIENCE
            self._since = None
            return self._of_equal_outputs(values) if never else None
        self._since = step if self._since is None else self._since
        lasting = step - self._since >= _STEPS
        return self._of_equal_outputs(values) if lasting else None

    def _of_equal_outputs(self, values: Mapping[str, float]) -> str:
        if values["teacher_distance"] > _FAR:
            return "learning rate"
        return "uniform" if values["teacher_entropy"] > 0.5 else "constant"
