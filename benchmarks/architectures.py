"""Parameters and FLOPs of every architecture: python benchmarks/architectures.py

FLOPs are those of the forward pass of one image and one text of 77 tokens, 64 for SigLIP or 32 for CLIPA, as XLA counts
them before compilation (a multiplication and an addition are two). For comparison the table has the figures that
open_clip publishes for its own implementation (docs/model_profile.csv, in GFLOPs), where it has the model.

With --compile it prints instead how long the train step of some architectures takes to compile, with the blocks of the
transformers scanned and, as in a plain loop over layers, unrolled.
"""

from typing import Any

from command import parser
import jax
import jax.numpy as jnp

from declip_jax import config
from declip_jax.architectures import ARCHITECTURES
from declip_jax.planning.compile import compile_step
from declip_jax.planning.topology import topology_devices
from declip_jax.weights.layout import abstract_variables

# Image and text together, GFLOPs.
OPEN_CLIP = {
  "RN50": 18.18,
  "RN101": 25.5,
  "RN50x4": 51.8,
  "RN50x16": 162.7,
  "RN50x64": 552.7,
  "ViT-B/32": 14.78,
  "ViT-B/16": 41.09,
  "ViT-L/14": 175.33,
  "ViT-L/14@336px": 395.2,
  "ViT-H/14": 381.68,
  "ViT-g/14": 581.15,
  "ViT-bigG/14": 1065.36,
  "ViT-e/14": 2091.45,
  "CLIPA ViT-L/14": 167.5,
  "CLIPA ViT-L/14@336px": 387.39,
  "CLIPA ViT-H/14": 354.02,
  "CLIPA ViT-H/14@336px": 800.88,
  "CLIPA ViT-bigG/14": 1007.93,
  "CLIPA ViT-bigG/14@336px": 2271.58,
  "SigLIP ViT-B/16": 46.44,
  "SigLIP ViT-B/16@256px": 57.84,
  "SigLIP ViT-B/16@384px": 123.15,
  "SigLIP ViT-B/16@512px": 227.26,
  "SigLIP ViT-L/16@256px": 201.62,
  "SigLIP ViT-L/16@384px": 422.91,
  "SigLIP ViT-So400m/14@384px": 723.48,
}
COLUMNS = (
  "embed",
  "image px",
  "image params",
  "text params",
  "all params",
  "image GFLOPs",
  "text",
  "both",
  "open_clip",
)


def num_parameters(tree: Any) -> int:
  """Number of parameters in a tree of arrays or shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def forward_flops(name: str) -> tuple[float, float]:
  """FLOPs to encode one image and one text."""
  c = config.default("clip", name)
  c.model.unroll = 1000  # XLA counts the body of a loop once
  model, shapes = abstract_variables(c.model.to_dict(), ("joint",), c.data.image_size)
  size, length = c.data.image_size, c.model.text.context_length
  inputs = {
    "image_features": jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),
    "text_features": jax.ShapeDtypeStruct((1, length), jnp.int32),
  }
  lowered = [
    jax.jit(getattr(model, function)).lower(shapes["params"], shapes["collections"], x)
    for function, x in inputs.items()
  ]
  return tuple(each.cost_analysis()["flops"] for each in lowered)


def print_sizes(names: list[str]) -> None:
  """Prints parameters and FLOPs of CLIP with each architecture."""
  print(f"{'architecture':<21}" + "".join(f"{column:>14}" for column in COLUMNS))
  for name in names:
    c = config.default("clip", name)
    params = abstract_variables(c.model.to_dict(), ("joint",), c.data.image_size)[1]["params"]
    towers = {
      side: num_parameters(params["towers"][side]) + num_parameters(params["heads"].get(f"{side}_projection", {}))
      for side in ("image", "text")
    }
    image, text = (flops / 1e9 for flops in forward_flops(name))
    numbers = [c.model.heads.embed_dim, c.data.image_size, towers["image"], towers["text"], num_parameters(params)]
    cells = "".join(f"{number:14,}" for number in numbers)
    published = f"{OPEN_CLIP[name]:14.1f}" if name in OPEN_CLIP else " " * 13 + "-"
    print(f"{name:<21}{cells}{image:14.1f}{text:14.1f}{image + text:14.1f}{published}", flush=True)


def compile_seconds(name: str, unroll: int, batch_size: int, devices: list[jax.Device]) -> float:
  """Seconds to compile the train step of CLIP, without tracing."""
  c = config.default("clip", name)
  c.batch_size, c.model.unroll = batch_size, unroll
  return compile_step(c, devices).compile_seconds


def main() -> None:
  """Prints the tables."""
  arguments = parser(__doc__)
  arguments.add_argument("names", nargs="*", help=f"{', '.join(ARCHITECTURES)} (default: all)")
  arguments.add_argument("--compile", action="store_true", help="time compilation (default: of ViT-B/32 and ViT-L/14)")
  arguments.add_argument("--batch-size", type=int, default=16, help="pairs of the compiled step (default: 16)")
  arguments.add_argument("--topology", help="TPU topology to compile for, such as v5e:4x4 (needs libtpu, no TPU)")
  args = arguments.parse_args()
  for name in args.names:
    if name not in ARCHITECTURES:
      arguments.error(f"{name!r}: choose one of {', '.join(ARCHITECTURES)}")
  if not args.compile:
    print_sizes(args.names or list(ARCHITECTURES))
    return
  devices = topology_devices(args.topology) if args.topology else jax.devices()
  machine = f"{len(devices)} x {devices[0].device_kind}"
  print(f"{'architecture':<21}{'scanned s':>10}{'unrolled s':>11}{'ratio':>7}   ({machine})")
  for name in args.names or ["ViT-B/32", "ViT-L/14"]:
    scanned, unrolled = (compile_seconds(name, unroll, args.batch_size, devices) for unroll in (1, 1000))
    print(f"{name:<21}{scanned:10.1f}{unrolled:11.1f}{unrolled / scanned:7.1f}", flush=True)


if __name__ == "__main__":
  main()
