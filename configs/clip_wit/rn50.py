"""CLIP RN50 by its own recipe.

  python -m declip_jax.train --config=configs/clip_wit/rn50.py:FOLDER,IMAGENET --workdir runs/rn50

Paper: Radford et al. 2021, arXiv 2103.00020; recipe in tables 18 to 20.
Expected: 59.6 zero-shot; the paper's top-1 on ImageNet, not ours.
Hardware: not published.
"""

from ml_collections import ConfigDict

from declip_jax.configs.clip_wit import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  return recipe.make("RN50", arg, rate=5e-4)
