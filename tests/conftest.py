"""Set-up for all tests, before anything imports JAX, and for the processes that tests start.

Compiled programs are shared between processes. LLVM does not optimise them: of a run of seconds most is
compilation, a third of it spared. Matrix products and convolutions are library calls, as fast as ever.
"""

import gc
import os
import sys
import tempfile

import pytest

# Removed with the temporary folder when the tests end.
_COMPILED = tempfile.TemporaryDirectory(prefix="jaxseg-compiled-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _COMPILED.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = " ".join(
        [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0"]
    ).strip()


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_module():
    """Lets compiled programs go with the module that needed them: else a worker grows to 5 GB."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()
