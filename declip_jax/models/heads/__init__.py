"""The second half of the model: heads that see the global batch, from `Features` to `Outputs`."""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from declip_jax.models.heads.bank import NeighbourBank
from declip_jax.models.heads.base import Head
from declip_jax.models.heads.classifier import Classifier
from declip_jax.models.heads.filip import Filip
from declip_jax.models.heads.joint import Joint
from declip_jax.models.heads.mim import Mim
from declip_jax.models.heads.mlm import Mlm
from declip_jax.models.heads.momentum import Momentum
from declip_jax.models.heads.sigmoid import Sigmoid
from declip_jax.models.heads.simclr import SimClr
from declip_jax.models.heads.simsiam import SimSiam
from declip_jax.types import Features, Outputs
from declip_jax.views import Views

# The heads that a term may name, in the order in which they are applied: each sees the outputs of those before it.
HEADS: dict[str, type[Head]] = {
  "joint": Joint,
  "sigmoid": Sigmoid,
  "filip": Filip,
  "simclr": SimClr,
  "simsiam": SimSiam,
  "momentum": Momentum,
  "mlm": Mlm,
  "mim": Mim,
  "bank": NeighbourBank,
  "classifier": Classifier,
}


class Heads(nn.Module):
  """The heads that the terms need, in one scope.

  Attributes:
    members: heads by their names in `HEADS`, in that order.
  """

  members: Mapping[str, Head]

  def setup(self) -> None:
    for head in self.members.values():
      nn.share_scope(self, head)  # the parameters are at heads/<name>, without the name of the head

  def __call__(self, features: Features, views: Views, train: bool) -> Outputs:
    """Applies the heads to the views that have a role; the bank is searched before it stores this batch."""
    outputs, internal = Outputs(), []
    for head in self.members.values():
      outputs = outputs.replace(**head(features, outputs, views, train))
      internal += head.internal
    return outputs.replace(**dict.fromkeys(internal))

  def momentum_targets(self, feature: Float[Array, "b v f"], train: bool) -> Float[Array, "v b p"]:
    """Projections of the momentum tower's features."""
    return self.members["momentum"].targets(feature, train)

  def project_image(self, feature: Float[Array, "b f"]) -> Float[Array, "b d"]:
    """Joint embeddings of image features, not normalised."""
    return self.members["joint"].project_image(feature)

  def project_text(self, feature: Float[Array, "b f"]) -> Float[Array, "b d"]:
    """Joint embeddings of text features, not normalised."""
    return self.members["joint"].project_text(feature)

  def classify(self, feature: Float[Array, "b f"]) -> Float[Array, "b classes"]:
    """Logits of the classes of image features."""
    return self.members["classifier"].classify(feature)

  def map_image(self, tokens: Float[Array, "b n f"]) -> Float[Array, "b n e"]:
    """Unit-norm tokens of images, as FILIP compares them."""
    return self.members["filip"].map_image(tokens)

  def map_text(self, tokens: Float[Array, "b t f"]) -> Float[Array, "b t e"]:
    """Unit-norm tokens of texts, as FILIP compares them."""
    return self.members["filip"].map_text(tokens)


def make_heads(names: Sequence[str], fields: Mapping[str, Any]) -> Heads:
  """Builds heads by name.

  Args:
    names: names of `HEADS`.
    fields: values of the heads' fields, by name; those of other heads are ignored.

  Raises:
    ValueError: an unknown name.
  """
  if unknown := sorted(set(names) - set(HEADS)):
    raise ValueError(f"unknown heads {unknown}: choose from {list(HEADS)}")
  chosen = {name: head for name, head in HEADS.items() if name in names}
  return Heads({name: head(**{field: fields[field] for field in _fields(head)}) for name, head in chosen.items()})


def diagnostic_kinds(names: Collection[str]) -> dict[str, str]:
  """The kind of each output of these heads, one of `objectives.diagnostics.KINDS`."""
  return {output: kind for name in names for output, kind in HEADS[name].diagnostics.items()}


def parameters_of_side(side: str) -> tuple[str, ...]:
  """Names of the heads' parameters that belong to the "image" or the "text" tower."""
  return tuple(name for head in HEADS.values() for name in head.sides.get(side, ()))


def unread_fields(names: Collection[str]) -> set[str]:
  """The names of fields that only other heads than these read."""
  read = {field for name in names for field in _fields(HEADS[name])}
  return {field for head in HEADS.values() for field in _fields(head)} - read


def _fields(head: type[Head]) -> list[str]:
  return [field.name for field in dataclasses.fields(head) if field.name not in ("parent", "name")]
