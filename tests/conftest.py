"""Set-up for all tests: compiled programs are shared between the processes that tests start."""

import os
import tempfile

# Before anything imports JAX; removed with the temporary folder when the tests end.
_COMPILED = tempfile.TemporaryDirectory(prefix="jaxseg-compiled-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _COMPILED.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
