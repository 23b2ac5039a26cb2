"""DeCLIP ResNet-50 on 88 M pairs, as its released config says.

  python -m declip_jax.train --config=configs/declip_88m/r50.py:FOLDER,IMAGENET --workdir runs/r50

Paper: Li et al. 2022, arXiv 2110.05208, and the table of the code's README.
Expected: 62.5 zero-shot; the authors' top-1 on ImageNet, not ours.
Hardware: 80 V100, 8 days; second-hand, look it up before you quote it.

The paper's ResNet-50 has 60.4 with 56 M of the pairs. The table has 32 epochs; the config gives 46,001 steps "for
testing" and no number of GPUs.
"""

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs.declip_88m import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  c = recipe.make("DeCLIP RN50", arg, embed_dim=1024, pairs=128)
  c.duration = config.duration(epochs=32)
  c.model.image.norm_groups = c.model.heads.norm_groups
  c.optimizer.weight_decay = 1e-4
  c.optimizer.warmup = config.duration(steps=2500)
  c.optimizer.multipliers = (("heads/logit_scale", 0.1),)
  return c
