"""DeCLIP's ablation, ResNet-50 on CC3M: CLIP and nearest-neighbour supervision.

  python -m declip_jax.train --config=configs/declip_paper/cc3m_nns.py:FOLDER,IMAGENET --workdir runs/cc3m_nns

Paper: Li et al. 2022, arXiv 2110.05208, section 4.
Expected: we know of no published number.
Hardware: not published, as far as we know.
"""

from ml_collections import ConfigDict

from declip_jax.configs.declip_paper import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  return recipe.make("declip_nns", arg, data="cc3m")
