"""Peak figures of accelerators, by the name that JAX gives them, and their sources.

All figures are per JAX device, which is one chip, except for TPU7x, where it is half a chip. Compute is dense bfloat16;
NVIDIA's data sheets print it with sparsity, which is twice as much. Bandwidths of links and networks are one direction.

Sources, all from the vendors:
  TPU v5e, v6e, v5p, TPU7x: Google Cloud's pages "TPU v5e", "TPU v6e", "TPU v5p" and "TPU7x" (bfloat16 peak, HBM; ICI
    bandwidth per chip in both directions, half of which is one direction; data center network per pod or per chip;
    vCPUs of a VM with four chips). A chip has four ICI links in two dimensions (v5e, v6e), six in three (v4, v5p, 7x).
    Memory is the part that libtpu leaves to programs, from its out-of-memory errors: 15.75 of 16 GiB on a v5e.
  TPU v4: "TPU v4" for compute and HBM; Jouppi et al. 2023 (arXiv 2304.01433), table 4, for the six links of 50 GB/s.
  A100, A10, A10G, L4, L40S, H100, H200, GH200: NVIDIA's data sheet of each. B200: that of the DGX B200, divided by 8.
  NVLink: 12 links of 25 GB/s (A100), 18 of 25 (H100, H200), 18 of 50 (B200). Cards without NVSwitch communicate over
    PCI Express: 16 lanes are 32 GB/s in generation 4, 64 GB/s in generation 5.
  Networks of GPU nodes: one adapter per GPU, as in NVIDIA's DGX A100 (200 Gb/s), H100, H200, B200 (400 Gb/s).
"""

import dataclasses

GB, GIB = 1e9, 2**30


@dataclasses.dataclass(frozen=True)
class Device:
  """Peak figures of one device.

  Attributes:
    flops: FLOPs per second of dense bfloat16 matrix products.
    memory: bytes of main memory; on a TPU those available to programs.
    memory_bandwidth: bytes per second.
    links: number of links to other devices of the same slice or node.
    link_bandwidth: bytes per second of one link in one direction.
    network_bandwidth: bytes per second between slices or nodes, in one direction; None if unknown.
    host_cpus: virtual CPUs (hyperthreads) of the host per device; None if unknown.
  """

  flops: float
  memory: float
  memory_bandwidth: float
  links: int
  link_bandwidth: float
  network_bandwidth: float | None
  host_cpus: float | None = None

  @property
  def interconnect(self) -> float:
    """Bytes per second over all links at once, in one direction."""
    return self.links * self.link_bandwidth


_V5E = Device(197e12, 15.75 * GIB, 819 * GB, 4, 50 * GB, 25 * GB / 8, 112 / 4)
_V5P = Device(459e12, 95.74 * GIB, 2765 * GB, 6, 100 * GB, 50 * GB / 8, 208 / 4)
_V6E = Device(918e12, 31.25 * GIB, 1638 * GB, 4, 100 * GB, 100 * GB / 8, 180 / 4)

DEVICES = {
  "TPU v4": Device(275e12, 30.75 * GIB, 1200 * GB, 6, 50 * GB, None, 240 / 4),
  "TPU v5 lite": _V5E,
  "TPU v5e": _V5E,
  "TPU v5": _V5P,
  "TPU v5p": _V5P,
  "TPU v6 lite": _V6E,
  "TPU v6e": _V6E,
  "TPU7x": Device(2307e12 / 2, 94.75 * GIB, 7380 * GB / 2, 6, 50 * GB, 100 * GB / 8 / 2, 224 / 4 / 2),
  "NVIDIA A100-SXM4-40GB": Device(312e12, 40 * GB, 1555 * GB, 12, 25 * GB, 200 * GB / 8),
  "NVIDIA A100-SXM4-80GB": Device(312e12, 80 * GB, 2039 * GB, 12, 25 * GB, 200 * GB / 8),
  "NVIDIA A100-PCIE-40GB": Device(312e12, 40 * GB, 1555 * GB, 1, 32 * GB, None),
  "NVIDIA A100 80GB PCIe": Device(312e12, 80 * GB, 1935 * GB, 1, 32 * GB, None),
  "NVIDIA H100 80GB HBM3": Device(989.5e12, 80 * GB, 3350 * GB, 18, 25 * GB, 400 * GB / 8),
  "NVIDIA H100 PCIe": Device(756.5e12, 80 * GB, 2000 * GB, 1, 64 * GB, None),
  "NVIDIA H100 NVL": Device(835.5e12, 94 * GB, 3900 * GB, 1, 64 * GB, None),
  "NVIDIA H200": Device(989.5e12, 141 * GB, 4800 * GB, 18, 25 * GB, 400 * GB / 8),
  "NVIDIA H200 NVL": Device(835.5e12, 141 * GB, 4800 * GB, 1, 64 * GB, None),
  "NVIDIA GH200 480GB": Device(989.5e12, 96 * GB, 4000 * GB, 18, 25 * GB, None),
  "NVIDIA B200": Device(2250e12, 180 * GB, 8000 * GB, 18, 50 * GB, 400 * GB / 8),
  "NVIDIA L4": Device(121e12, 24 * GB, 300 * GB, 1, 32 * GB, None),
  "NVIDIA L40S": Device(362e12, 48 * GB, 864 * GB, 1, 32 * GB, None),
  "NVIDIA A10": Device(125e12, 24 * GB, 600 * GB, 1, 32 * GB, None),
  "NVIDIA A10G": Device(70e12, 24 * GB, 600 * GB, 1, 32 * GB, None),
}


def find(device_kind: str) -> Device | None:
  """The figures of a `jax.Device.device_kind`; None for a CPU and for devices that are not in the table."""
  return DEVICES.get(device_kind)
