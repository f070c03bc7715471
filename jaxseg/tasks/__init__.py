"""Tasks: what is learned, and what it is good for. A new one is a file here and a line in `_Tasks`."""

from jaxseg.options import listed
from jaxseg.tasks.base import Facts, Task

__all__ = ["TASKS", "Facts", "Task"]


class _Tasks:
    # First those with masks.
    # isort: off
    from jaxseg.tasks.binary import Binary as binary
    from jaxseg.tasks.multiclass import Multiclass as multiclass
    from jaxseg.tasks.query import Query as query
    from jaxseg.tasks.dino import Dino as dino
    from jaxseg.tasks.rotation import Rotation as rotation


# By their names in configs.
TASKS: dict[str, type[Task]] = listed(_Tasks)
# By their own names, as in `jaxseg.tasks.Binary`.
globals().update({task.__name__: task for task in TASKS.values()})
