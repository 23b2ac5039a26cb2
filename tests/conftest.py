"""Eight CPU devices, so that sharding is tested everywhere; full-precision products; code that compiles fast."""

import os

from cpu_devices import xla_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"

# Most of the time of these tests is compiling. The cache outlives a checkout.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/declip_jax/compiled_tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax

jax.config.update("jax_default_matmul_precision", "highest")
