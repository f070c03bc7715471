"""Who may import whom: one way, so that every layer can be read without those above it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jaxseg"

ALLOWED = {
    "ops": set(),
    "losses": {"ops"},
    "models": {"ops"},
    "metrics": {"ops"},
    "multiclass_metrics": {"ops", "metrics"},
    "weights": {"ops", "models"},
    "data": {"ops"},
    "tasks": {"ops", "losses", "models", "metrics", "multiclass_metrics"},
    "train": {"ops", "losses", "models", "metrics", "tasks"},
    "evaluate": {"ops", "losses", "models", "metrics", "multiclass_metrics", "tasks", "train"},
}
ANYONE = {"checksums", "files"}  # which import nothing of ours
FILES = sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_layers_import_downwards(path):
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    ours = {n.split(".")[1] for n in _imports(path) if n.startswith("jaxseg.")}
    if layer in ALLOWED:
        assert ours <= ALLOWED[layer] | ANYONE | {layer}
    if layer in ANYONE:
        assert not ours
    assert not {n for n in _imports(path) if n.split(".")[0] in ("main", "configs")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_torch_or_tensorflow(path):
    assert not {n.split(".")[0] for n in _imports(path)} & {"torch", "tensorflow", "cv2"}
