"""SLIP with masked image modelling in place of SimCLR, ViT-B/16, 25 epochs of YFCC15M.

  python -m declip_jax.train --config=configs/slip/slip_mim.py:FOLDER,IMAGENET --workdir runs/slip_mim

Paper: Mu et al. 2021, arXiv 2112.12750, table 6.
Expected: 39.1 zero-shot, 66.5 linear probe, 82.2 fine-tuned; the paper's top-1 on ImageNet, not ours.
Hardware: not published.

Learning rate, weight decay and the weight of the self-supervised term are not published: they are SLIP's here. The
paper's BEiT predicts the tokens of DALL-E's image tokenizer, this predicts pixels.
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  return recipe.make("slip_mim", "SLIP ViT-B/16", arg, epochs=25)
