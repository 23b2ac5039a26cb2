"""SLIP with self-supervision on other images, ViT-B/16, 25 epochs of YFCC15M.

  python -m declip_jax.train --config=slip/slip_decoupled:data=FOLDER,imagenet=FOLDER --workdir runs/slip_decoupled

SimCLR sees other images: data/yfcc15m_others/*.tar or --config.data.ssl_train, 15 M images of YFCC100M that are not in
YFCC15M. Their shards need a caption or a class too, which is not read.
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe

PUBLISHED = {
  "source": "Mu et al. 2021, arXiv 2112.12750, tables 7 to 9",
  "imagenet_top1_percent": {"zero_shot": 42.7, "linear_probe": 72.0, "fine_tuned": 82.8},
}


def get_config(data: str = "data/yfcc15m", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  c = recipe.make("slip", "SLIP ViT-B/16", data, imagenet, epochs=25)
  c.data.ssl_train = ("webdataset:data/yfcc15m_others/*.tar",)
  return c
