"""CLIP ViT-L/16, 25 epochs of YFCC15M.

  python -m declip_jax.train --config=configs/slip/clip_large_25ep.py:FOLDER,IMAGENET --workdir runs/clip_large_25ep

Paper: Mu et al. 2021, arXiv 2112.12750, tables 2 and 10.
Expected: 40.4 zero-shot, 70.5 linear probe, 81.0 fine-tuned; the paper's top-1 on ImageNet, not ours.
Hardware: not published.
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  return recipe.make("clip", "SLIP ViT-L/16", arg, epochs=25)
