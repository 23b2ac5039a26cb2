"""Memory and time of the forms of InfoNCE for larger and larger global batches: python benchmarks/scale.py

Value and gradient for embeddings of one view a side, as the compiler plans them for one of eight devices: MiB of its
arguments, results and temporary arrays together. Beside our forms stand two of open_clip's, written here as each of its
processes computes them, in the words of its flags: by default every process makes the whole matrix of logits, with
`--local-loss` its own rows and its own columns. (open_clip without `--gather-with-grad` drops gradients between
processes; that is not cheaper, and not shown.)

Times are those of the compiled program, the forms in turn, round after round, and relative to "plain"; on eight devices
that a CPU plays they say how much more there is to compute, and nothing about a network. --topology compiles for a TPU
instead, without any (it needs `pip install -e '.[tpu]'`), and times nothing.
"""

import argparse
from collections.abc import Callable
import os
import time

DEVICES = 8
FORMS = ("plain", "chunked", "ring")
RIVALS = ("open_clip", "open_clip local")


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    "--batches", type=int, nargs="+", default=[2**k for k in range(12, 18)], help="global batch sizes"
  )
  parser.add_argument("--dim", type=int, default=512, help="of the embeddings (default: 512)")
  parser.add_argument("--block", type=int, default=0, help="candidates of a chunk (default: by the sizes)")
  parser.add_argument("--timed", type=int, default=8192, help="largest batch that is also timed (default: 8192)")
  parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
  parser.add_argument("--topology", help="a TPU topology such as v5e:16x16")
  args = parser.parse_args()
  if not args.topology:
    os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS=f"--xla_force_host_platform_device_count={DEVICES}")
  print_table(args)


def print_table(args: argparse.Namespace) -> None:
  """A row for each batch."""
  import jax  # behind the environment
  import jax.numpy as jnp
  from jax.sharding import NamedSharding, PartitionSpec
  import numpy as np

  from declip_jax.objectives.blockwise import Method
  from declip_jax.objectives.contrastive import info_nce
  from declip_jax.planning.topology import topology_devices
  from declip_jax.sharding import make_mesh

  mesh = make_mesh(-1, 1, topology_devices(args.topology) if args.topology else jax.devices())
  rows, whole = NamedSharding(mesh, PartitionSpec(mesh.axis_names)), NamedSharding(mesh, PartitionSpec())

  def ours(kind: str) -> Callable:
    method = Method(kind, mesh, args.block if kind == "chunked" else 0)
    return jax.value_and_grad(
      lambda x, y, s: info_nce(x[None], y[None], s, method=method).loss[0, 0], argnums=(0, 1, 2)
    )

  def theirs(local: bool) -> Callable:
    axes = mesh.axis_names

    def loss(x: jax.Array, y: jax.Array, scale: jax.Array) -> jax.Array:
      all_x, all_y = (jax.lax.all_gather(side, axes, tiled=True) for side in (x, y))
      if local:
        logits, first = (scale * x @ all_y.T, scale * y @ all_x.T), jax.lax.axis_index(axes) * len(x)
      else:
        logits, first = (scale * all_x @ all_y.T, (scale * all_x @ all_y.T).T), 0
      own = first + jnp.arange(len(logits[0]))[:, None]
      return sum(-jnp.take_along_axis(jax.nn.log_softmax(one), own, axis=1).mean() for one in logits) / 2

    def step(x: jax.Array, y: jax.Array, scale: jax.Array) -> tuple:
      value, gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))(x, y, scale)
      of_x, of_y, of_scale = gradient  # of rows, those of all processes, added by the transposed gather
      return jax.lax.pmean(value, axes), (of_x / mesh.size, of_y / mesh.size, jax.lax.pmean(of_scale, axes))

    split, all_ = PartitionSpec(axes), PartitionSpec()
    specs = {"in_specs": (split, split, all_), "out_specs": (all_, (split, split, all_)), "check_vma": False}
    return jax.shard_map(step, mesh=mesh, **specs)

  functions = {kind: ours(kind) for kind in FORMS} | {
    name: theirs(local) for name, local in zip(RIVALS, (False, True), strict=True)
  }
  print(f"InfoNCE of [batch {args.dim}] on {mesh.size} x {mesh.devices.flat[0].device_kind}: MiB a device", end="")
  print("" if args.topology else ", and time relative to plain")
  header = "".join(f"{name:>17}" for name in functions)
  timed = "" if args.topology else "".join(f"{name + ' time':>22}" for name in (*FORMS[1:], *RIVALS))
  print(f"{'batch':>8}{header}{timed}", flush=True)
  for batch in args.batches:
    shapes = [jax.ShapeDtypeStruct((batch, args.dim), jnp.float32, sharding=rows)] * 2
    shapes.append(jax.ShapeDtypeStruct((), jnp.float32, sharding=whole))
    out = whole, (rows, rows, whole)
    compiled, line = {}, f"{batch:8,}"
    for name, function in functions.items():
      try:
        compiled[name] = jax.jit(function, out_shardings=out).lower(*shapes).compile()
      except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
          raise
        line += f"{'does not fit':>17}"
        continue
      about = compiled[name].memory_analysis()
      total = about.argument_size_in_bytes + about.output_size_in_bytes + about.temp_size_in_bytes
      line += f"{total / 2**20:17,.1f}"
    if not args.topology and batch <= args.timed:
      rng = np.random.default_rng(0)
      x, y = rng.normal(size=(2, batch, args.dim)).astype(np.float32) / args.dim**0.5
      inputs = jax.device_put(x, rows), jax.device_put(y, rows), jax.device_put(np.float32(14), whole)
      seconds = {name: [] for name in compiled}
      found = {name: one(*inputs) for name, one in compiled.items()}  # warms up
      for one in found.values():  # all compute the same
        for ours, plain in zip(jax.tree.leaves(one), jax.tree.leaves(found["plain"]), strict=True):
          np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5 / batch)
      for _ in range(args.rounds):
        for name, one in compiled.items():
          start = time.perf_counter()
          jax.block_until_ready(one(*inputs))
          seconds[name].append(time.perf_counter() - start)
      best = {name: min(times) for name, times in seconds.items()}
      line += "".join(f"{best[name] / best['plain']:22.2f}" for name in (*FORMS[1:], *RIVALS))
    print(line, flush=True)


if __name__ == "__main__":
  main()
