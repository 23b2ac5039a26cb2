"""DeCLIP's ablation, ResNet-50 on CC3M: CLIP and multi-view supervision.

  python -m declip_jax.train --config=configs/declip_paper/cc3m_mvs.py:FOLDER,IMAGENET --workdir runs/cc3m_mvs

Paper: Li et al. 2022, arXiv 2110.05208, section 4.
Expected: 24.8 zero-shot; the paper's top-1 on ImageNet, not ours, and second-hand: look it up before you quote it.
Hardware: not published, as far as we know.

The ladder's second rung, and this signal alone.
"""

from ml_collections import ConfigDict

from declip_jax.configs.declip_paper import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  return recipe.make("declip_mvs", arg, data="cc3m")
