"""Eight CPU devices, so that sharding is tested everywhere; full-precision products; code that compiles fast."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

# Most of the time of these tests is compiling. The cache outlives a checkout.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/declip_jax/compiled_tests"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

import jax

jax.config.update("jax_default_matmul_precision", "highest")
