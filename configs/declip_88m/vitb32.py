"""DeCLIP ViT-B/32 on 88 M pairs, as its released config says.

  python -m declip_jax.train --config=configs/declip_88m/vitb32.py:FOLDER,IMAGENET --workdir runs/vitb32

Paper: Li et al. 2022, arXiv 2110.05208, and the table of the code's README.
Expected: 66.2 zero-shot; the authors' top-1 on ImageNet, not ours.
Hardware: 80 V100, 10 days; second-hand, look it up before you quote it.

The paper's own ViT had an optimiser for each tower, second-hand too: AdamW for images (learning rate 1e-3, decay 0.05)
and SGD for texts (0.02 and 1e-4). The class that was released, AdamW_SGD, can have either side
(`config.optimizer.sgd_side`).
"""

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs.declip_88m import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  c = recipe.make("DeCLIP ViT-B/32", arg, embed_dim=3072, pairs=64)
  c.duration = config.duration(steps=300_001)
  c.objective.clip.weight, c.objective.mvs.weight = 0.15, 0.45  # the mean over four pairs of views, times 0.6
  c.optimizer.weight_decay = 0.0
  c.optimizer.warmup = config.duration(steps=5000)
  c.optimizer.frozen += ("heads/logit_scale",)
  return c
