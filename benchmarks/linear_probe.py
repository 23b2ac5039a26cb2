"""The sweep of a linear probe, compared with scikit-learn's on the same features: python benchmarks/linear_probe.py

Features are random: classes are Gaussian, with axes of unequal variance and a mean that is not zero, as the features of
towers are. Both take CLIP's path through the 97 strengths, 15 fits and one of training and validation split together,
and stop at the same largest entry of the gradient or after 1,000 iterations. Objectives are computed in float64. Our
time includes compiling; scikit-learn gets float32 as well, with which it is faster.

  make bench-probe                         installs scikit-learn in an environment of its own
  ... --tolerance 1e-4                     scikit-learn's default
  ... --topology v5e:2x4 --train 1281167 --val 50000 --width 1024 --classes 1000

With --topology, nothing is fitted: the programs are compiled for a TPU, with pip install -e '.[tpu]' but without a TPU,
and the table shows memory, FLOPs of a pass, and the least time of passes by the peak figures of the device. Products in
float32 with the highest precision are six of bfloat16 each.
"""

import argparse
import time
from typing import Any

from command import parser
import jax
import jax.numpy as jnp
import numpy as np
from optional_imports import optional_import

from declip_jax.evals import linear_probe, logistic_regression
from declip_jax.evals.logistic_regression import Axes, Data, Inputs, Linear
from declip_jax.evals.rows import Labelled, ProbeData, padded_rows
from declip_jax.planning import devices as device_table
from declip_jax.planning import flops, hlo
from declip_jax.planning.report import available_memory, least_times
from declip_jax.planning.topology import topology_devices
from declip_jax.sharding import batch_sharding, make_mesh, replicated

sklearn, threadpoolctl = optional_import("sklearn.linear_model"), optional_import("threadpoolctl")

PRODUCTS = 6  # of bfloat16, in one of float32 with the highest precision (jax.default_matmul_precision)
COARSE, HALVING = 7, 2  # fits that share their passes


def main() -> None:
  """Prints the table."""
  arguments = parser(__doc__)
  arguments.add_argument("--train", type=int, default=50_000, help="rows of the training split (default: 50000)")
  arguments.add_argument("--val", type=int, default=10_000, help="rows of the validation split (default: 10000)")
  arguments.add_argument("--width", type=int, default=512, help="features (default: 512)")
  arguments.add_argument("--classes", type=int, default=10, help="classes (default: 10)")
  arguments.add_argument("--tolerance", type=float, default=1e-5, help="of the gradient (default: 1e-5)")
  arguments.add_argument(
    "--theirs", type=float, nargs="+", help="values of C that scikit-learn fits (default: all of the path)"
  )
  arguments.add_argument("--topology", help="TPU topology to compile for, such as v5e:2x4")
  args = arguments.parse_args()
  (plan if args.topology else compare)(args)


def random_features(args: argparse.Namespace) -> ProbeData:
  """Features of Gaussian classes whose axes have variances from 1 to 1e-4."""
  rng = np.random.default_rng(0)
  deviation = np.logspace(0, -2, args.width, dtype=np.float32)
  axes = np.linalg.qr(rng.normal(size=(args.width, args.width)))[0].astype(np.float32)
  centres = rng.normal(size=(args.classes, args.width)).astype(np.float32) * 0.3
  mean = rng.normal(size=args.width).astype(np.float32)

  def rows(count: int) -> Labelled:
    label = rng.integers(0, args.classes, count)
    noise = rng.normal(size=(count, args.width)).astype(np.float32)
    return Labelled(((noise + centres[label]) * deviation) @ axes + mean, label)

  train, val, test = rows(args.train), rows(args.val), rows(args.val)
  return ProbeData(train, test, top1, args.classes, make_mesh(-1, 1), val)


def top1(scores: np.ndarray, label: np.ndarray) -> float:
  """Accuracy."""
  return float((scores.argmax(axis=1) == label).mean())


def objective(rows: Labelled, strength: float, kernel: np.ndarray, bias: np.ndarray) -> float:
  """Mean loss and penalty in float64."""
  logits = rows.features.astype(np.float64) @ kernel + bias
  largest = logits.max(axis=1)
  loss = np.log(np.exp(logits - largest[:, None]).sum(axis=1)) + largest - logits[np.arange(len(logits)), rows.label]
  return float(loss.mean() + (kernel**2).sum() / (2 * strength * len(logits)))


def compare(args: argparse.Namespace) -> None:
  """Times both sweeps on the same features and prints their fits."""
  split = random_features(args)
  start = time.perf_counter()
  ours = linear_probe.sweep(split, tolerance=args.tolerance)
  cold = time.perf_counter() - start
  start = time.perf_counter()
  ours = linear_probe.sweep(split, tolerance=args.tolerance)
  warm = time.perf_counter() - start
  print(f"{args.train:,} + {args.val:,} rows x {args.width}, {args.classes} classes, gradient {args.tolerance:g}")
  print(f"ours: {cold:.1f} s, {warm:.1f} s once compiled", flush=True)
  header = ("C", "ours iter.", "passes", "gradient", "val", "their iter.", "s", "val")
  print("".join(f"{name:>13}" for name in header), flush=True)
  threads = faster_threads(split.train, args.tolerance)
  seconds = []
  for fit in ours.fits:
    values = (f"{fit.strength:.2e}", fit.iterations, fit.passes, f"{fit.gradient:.1e}", f"{fit.score:.4f}")
    if not args.theirs or np.isclose(args.theirs, fit.strength).any():
      model, took = fitted(split.train, fit.strength, args.tolerance, threads)
      seconds.append(took)
      values += (model.n_iter_.max(), f"{took:.1f}", f"{model.score(split.val.features, split.val.label):.4f}")
    print("".join(f"{value:>13}" for value in values), flush=True)
  both = Labelled(*map(np.concatenate, zip(split.train, split.val, strict=True)))
  model, took = fitted(both, ours.chosen.strength, args.tolerance, threads)
  print(f"refit with C = {ours.chosen.strength:.2e}: {took:.1f} s and {model.n_iter_.max()} iterations of scikit-learn")
  best = objective(both, ours.chosen.strength, ours.classifier.kernel, ours.classifier.bias)
  theirs = objective(both, ours.chosen.strength, model.coef_.T, model.intercept_)
  print(f"objective of the refit: ours {best:.8f}, theirs {theirs:.8f}, ours / theirs - 1 = {best / theirs - 1:.1e}")
  accuracy = model.score(split.test.features, split.test.label)
  print(f"test accuracy: ours {top1(ours.scores, ours.label):.4f}, theirs {accuracy:.4f}")
  print(f"ours, 16 fits: {cold:.1f} s, {warm:.1f} s once compiled")
  print(f"scikit-learn, {len(seconds) + 1} fits with {threads or 'all'} threads: {sum(seconds) + took:.1f} s")


def faster_threads(rows: Labelled, tolerance: float) -> int | None:
  """The number of threads with which scikit-learn is faster: one, or None for all.

  Where other programs use the machine, its threads wait for each other.
  """
  return min((None, 1), key=lambda threads: fitted(rows, 1e-6, tolerance, threads)[1])


def fitted(rows: Labelled, strength: float, tolerance: float, threads: int | None) -> tuple[Any, float]:
  """scikit-learn's model, and the seconds that it took."""
  with threadpoolctl.threadpool_limits(threads):
    start = time.perf_counter()
    model = sklearn.LogisticRegression(C=strength, tol=tolerance, max_iter=1000).fit(rows.features, rows.label)
    return model, time.perf_counter() - start


def plan(args: argparse.Namespace) -> None:
  """Compiles the programs of the sweep for a topology and prints what they cost."""
  mesh = make_mesh(-1, 1, topology_devices(args.topology))
  device, peak = mesh.devices.flat[0], device_table.find(mesh.devices.flat[0].device_kind)
  print(
    f"{args.train:,} + {args.val:,} rows x {args.width}, {args.classes} classes on {mesh.size} x {device.device_kind}"
  )
  programs = (
    ("coarse", COARSE, args.train),
    ("halving", HALVING, args.train),
    ("refit", 1, args.train + args.val),
  )
  for name, fits, rows in programs:
    data = rows_of(rows, args, mesh)
    start = time.perf_counter()
    program = logistic_regression.programs(mesh).minimise.lower(*arguments_of(data, fits, args, mesh)).compile()
    used = program.memory_analysis()
    needed = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
    work, traffic = one_pass(data, fits, args, mesh)
    times = least_times(PRODUCTS * work / mesh.size, traffic, peak)
    seconds = time.perf_counter() - start
    memory = f"{needed / 2**30:.2f} of {available_memory(device) / 2**30:.2f} GiB per device"
    print(f"{name} ({fits} fits): {memory}; a pass has {work:.4g} FLOPs and takes at least {1e3 * times.step:.1f} ms")
    parts = {"compute": times.compute, "memory": times.memory, "links": times.interconnect}
    print(
      "  " + ", ".join(f"{key} {1e3 * value:.1f} ms" for key, value in parts.items()) + f"; compiled in {seconds:.0f} s"
    )


def rows_of(count: int, args: argparse.Namespace, mesh: Any) -> Data:
  """Shapes of a split."""
  rows = mesh.size * padded_rows(-(-count // mesh.size))
  split = batch_sharding(mesh)
  return Data(
    jax.ShapeDtypeStruct((rows, args.width), jnp.float32, sharding=split),
    jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=split),
  )


def arguments_of(data: Data, fits: int, args: argparse.Namespace, mesh: Any) -> tuple:
  """Shapes of the arguments of `Programs.minimise`."""
  whole = replicated(mesh)

  def shape(*size: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(size, dtype, sharding=whole)

  axes = Axes(shape(args.width), shape(args.width, args.width))
  inputs = Inputs(data, axes, shape(args.classes, dtype=jnp.bool_), shape())
  start = Linear(shape(fits, args.width, args.classes), shape(fits, args.classes))
  search = jax.eval_shape(logistic_regression.programs(mesh).first, inputs, shape(fits), start)
  search = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), search)
  return inputs, search, shape(dtype=jnp.int32), shape(dtype=jnp.int32)


def one_pass(data: Data, fits: int, args: argparse.Namespace, mesh: Any) -> tuple[float, hlo.Traffic]:
  """FLOPs of an evaluation of all objectives and their gradients over all devices, and its traffic."""
  inputs, search, *_ = arguments_of(data, fits, args, mesh)

  def evaluate(data: Data, mean: jax.Array, linear: Linear, answered: jax.Array) -> Any:
    with jax.default_matmul_precision("highest"):
      return logistic_regression.loss_and_gradient(data, mean, linear, answered, mesh)

  traced = jax.jit(evaluate, out_shardings=replicated(mesh)).trace(
    data, inputs.axes.mean, search.point, inputs.answered
  )
  return flops.num_flops(traced.jaxpr), hlo.traffic(traced.lower().compile().as_text(), mesh.size)


if __name__ == "__main__":
  main()
