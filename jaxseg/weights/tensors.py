"""Tensors by name, as files hold them, put into the places of a module's parameters."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

_log = logging.getLogger(__name__)

# Name in the release: (path in our parameters, shape in the release, transform).
Expected = dict[str, tuple[str, tuple[int, ...], Callable[[np.ndarray], np.ndarray]]]


def pick_branch(tree: Any, *, branch: str = "teacher", source: str) -> Mapping[str, Any]:
    """Returns the dict of tensors in a loaded file: itself, or one branch of a training file.

    Training files hold `student` and `teacher` (of which `branch` is taken), or their weights under
    `state_dict` or `model`. Raises ValueError if there is no dict of tensors.
    """
    for key in (branch, "state_dict", "model"):
        if isinstance(tree, Mapping) and isinstance(tree.get(key), Mapping):
            _log.info("%s: taking the tensors under %r", source, key)
            tree = tree[key]
            break
    if not isinstance(tree, Mapping):
        raise ValueError(f"{source} holds a {type(tree).__name__}, not a dict of tensors")
    tensors = {str(k): v for k, v in tree.items() if hasattr(v, "shape")}
    if not tensors:
        raise ValueError(f"{source} holds no tensors; its keys are {some_of(map(str, tree))}")
    return tensors


def fill(
    tensors: Mapping[str, Any],
    found: Mapping[str, tuple[str, ...]],
    expected: Expected,
    source: str,
) -> dict[str, Any]:
    """Puts every expected tensor in its place.

    Args:
      tensors: arrays, or objects with `shape` and `read()`, under the file's names.
      found: the file's names of each tensor, under its expected name; several are joined along the
        first axis.
      expected: what must be there, no more and no less.
      source: what to call the file in messages.

    Returns:
      Nested dict of float32 arrays.

    Raises:
      ValueError: tensors missing, unknown or of another shape or dtype, all named.
    """
    shapes = {name: joint_shape([tensors[o] for o in found[name]]) for name in found}
    _check(found, shapes, expected, source)
    tree: dict[str, Any] = {}
    for name, (path, _, transform) in expected.items():
        array = np.concatenate([_float32(tensors[o], f"{source}: {o}") for o in found[name]])
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = np.ascontiguousarray(transform(array))
    return tree


def joint_shape(parts: list[Any]) -> tuple[int, ...]:
    """The shape of parts of the same shape joined along the first axis."""
    shape = tuple(parts[0].shape)
    return (len(parts) * shape[0], *shape[1:]) if shape else ()


def conv_kernel(weight_DxCxpxp: np.ndarray) -> np.ndarray:
    """A convolution's weight in Flax's order of axes, `p x p x C x D`."""
    return weight_DxCxpxp.transpose(2, 3, 1, 0)


INVERSE: dict[Callable, Callable] = {
    np.transpose: np.transpose,
    conv_kernel: lambda kernel: kernel.transpose(3, 2, 0, 1),
}


def _check(
    found: Mapping[str, tuple[str, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    expected: Expected,
    source: str,
) -> None:
    """Raises one ValueError that names every missing, unknown and misshapen tensor."""
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"missing tensors: {', '.join(missing)}")
    if unknown := sorted(found.keys() - expected.keys()):
        problems.append(f"unknown tensors: {all_names(found[name] for name in unknown)}")
    for name in expected.keys() & found.keys():
        if shapes[name] != (shape := expected[name][1]):
            problems.append(
                f"{all_names([found[name]])} has shape {shapes[name]}, expected {shape}"
            )
    if problems:
        raise ValueError(f"{source}: " + "; ".join(problems))


def _float32(tensor: Any, where: str) -> np.ndarray:
    array = tensor.read() if hasattr(tensor, "read") else np.asarray(tensor)
    if array.dtype.name not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"{where} is {array.dtype}: allowed are float32, float16 and bfloat16")
    return array.astype(np.float32)


def all_names(groups: Iterable[tuple[str, ...]]) -> str:
    return ", ".join(name for group in groups for name in group)


def some_of(names: Iterable[str]) -> str:
    """The first five names, and how many there are."""
    names = list(names)
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")


class Table(dict):
    """Maps torchvision's names to (path in our variables, shape in torchvision, transform)."""

    def conv(self, name: str, path: str, n_out: int, n_in: int, size: int) -> None:
        shape = (n_out, n_in, size, size)
        self[f"{name}.weight"] = (f"params/{path}/kernel", shape, conv_kernel)

    def norm(self, name: str, path: str, count: int) -> None:
        for theirs, ours in [
            ("weight", f"params/{path}/scale"),
            ("bias", f"params/{path}/bias"),
            ("running_mean", f"batch_stats/{path}/mean"),
            ("running_var", f"batch_stats/{path}/var"),
        ]:
            self[f"{name}.{theirs}"] = (ours, (count,), np.asarray)
