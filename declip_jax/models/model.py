"""The whole model: `make_model` builds its two halves, and `Model` applies them as pure functions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from declip_jax.models.attention import IMPLEMENTATIONS
from declip_jax.models.bank import OVERFLOWS
from declip_jax.models.heads import Heads, make_heads
from declip_jax.models.lora import Lora, add_adapters, merge
from declip_jax.models.positions import fit_positions
from declip_jax.models.text import POOLINGS as TEXT_POOLINGS
from declip_jax.models.text import TextTransformer
from declip_jax.models.towers import IMAGE_TOWERS, MLM_ATTENTION, Towers
from declip_jax.models.transformer import ACTIVATIONS, INITS, REMAT_POLICIES
from declip_jax.models.vit import POOLINGS as IMAGE_POOLINGS
from declip_jax.spelling import did_you_mean
from declip_jax.types import Batch, Features, Outputs
from declip_jax.unit_norm import unit_norm
from declip_jax.views import Views

Tree = Mapping[str, Any]
_ADAPTERS_KEY = 2  # folded into the key of the parameters; with 0 and 1, it would give those of towers and heads
DTYPES = ("bfloat16", "float16", "float32")  # what `config.model.dtype` may name


@dataclass(frozen=True)
class Model:
  """Two linen modules, and the views that they encode. Hashable, so that jit may close over it; all state is passed in.

  `params` has two entries, "towers" and "heads". `collections` has the same, with batch statistics and the neighbour
  bank; functions in training mode return the new ones. Where a term needs a momentum tower, `collections["momentum"]`
  is its copy of the parameters of the image tower and the projector, with the structure of `params`.

  With `lora`, the parameters of `init` have adapters, which all other functions ignore: they read `merged` parameters.
  """

  towers: Towers
  heads: Heads
  views: Views
  lora: Lora | None = None

  @cached_property
  def init(self) -> Callable[[jax.Array, Batch], tuple[Tree, Tree]]:
    """Parameters (float32) and collections for a key and batches of this shape.

    A run needs them to check its config, for the shapes of its state, and to compute it. Here they are traced once.
    """
    return jax.jit(self._init)

  def _init(self, key: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
    towers_key, heads_key = jax.random.split(key)
    towers = self.towers.init(towers_key, batch, self.views, self._dense, True)
    features = self.towers.apply(towers, batch, self.views, self._dense, False)
    heads = self.heads.init(heads_key, features, self.views, True)
    params = {"towers": towers.pop("params"), "heads": heads.pop("params", {})}
    if self.lora:
      params = add_adapters(params, jax.random.fold_in(key, _ADAPTERS_KEY), self.lora)
    collections = {"towers": towers, "heads": heads}
    return params, collections | self.momentum_copy(params)

  def merged(self, params: Tree) -> Tree:
    """Parameters without adapters, which are added to the kernels; the parameters themselves if there are none."""
    return merge(params, self.lora) if self.lora else params

  def encode(self, params: Tree, collections: Tree, batch: Batch) -> tuple[Features, Tree]:
    """The first half, in training mode: features, and the towers' new collections (a ResNet's statistics).

    Images and texts may be smaller than those of the parameters, see `positions.fit_positions`, and texts shorter than
    the context length of the tower.
    """
    variables, _ = _variables({**params, "towers": self._fit_positions(params["towers"], batch)}, collections)
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
    if "momentum_image" in features:
      variables["params"] = {**params["heads"], **collections["momentum"]["heads"]}
      target, _ = self.heads.apply(
        variables, features.momentum_image, True, method=Heads.momentum_targets, mutable=["batch_stats"]
      )
      outputs = outputs.replace(momentum_target=jax.lax.stop_gradient(target))
    return outputs, heads

  def momentum_copy(self, params: Tree) -> Tree:
    """A copy of the parameters of the momentum tower, as `{"momentum": ...}`; empty if there is no momentum tower."""
    if "momentum" not in self.heads.members:
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

  def encode_image_features(
    self, params: Tree, collections: Tree, images: UInt8[Array, "b h w c"]
  ) -> tuple[Float[Array, "b f"], Float[Array, "b d"] | None]:
    """Pooled features and joint embeddings of uint8 images from one forward pass, float32, in evaluation mode.

    The pooled feature is the output of the tower before the projection to the joint space: the class token after the
    last norm (ViT), the attention-pooled vector before `c_proj` (ModifiedResNet), or the average-pooled vector
    (RegNet). The joint embedding is its projection in float32, not normalised; None if there is no joint space.
    """
    towers, heads = _variables(params, collections)
    pooled, _ = self.towers.apply(towers, images, method=Towers.encode_image)
    pooled = pooled.astype(jnp.float32)
    if "joint" not in self.heads.members:
      return pooled, None
    joint = self.heads.members["joint"].clone(dtype=jnp.float32)
    with jax.default_matmul_precision("highest"):
      return pooled, Heads({"joint": joint}).apply(heads, pooled, method=Heads.project_image)

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
    """Unit-norm float32 tokens of texts, as FILIP compares them, and which are not padding, in evaluation mode."""
    towers, heads = _variables(params, collections)
    encoded: Any = self.towers.apply(towers, tokens, method=Towers.encode_text)
    _, states, valid = encoded
    return self.heads.apply(heads, states, method=Heads.map_text), valid

  def image_features(self, params: Tree, collections: Tree, images: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
    """Joint float32 embeddings of normalised images in evaluation mode; the embeddings are not of unit norm."""
    return self._image_features(params, collections, images, Towers.encode_pixels)

  def text_features(self, params: Tree, collections: Tree, tokens: Int[Array, "b t"]) -> Float[Array, "b d"]:
    """Joint float32 embeddings of token ids in evaluation mode; the embeddings are not of unit norm."""
    towers, heads = _variables(params, collections)
    features, *_ = self.towers.apply(towers, tokens, method=Towers.encode_text)
    return self.heads.apply(heads, features, method=Heads.project_text)

  def classify(self, heads: Tree, pooled: Float[Array, "b f"]) -> Float[Array, "b classes"]:
    """Float32 logits of the classes, from the parameters of the heads and the pooled features of images."""
    return self.heads.apply({"params": heads}, pooled, method=Heads.classify)

  @property
  def _dense(self) -> bool:
    return "filip" in self.heads.members

  def _encode_momentum(self, collections: Tree, batch: Batch) -> Float[Array, "b 2 f"]:
    """Features of the self-supervised views by the momentum tower; its batch statistics are those of the batch."""
    images = jnp.stack([batch["image"][:, view] for view in self.views.ssl_image], axis=1)
    towers = self._fit_positions(collections["momentum"]["towers"], batch)
    variables = {"params": towers, **collections["towers"]}
    features, _ = self.towers.apply(
      variables, images, True, method=Towers.encode_views, mutable=list(collections["towers"])
    )
    return jax.lax.stop_gradient(features)

  def _fit_positions(self, towers: Tree, batch: Batch) -> Tree:
    stride = self.towers.image.stride
    height, width = (size // stride for size in batch["image"].shape[2:4])
    text = self.towers.text
    return fit_positions(towers, patches=height * width, tokens=None if text is None else text.context_length)

  def _image_features(self, params: Tree, collections: Tree, images: Array, encode: Any) -> Float[Array, "b d"]:
    towers, heads = _variables(params, collections)
    features, _ = self.towers.apply(towers, images, method=encode)
    return self.heads.apply(heads, features, method=Heads.project_image)


def make_model(
  fields: Mapping[str, Any],
  *,
  views: Views,
  heads: Sequence[str],
  lock_image: bool = False,
  lora: Lora | None = None,
) -> Model:
  """Builds a model.

  Args:
    fields: `config.model` as nested dicts; see `config.default` for its fields.
    views: which view plays which role, from the data recipe.
    heads: which of `models.heads.HEADS` the objective's terms need.
    lock_image: whether the image tower is not trained; see `Towers`.
    lora: adapters of the towers.

  Raises:
    ValueError: an unknown name or an invalid number; the message lists the legal ones.
  """
  _check(fields)
  _check_classifier(fields["heads"], heads)
  dtype = jnp.dtype(fields["dtype"])
  common = {"remat": fields["remat"], "unroll": fields["unroll"], "dtype": dtype}
  attention = {"attention": fields["attention"]}
  image_attention = attention if fields["image"]["kind"] == "vit" else {}
  image = IMAGE_TOWERS[fields["image"]["kind"]](**_without(fields["image"], "kind"), **common, **image_attention)
  text = None
  if "joint" in heads:
    text = TextTransformer(**_without(fields["text"], "tokenizer", "buckets"), **common, **attention)
    _check_widths(fields["heads"], {"image": image.feature_width, "text": fields["text"]["width"]})
  of_towers = {
    "image_width": image.feature_width,
    "text_width": fields["text"]["width"],
    "patch_size": 3 * image.stride**2,
    "vocab_size": fields["text"]["vocab_size"],
    "dtype": dtype,
  }
  return Model(
    towers=Towers(image, text, fields["mean"], fields["std"], lock_image, fields["mlm_attention"], dtype),
    heads=make_heads(heads, {**fields["heads"], **of_towers}),
    views=views,
    lora=lora,
  )


def _check_widths(heads: Mapping[str, Any], widths: Mapping[str, int]) -> None:
  """Rejects features that are joint embeddings without a projection but have another width."""
  for side, width in widths.items():
    if not heads[f"{side}_linear"] and width != heads["embed_dim"]:
      raise ValueError(
        f"config.model.heads.{side}_linear=False: {side} features have {width} dimensions, but "
        f"config.model.heads.embed_dim={heads['embed_dim']}: set the two equal, or choose True"
      )


def _without(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
  return {field: value for field, value in fields.items() if field not in names}


def _check(fields: Mapping[str, Any]) -> None:
  """Rejects unknown names and invalid numbers."""
  image, text, heads = fields["image"], fields["text"], fields["heads"]
  _check_name("image.kind", image["kind"], IMAGE_TOWERS)
  _check_name("dtype", fields["dtype"], DTYPES)
  _check_name("remat", fields["remat"], REMAT_POLICIES)
  _check_name("attention", fields["attention"], IMPLEMENTATIONS)
  _check_name("mlm_attention", fields["mlm_attention"], MLM_ATTENTION)
  _check_name("text.activation", text["activation"], ACTIVATIONS)
  _check_name("heads.bank_overflow", heads["bank_overflow"], OVERFLOWS)
  if image["kind"] == "vit":
    _check_name("image.activation", image["activation"], ACTIVATIONS)
    _check_name("image.initializer", image["initializer"], INITS)
    _check_name("image.pooling", image.get("pooling", "token"), IMAGE_POOLINGS)
    width = image.get("pool_width", 0)
    if image.get("pooling") == "query" and (width < 8 or width % 8):
      raise ValueError(f"config.model.image.pool_width={width}: expected a multiple of 8, the heads of pooling='query'")
  for tower in ("image", "text"):
    width, count = fields[tower].get("width"), fields[tower].get("heads")
    if count is not None and (count < 1 or width % count):
      raise ValueError(f"config.model.{tower}.heads={count} does not divide config.model.{tower}.width={width}")
  _check_name("text.pooling", text.get("pooling", "eot"), TEXT_POOLINGS)
  for name in ("norm_groups", "bank_groups", "bank_neighbours", "bank_size"):
    if heads[name] < 1:
      raise ValueError(f"config.model.heads.{name}={heads[name]}: expected at least 1")
  if heads["bank_neighbours"] > heads["bank_size"]:
    raise ValueError(
      f"config.model.heads.bank_neighbours={heads['bank_neighbours']} is more than its bank_size={heads['bank_size']}"
    )


def _check_classifier(fields: Mapping[str, Any], heads: Sequence[str]) -> None:
  if "classifier" in heads and fields["num_classes"] < 1:
    raise ValueError(f"config.model.heads.num_classes={fields['num_classes']}: a classifier needs at least 1 class")
  if {"classifier", "joint"} <= set(heads) and fields["classify_joint"]:
    raise ValueError(
      "config.model.heads.classify_joint=True: the classifier would have the projection of the joint space, which the "
      "objective also trains with texts: choose False"
    )


def _check_name(field: str, value: str, legal: Iterable[str]) -> None:
  if value not in legal:
    raise ValueError(f"config.model.{field}={value!r}: choose one of {sorted(legal)}{did_you_mean(value, legal)}")


def _variables(params: Tree, collections: Tree) -> tuple[Tree, Tree]:
  return tuple({"params": params[half], **collections[half]} for half in ("towers", "heads"))
