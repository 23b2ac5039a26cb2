"""A compiled train step of a config with a state and a batch of noise."""

import dataclasses
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from declip_jax import build, config_files
from declip_jax.planning.compile import CompiledStep, compile_step
from declip_jax.sharding import batch_sharding, to_global
from declip_jax.training import trimming
from declip_jax.training.state import State, create_state

TOKENS = 13  # in each text, with start and end of text


@dataclasses.dataclass
class TrainStep:
  """A train step that can be called: each call updates the state.

  Attributes:
    program: the compiled step.
    state: the current state.
    batch: the batch of every call.
  """

  program: CompiledStep
  state: State
  batch: Any

  def __call__(self) -> None:
    """Takes one step and waits for it."""
    self.state, metrics = self.program.compiled(self.state, self.batch)
    jax.block_until_ready((self.state, metrics))

  @property
  def compile_seconds(self) -> float:
    """Time to trace and compile the step."""
    return self.program.trace_seconds + self.program.compile_seconds

  @property
  def memory(self) -> float:
    """MiB of temporary memory on each device."""
    return self.program.compiled.memory_analysis().temp_size_in_bytes / 2**20


def read_config(name: str, method: str) -> ConfigDict:
  """A config for a method.

  Args:
    name: a config with an argument `method`, such as demo; other arguments follow a colon: small:dataset=flickr8k.
    method: the method.
  """
  name, _, arguments = name.partition(":")
  return config_files.load(f"{name}:method={method},{arguments}")


def make_train_step(config: ConfigDict) -> TrainStep:
  """Compiles the step of a config without diagnostics, which training runs only every `log_every` steps.

  Raises:
    ValueError: the config contradicts itself.
  """
  config.log_every = 0
  program, built = compile_step(config), build.build(config)
  batch = random_batch(built, config.batch_size)
  state = create_state(0, batch, program.state, model=built.model, optimizer=built.optimizer)
  return TrainStep(program, state, batch)


def trimmed(built: build.Built, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """A global batch with its texts trimmed as in training."""
  needed = trimming.needed_length(batch, built.tokenizer.eot)
  return {**batch, "text": batch["text"][..., : trimming.trimmed_length(built.text_lengths, needed)]}


def random_batch(built: build.Built, batch_size: int) -> Any:
  """Images of noise, texts of `TOKENS` tokens, and predictions at every masked position."""
  rng = np.random.default_rng(0)
  batch = {name: np.zeros(x.shape, x.dtype) for name, x in built.batch_shape(batch_size).items()}
  batch["image"] = rng.integers(256, size=batch["image"].shape, dtype=np.uint8)
  if "text" in batch:
    batch["text"][..., : TOKENS - 1] = rng.integers(1000, size=(*batch["text"].shape[:-1], TOKENS - 1))
    batch["text"][..., TOKENS - 1] = built.tokenizer.eot
  for name in ("mlm_position", "mlm_weight"):
    if name in batch:
      batch[name][:] = 1
  if "mim_position" in batch:
    batch["mim_position"][:] = np.arange(batch["mim_position"].shape[1])
  return to_global(batch, batch_sharding(built.mesh))
