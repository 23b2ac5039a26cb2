"""CLIP ViT-L/14@336px: ViT-L/14 for one more epoch.

  python -m declip_jax.train --config=configs/clip_wit/vit_l_14_336px.py:FOLDER,IMAGENET --workdir runs/vit_l_14_336px

Paper: Radford et al. 2021, arXiv 2103.00020; recipe in tables 18 to 20.
Expected: 76.2 zero-shot; the paper's top-1 on ImageNet, not ours.
Hardware: not published.

It starts from runs/vit_l_14, or what --config.init_from.path says. The warm-up is ours.
"""

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs.clip_wit import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  c = recipe.make("ViT-L/14@336px", arg, rate=2e-5)
  c.duration = config.duration(epochs=1)
  c.init_from.path = "runs/vit_l_14"
  return c
