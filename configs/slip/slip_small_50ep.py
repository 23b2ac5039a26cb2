"""SLIP ViT-S/16, 50 epochs of YFCC15M.

  python -m declip_jax.train --config=configs/slip/slip_small_50ep.py:FOLDER,IMAGENET --workdir runs/slip_small_50ep

Paper: Mu et al. 2021, arXiv 2112.12750, tables 2 and 10.
Expected: 39.3 zero-shot, 67.6 linear probe, 80.7 fine-tuned; the paper's top-1 on ImageNet, not ours.
Hardware: not published.
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  return recipe.make("slip", "SLIP ViT-S/16", arg, epochs=50)
