"""The two halves put together: `make_model` builds them from a config, `Model` applies them as pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8
from ml_collections import ConfigDict

from declip_jax.models.bank import OVERFLOWS
from declip_jax.models.heads import Heads
from declip_jax.models.text import TextTransformer
from declip_jax.models.towers import IMAGE_TOWERS, MLM_ATTENTION, Towers
from declip_jax.models.transformer import ACTIVATIONS, INITS, REMAT_POLICIES
from declip_jax.types import Batch, Features, Outputs, Views
from declip_jax.unit_norm import unit_norm

Tree = Mapping[str, Any]


@dataclass(frozen=True)
class Model:
  """Two linen modules and the views they serve. Hashable, so that jit may close over it; all state is passed in.

  `params` has two entries, "towers" and "heads". `collections` has the same, with batch statistics and the neighbour
  bank; functions that train return the new ones. Where a term needs a momentum tower, `collections["momentum"]` holds
  its copy of the image tower's and the projector's parameters, laid out like `params`.
  """

  towers: Towers
  heads: Heads
  views: Views

  def init(self, key: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
    """Parameters (float32) and collections for batches of this shape."""
    towers_key, heads_key = jax.random.split(key)
    towers = self.towers.init(towers_key, batch, self.views, self._dense, True)
    features = self.towers.apply(towers, batch, self.views, self._dense, False)
    heads = self.heads.init(heads_key, features, self.views, True)
    params = {"towers": towers.pop("params"), "heads": heads.pop("params", {})}
    collections = {"towers": towers, "heads": heads}
    return params, collections | self.momentum_copy(params)

  def encode(self, params: Tree, collections: Tree, batch: Batch) -> tuple[Features, Tree]:
    """The first half, in training mode: features, and the towers' new collections (a ResNet's statistics)."""
    variables, _ = _variables(params, collections)
    features, towers = self.towers.apply(
      variables, batch, self.views, self._dense, True, mutable=list(collections["towers"])
    )
    if "momentum" in collections:
      features = features.replace(momentum_image=self._encode_momentum(collections, batch))
    return features, towers

  def apply_heads(self, params: Tree, collections: Tree, features: Features) -> tuple[Outputs, Tree]:
    """The second half, in training mode: outputs, and the heads' new collections (statistics and bank)."""
    _, variables = _variables(params, collections)
    outputs, heads = self.heads.apply(variables, features, self.views, True, mutable=list(collections["heads"]))
    if features.momentum_image is not None:
      variables["params"] = {**params["heads"], **collections["momentum"]["heads"]}
      target, _ = self.heads.apply(
        variables, features.momentum_image, True, method=Heads.project_momentum, mutable=["batch_stats"]
      )
      outputs = outputs.replace(momentum_target=jax.lax.stop_gradient(target))
    return outputs, heads

  def momentum_copy(self, params: Tree) -> Tree:
    """What of the parameters the momentum tower copies, as `{"momentum": ...}`; empty if there is none."""
    if "momentum" not in self.heads.heads:
      return {}
    copied = {
      "towers": {"image": params["towers"]["image"]},
      "heads": {"momentum_project": params["heads"]["momentum_project"]},
    }
    return {"momentum": jax.tree.map(jnp.array, copied)}

  def encode_image(self, params: Tree, collections: Tree, images: UInt8[Array, "b h w c"]) -> Float[Array, "b d"]:
    """Unit-norm float32 embeddings of uint8 images, in evaluation mode."""
    return unit_norm(self._image_features(params, collections, images, Towers.encode_image))

  def encode_text(self, params: Tree, collections: Tree, tokens: Int[Array, "b t"]) -> Float[Array, "b d"]:
    """Unit-norm float32 embeddings of token ids, in evaluation mode."""
    return unit_norm(self.text_features(params, collections, tokens))

  def encode_image_tokens(
    self, params: Tree, collections: Tree, images: UInt8[Array, "b h w c"]
  ) -> Float[Array, "b n e"]:
    """Unit-norm float32 tokens of uint8 images, as FILIP compares them, in evaluation mode."""
    towers, heads = _variables(params, collections)
    _, tokens = self.towers.apply(towers, images, method=Towers.encode_image)
    return self.heads.apply(heads, tokens, method=Heads.map_image)

  def encode_text_tokens(
    self, params: Tree, collections: Tree, tokens: Int[Array, "b t"]
  ) -> tuple[Float[Array, "b t e"], Bool[Array, "b t"]]:
    """Unit-norm float32 tokens of texts, as FILIP compares them, and which are no padding, in evaluation mode."""
    towers, heads = _variables(params, collections)
    _, states, valid = self.towers.apply(towers, tokens, method=Towers.encode_text)
    return self.heads.apply(heads, states, method=Heads.map_text), valid

  def image_features(self, params: Tree, collections: Tree, images: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
    """Joint float32 embeddings, not of unit norm, of images that are already normalised, in evaluation mode."""
    return self._image_features(params, collections, images, Towers.encode_pixels)

  def text_features(self, params: Tree, collections: Tree, tokens: Int[Array, "b t"]) -> Float[Array, "b d"]:
    """Joint float32 embeddings, not of unit norm, of token ids, in evaluation mode."""
    towers, heads = _variables(params, collections)
    features, *_ = self.towers.apply(towers, tokens, method=Towers.encode_text)
    return self.heads.apply(heads, features, method=Heads.project_text)

  @property
  def _dense(self) -> bool:
    return "filip" in self.heads.heads

  def _encode_momentum(self, collections: Tree, batch: Batch) -> Float[Array, "b 2 w"]:
    """Features of the self-supervised views by the momentum tower; its batch statistics are those of the batch."""
    images = jnp.stack([batch["image"][:, view] for view in self.views.ssl_image], axis=1)
    variables = {"params": collections["momentum"]["towers"], **collections["towers"]}
    features, _ = self.towers.apply(
      variables, images, True, method=Towers.encode_views, mutable=list(collections["towers"])
    )
    return jax.lax.stop_gradient(features)

  def _image_features(self, params: Tree, collections: Tree, images: Array, encode: Any) -> Float[Array, "b d"]:
    towers, heads = _variables(params, collections)
    features, _ = self.towers.apply(towers, images, method=encode)
    return self.heads.apply(heads, features, method=Heads.project_image)


def make_model(config: ConfigDict, *, views: Views, heads: tuple[str, ...], lock_image: bool = False) -> Model:
  """Builds the model of `config.model`; see `config.default` for its fields.

  Args:
    config: the `model` part of a config.
    views: which view plays which part, from the data recipe.
    heads: which of `models.heads.HEADS` the objective's terms need.
    lock_image: whether the image tower is not trained; see `Towers`.

  Raises:
    ValueError: a field with a name that does not exist, or a number that does not fit; the message says which would.
  """
  image_fields = config.image.to_dict()
  kind = image_fields.pop("kind")
  if kind not in IMAGE_TOWERS:
    raise ValueError(f"config.model.image.kind={kind!r}: choose one of {sorted(IMAGE_TOWERS)}")
  _check(config)
  dtype = jnp.dtype(config.dtype)
  common = {"remat": config.remat, "unroll": config.unroll, "dtype": dtype}
  image = IMAGE_TOWERS[kind](**image_fields, **common)
  text_fields = {name: value for name, value in config.text.items() if name != "tokenizer"}
  text = TextTransformer(**text_fields, **common) if "joint" in heads else None
  return Model(
    towers=Towers(image, text, config.mean, config.std, lock_image, config.mlm_attention, dtype),
    heads=Heads(
      image_width=image.feature_width,
      text_width=config.text.width,
      patch_size=3 * image.stride**2,
      heads=heads,
      vocab_size=config.text.vocab_size,
      dtype=dtype,
      **config.heads,
    ),
    views=views,
  )


def _check(config: ConfigDict) -> None:
  legal = {
    "remat": REMAT_POLICIES,
    "mlm_attention": MLM_ATTENTION,
    "text.activation": ACTIVATIONS,
    "heads.bank_overflow": OVERFLOWS,
  }
  if config.image.kind == "vit":
    legal |= {"image.activation": ACTIVATIONS, "image.initializer": INITS}
  for name, names in legal.items():
    value = operator.attrgetter(name)(config)
    if value not in names:
      raise ValueError(f"config.model.{name}={value!r}: choose one of {sorted(names)}")
  for part in ("image", "text"):
    width, heads = config[part].get("width"), config[part].get("heads")
    if heads is not None and (heads < 1 or width % heads):
      raise ValueError(f"config.model.{part}.heads={heads} does not divide config.model.{part}.width={width}")
  if any(length < 1 for length in config.text.buckets) or list(config.text.buckets) != sorted(config.text.buckets):
    raise ValueError(f"config.model.text.buckets={config.text.buckets}: positive lengths, ascending")
  if config.heads.bank_neighbours > config.heads.bank_size:
    raise ValueError(
      f"config.model.heads.bank_neighbours={config.heads.bank_neighbours} is more than its bank_size="
      f"{config.heads.bank_size}"
    )
  for name in ("norm_groups", "bank_groups", "bank_neighbours", "bank_size"):
    if config.heads[name] < 1:
      raise ValueError(f"config.model.heads.{name}={config.heads[name]}: at least 1")


def _variables(params: Tree, collections: Tree) -> tuple[Tree, Tree]:
  return tuple({"params": params[half], **collections[half]} for half in ("towers", "heads"))
