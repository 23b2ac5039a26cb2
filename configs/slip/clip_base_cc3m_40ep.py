"""CLIP ViT-B/16, 40 epochs of CC3M.

  python -m declip_jax.train --config=configs/slip/clip_base_cc3m_40ep.py:FOLDER,IMAGENET \
    --workdir runs/clip_base_cc3m_40ep

Paper: Mu et al. 2021, arXiv 2112.12750, table 5.
Expected: 17.1 zero-shot, 53.3 linear probe, 79.5 fine-tuned; the paper's top-1 on ImageNet, not ours.
Hardware: not published.

It is best after 15 of its 40 epochs; at the last, users of the released code had 14.1.
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  return recipe.make("clip", "SLIP ViT-B/16", arg, epochs=40, data="cc3m")
