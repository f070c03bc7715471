"""Checkpoints by name: our own small one, and where the released ones are published and kept."""

import dataclasses
import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

_DINO = "https://dl.fbaipublicfiles.com/dino"
_DINOV2 = "https://dl.fbaipublicfiles.com/dinov2"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One released file; `sha256` is None where no checksum is published or known."""

    url: str
    sha256: str | None = None

    @property
    def filename(self) -> str:
        return self.url.rsplit("/", 1)[-1]


# Addresses: hubconf.py of facebookresearch/dino and dinov2/hub/backbones.py of
# facebookresearch/dinov2; the latter's checksums: finegrain-ai/refiners, conversion of DINOv2.
# The names are those of `VARIANTS`.
CATALOG: dict[str, Entry] = {
    "dino_vits16": Entry(f"{_DINO}/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"),
    "dino_vits8": Entry(f"{_DINO}/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"),
    "dino_vitb16": Entry(f"{_DINO}/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"),
    "dino_vitb8": Entry(f"{_DINO}/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth"),
    "dinov2_vits14": Entry(
        f"{_DINOV2}/dinov2_vits14/dinov2_vits14_pretrain.pth",
        "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    ),
    "dinov2_vitb14": Entry(
        f"{_DINOV2}/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
        "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    ),
    "dinov2_vitl14": Entry(
        f"{_DINOV2}/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    ),
    "dinov2_vits14_reg": Entry(
        f"{_DINOV2}/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth",
        "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb",
    ),
    "dinov2_vitb14_reg": Entry(
        f"{_DINOV2}/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
        "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71",
    ),
    "dinov2_vitl14_reg": Entry(
        f"{_DINOV2}/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth",
        "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51",
    ),
}

# Part of the repository; `shapes_micro8.md` beside the file says how it was made.
BUILT_IN: dict[str, Path] = {
    "shapes_micro8": Path(__file__).with_name("shapes_micro8.safetensors"),
}
NAMES = (*BUILT_IN, *CATALOG)


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Returns `cache_dir`, else `$JAXSEG_CACHE`, else `~/.cache/jaxseg/weights`."""
    return Path(
        cache_dir or os.environ.get("JAXSEG_CACHE") or "~/.cache/jaxseg/weights"
    ).expanduser()


def fetch(name: str, *, cache_dir: str | Path | None = None) -> Path:
    """Returns the file of a checkpoint, downloading a released one if it is not in the cache.

    Raises:
      ValueError: unknown name, or the file's checksum is not the published one.
      OSError: the download failed; the message says which file to put where by hand.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name not in CATALOG:
        raise ValueError(f"no weights are called {name!r}: allowed are {', '.join(NAMES)}")
    entry, folder = CATALOG[name], cache_folder(cache_dir)
    path = folder / entry.filename
    if path.is_file():
        return path
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        digest = _download(entry.url, partial)
        if entry.sha256 not in (None, digest):
            raise ValueError(f"{entry.url} has sha256 {digest}, expected {entry.sha256}")
        os.replace(partial, path)
    except (OSError, http.client.HTTPException) as e:
        raise OSError(
            f"cannot download the weights {name!r} ({e}): fetch {entry.url} where there is a "
            f"network and put it at {path}"
        ) from e
    finally:
        partial.unlink(missing_ok=True)
    return path


def _download(url: str, path: Path) -> str:
    """Streams `url` into `path` with a progress bar and returns its sha256."""
    from tqdm import tqdm

    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=60) as response, path.open("wb") as file:
        total = int(response.headers.get("Content-Length") or 0)
        with tqdm(total=total or None, unit="B", unit_scale=True, desc=path.stem) as bar:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
        if total and bar.n != total:
            raise OSError(f"the connection broke after {bar.n} of {total} bytes")
    return digest.hexdigest()
