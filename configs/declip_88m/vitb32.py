"""DeCLIP ViT-B/32 on 88 M pairs, by its released config.

  python -m declip_jax.train --config=declip_88m/vitb32:data=FOLDER,imagenet=FOLDER --workdir runs/vitb32

The paper trained this ViT with one optimiser per tower (second-hand): AdamW for images (learning rate 1e-3, decay 0.05)
and SGD for texts (0.02 and 1e-4). The released class, AdamW_SGD, can use SGD for either side
(`config.optimizer.sgd_side`).
"""

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs.declip_88m import recipe

PUBLISHED = {
  "source": "Li et al. 2022, arXiv 2110.05208, and the table of the code's README",
  "imagenet_top1_percent": {"zero_shot": 66.2},
  "parameters": 186_207_746,
  "hardware": "80 V100, 10 days",
  "second_hand": ("hardware",),
}


def get_config(data: str = "data/declip88m", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  c = recipe.make("DeCLIP ViT-B/32", data, imagenet, embed_dim=3072, pairs=64)
  c.duration = config.duration(steps=300_001)
  c.objective.clip.weight, c.objective.mvs.weight = 0.15, 0.45  # the mean over four pairs of views, times 0.6
  c.optimizer.weight_decay = 0.0
  c.optimizer.warmup = config.duration(steps=5000)
  c.optimizer.frozen += ("heads/logit_scale",)
  return c
