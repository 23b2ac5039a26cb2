"""Numbers of the reference implementations (see fixtures/README.md), and models to compare with them."""

from pathlib import Path

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from declip_jax import config
from declip_jax.models.heads import make_heads
from declip_jax.models.model import Model
from declip_jax.models.towers import Towers
from declip_jax.objectives import Objective, make_objective
from declip_jax.objectives.blockwise import PLAIN
from declip_jax.views import Views

FIXTURES = Path(__file__).parent / "fixtures"
# What the tensors of OpenAI's, open_clip's and Hugging Face's models do not tell.
TOLD = {"text.activation": "quick_gelu", "text.eot": 127}
# Pixels of the fixtures are already normalised: this mean and deviation do not change them.
UNCHANGED = {"mean": (0.0,), "std": (1 / 255,)}


def load(*names):
  """The arrays of some fixtures; those stored as float16, without loss, come back as float32."""
  arrays = {}
  for name in names:
    with np.load(FIXTURES / f"{name}.npz") as file:
      arrays |= {key: file[key] for key in file.files}
  return {key: a.astype(np.float32) if a.dtype == np.float16 else a for key, a in arrays.items()}


def below(arrays, prefix):
  """The entries under a prefix, without it."""
  return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def pixels(*views):
  """Images `[b c h w]`, one array per view, as the `[b v h w c]` of a batch."""
  return np.stack([np.moveaxis(view, 1, -1) for view in views], axis=1)


class GivenImages(nn.Module):
  """An image tower whose input already is the feature, as `[b 1 1 f]`."""

  has_batch_norm = False

  @property
  def stride(self):
    return 1

  @nn.compact
  def __call__(self, images, train=False, hidden=None):
    return images.reshape(images.shape[0], -1), None


class GivenTexts(nn.Module):
  """A text tower whose input already is the feature `[b f]`."""

  @nn.compact
  def __call__(self, features):
    return features, features[:, None]


def make_model(image, text, views=None, **heads):
  """A model of these towers; `heads` are names of heads under "heads", and values of their fields."""
  usual = {
    **config.default().model.heads.to_dict(),
    "heads": ("joint",),
    "patch_size": 3,
    "vocab_size": 8,
    "bank_size": 1,
    "dtype": jnp.float32,
  }
  fields = usual | heads
  heads = make_heads(fields.pop("heads"), fields)
  return Model(towers=Towers(image, text, **UNCHANGED), heads=heads, views=views or Views())


def objective(weights, options=None, method=PLAIN) -> Objective:
  """The objective of terms with these weights, and with these options by the term."""
  return make_objective(
    {name: {"weight": weight, **(options or {}).get(name, {})} for name, weight in weights.items()}, method
  )


def differentiate(model, params, collections, batch, options=None, **weights):
  """One forward and backward pass in training mode.

  Returns:
    Loss, gradient, features, outputs, metrics and new collections.
  """

  batch = jax.tree.map(jnp.asarray, batch)

  def forward(params):
    features, towers = model.encode(params, collections, batch)
    outputs, heads = model.apply_heads(params, collections, features)
    loss, metrics = objective(weights, options)(outputs, batch, 0)
    return loss, (features, outputs, metrics, {"towers": towers, "heads": heads})

  (loss, aux), gradient = jax.jit(jax.value_and_grad(forward, has_aux=True))(params)
  return loss, gradient, *aux
