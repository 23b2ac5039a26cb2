"""CLIP's nine models, trained as in its paper, on data that is not public.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020; the
recipe is in tables 18 to 20.

Data: WIT, 400 M pairs from 500,000 queries with at most 20,000 pairs each, was never released. Other pairs give other
numbers: on OpenAI's list of YFCC15M the paper's ResNet-50 reaches 31.3. `data` is data/wit by default; `imagenet` is
classified after each epoch.

Where we differ: bfloat16 and float32 moments instead of half precision with stochastic rounding; the batch norms of a
ResNet see the global batch.
"""

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs import read_data


def make(architecture: str, data: str, imagenet: str, *, rate: float) -> ConfigDict:
  """Returns the config of a result with the peak learning rate `rate`; see `read_data` for the folders."""
  c = config.default("clip", architecture)
  c.batch_size = 32768
  c.duration = config.duration(epochs=32)
  c.data.recipe = "openai"
  c.data.interpolation = "bicubic"
  c.optimizer.learning_rate = rate
  if c.model.image.kind == "resnet":
    c.optimizer.b2, c.optimizer.epsilon = 0.999, 1e-8
  read_data(c, data, imagenet)
  return c
