"""DeCLIP ResNet-50 on YFCC15M, as DeCLIP's paper compares.

  python -m declip_jax.train --config=configs/declip_paper/yfcc15m_declip.py:FOLDER,IMAGENET \
    --workdir runs/yfcc15m_declip

Paper: Li et al. 2022, arXiv 2110.05208, section 4.
Expected: 41.9 zero-shot; the paper's top-1 on ImageNet, not ours.
Hardware: not published, as far as we know.
"""

from ml_collections import ConfigDict

from declip_jax.configs.declip_paper import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  return recipe.make("declip", arg, data="yfcc15m_v2")
