"""CLIP after SimCLR, ViT-B/16, 25 epochs of YFCC15M.

  python -m declip_jax.train --config=slip/simclr_to_clip:data=FOLDER,imagenet=FOLDER --workdir runs/simclr_to_clip

The image tower starts from runs/simclr_base_25ep, or from --config.init_from.path.
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe

PUBLISHED = {
  "source": "Mu et al. 2021, arXiv 2112.12750, tables 7 to 9",
  "imagenet_top1_percent": {"zero_shot": 41.1, "linear_probe": 68.2, "fine_tuned": 82.3},
}


def get_config(data: str = "data/yfcc15m", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  c = recipe.make("clip", "SLIP ViT-B/16", data, imagenet, epochs=25)
  c.init_from.path, c.init_from.groups = "runs/simclr_base_25ep", ("image",)
  return c
