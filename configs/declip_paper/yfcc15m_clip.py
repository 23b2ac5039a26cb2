"""CLIP ResNet-50 on YFCC15M, as DeCLIP's paper compares.

  python -m declip_jax.train --config=configs/declip_paper/yfcc15m_clip.py:FOLDER,IMAGENET --workdir runs/yfcc15m_clip

Paper: Li et al. 2022, arXiv 2110.05208, section 4.
Expected: 31.3 zero-shot; the paper's top-1 on ImageNet, not ours.
Hardware: not published, as far as we know.

CLIP's own paper has 31.3 too, for a ResNet-50 on its YFCC15M: this may be taken from there.
"""

from ml_collections import ConfigDict

from declip_jax.configs.declip_paper import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  return recipe.make("clip", arg, data="yfcc15m_v2")
