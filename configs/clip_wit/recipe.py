"""CLIP's nine models by its own recipe, on data that is not public.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020; tables
18 to 20 have the recipe.

Data: WIT, 400 M pairs from 500,000 queries with 20,000 pairs at most for each, was never released. With other pairs
the recipe is the same and the number another: on OpenAI's list of YFCC15M the paper's ResNet-50 has 31.3. FOLDER is
data/wit by default; IMAGENET is classified after each epoch.

Where we differ: bfloat16 and float32 moments in place of half precision with stochastic rounding; batch norms of a
ResNet are those of the global batch.
"""

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs import read_folders


def make(architecture: str, arg: str, *, rate: float) -> ConfigDict:
  """A row; `arg` is that of its `get_config`, `rate` the peak learning rate."""
  c = config.default("clip", architecture)
  c.batch_size = 32768
  c.duration = config.duration(epochs=32)
  c.data.recipe = "openai"
  c.data.interpolation = "bicubic"
  c.optimizer.learning_rate = rate
  if c.model.image.kind == "resnet":
    c.optimizer.b2, c.optimizer.epsilon = 0.999, 1e-8
  read_folders(c, arg, "data/wit")
  return c
