"""Eight CPU devices, so that sharding is tested everywhere; full-precision matrix products."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402  (the variables above have to be set first)

jax.config.update("jax_default_matmul_precision", "highest")
