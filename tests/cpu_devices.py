"""The flags under which tests run on CPUs: several devices in one process, and code that compiles fast.

Without optimisation and without fusion emitters a train step compiles in half the time that XLA's defaults take; small
arrays run as fast. The number of devices costs nothing: a tiny train step compiles in the same time for 1, 2 and 8.
"""


def xla_flags(devices: int) -> str:
  fast = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
  return f"--xla_force_host_platform_device_count={devices} {fast}"
