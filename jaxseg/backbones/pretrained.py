"""Pretrained backbones: from a catalogue name or a file to parameters of ours, and to a file."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxseg import backbones
from jaxseg.backbones import BACKBONES, FAMILIES, family_of, workdir_weights
from jaxseg.weights import catalog, safetensors_file, tensors, torch_pickle

_VARIANT = "jaxseg.variant"  # among the metadata of a file that `export` wrote


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters of a backbone: nested dict of float32 NumPy arrays in the layout of its module.

    `source` is the file they came from and `digest` its sha256. `statistics` are the running means
    and variances of batch norm (`batch_stats` of a `ResNet`), {} where there is none.
    """

    params: dict[str, Any]
    variant: Any
    source: str
    digest: str
    statistics: dict[str, Any] = dataclasses.field(default_factory=dict)


def load(
    name_or_path: str | Path,
    *,
    variant: Any = None,
    cache_dir: str | Path | None = None,
    branch: str = "teacher",
) -> Weights:
    """Loads pretrained weights.

    Args:
      name_or_path: a name in `catalog.NAMES` (most are downloaded once), a `.pth` or `.safetensors`
        file (a ViT of the DINO family or a ResNet in torchvision's layout), or the workdir of one of
        our own runs.
      variant: a name in `BACKBONES` or a variant that the file must fit; inferred if None.
      cache_dir: where downloads are kept; see `catalog.cache_folder`.
      branch: "teacher" or "student", for training files that hold both.

    Raises:
      ValueError: unknown name, damaged or foreign file, or tensors that do not fit, all named.
      OSError: the file cannot be read or downloaded.
    """
    if branch not in ("teacher", "student"):
        raise ValueError(f"branch is {branch!r}: allowed are 'teacher' and 'student'")
    if isinstance(variant, str):
        variant = _named(variant)
    path, name = Path(name_or_path).expanduser(), str(name_or_path)
    if name in catalog.CATALOG:
        variant = variant or _named(name)
    if name in catalog.NAMES:
        path = catalog.fetch(name, cache_dir=cache_dir)
    if path.is_dir():
        return _load_orbax(path)
    if not path.is_file():
        raise ValueError(
            f"no weights {name!r}: neither a file nor one of {', '.join(catalog.NAMES)}"
        )
    if variant is None and path.suffix == ".safetensors":
        variant = _stored_variant(path)
    digest = _sha256(path, expected=catalog.CATALOG.get(name))
    found = tensors.pick_branch(_read(path), branch=branch, source=str(path))
    # Where the names tell nothing, the first family's reader says what it misses.
    families = [f for f in FAMILIES.values() if f.holds(found)] or list(FAMILIES.values())
    if variant is not None and family_of(variant) not in families:
        raise ValueError(f"{path} holds a {families[0].module.__name__}, not a {variant.name}")
    params, statistics, variant = families[0].to_flax(found, source=str(path), variant=variant)
    return Weights(params, variant, str(path), digest, statistics)


def export(workdir: str | Path, path: str | Path) -> Weights:
    """Writes the backbone of a run as one `.safetensors` file of float16, and returns it as it is read.

    The tensors have the names and the layout of the DINO and DINOv2 releases, so that their PyTorch code
    loads them too.

    Raises:
      ValueError: the folder holds no run, its backbone is a ResNet, or `path` is no `.safetensors`.
      OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"--outputs={path}: allowed are names that end in .safetensors")
    params, _, variant = workdir_weights.read(Path(workdir))
    from_flax = family_of(variant).from_flax
    if from_flax is None:
        raise ValueError(f"{workdir} holds a {variant.name}; only a ViT can be exported")
    half = {name: x.astype(np.float16) for name, x in from_flax(params, variant).items()}
    metadata = {"format": "pt", _VARIANT: json.dumps(backbones.to_json(variant))}
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors_file.write(path, half, metadata)
    return load(path)


def _stored_variant(path: Path) -> Any:
    """What `export` says of a file; None for any other file."""
    text = safetensors_file.metadata(path).get(_VARIANT)
    if text is None:
        return None
    try:
        return backbones.from_json(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {_VARIANT} is damaged: {error!r}") from error


def _named(name: str) -> Any:
    if name not in BACKBONES:
        raise ValueError(f"no backbone is called {name!r}: allowed are {', '.join(BACKBONES)}")
    return BACKBONES[name]


def _sha256(path: Path, *, expected: catalog.Entry | None) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if expected and expected.sha256 not in (None, digest):
        raise ValueError(
            f"{path} has sha256 {digest}, but {expected.url} has {expected.sha256}: delete the file "
            "to download it again, or give its path if it is meant to be another"
        )
    return digest


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safetensors_file.read(path)
    return torch_pickle.read(path)


def _load_orbax(path: Path) -> Weights:
    params, statistics, variant = workdir_weights.read(path)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((params, statistics)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return Weights(params, variant, str(path), digest.hexdigest(), statistics)
