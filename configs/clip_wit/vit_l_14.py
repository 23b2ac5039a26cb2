"""CLIP ViT-L/14 by its own recipe.

  python -m declip_jax.train --config=configs/clip_wit/vit_l_14.py:FOLDER,IMAGENET --workdir runs/vit_l_14

Paper: Radford et al. 2021, arXiv 2103.00020; recipe in tables 18 to 20.
Expected: 75.3 zero-shot; the paper's top-1 on ImageNet, not ours.
Hardware: 256 V100, 12 days.
"""

from ml_collections import ConfigDict

from declip_jax.configs.clip_wit import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  return recipe.make("ViT-L/14", arg, rate=4e-4)
