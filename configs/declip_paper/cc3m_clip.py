"""DeCLIP's ablation, ResNet-50 on CC3M: CLIP, where the ladder starts.

  python -m declip_jax.train --config=configs/declip_paper/cc3m_clip.py:FOLDER,IMAGENET --workdir runs/cc3m_clip

Paper: Li et al. 2022, arXiv 2110.05208, section 4.
Expected: 20.6 zero-shot; the paper's top-1 on ImageNet, not ours, and second-hand: look it up before you quote it.
Hardware: not published, as far as we know.

One strong crop and the clean caption, the first pair of the rungs above: which view the paper's row sees we do not
know.
"""

from ml_collections import ConfigDict

from declip_jax.configs.declip_paper import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  return recipe.make("declip_clip", arg, data="cc3m")
