"""The flags under which tests run on CPUs: several devices in one process, and code that compiles fast."""

from importlib.metadata import version
import platform

# JAX 0.11 has only fusion emitters, and ends the process at a flag that it does not know.
HAS_OLDER_EMITTERS = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)


def xla_flags(devices: int) -> str:
  """Flags for this many devices, without optimisation and fusion emitters, which halves compile time.

  JAX 0.11 keeps the emitters. Small arrays run as fast. The number of devices costs nothing: a tiny train step compiles
  in the same time for 1, 2 and 8. The older emitters fuse a product and a sum into one rounding where the processor can
  (FMA, after AVX), which breaks the bit-exact tests of images.
  """
  fast = "--xla_backend_optimization_level=0"
  if HAS_OLDER_EMITTERS:
    fast += " --xla_cpu_use_fusion_emitters=false"
  separate = " --xla_cpu_max_isa=AVX" if platform.machine() == "x86_64" else ""
  return f"--xla_force_host_platform_device_count={devices} {fast}{separate}"
