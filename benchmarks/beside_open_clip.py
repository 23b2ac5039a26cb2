"""Compares a train step of CLIP with open_clip's on the same device: python benchmarks/beside_open_clip.py

Both have the same weights, images, captions and dtype, and compute the same step: forward, symmetric InfoNCE, backward,
AdamW with the same hyperparameters, clipping of the scale. The losses of the first two steps must agree. Then they take
turns, round after round, so that other load on the machine affects both alike. "trimmed" is our step as training takes
it: each batch is trimmed to its longest text, which is exact because of the causal mask.

On a CPU both use all cores. On a GPU open_clip runs under torch.compile with its fastest settings; the table also shows
images per second, and the model's FLOP/s as a share of the highest rate of a matrix product measured on the device.

  make bench-open-clip                                       on this machine; installs PyTorch in its own environment
  ... --source "webdataset:data/test-*.tar"                  captions of a source (default: rendered scenes)
  ... --model ViT-B-16 --dtype bfloat16 --batch-size 256     for a GPU
"""

import argparse
from collections.abc import Callable, Iterator
import itertools
import os
from pathlib import Path
import tempfile
import time
from typing import Any

from command import parser
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
from optional_imports import optional_import
from rounds import median_ratio, seconds_in_turn
from train_step import TrainStep, make_train_step, trimmed

from declip_jax import architectures, build
from declip_jax import config as config_lib
from declip_jax.data.sources import open_source
from declip_jax.planning.compile import compile_step
from declip_jax.sharding import batch_sharding, to_global
from declip_jax.training.state import create_state
from declip_jax.weights.initial import load_weights
from declip_jax.weights.read import read

torch, open_clip = optional_import("torch"), optional_import("open_clip")

BATCHES = 8  # the steps cycle through them
ADAMW = {"lr": 5e-4, "betas": (0.9, 0.98), "eps": 1e-6}
DECAY = 0.2


def main() -> None:
  """Prints the table."""
  arguments = parser(__doc__)
  arguments.add_argument("--model", default="ViT-B-32", help="a ViT of open_clip (default: ViT-B-32)")
  arguments.add_argument("--batch-size", type=int, default=16, help="pairs per step (default: 16)")
  arguments.add_argument(
    "--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of activations (default: float32)"
  )
  arguments.add_argument("--remat", default="dots", help="config.model.remat of our step (default: dots)")
  arguments.add_argument("--unroll", type=int, default=1, help="config.model.unroll of our step (default: 1)")
  arguments.add_argument("--source", default="scenes:train/256/32", help="data source of the captions")
  arguments.add_argument("--rounds", type=int, default=10, help="timed steps of each (default: 10)")
  arguments.add_argument("--declip", action="store_true", help="also time our DeCLIP step with this architecture")
  arguments.add_argument("--profile", type=Path, help="folder for a trace of two of our steps")
  args = arguments.parse_args()
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both share the memory of one GPU
  os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
  if torch is None or open_clip is None:
    arguments.error("PyTorch and open_clip are not installed; make bench-open-clip installs them")
  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.manual_seed(0)
  model = open_clip.create_model(args.model)
  captions = read_captions(args.source, args.batch_size * BATCHES)
  with tempfile.TemporaryDirectory() as folder:
    torch.save(model.state_dict(), f"{folder}/model.pt")
    steps = {
      "declip_jax": Ours(args, f"{folder}/model.pt", captions, trims=False),
      "trimmed": Ours(args, f"{folder}/model.pt", captions, trims=True),
    }
  steps["open_clip"] = Theirs(args, model, steps["declip_jax"].batches, device)
  losses = {name: [step() for _ in range(2)] for name, step in steps.items()}
  tolerance = 2e-3 if args.dtype == "float32" else 5e-2
  for name, found in losses.items():
    np.testing.assert_allclose(found, losses["open_clip"], rtol=tolerance, err_msg=f"losses of {name} and open_clip")
  if args.declip:
    steps["DeCLIP"] = declip_step(args)
    steps["DeCLIP"]()
  seconds = seconds_in_turn(steps, args.rounds)
  if args.profile:
    with jax.profiler.trace(args.profile):
      for _ in range(2):
        steps["declip_jax"]()
  flops = {name: steps[name].program.executed_flops for name in steps if name not in ("trimmed", "open_clip")}
  print_table(args, seconds, flops, highest_rate(args.dtype))


def read_captions(location: str, count: int) -> list[str]:
  """The first captions of a source; a source with fewer examples repeats."""
  source = open_source(location)
  return [source[index % len(source)]["captions"][0] for index in range(count)]


class Ours:
  """Our step, and the batches of both steps."""

  def __init__(self, args: argparse.Namespace, weights: str, captions: list[str], *, trims: bool):
    loaded = read(weights, {"text.activation": "quick_gelu" if "quick" in args.model else "gelu"})
    config = config_lib.default("clip")
    config.batch_size = args.batch_size
    config.data.image_size = loaded.view.size
    for tower in ("image", "text"):
      config.model[tower] = ConfigDict(loaded.model[tower])
    config.model.heads.embed_dim = loaded.model["heads"]["embed_dim"]
    config.model.update({"dtype": args.dtype, "remat": args.remat, "unroll": args.unroll})
    config.optimizer.schedule, config.optimizer.warmup = "constant", config_lib.duration()
    config.optimizer.learning_rate, config.optimizer.weight_decay = ADAMW["lr"], DECAY
    (config.optimizer.b1, config.optimizer.b2), config.optimizer.epsilon = ADAMW["betas"], ADAMW["eps"]
    config.log_every = 0
    built, self.program = build.build(config), compile_step(config)
    self._step = build.make_step(config, built, build.to_steps(config, epoch_examples=1), self.program.state)
    shapes = built.batch_shape(args.batch_size)
    state = create_state(0, shapes, self.program.state, model=built.model, optimizer=built.optimizer)
    params, collections, _ = load_weights(state.params, state.collections, loaded, ("image", "text", "heads"))
    self.state = state.replace(params=params, collections=collections)
    rng = np.random.default_rng(0)
    tokens = built.tokenizer(captions)[:, None]
    self.batches = [
      {"image": rng.integers(256, size=shapes["image"].shape, dtype=np.uint8), "text": text.astype(np.int32)}
      for text in np.split(tokens, BATCHES)
    ]
    batches = [trimmed(built, batch) for batch in self.batches] if trims else self.batches
    placed = [to_global(batch, batch_sharding(built.mesh)) for batch in batches]
    self._placed = itertools.cycle(placed)

  def __call__(self) -> float:
    """Takes one step; returns its loss."""
    self.state, metrics = self._step(self.state, next(self._placed))
    jax.block_until_ready(self.state)
    return float(metrics["loss"])


def declip_step(args: argparse.Namespace) -> TrainStep:
  """DeCLIP's step with the same architecture, on noise and short captions; it has three times the views."""
  config = config_lib.default("declip", args.model.replace("-", "/").replace("ViT/", "ViT-"))
  config.batch_size = args.batch_size
  config.model.update({"dtype": args.dtype, "remat": args.remat, "unroll": args.unroll})
  return make_train_step(config)


class Theirs:
  """open_clip's step on the same batches."""

  def __init__(self, args: argparse.Namespace, model: Any, batches: list[dict], device: str):
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (architectures.OPENAI_MEAN, architectures.OPENAI_STD))
    self._batches: Iterator[Any] = itertools.cycle(
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
    not_decayed = [p for name, p in named if p.ndim < 2 or "bn" in name or "ln" in name or "bias" in name]
    ids = {id(p) for p in not_decayed}
    groups = [
      {"params": not_decayed, "weight_decay": 0.0},
      {"params": [p for _, p in named if id(p) not in ids], "weight_decay": DECAY},
    ]
    self._optimizer = torch.optim.AdamW(groups, **ADAMW, fused=device == "cuda")
    if device == "cuda":
      torch.set_float32_matmul_precision("high")
    self._autocast = {"device_type": device, "dtype": torch.bfloat16, "enabled": args.dtype == "bfloat16"}

  def __call__(self) -> float:
    """Takes one step; returns its loss."""
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


def highest_rate(dtype: str, size: int = 8192) -> float:
  """Measured FLOP/s of a large matrix product on the device, or of a smaller one on a CPU."""
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
  args: argparse.Namespace, seconds: dict[str, list[float]], flops: dict[str, float], highest: float
) -> None:
  """Prints a row for each step; ratios are medians over the rounds."""
  kind = jax.devices()[0].device_kind
  print(
    f"{args.model}, {args.batch_size} pairs, {args.dtype}, {kind}; PyTorch {torch.__version__}, JAX {jax.__version__}"
  )
  known = ", ".join(f"{name} {number / 1e9:,.1f}" for name, number in flops.items())
  print(f"highest rate of a matrix product {highest / 1e12:.2f} TFLOP/s; GFLOPs of a step: {known}")
  flops = {"open_clip": flops["declip_jax"], **flops}
  print(f"{'':12}{'best ms':>9}{'median ms':>11}{'pairs/s':>10}{'speed x open_clip':>19}{'of highest rate':>17}")
  for name, times in seconds.items():
    faster = median_ratio(seconds["open_clip"], times)
    used = f"{flops[name] / min(times) / highest:16.0%}" if name in flops else ""
    print(f"{name:12}{1e3 * min(times):9.0f}{1e3 * np.median(times):11.0f}", end="")
    print(f"{args.batch_size / min(times):10.1f}{faster:19.2f}{used}")


if __name__ == "__main__":
  main()
