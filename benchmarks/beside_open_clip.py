"""A train step of CLIP beside open_clip's, on the same device: python benchmarks/beside_open_clip.py

Both take the same weights, images and captions, in the same dtype, and do the same: forward, symmetric InfoNCE,
backward, AdamW with the same numbers, clipping of the scale. That they do is checked: the losses of the first two steps
must agree. Then they take turns, round after round, so that a noisy machine treats them alike. "trimmed" is our step
with `config.model.text.buckets`: texts are cut behind the longest of a batch, which a causal mask makes exact.

On a CPU both have all cores. On a GPU open_clip runs under torch.compile with its fastest settings; the table also
gives images per second, and the share of the highest product rate measured on that device that the model's FLOPs make.

  make bench-open-clip                                       on this machine; installs PyTorch and open_clip apart
  ... --source "webdataset:data/test-*.tar"                  captions of a source (default: embedded scenes)
  ... --model ViT-B-16 --dtype bfloat16 --batch-size 256     for a GPU
"""

import argparse
from collections.abc import Callable, Iterator
import os
from pathlib import Path
import tempfile
import time
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both need room on a GPU, and have one
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")

import jax
import jax.numpy as jnp
import numpy as np
from rivals import import_torchvision
from steps import Step, compile_step
import torch

from declip_jax import build
from declip_jax import config as config_lib
from declip_jax.build import make_step
from declip_jax.data.sources import open_source
from declip_jax.planning import flops
from declip_jax.sharding import batch_sharding, to_global
from declip_jax.training.state import abstract_state, create_state
from declip_jax.weights.initial import load_weights
from declip_jax.weights.read import read

import_torchvision()
import open_clip  # noqa: E402 (imports torchvision)

BATCHES = 8  # that the steps go round
ADAMW = {"lr": 5e-4, "betas": (0.9, 0.98), "eps": 1e-6}
DECAY = 0.2


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default="ViT-B-32", help="open_clip's name of a ViT (default: ViT-B-32)")
  parser.add_argument("--batch-size", type=int, default=16, help="pairs (default: 16)")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations")
  parser.add_argument("--remat", default="dots", help="config.model.remat of ours (default: dots, as in our configs)")
  parser.add_argument("--unroll", type=int, default=1, help="config.model.unroll of ours (default: 1)")
  parser.add_argument("--buckets", type=int, nargs="+", default=[16, 24, 32, 48], help="of the trimmed step")
  parser.add_argument("--source", default="scenes:train/256/32", help="whose captions are read")
  parser.add_argument("--rounds", type=int, default=10, help="timed steps of each (default: 10)")
  parser.add_argument("--declip", action="store_true", help="also time our DeCLIP step with this architecture")
  parser.add_argument("--profile", type=Path, help="folder for a trace of two of our steps")
  args = parser.parse_args()
  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.manual_seed(0)
  model = open_clip.create_model(args.model)
  captions = read_captions(args.source, args.batch_size * BATCHES)
  with tempfile.TemporaryDirectory() as folder:
    torch.save(model.state_dict(), f"{folder}/model.pt")
    contestants = {
      "declip_jax": Ours(args, f"{folder}/model.pt", captions, ()),
      "trimmed": Ours(args, f"{folder}/model.pt", captions, tuple(args.buckets)),
    }
  contestants["open_clip"] = Theirs(args, model, contestants["declip_jax"].batches, device)
  losses = {name: [one.take() for _ in range(2)] for name, one in contestants.items()}
  tolerance = 2e-3 if args.dtype == "float32" else 5e-2
  for name, found in losses.items():
    np.testing.assert_allclose(found, losses["open_clip"], rtol=tolerance, err_msg=f"{name} does not do the same")
  if args.declip:
    contestants["DeCLIP"] = declip_step(args)
    contestants["DeCLIP"].take()
  seconds: dict[str, list[float]] = {name: [] for name in contestants}
  for _ in range(args.rounds):
    for name, one in contestants.items():
      start = time.perf_counter()
      one.take()
      seconds[name].append(time.perf_counter() - start)
  if args.profile:
    with jax.profiler.trace(args.profile):
      for _ in range(2):
        contestants["declip_jax"].take()
  counts = {name: contestants[name].flops for name in contestants if name not in ("trimmed", "open_clip")}
  print_table(args, seconds, counts, highest_rate(args.dtype))


def read_captions(location: str, count: int) -> list[str]:
  """The first captions of a source, from its start again where it is too short."""
  source = open_source(location)
  return [source[index % len(source)]["captions"][0] for index in range(count)]


class Ours:
  """Our step, and batches for it."""

  def __init__(self, args: argparse.Namespace, weights: str, captions: list[str], buckets: tuple[int, ...]):
    loaded = read(weights, {"image.activation": "gelu", "text.activation": "gelu"} if "quick" not in args.model else {})
    config = config_lib.default("clip")
    config.batch_size = args.batch_size
    config.data.image_size = loaded.view.size
    for part in ("image", "text"):
      config.model[part] = loaded.model[part]
    config.model.heads.embed_dim = loaded.model.heads.embed_dim
    config.model.text.buckets = buckets
    config.model.update({"dtype": args.dtype, "remat": args.remat, "unroll": args.unroll})
    config.optimizer.schedule, config.optimizer.warmup = "constant", config_lib.duration()
    config.optimizer.learning_rate, config.optimizer.weight_decay = ADAMW["lr"], DECAY
    (config.optimizer.b1, config.optimizer.b2), config.optimizer.epsilon = ADAMW["betas"], ADAMW["eps"]
    config.log_every, config.duration = 0, config_lib.duration(steps=10**6)
    built = build.build(config)
    shapes, model = built.batch_shape(args.batch_size), {"model": built.model, "optimizer": built.optimizer}
    abstract = abstract_state(shapes, built.mesh, **model)
    state = create_state(0, shapes, abstract, **model)
    params, collections, _ = load_weights(state.params, state.collections, loaded, ("image", "text", "heads"))
    self.state = state.replace(params=params, collections=collections)
    rng = np.random.default_rng(0)
    tokens = built.tokenizer(captions)[:, None]
    self.batches = [
      {"image": rng.integers(256, size=shapes["image"].shape, dtype=np.uint8), "text": text.astype(np.int32)}
      for text in np.split(tokens, BATCHES)
    ]
    placed = [to_global(batch, batch_sharding(built.mesh)) for batch in self.batches]
    traced = make_step(config, built, build.to_steps(config, 10**6), abstract).trace(abstract, placed[0])
    self.flops = flops.num_flops(traced.jaxpr)
    self._step, self._placed = traced.lower().compile(), round_and_round(placed)

  def take(self) -> float:
    """One step; returns its loss."""
    self.state, metrics = self._step(self.state, next(self._placed))
    jax.block_until_ready(self.state)
    return float(metrics["loss"])


def declip_step(args: argparse.Namespace) -> Step:
  """DeCLIP's step with the same architecture, on noise and short captions: three times the views."""
  config = config_lib.default("declip", args.model.replace("-", "/").replace("ViT/", "ViT-"))
  config.batch_size = args.batch_size
  config.model.update({"dtype": args.dtype, "remat": args.remat, "unroll": args.unroll})
  return compile_step(config)


class Theirs:
  """open_clip's step on the same batches."""

  def __init__(self, args: argparse.Namespace, model: torch.nn.Module, batches: list[dict], device: str):
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (config_lib.OPENAI_MEAN, config_lib.OPENAI_STD))
    self._batches = round_and_round(
      [
        (
          ((torch.from_numpy(batch["image"][:, 0]).permute(0, 3, 1, 2) / 255 - mean) / std).contiguous().to(device),
          torch.from_numpy(batch["text"][:, 0]).long().to(device),
        )
        for batch in batches
      ]
    )
    self._model, self._device = model.to(device).train(), device
    self._forward = torch.compile(model, mode="max-autotune-no-cudagraphs") if device == "cuda" else model
    self._loss = open_clip.ClipLoss()
    named = list(model.named_parameters())
    kept = [p for name, p in named if p.ndim < 2 or "bn" in name or "ln" in name or "bias" in name]
    others = {id(p) for p in kept}
    groups = [
      {"params": kept, "weight_decay": 0.0},
      {"params": [p for _, p in named if id(p) not in others], "weight_decay": DECAY},
    ]
    self._optimizer = torch.optim.AdamW(groups, **ADAMW, fused=device == "cuda")
    if device == "cuda":
      torch.set_float32_matmul_precision("high")
    self._autocast = {"device_type": device, "dtype": torch.bfloat16, "enabled": args.dtype == "bfloat16"}

  def take(self) -> float:
    """One step; returns its loss."""
    image, text = next(self._batches)
    self._optimizer.zero_grad()
    with torch.autocast(**self._autocast):
      image_features, text_features, scale = self._forward(image, text)[:3]
      loss = self._loss(image_features, text_features, scale)
    loss.backward()
    self._optimizer.step()
    with torch.no_grad():
      self._model.logit_scale.clamp_(0, np.log(100))
    if self._device == "cuda":
      torch.cuda.synchronize()
    return loss.item()


def round_and_round(batches: list[Any]) -> Iterator[Any]:
  """The batches, again and again."""
  while True:
    yield from batches


def highest_rate(dtype: str, size: int = 8192) -> float:
  """FLOP/s of a large product of matrices on the device, as measured; on a CPU a smaller one."""
  size = size if jax.default_backend() != "cpu" else 2048
  x = jnp.ones((size, size), dtype)
  product: Callable = jax.jit(lambda x: x @ x)
  jax.block_until_ready(product(x))
  seconds = []
  for _ in range(10):
    start = time.perf_counter()
    jax.block_until_ready(product(x))
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)


def print_table(
  args: argparse.Namespace, seconds: dict[str, list[float]], counts: dict[str, float], highest: float
) -> None:
  """A row for each contestant; ratios are medians over the rounds, for neighbours in time are alike."""
  kind = jax.devices()[0].device_kind
  print(
    f"{args.model}, {args.batch_size} pairs, {args.dtype}, {kind}; PyTorch {torch.__version__}, JAX {jax.__version__}"
  )
  known = ", ".join(f"{name} {count / 1e9:,.1f}" for name, count in counts.items())
  print(f"highest rate of products {highest / 1e12:.2f} TFLOP/s; GFLOPs of a step: {known}")
  counts = {"open_clip": counts["declip_jax"], **counts}
  print(f"{'':12}{'best ms':>9}{'median ms':>11}{'pairs/s':>10}{'times open_clip':>17}{'of highest rate':>17}")
  for name, times in seconds.items():
    faster = np.median(np.asarray(seconds["open_clip"]) / np.asarray(times))
    used = f"{counts[name] / min(times) / highest:16.0%}" if name in counts else ""
    print(f"{name:12}{1e3 * min(times):9.0f}{1e3 * np.median(times):11.0f}", end="")
    print(f"{args.batch_size / min(times):10.1f}{faster:17.2f}{used}")


if __name__ == "__main__":
  main()
