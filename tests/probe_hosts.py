"""Every probe and every search on the arrays of the fixtures: tests/probe_hosts.py OUT PORT PROCESS.

As a command it is one of two processes, with one device each and unequal shares of the rows; the first writes OUT.
"""

import dataclasses
import sys

import jax
import numpy as np
import references as reference

from declip_jax.evals import few_shot, linear_probe, nearest, overlap, ranks, sgd_probe
from declip_jax.evals.rows import Labelled, ProbeData, first_row
from declip_jax.sharding import make_mesh


def top1(scores: np.ndarray, label: np.ndarray) -> float:
  return float((scores.argmax(axis=1) == label).mean())


def results() -> dict[str, np.ndarray]:
  """Scores of every probe, and results of every search; every process has to call this."""
  golden, mesh = reference.load("probes"), make_mesh(-1, 1)

  def local(x: np.ndarray) -> np.ndarray:
    first = len(x) // 3
    return x if jax.process_count() == 1 else np.split(x, [first])[jax.process_index()]

  def split(prefix: str, name: str) -> Labelled:
    return Labelled(local(golden[f"{prefix}/X_{name}"]), local(golden[f"{prefix}/y_{name}"]))

  train, val, test = (split("probe", name) for name in ("train", "val", "test"))
  data = ProbeData(train, test, top1, 7, mesh, val)
  swept = linear_probe.sweep(data, tolerance=1e-6)
  recipe = dataclasses.replace(sgd_probe.SGD, epochs=3, batch_size=50)
  stochastic = sgd_probe.sgd_probe(data, recipe=recipe, rates=(0.1, 0.3))
  train, test = (split("few", name) for name in ("train", "test"))
  votes, _ = nearest.knn(train, test, classes=8, mesh=mesh, neighbours=(5,))
  means, _ = nearest.nearest_mean(train, test, classes=8)
  few = ProbeData(train, test, top1, 8, mesh)
  pairs, copies = reference.load("retrieval"), reference.load("overlap")
  ranked = ranks.retrieval_ranks(pairs["image"], pairs["text"], pairs["text_to_image"])
  rows = local(copies["train"])
  duplicates = overlap.across_hosts(overlap.nearest(copies["evaluation"], [rows], first=first_row(len(rows))))
  return {
    "strengths": np.array([fit.strength for fit in swept.fits]),
    "swept": swept.scores,
    "label": swept.label,
    "stochastic": stochastic.scores,
    "weighted": votes[5](),
    "means": means,
    "text_ranks": ranked.image_to_text.high,
    "image_ranks": ranked.text_to_image.high,
    "duplicates": duplicates.index,
    "ridge": few_shot.ridge(few, shots=(1, 5)).scores,
    "logistic": few_shot.logistic(few, shots=(1, 5)).scores,
  }


def main(out: str, port: str, process: str) -> None:
  jax.config.update("jax_default_matmul_precision", "highest")
  jax.distributed.initialize(f"localhost:{port}", 2, int(process))
  found = results()
  if process == "0":
    np.savez(out, **found)


if __name__ == "__main__":
  main(*sys.argv[1:])
