"""Toys of each kind of extension. `pytest --extended` adds them, to show that no test fails only because one exists."""

from collections.abc import Callable
import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from declip_jax import config
from declip_jax.data.recipes import RECIPES
from declip_jax.data.sources import SOURCES, Example
from declip_jax.evals import EVALUATORS, Evaluator
from declip_jax.evals.features import EvaluationData
from declip_jax.evals.results import Scores
from declip_jax.models.heads import HEADS
from declip_jax.models.heads.base import Head, linear, pick
from declip_jax.objectives import TERMS, Term
from declip_jax.types import Features, Outputs
from declip_jax.unit_norm import unit_norm
from declip_jax.views import Views

VIEWS = Views(mosaic_image=(1, 2))


def toy_loss(outputs: Outputs, batch: Any, *, margin: float = 0.2) -> tuple[jax.Array, dict[str, jax.Array]]:
  """A hinge on the cosine of the first pair."""
  del batch
  cosine = jnp.sum(outputs.image[0] * outputs.text[0], axis=-1)
  return jnp.maximum(0, 1 - margin - cosine).mean(), {"toy_cosine": cosine.mean()}


class ToyHead(Head):
  """Projects the mosaic views."""

  image_width: int
  toy_width: int
  dtype: Any = jnp.float32

  views: ClassVar = ("mosaic_image",)
  sides: ClassVar = {"image": ("toy",)}
  diagnostics: ClassVar = {"toy": "embeddings"}

  def setup(self) -> None:
    self.toy = linear(self.image_width, self.toy_width, self.dtype)

  def __call__(self, features: Features, outputs: Outputs, views: Views, train: bool) -> dict[str, jax.Array]:
    del outputs, train
    if "mosaic_image" not in views:
      return {}
    return {"toy": self.toy(pick(features.image, views.mosaic_image))}


def toy_head_loss(outputs: Outputs, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The cosine of the two mosaic views."""
  del batch
  first, second = unit_norm(outputs.toy)
  return -jnp.sum(first * second, axis=-1).mean(), {}


@dataclasses.dataclass(frozen=True)
class ToySource:
  """Squares of one grey level, with class and caption."""

  name: str
  classnames: tuple[str, ...] = ("dark", "bright")
  stamp: str = "toy"

  @property
  def skipped(self) -> dict[str, int]:
    return {}

  @property
  def left_out(self) -> dict[str, int]:
    return {}

  def __len__(self) -> int:
    return 12

  def __getitem__(self, index: int) -> Example:
    label = index % 2
    pixels = np.full((16, 16, 3), 20 + 200 * label, np.uint8)
    return Example(image=pixels, captions=(f"a {self.classnames[label]} square",), label=label, id=f"toy:{index}")


def _open_squares(location: str) -> ToySource:
  if location != "squares":
    raise FileNotFoundError(location)
  return ToySource(f"toy:{location}")


def toy_evaluator(data: EvaluationData, pictures: Path | None, *, scale: float = 1.0) -> Scores:
  """The largest element of a pooled feature."""
  del pictures
  return Scores({"largest": scale * float(data.test.features.pooled.max())})


def extended_default(add_fields: Callable[[ConfigDict], None]) -> Callable[..., ConfigDict]:
  """`config.default` with further fields; `add_fields` gets the unlocked config."""
  default = config.default

  def extended(*arguments: Any, **options: Any) -> ConfigDict:
    c = default(*arguments, **options).unlock()
    add_fields(c)
    c.lock()
    config.unlock_extensible(c)
    return c

  return extended


def install() -> None:
  """Adds a term, a term with a head and a view, a recipe, a source and an evaluator to the package."""
  TERMS["toy"] = Term(toy_loss, ("joint",), ("image", "text"), ("pair",))
  TERMS["toy_head"] = Term(toy_head_loss, ("toy",), ("toy",), ("mosaic_image",))
  HEADS["toy"] = ToyHead
  RECIPES["toy"] = dataclasses.replace(RECIPES["slip"], views=VIEWS)
  SOURCES["toy"] = _open_squares
  EVALUATORS["toy"] = Evaluator(toy_evaluator, needs_text=False)

  def add_fields(c: ConfigDict) -> None:
    c.objective.toy = {"weight": 0.0, "schedule": (), "margin": 0.2}
    c.objective.toy_head = {"weight": 0.0, "schedule": ()}
    c.model.heads.toy_width = 6

  config.default = extended_default(add_fields)
