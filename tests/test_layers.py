"""Who may import whom, and who may ask what it has in hand: so that each floor reads without those above.

`python tests/test_layers.py [CHECKOUT]` prints the counts that the tests hold at zero.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# From the lowest floor up; each may import its own and those before it.
FLOORS = (
    ("options", "files", "checksums", "huge_pages", "quiet", "renames"),
    ("ops",),
    ("nn",),
    ("weights",),
    ("losses", "metrics"),
    ("backbones",),
    ("heads",),
    ("networks",),
    ("data",),
    ("train",),
    ("evaluate",),
    ("report",),
    ("tasks",),
    ("schema",),
    ("assembly",),
    ("workdir",),
    ("objects",),
    ("predictor",),
    ("run",),
    ("predict",),
    ("compare", "analyze"),
    ("cli",),
    ("__init__", "__main__"),
)
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}
# The assembly and the command line: what a config goes through before it is objects.
CONFIGURED = ("schema", "assembly", "workdir", "run", "predict", "compare", "analyze", "cli")
# Where the kinds of things are listed, and where a contract's optional part is looked up.
REGISTRIES = (
    "TASKS",
    "HEADS",
    "NETWORKS",
    "BACKBONES",
    "FAMILIES",
    "FORMATS",
    "VARIANTS",
    "RESNETS",
)
OWN = {
    "renames.py",  # old names and new ones
    *("tasks/", "heads/", "networks/", "backbones/", "data/formats/", "data/drawn/"),
    "data/source.py",  # of sources
}
# Things that have kinds, as they are called in arguments.
KINDS = {"task", "head", "network", "backbone", "module", "variant", "shape", "model"}


def package() -> Path:
    import jaxseg

    return Path(jaxseg.__file__).parent


def _floor(path: Path, root: Path) -> str:
    return path.relative_to(root).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
    return names


def _files(root: Path) -> list[Path]:
    return [p for p in sorted(root.rglob("*.py")) if p.relative_to(root).parts[0] != "configs"]


def climbing_imports(root: Path) -> Iterator[str]:
    """Imports of a higher floor."""
    for path in _files(root):
        floor = _floor(path, root)
        for name in sorted(_imports(path)):
            parts = name.split(".")
            if parts[0] != "jaxseg" or len(parts) < 2 or parts[1] not in LEVEL:
                continue
            if floor not in LEVEL or LEVEL[parts[1]] > LEVEL[floor]:
                yield f"{path.relative_to(root)} imports {name}"


def carried_configs(root: Path) -> Iterator[str]:
    """Parameters below the assembly that carry values of more than one config section."""
    for path in _files(root):
        if _floor(path, root) in CONFIGURED:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                for argument in [*node.args.args, *node.args.kwonlyargs]:
                    annotation = ast.unparse(argument.annotation) if argument.annotation else ""
                    named = argument.arg in ("config", "overrides") and annotation != "str"
                    if named or "ConfigDict" in annotation:
                        yield f"{path.relative_to(root)}:{node.lineno} {node.name}({argument.arg})"


def _kinds() -> set[str]:
    from jaxseg.backbones import FAMILIES
    from jaxseg.data.formats import FORMATS
    from jaxseg.heads import HEADS
    from jaxseg.networks import NETWORKS
    from jaxseg.tasks import TASKS

    return {*TASKS, *HEADS, *NETWORKS, *FAMILIES, *FORMATS, "segmentation", "labelled", "folder"}


def questions_of_kind(root: Path, kinds: set[str]) -> Iterator[str]:
    """Comparisons with, and lookups by, a literal name of a kind; questions about an object's type."""
    for path in _files(root):
        place = str(path.relative_to(root))
        if any(place.startswith(own) for own in OWN):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            found = None
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                literals = {
                    n.value for s in sides for n in ast.walk(s) if isinstance(n, ast.Constant)
                }
                asked = any(_names(s) & {"task", "name", "family"} for s in sides)
                if asked and literals & kinds:
                    found = ast.unparse(node)
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                if _names(node.value) & set(REGISTRIES):
                    found = ast.unparse(node)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in ("isinstance", "hasattr", "getattr") and node.args:
                    if _names(node.args[0]) & KINDS:
                        found = ast.unparse(node)
            if found:
                yield f"{place}:{node.lineno} {found}"


def _names(node: ast.AST) -> set[str]:
    """The names in an expression, and the last attributes."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} | {
        n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)
    }


def code_lines(root: Path) -> int:
    """Lines with code: without docstrings, comments and blank lines."""
    total = 0
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text())
        strings = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
                node, clean=False
            ):
                first = node.body[0]
                strings |= set(range(first.lineno, first.end_lineno + 1))
        for number, line in enumerate(path.read_text().splitlines(), 1):
            text = line.strip()
            total += bool(text) and not text.startswith("#") and number not in strings
    return total


def test_imports_go_down():
    assert list(climbing_imports(package())) == []


def test_a_config_ends_where_objects_begin():
    assert list(carried_configs(package())) == []


def test_nobody_asks_what_kind_of_thing_it_has():
    assert list(questions_of_kind(package(), _kinds())) == []


@pytest.mark.parametrize("path", _files(package()), ids=lambda p: str(p.relative_to(package())))
def test_no_torch_or_tensorflow(path):
    assert not {n.split(".")[0] for n in _imports(path)} & {"torch", "tensorflow", "cv2"}


if __name__ == "__main__":
    checkout = Path(sys.argv[1]) if len(sys.argv) > 1 else package().parent
    folder = checkout / "jaxseg"
    asked = list(questions_of_kind(folder, _kinds()))
    for count, what in (
        (len(list(carried_configs(folder))), "parameters below the assembly that carry a config"),
        (len(asked), "questions of kind"),
        (code_lines(folder), "lines of code in jaxseg"),
        (code_lines(checkout / "configs"), "lines of code in configs"),
    ):
        print(f"{count:6d}  {what}")
    print("\n".join(asked))
