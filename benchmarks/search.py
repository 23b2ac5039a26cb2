"""Latency of the search page for four clients at once, and hostile requests: python benchmarks/search.py

The server runs in this process, with random weights and random embeddings of scenes that are rendered when they are
looked at, and each client in a process of its own. Every query has a text that the model encodes anew; every fifth has
two, and every tenth an image of the source too. The time of a query is that from the connection to the last byte of 24
results.

  ... --features_dtype float16     the embeddings take half the space
"""

import argparse
from collections import Counter
import json
import os
from pathlib import Path
import random
import re
import subprocess
import sys
import tempfile
import threading
import time

from command import parser
import jax
import numpy as np
from search_requests import hostile, query, send, timed

from declip_jax import architectures, config
from declip_jax.clip import Clip
from declip_jax.data.images import EvalView
from declip_jax.data.sources import open_source
from declip_jax.evals.features import Features
from declip_jax.image_search.index import ImageIndex
from declip_jax.image_search.searcher import Searcher
from declip_jax.image_search.server import SearchServer
from declip_jax.sharding import make_mesh
from declip_jax.weights.layout import abstract_variables
from declip_jax.weights.read import Weights

HERE = Path(__file__).parent
SIDE = 64  # pixels of the scenes
REPEATS = 20  # of a search without the model


def main() -> None:
  """Prints latencies and the statuses of the answers to hostile requests."""
  arguments = parser(__doc__)
  arguments.add_argument("--architecture", default="ViT-B/32", help="of the model (default: ViT-B/32)")
  arguments.add_argument("--images", type=int, default=100_000, help="images (default: 100000)")
  arguments.add_argument("--queries", type=int, default=1000, help="queries of all clients (default: 1000)")
  arguments.add_argument("--clients", type=int, default=4, help="clients (default: 4)")
  arguments.add_argument("--hostile", type=int, default=1000, help="hostile requests (default: 1000)")
  arguments.add_argument("--features_dtype", choices=("float32", "float16"), default="float32")
  args = arguments.parse_args()
  clip = random_clip(args.architecture)
  with tempfile.TemporaryDirectory() as folder:
    source = open_source(f"scenes:train/{args.images}/{SIDE}")
    features = random_features(args, clip.feature_widths[1], Path(folder) / "embedding.npy")
    searcher = Searcher(clip, source, features)
    searcher.compile()
    shape = " x ".join(map(str, features.embedding.shape))
    print(f"{args.architecture} on {jax.default_backend()}, embeddings {shape} in {args.features_dtype}", flush=True)
    time_parts(clip, features.embedding)
    server = SearchServer(0)
    port = server.server_address[1]
    thread = threading.Thread(target=server.serve, args=(searcher,), daemon=True)
    thread.start()
    time_queries(args, port)
    send_hostile(args, port)
    server.shutdown()
    thread.join()


def random_clip(architecture: str) -> Clip:
  """A model with random weights."""
  fields, rng = config.default("clip", architecture).model.to_dict(), np.random.default_rng(0)
  fields["dtype"], heads = "float32", ("joint",)
  size = architectures.build(architecture).image_size
  _, shapes = abstract_variables(fields, heads, size)
  drawn = jax.tree.map(lambda leaf: rng.normal(0, 0.02, leaf.shape).astype(leaf.dtype), shapes)
  return Clip(Weights("random weights", fields, heads, **drawn, view=EvalView(size)), make_mesh(-1, 1))


def random_features(args: argparse.Namespace, width: int, path: Path) -> Features:
  """Random embeddings in a file that is mapped into memory."""
  rng = np.random.default_rng(0)
  np.save(path, rng.standard_normal((args.images, width), dtype=np.float32).astype(args.features_dtype))
  count, nothing = args.images, np.zeros((args.images, 0), np.float32)
  texts = [f"image {number}" for number in range(count)]
  label, captions = np.full(count, -1, np.int32), [(text,) for text in texts]
  return Features(nothing, np.load(path, "r"), label, None, {}, texts, np.ones(count, bool), captions, texts)


def time_parts(clip: Clip, embedding: np.ndarray) -> None:
  """Prints the time of the parts of a query, and of alternatives: NumPy's conversion, JAX with a copy on the device."""
  index, rng = ImageIndex(embedding, np.ones(len(embedding), bool)), np.random.default_rng(1)
  unit = rng.standard_normal(embedding.shape[1], dtype=np.float32)
  on_device, tokens = jax.device_put(np.asarray(embedding)), clip.tokenizer(["a red circle"])
  product = jax.jit(lambda rows, one: rows.astype(np.float32) @ one)
  ways = {
    "search": lambda: index.search(unit, 0, 24),
    "products in NumPy": lambda: index.cosines(unit),
    "products after NumPy's conversion": lambda: converted(embedding, unit),
    "products in JAX": lambda: np.asarray(product(on_device, unit)),
    "text cut to 16 tokens": lambda: clip.text_features(tokens[:, :16]),
    "text": lambda: clip.text_features(tokens),
  }
  for name, way in ways.items():
    way()
    seconds = []
    for _ in range(REPEATS):
      start = time.perf_counter()
      way()
      seconds.append(time.perf_counter() - start)
    print(f"{name}: median {1e3 * np.median(seconds):.1f} ms", flush=True)


def converted(embedding: np.ndarray, unit: np.ndarray) -> list[np.ndarray]:
  """Products of blocks of as many rows as `ImageIndex` converts at once."""
  starts = range(0, len(embedding), 512)
  return [embedding[start : start + 512].astype(np.float32, copy=False) @ unit for start in starts]


def time_queries(args: argparse.Namespace, port: int) -> None:
  """Prints the latencies of all clients' queries."""
  command = [sys.executable, HERE / "search_requests.py", str(port), f"--queries={args.queries // args.clients}"]
  start = time.perf_counter()
  clients = [subprocess.Popen([*command, f"--seed={seed}"], stdout=subprocess.PIPE) for seed in range(args.clients)]
  answers = [client.communicate()[0] for client in clients]
  seconds = np.concatenate([json.loads(answer) for answer in answers])
  p50, p99 = 1e3 * np.quantile(seconds, [0.5, 0.99])
  print(f"{len(seconds):,} queries of {args.clients} clients in {time.perf_counter() - start:.1f} s: ", end="")
  print(f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, longest {1e3 * seconds.max():.1f} ms", flush=True)


def send_hostile(args: argparse.Namespace, port: int) -> None:
  """Prints the statuses of the answers; fails if one shows a file, or if the server does not answer afterwards.

  Raises:
    ValueError: the request and its answer.
  """
  rng, statuses = random.Random(0), Counter()
  shown = [
    line for path in ("/etc/passwd", __file__) for line in Path(path).read_bytes().splitlines() if len(line) > 20
  ]
  shown += [os.environ.get("PATH", "no PATH").encode()]
  for _ in range(args.hostile):
    request = hostile(rng)
    answer = send(port, request)
    status = re.match(rb"HTTP/1\.0 ([0-9]+) ", answer)
    statuses[status[1].decode() if status else "closed" if not answer else "no status"] += 1
    if any(line in answer for line in shown) or (status and status[1] == b"500"):
      raise ValueError(f"{request[:500]!r}: {answer[:500]!r}")
  print(
    f"{args.hostile:,} hostile requests: " + ", ".join(f"{count} x {name}" for name, count in sorted(statuses.items()))
  )
  print(f"a query afterwards: {1e3 * timed(port, query(rng, 0)):.1f} ms")


if __name__ == "__main__":
  main()
