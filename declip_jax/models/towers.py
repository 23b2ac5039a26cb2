"""The first half of the model: towers that look at one example at a time, from a `Batch` to `Features`."""

from typing import Any

from einops import rearrange
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from declip_jax.models.regnet import RegNetY
from declip_jax.models.resnet import ModifiedResNet
from declip_jax.models.text import TextTransformer
from declip_jax.models.vit import ViT
from declip_jax.types import Batch, Features

# What `config.model.image.kind` may name.
IMAGE_TOWERS = {"vit": ViT, "resnet": ModifiedResNet, "regnet": RegNetY}
_BATCH_NORMED = (ModifiedResNet, RegNetY)


class Towers(nn.Module):
  """An image tower and a text tower side by side; pixels are normalised here, on the device.

  Attributes:
    image: a module from normalised images `[b h w c]` and `train` to features `[b w]`.
    text: the text transformer.
    mean, std: per channel, on a scale of 0 to 1.
    lock_image: the image tower is not trained, so its batch norms use their running statistics and keep them.
  """

  image: nn.Module
  text: TextTransformer
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  lock_image: bool = False
  dtype: Any = jnp.float32

  def __call__(self, batch: Batch, masked_view: int | None, train: bool) -> Features:
    """Encodes every view of a batch; `masked_view` is the text view that masked language modelling predicts in."""
    image = self._encode_views(batch["image"], train)
    views = batch["text"].shape[1]
    text, states = self.text(rearrange(batch["text"], "b u t -> (b u) t"))
    text, states = (rearrange(x, "(b u) ... -> b u ...", u=views) for x in (text, states))
    if masked_view is None:
      return Features(image=image, text=text)
    # Only masked positions go on: the vocabulary head is the widest matrix of the model.
    masked = jnp.take_along_axis(states[:, masked_view], batch["mlm_position"][..., None], axis=1)
    return Features(image=image, text=text, masked_text=self.text.normalise(masked))

  def encode_image(self, images: UInt8[Array, "b h w c"], train: bool = False) -> Float[Array, "b width"]:
    """Features of one view per image, from unnormalised pixels."""
    mean, std = (255 * jnp.asarray(x, jnp.float32) for x in (self.mean, self.std))
    return self.encode_pixels((images.astype(jnp.float32) - mean) / std, train)

  def encode_pixels(self, images: Float[Array, "b h w c"], train: bool = False) -> Float[Array, "b width"]:
    """Features of one view per image, from normalised pixels."""
    return self.image(images.astype(self.dtype), train and not self.lock_image)

  def encode_text(self, tokens: Int[Array, "b t"]) -> Float[Array, "b width"]:
    """Features of texts at their end-of-text token."""
    return self.text(tokens)[0]

  def _encode_views(self, images: UInt8[Array, "b v h w c"], train: bool) -> Float[Array, "b v width"]:
    if isinstance(self.image, _BATCH_NORMED):
      # Batch statistics are those of one view, so views go through one after the other.
      return jnp.stack([self.encode_image(images[:, view], train) for view in range(images.shape[1])], axis=1)
    features = self.encode_image(rearrange(images, "b v h w c -> (b v) h w c"), train)
    return rearrange(features, "(b v) w -> b v w", v=images.shape[1])
