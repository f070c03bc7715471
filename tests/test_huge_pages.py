import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
from pathlib import Path
from jaxseg.huge_pages import restart_with_huge_pages
print("begin", flush=True)
restart_with_huge_pages({name!r}, setting=Path(sys.argv[1]))
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[2:], os.getpid())
"""


def run(tmp_path, *, setting: str | None, tunables: str = "", name: str = "script.py"):
    """The lines that a script prints which restarts itself, and its process id."""
    script, file = tmp_path / "script.py", tmp_path / "enabled"
    script.write_text(SCRIPT.format(name=name))
    if setting is not None:
        file.write_text(setting)
    env = {**os.environ, "GLIBC_TUNABLES": tunables}
    process = subprocess.Popen(
        [sys.executable, str(script), str(file), "a b"], env=env, stdout=subprocess.PIPE, text=True
    )
    lines = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    return lines, process.pid


def test_starts_again_once_in_the_same_process_with_its_arguments(tmp_path):
    lines, pid = run(tmp_path, setting="always [madvise] never", tunables="glibc.malloc.check=0")
    tunables = "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
    assert lines == ["begin", "begin", f"{tunables} ['a b'] {pid}"]


@pytest.mark.parametrize(
    "options",
    [
        dict(setting="[always] madvise never"),
        dict(setting="always madvise [never]"),
        dict(setting=None),
        dict(setting="always [madvise] never", tunables="glibc.malloc.hugetlb=0"),
        dict(setting="always [madvise] never", name="notebook.py"),
    ],
    ids=["given unasked", "never given", "no such kernel", "user's own", "another program"],
)
def test_goes_on_where_a_new_start_gains_nothing(tmp_path, options):
    lines, _ = run(tmp_path, **options)
    assert len(lines) == 2 and lines[1].startswith(options.get("tunables", ""))
