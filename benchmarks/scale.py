"""Memory and time of InfoNCE by each method, for growing global batches: python benchmarks/scale.py

Value and gradient for embeddings of one view of image and text: MiB of arguments, results and temporary arrays together
on one of eight devices, as planned by the compiler. Besides our methods it measures two of open_clip's, rewritten here
as each of its processes computes them: by default every process computes the whole matrix of logits, with
`--local-loss` its own rows and columns. (open_clip without `--gather-with-grad` drops gradients between processes;
that is not cheaper, and is not shown.)

Times are those of the compiled program, all methods in turn, round after round, relative to "plain". Eight devices
emulated by a CPU show how much more there is to compute, and nothing about a network. --topology compiles for a TPU
instead. It needs pip install -e '.[tpu]' but no TPU, and measures no times.
"""

import argparse
from collections.abc import Callable, Mapping
import os
from typing import Any

from command import parser
from rounds import seconds_in_turn

DEVICES = 8
METHODS = ("plain", "chunked", "ring")
RIVALS = ("open_clip", "open_clip local")


def main() -> None:
  """Prints the table."""
  arguments = parser(__doc__)
  arguments.add_argument(
    "--batches",
    type=int,
    nargs="+",
    default=[2**k for k in range(12, 18)],
    help="global batch sizes (default: powers of two from 4096 to 131072)",
  )
  arguments.add_argument("--dim", type=int, default=512, help="width of the embeddings (default: 512)")
  arguments.add_argument("--block", type=int, default=0, help="candidates per chunk (default: chosen by size)")
  arguments.add_argument("--timed", type=int, default=8192, help="largest batch that is also timed (default: 8192)")
  arguments.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
  arguments.add_argument("--topology", help="TPU topology to compile for, such as v5e:16x16")
  args = arguments.parse_args()
  if not args.topology:
    os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS=f"--xla_force_host_platform_device_count={DEVICES}")
  print_table(args)


def print_table(args: argparse.Namespace) -> None:
  """Prints a row for each batch."""
  import jax  # after the environment is set
  import jax.numpy as jnp
  from jax.sharding import NamedSharding, PartitionSpec

  from declip_jax.planning.topology import topology_devices
  from declip_jax.sharding import make_mesh

  mesh = make_mesh(-1, 1, topology_devices(args.topology) if args.topology else jax.devices())
  split, whole = NamedSharding(mesh, PartitionSpec(mesh.axis_names)), NamedSharding(mesh, PartitionSpec())
  functions = {name: our_loss(name, mesh, args.block) for name in METHODS}
  functions |= {name: their_loss(mesh, local) for name, local in zip(RIVALS, (False, True), strict=True)}
  compared = (*METHODS[1:], *RIVALS)
  print(f"InfoNCE of [batch {args.dim}] on {mesh.size} x {mesh.devices.flat[0].device_kind}: MiB per device", end="")
  print("" if args.topology else ", and time relative to plain")
  timed = "" if args.topology else "".join(f"{name + ' time':>22}" for name in compared)
  print(f"{'batch':>8}" + "".join(f"{name:>17}" for name in functions) + timed, flush=True)
  for batch in args.batches:
    shapes = [jax.ShapeDtypeStruct((batch, args.dim), jnp.float32, sharding=split)] * 2
    shapes.append(jax.ShapeDtypeStruct((), jnp.float32, sharding=whole))
    programs, line = {}, f"{batch:8,}"
    for name, function in functions.items():
      try:
        programs[name] = jax.jit(function, out_shardings=(whole, (split, split, whole))).lower(*shapes).compile()
      except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
          raise
        line += f"{'does not fit':>17}"
        continue
      used = programs[name].memory_analysis()
      total = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
      line += f"{total / 2**20:17,.1f}"
    if not args.topology and batch <= args.timed:
      ratios = relative_times(programs, shapes, args.rounds)
      line += "".join(f"{ratios[name]:22.2f}" for name in compared)
    print(line, flush=True)


def our_loss(name: str, mesh: Any, block: int) -> Callable:
  """Value and gradient of our InfoNCE with respect to image, text and scale."""
  import jax

  from declip_jax.objectives.blockwise import Method
  from declip_jax.objectives.contrastive import info_nce

  method = Method(name, mesh, block if name == "chunked" else 0)
  return jax.value_and_grad(lambda x, y, s: info_nce(x[None], y[None], s, method=method).loss[0, 0], argnums=(0, 1, 2))


def their_loss(mesh: Any, local: bool) -> Callable:
  """Value and gradient of open_clip's loss, with `--gather-with-grad` and, if `local`, `--local-loss`."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import PartitionSpec

  axes = mesh.axis_names

  def loss(x: jax.Array, y: jax.Array, scale: jax.Array) -> jax.Array:
    all_x, all_y = (jax.lax.all_gather(side, axes, tiled=True) for side in (x, y))
    if local:
      logits, first = (scale * x @ all_y.T, scale * y @ all_x.T), jax.lax.axis_index(axes) * len(x)
    else:
      logits, first = (scale * all_x @ all_y.T, (scale * all_x @ all_y.T).T), 0
    target = first + jnp.arange(len(logits[0]))[:, None]
    return sum(-jnp.take_along_axis(jax.nn.log_softmax(side), target, axis=1).mean() for side in logits) / 2

  def step(x: jax.Array, y: jax.Array, scale: jax.Array) -> tuple:
    value, (grad_x, grad_y, grad_scale) = jax.value_and_grad(loss, argnums=(0, 1, 2))(x, y, scale)
    # The transposed gather has summed the gradients of x and y over all processes.
    return jax.lax.pmean(value, axes), (grad_x / mesh.size, grad_y / mesh.size, jax.lax.pmean(grad_scale, axes))

  split, whole = PartitionSpec(axes), PartitionSpec()
  specs = {"in_specs": (split, split, whole), "out_specs": (whole, (split, split, whole)), "check_vma": False}
  return jax.shard_map(step, mesh=mesh, **specs)


def relative_times(programs: Mapping[str, Callable], shapes: list[Any], rounds: int) -> dict[str, float]:
  """The fastest time of each program divided by that of "plain"; checks that their results agree."""
  import jax
  import numpy as np

  rng, (batch, dim) = np.random.default_rng(0), shapes[0].shape
  values = (*(rng.normal(size=(2, batch, dim)).astype(np.float32) / dim**0.5), np.float32(14))
  inputs = [jax.device_put(value, shape.sharding) for value, shape in zip(values, shapes, strict=True)]
  results = {name: program(*inputs) for name, program in programs.items()}  # warms up
  for result in results.values():
    for leaf, plain in zip(jax.tree.leaves(result), jax.tree.leaves(results["plain"]), strict=True):
      np.testing.assert_allclose(leaf, plain, rtol=1e-4, atol=1e-5 / batch)
  calls = {name: lambda program=program: jax.block_until_ready(program(*inputs)) for name, program in programs.items()}
  fastest = {name: min(times) for name, times in seconds_in_turn(calls, rounds).items()}
  return {name: seconds / fastest["plain"] for name, seconds in fastest.items()}


if __name__ == "__main__":
  main()
