"""SLIP ViT-B/16, 35 epochs of CC12M.

  python -m declip_jax.train --config=configs/slip/slip_base_cc12m_35ep.py:FOLDER,IMAGENET \
    --workdir runs/slip_base_cc12m_35ep

Paper: Mu et al. 2021, arXiv 2112.12750, table 5.
Expected: 40.7 zero-shot, 73.7 linear probe, 83.1 fine-tuned; the paper's top-1 on ImageNet, not ours.
Hardware: not published.
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  return recipe.make("slip", "SLIP ViT-B/16", arg, epochs=35, data="cc12m")
