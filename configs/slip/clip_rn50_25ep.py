"""CLIP ResNet-50, 25 epochs of YFCC15M.

  python -m declip_jax.train --config=configs/slip/clip_rn50_25ep.py:FOLDER,IMAGENET --workdir runs/clip_rn50_25ep

Paper: Mu et al. 2021, arXiv 2112.12750, section 4.
Expected: 34.6 zero-shot; the paper's top-1 on ImageNet, not ours.
Hardware: not published.

CLIP's paper has 31.3 for its own ResNet-50 on the same data.
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  return recipe.make("clip", "RN50", arg, epochs=25)
