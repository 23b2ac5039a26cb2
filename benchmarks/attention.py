"""Memory traffic of transformers by the implementation of attention: python benchmarks/attention.py --topology v5e:2x2

Compiles the gradient of a transformer of 12 blocks for one TPU, with libtpu and without a TPU. Prints GiB that the
program reads and writes in main memory, and in parentheses what its temporary arrays take. Attention is plain XLA, our
kernel, and JAX's own kernels, flash and splash attention, with all tokens of a sequence in one block. Those of JAX need
a multiple of 128 tokens, and so padding.
"""

import argparse
from collections.abc import Callable, Iterator
import contextlib
from functools import partial
import sys
from typing import Any, NamedTuple
from unittest import mock

from command import parser
import jax
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from declip_jax.models import transformer
from declip_jax.planning import hlo
from declip_jax.planning.topology import topology_devices
from declip_jax.sharding import make_mesh, traced_over

Array = Any
DEPTH = 12


class Shape(NamedTuple):
  """The tokens of a tower."""

  batch: int
  tokens: int
  heads: int
  head_width: int
  causal: bool = False


SHAPES = {
  "ViT-B/32, images": Shape(512, 50, 12, 64),
  "ViT-B/16, images": Shape(128, 197, 12, 64),
  "ViT-L/14, images": Shape(64, 257, 16, 64),
  "ViT-L/14@336px, images": Shape(16, 577, 16, 64),
  "ViT-H/14, images": Shape(32, 257, 16, 80),
  "ViT-B, texts": Shape(512, 77, 8, 64, True),
  "ViT-B, texts of 32 tokens": Shape(512, 32, 8, 64, True),
  "ViT-H/14, texts": Shape(256, 77, 16, 64, True),
}


def flash_attention(query: Array, key: Array, value: Array, *, causal: bool, **unused: Any) -> Array:
  """`jax.experimental.pallas.ops.tpu.flash_attention`."""
  tokens = query.shape[1]
  padded = [_padded(x) for x in (query, key, value)]
  whole = padded[0].shape[2]
  blocks = {name: whole for name in flash.BlockSizes.__dataclass_fields__ if name != "block_b"}
  ids = jnp.broadcast_to((jnp.arange(whole) < tokens).astype(jnp.int32), (len(query), whole))
  attended = flash.flash_attention(
    *padded,
    segment_ids=flash.SegmentIds(ids, ids),
    causal=causal,
    sm_scale=query.shape[-1] ** -0.5,
    block_sizes=flash.BlockSizes(block_b=1, **blocks),
  )
  return attended.transpose(0, 2, 1, 3)[:, :tokens]


def splash_attention(query: Array, key: Array, value: Array, *, causal: bool, **unused: Any) -> Array:
  """`jax.experimental.pallas.ops.tpu.splash_attention`, whose backward pass is one kernel."""
  tokens, heads, head_width = query.shape[1:]
  padded = [_padded(x) for x in (query * head_width**-0.5, key, value)]
  whole = padded[0].shape[2]
  names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
  mask = (masks.CausalMask if causal else masks.FullMask)((whole, whole))
  kernel = splash.make_splash_mha(
    masks.MultiHeadMask([mask] * heads),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=splash.BlockSizes(**dict.fromkeys(names, whole), use_fused_bwd_kernel=True),
  )
  ids = (jnp.arange(whole) < tokens).astype(jnp.int32)
  attended = jax.vmap(partial(kernel, segment_ids=splash.SegmentIds(ids, ids)))(*padded)
  return attended.transpose(0, 2, 1, 3)[:, :tokens]


def _padded(x: Array) -> Array:
  """`[b n h e]` to `[b h m e]`, where m is the next multiple of 128."""
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 128), (0, 0), (0, 0))).transpose(0, 2, 1, 3)


IMPLEMENTATIONS: dict[str, Callable[..., Array] | None] = {
  "xla": None,
  "pallas": None,
  "splash": splash_attention,
  "flash": flash_attention,
}


@contextlib.contextmanager
def attention(implementation: str) -> Iterator[str]:
  """Replaces attention by that of JAX; returns what the transformer has to be given as `attention`."""
  function = IMPLEMENTATIONS[implementation]
  if function is None:
    yield implementation
    return
  with mock.patch.object(transformer, "attend", lambda *arrays, implementation, **kw: function(*arrays, **kw)):
    yield "xla"


def measure(shape: Shape, implementation: str, topology: str, remat: str) -> tuple[float, float]:
  """GiB of memory traffic and of temporary arrays of the gradient of a transformer in bfloat16."""
  mesh = make_mesh(1, 1, topology_devices(topology)[:1])
  width = shape.heads * shape.head_width
  with attention(implementation) as name:
    model = transformer.Transformer(
      width, shape.heads, DEPTH, causal=shape.causal, remat=remat, attention=name, dtype=jnp.bfloat16
    )
    x = jax.ShapeDtypeStruct((shape.batch, shape.tokens, width), jnp.bfloat16)
    plain = model.clone(attention="xla")
    arguments = jax.eval_shape(plain.init, jax.random.key(0), x), x
    placed = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())), arguments
    )

    def loss(params: Any, x: Array) -> Array:
      return jnp.square(model.apply(params, x).astype(jnp.float32)).sum()

    compiled = jax.jit(traced_over(mesh, jax.grad(loss, argnums=(0, 1)))).lower(*placed).compile()
  traffic = hlo.traffic(compiled.as_text(), 1).memory
  return traffic / 2**30, compiled.memory_analysis().temp_size_in_bytes / 2**30


def main() -> None:
  """Prints a table of Markdown, a line as soon as it is known."""
  arguments = parser(__doc__)
  arguments.add_argument("--topology", default="v5e:2x2", help="TPU, of which one device is used (default: v5e:2x2)")
  arguments.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE")
  arguments.add_argument("--remat", default="dots", help="what the backward pass recomputes (default: dots)")
  implementations = list(IMPLEMENTATIONS)
  arguments.add_argument("--implementations", nargs="+", choices=implementations, default=implementations)
  args = arguments.parse_args()
  print("| tower | sequences | tokens | heads |", *(f"{name} |" for name in args.implementations))
  print("|---|---|---|---|", *("---|" for _ in args.implementations))
  for name in args.shapes:
    shape = SHAPES[name]
    print(f"| {name} | {shape.batch} | {shape.tokens} | {shape.heads} x {shape.head_width} |", end="", flush=True)
    for implementation in args.implementations:
      print(f" {_figures(shape, implementation, args)} |", end="", flush=True)
    print(flush=True)


def _figures(shape: Shape, implementation: str, args: argparse.Namespace) -> str:
  try:
    traffic, temporaries = measure(shape, implementation, args.topology, args.remat)
  except jax.errors.JaxRuntimeError as error:
    print(str(error).splitlines()[0], file=sys.stderr)
    return "does not compile"
  return f"{traffic:.1f} ({temporaries:.1f})"


if __name__ == "__main__":
  main()
