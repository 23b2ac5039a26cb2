"""CLIP with SimCLR's crop and flip, ViT-B/16, 25 epochs of YFCC15M.

  python -m declip_jax.train --config=configs/slip/clip_crop.py:FOLDER,IMAGENET --workdir runs/clip_crop

Paper: Mu et al. 2021, arXiv 2112.12750, tables 7 to 9.
Expected: 36.0 zero-shot, 66.1 linear probe, 80.5 fine-tuned; the paper's top-1 on ImageNet, not ours.
Hardware: not published.

Strengths of the augmentation are those of SLIP's code, as the paper gives none.
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  return recipe.make("clip_crop", "SLIP ViT-B/16", arg, epochs=25)
