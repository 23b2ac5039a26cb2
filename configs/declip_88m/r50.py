"""DeCLIP ResNet-50 on 88 M pairs, by its released config.

  python -m declip_jax.train --config=declip_88m/r50:data=FOLDER,imagenet=FOLDER --workdir runs/r50

The paper's ResNet-50 reaches 60.4 with 56 M of the pairs. The table says 32 epochs; the config says 46,001 steps "for
testing" and does not give the number of GPUs.
"""

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs.declip_88m import recipe
from declip_jax.configs.declip_yfcc15m.recipe import RESNET_FC

PUBLISHED = {
  "source": "Li et al. 2022, arXiv 2110.05208, and the table of the code's README",
  "imagenet_top1_percent": {"zero_shot": 62.5},
  "parameters": 133_659_746 - RESNET_FC,
  "hardware": "80 V100, 8 days",
  "second_hand": ("hardware",),
}


def get_config(data: str = "data/declip88m", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  c = recipe.make("DeCLIP RN50", data, imagenet, embed_dim=1024, pairs=128)
  c.duration = config.duration(epochs=32)
  c.model.image.norm_groups = c.model.heads.norm_groups
  c.optimizer.weight_decay = 1e-4
  c.optimizer.warmup = config.duration(steps=2500)
  c.optimizer.multipliers = (("heads/logit_scale", 0.1),)
  return c
