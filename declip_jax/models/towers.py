"""The first half of the model: towers that encode one example at a time, from a `Batch` to `Features`."""

import itertools
from typing import Any

from einops import rearrange
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from declip_jax.models.convnext import ConvNeXt
from declip_jax.models.regnet import RegNetY
from declip_jax.models.resnet import ModifiedResNet
from declip_jax.models.vit import ViT
from declip_jax.types import Batch, Features
from declip_jax.views import Views

# What `config.model.image.kind` may name.
IMAGE_TOWERS = {"vit": ViT, "resnet": ModifiedResNet, "regnet": RegNetY, "convnext": ConvNeXt}
# What `config.model.mlm_attention` may name: a masked token sees the tokens before it, or the whole caption.
MLM_ATTENTION = ("causal", "bidirectional")


class Towers(nn.Module):
  """An image tower and a text tower side by side; pixels are normalised here, on the device.

  Attributes:
    image: a module that maps normalised images `[b h w c]`, `train` and `hidden` patches to features `[b f]` and
      tokens `[b n g]`; a ViT also takes `branch_scale` and the patches that are `kept`. It has `feature_width`,
      `stride` and `has_batch_norm`: whether `train` makes it normalise by the batch.
    text: the text transformer, None where no term uses texts.
    mean, std: mean and standard deviation per channel, on a scale of 0 to 1.
    lock_image: whether the image tower is not trained, so its batch norms use and keep their running statistics.
    mlm_attention: one of `MLM_ATTENTION`.
  """

  image: nn.Module
  text: nn.Module | None
  mean: tuple[float, ...]
  std: tuple[float, ...]
  lock_image: bool = False
  mlm_attention: str = "causal"
  dtype: Any = jnp.float32

  def __call__(self, batch: Batch, views: Views, tokens: bool, train: bool) -> Features:
    """Encodes every view that has a role; with `tokens`, also returns the tokens of the contrastive pair."""
    pixels = self.normalise(batch["image"])
    hidden = None
    if views.masked_image is not None:
      hidden = self._hidden(pixels, views.masked_image, batch["mim_position"])
    drawn = {"branch_scale": batch.get("branch_scale"), "kept": batch.get("kept_patches")}
    image, image_tokens = self._encode_views(pixels, train, hidden, **drawn)
    features = Features(image=image)
    if views.masked_image is not None:
      hidden_pixels = self._patches(pixels[:, views.masked_image])
      features = features.replace(
        masked_image=_take(image_tokens[:, views.masked_image], batch["mim_position"]),
        masked_pixels=_standardised(_take(hidden_pixels, batch["mim_position"])),
      )
    if self.text is not None:
      features = self._add_text(features, batch, views, tokens)
    if tokens:
      features = features.replace(image_tokens=image_tokens[:, views.contrastive_image[0]])
    return features

  def encode_views(self, images: Num[Array, "b v h w c"], train: bool) -> Float[Array, "b v f"]:
    """Features of several views per image, from unnormalised pixels."""
    return self._encode_views(self.normalise(images), train)[0]

  def encode_image(self, images: Num[Array, "b h w c"]) -> tuple[Float[Array, "b f"], Float[Array, "b n g"]]:
    """Feature and tokens of one view per image, from unnormalised pixels, in evaluation mode."""
    return self.encode_pixels(self.normalise(images))

  def encode_pixels(self, images: Float[Array, "b h w c"]) -> tuple[Float[Array, "b f"], Float[Array, "b n g"]]:
    """Feature and tokens of one view per image, from normalised pixels, in evaluation mode."""
    return self.image(images.astype(self.dtype), False)

  def encode_text(
    self, tokens: Int[Array, "b t"]
  ) -> tuple[Float[Array, "b f"], Float[Array, "b t f"], Bool[Array, "b t"]]:
    """Features of texts, the states of all tokens, and which of them are not padding."""
    feature, states = self.text(tokens)
    return feature, self.text.normalise(states), self._valid(tokens)

  def normalise(self, images: Num[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
    """Pixels normalised by the mean and the standard deviation of the config."""
    axes = tuple(range(images.ndim - 1))
    mean, std = (jnp.expand_dims(255 * jnp.asarray(x, jnp.float32), axes) for x in (self.mean, self.std))
    return (images.astype(jnp.float32) - mean) / std

  def _valid(self, tokens: Int[Array, "b t"]) -> Bool[Array, "b t"]:
    return jnp.arange(tokens.shape[1])[None] <= self.text.end(tokens)[:, None]

  def _encode_views(
    self,
    pixels: Float[Array, "b v h w c"],
    train: bool,
    hidden: Bool[Array, "b v n"] | None = None,
    branch_scale: Float[Array, "b v depth 2"] | None = None,
    kept: Int[Array, "b v n"] | None = None,
  ) -> tuple[Float[Array, "b v f"], Float[Array, "b v n g"]]:
    train, pixels = train and not self.lock_image, pixels.astype(self.dtype)
    views = pixels.shape[1]
    if self.image.has_batch_norm:
      # Batch statistics are those of one view, so views are encoded one after the other.
      masks = [None if hidden is None else hidden[:, view] for view in range(views)]
      encoded = [self.image(pixels[:, view], train, masks[view]) for view in range(views)]
      return tuple(jnp.stack(views, axis=1) for views in zip(*encoded, strict=True))
    flat = None if hidden is None else rearrange(hidden, "b v n -> (b v) n")
    drawn = {"branch_scale": branch_scale, "kept": kept}
    drawn = {name: rearrange(x, "b v ... -> (b v) ...") for name, x in drawn.items() if x is not None}
    encoded = self.image(rearrange(pixels, "b v h w c -> (b v) h w c"), train, flat, **drawn)
    return tuple(rearrange(x, "(b v) ... -> b v ...", v=views) for x in encoded)

  def _add_text(self, features: Features, batch: Batch, views: Views, tokens: bool) -> Features:
    text, masked = batch["text"], views.masked_text
    bidirectional = self.mlm_attention == "bidirectional" and self.text.causal
    wanted = views.contrastive_text
    if masked is not None and not bidirectional:
      wanted = (*wanted, masked)
    others = {role: views.numbers(role) for role in views.other_texts()}
    wanted = tuple(dict.fromkeys([*wanted, *itertools.chain(*others.values())]))
    if wanted:
      chosen = jnp.stack([text[:, view] for view in wanted], axis=1)
      feature, states = self.text(rearrange(chosen, "b u t -> (b u) t"))
      feature, states = (rearrange(x, "(b u) ... -> b u ...", u=len(wanted)) for x in (feature, states))
      features = features.replace(text=feature[:, : len(views.contrastive_text)])
      for role, numbers in others.items():
        chosen = [wanted.index(number) for number in numbers]
        features = features.replace(**{role: jnp.stack([feature[:, index] for index in chosen], axis=1)})
    if masked is not None:
      words = self.text(text[:, masked], bidirectional=True)[1] if bidirectional else states[:, wanted.index(masked)]
      # Only masked positions are kept: the vocabulary layer is the widest matrix of the model.
      features = features.replace(masked_text=self.text.normalise(_take(words, batch["mlm_position"])))
    if tokens:
      features = features.replace(
        text_tokens=self.text.normalise(states[:, 0]), text_valid=self._valid(text[:, views.contrastive_text[0]])
      )
    return features

  def _hidden(self, pixels: Float[Array, "b v h w c"], view: int, position: Int[Array, "b m"]) -> Bool[Array, "b v n"]:
    """Which patches of which views are hidden."""
    count = (pixels.shape[2] // self.image.stride) * (pixels.shape[3] // self.image.stride)
    here = (position[..., None] == jnp.arange(count)[None, None]).any(axis=1)
    return jnp.zeros((*pixels.shape[:2], count), bool).at[:, view].set(here)

  def _patches(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b n e"]:
    side = self.image.stride
    height, width = (size - size % side for size in pixels.shape[1:3])
    pixels = pixels[:, :height, :width]
    return rearrange(pixels, "b (y p) (x q) c -> b (y x) (p q c)", p=side, q=side)


def _take(x: Float[Array, "b n f"], position: Int[Array, "b m"]) -> Float[Array, "b m f"]:
  return jnp.take_along_axis(x, position[..., None], axis=1)


def _standardised(patches: Float[Array, "b m e"]) -> Float[Array, "b m e"]:
  """Each patch with mean 0 and variance 1, the targets of MAE (He et al. 2022, section 4.1)."""
  mean = patches.mean(axis=-1, keepdims=True)
  return (patches - mean) / jnp.sqrt(patches.var(axis=-1, ddof=1, keepdims=True) + 1e-6)
