"""Parameters and FLOPs of every architecture: python benchmarks/architectures.py

FLOPs are those of the forward pass of one image and one text of 77 tokens, as XLA counts them in what it is given to
compile (a multiplication and an addition are two). Beside them stand the figures that open_clip publishes for its own
implementation (docs/model_profile.csv, in GFLOPs), where it has the model.

With --compile it prints instead how long the train step of some architectures takes to compile, with the blocks of the
transformers scanned and, as in a plain loop over layers, unrolled.
"""

import argparse
import time
from typing import Any

import jax
from jax.experimental import topologies
import jax.numpy as jnp

from declip_jax import build, config
from declip_jax.architectures import ARCHITECTURES
from declip_jax.build import make_step
from declip_jax.sharding import batch_sharding
from declip_jax.training.state import abstract_state
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
}


def count(tree: Any) -> int:
  """Numbers in a tree of arrays or shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def forward_flops(name: str) -> tuple[float, float]:
  """FLOPs of encoding one image and one text."""
  c = config.default("clip", name)
  c.model.unroll = 1000  # XLA counts the body of a loop once
  model, shapes = abstract_variables(c.model, (), c.data.image_size)
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
  """The table of parameters and FLOPs, of CLIP with each architecture."""
  heads = (
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
  print(f"{'architecture':<21}" + "".join(f"{head:>14}" for head in heads))
  for name in names:
    c = config.default("clip", name)
    params = abstract_variables(c.model, (), c.data.image_size)[1]["params"]
    half = {
      part: count(params["towers"][part]) + count(params["heads"][f"{part}_projection"]) for part in ("image", "text")
    }
    image, text = (flops / 1e9 for flops in forward_flops(name))
    numbers = [c.model.heads.embed_dim, c.data.image_size, half["image"], half["text"], count(params)]
    row = "".join(f"{number:14,}" for number in numbers)
    rival = f"{OPEN_CLIP[name]:14.1f}" if name in OPEN_CLIP else " " * 13 + "-"
    print(f"{name:<21}{row}{image:14.1f}{text:14.1f}{image + text:14.1f}{rival}", flush=True)


def compile_seconds(name: str, unroll: int, batch_size: int, devices: list[jax.Device]) -> float:
  """Seconds to compile the train step of CLIP, without tracing."""
  c = config.default("clip", name)
  c.batch_size, c.model.unroll = batch_size, unroll
  built = build.build(c, devices)
  rows = batch_sharding(built.mesh)
  shapes = {
    field: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for field, x in built.batch_shape(c.batch_size).items()
  }
  abstract = abstract_state(shapes, built.mesh, model=built.model, optimizer=built.optimizer)
  lowered = make_step(c, built, build.to_steps(c, 10**8), abstract).lower(abstract, shapes)
  start = time.perf_counter()
  lowered.compile()
  return time.perf_counter() - start


def main() -> None:
  """Prints the tables."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("names", nargs="*", help=f"which: {', '.join(ARCHITECTURES)} (default: all)")
  parser.add_argument("--compile", action="store_true", help="compile times (default: ViT-B/32 and ViT-L/14)")
  parser.add_argument("--batch-size", type=int, default=16, help="of the step that is compiled (default: 16)")
  parser.add_argument("--topology", help="compile for a TPU that need not be there, such as v5e:4x4 (needs libtpu)")
  args = parser.parse_args()
  for name in args.names:
    if name not in ARCHITECTURES:
      parser.error(f"{name!r}: choose of {', '.join(ARCHITECTURES)}")
  if not args.compile:
    print_sizes(args.names or list(ARCHITECTURES))
    return
  devices = jax.devices()
  if args.topology:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
  print(
    f"{'architecture':<21}{'scanned s':>10}{'unrolled s':>11}{'ratio':>7}   ({len(devices)} x {devices[0].device_kind})"
  )
  for name in args.names or ["ViT-B/32", "ViT-L/14"]:
    scanned, unrolled = (compile_seconds(name, unroll, args.batch_size, devices) for unroll in (1, 1000))
    print(f"{name:<21}{scanned:10.1f}{unrolled:11.1f}{unrolled / scanned:7.1f}", flush=True)


if __name__ == "__main__":
  main()
