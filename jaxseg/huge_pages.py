"""Huge pages for XLA's CPU backend, whose temporary arrays else cost a page fault every 4 KiB."""

import os
import sys
from pathlib import Path

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLE = "glibc.malloc.hugetlb"


def restart_with_huge_pages(script: str, *, setting: Path = _SETTING) -> None:
    """Starts the running program again, in the same process, with glibc's malloc asking for huge pages.

    XLA allocates a step's temporary arrays anew each time, so the kernel fills hundreds of megabytes
    with zeros page by page: up to a third of a step. malloc reads its settings before `main`, hence the
    new start, which costs what has been imported so far. Nothing happens where the kernel gives huge
    pages unasked or not at all, where `GLIBC_TUNABLES` says something of them already, and where
    `script` is not what Python was started with (in a notebook, in a test).

    Args:
      script: the running program's `__file__`; for a console script `sys.argv[0]`.
      setting: the kernel's file that says who gets huge pages.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    try:
        asked_for = "[madvise]" in setting.read_text()
    except OSError:
        return
    if asked_for and _TUNABLE not in tunables and _started_with(Path(script)):
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{_TUNABLE}=1"]))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _started_with(script: Path) -> bool:
    """Whether Python was started with this script, as a file or by `-m`."""
    main = getattr(sys.modules["__main__"], "__file__", None)  # a notebook has none
    # What stands before the program's own arguments.
    place = len(sys.orig_argv) - len(sys.argv)
    if main is None or Path(main).name != script.name or not 0 < place < len(sys.orig_argv):
        return False
    if sys.orig_argv[place - 1] == "-m":
        module = script.parent.name if script.stem == "__main__" else script.stem
        return sys.orig_argv[place].split(".")[-1] == module
    return Path(sys.orig_argv[place]).name == script.name
