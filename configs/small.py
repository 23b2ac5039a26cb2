"""Any method with one small ViT on a small WebDataset, for two CPU cores; docs/results.md has the results.

  python -m declip_jax.train --config=small:method=slip,dataset=flickr8k,data=FOLDER --workdir runs/slip

All methods see the same pairs equally often and train the same towers; METHOD_repo freezes the patch embedding, as
the released code does.
"""

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.spelling import did_you_mean

EPOCHS = {"fashion44k": 6, "flickr8k": 20}
# Titles read like "Puma Women Black Crazy Slide Flats", not like "a photo of flats".
FASHION_TEMPLATES = tuple(
  f"{who} {color} {{}}"
  for who in ("Men", "Women")
  for color in ("Black", "White", "Blue", "Red", "Brown", "Pink", "Grey")
)


def get_config(method: str = "clip", dataset: str = "fashion44k", data: str = "") -> ConfigDict:
  """Returns the config.

  Args:
    method: a name of `methods.METHODS`, `methods.OURS` or `methods.ABLATIONS`; METHOD_repo is the method of that name
      as DeCLIP's released code implements it.
    dataset: fashion44k (product photos, their titles, 68 article types) or flickr8k (photos with five captions each).
    data: a folder with train-*.tar and test-*.tar, for fashion44k also classnames.txt; data/DATASET by default.

  Raises:
    ValueError: an unknown dataset.
  """
  if dataset not in EPOCHS:
    raise ValueError(f"dataset {dataset!r}: choose one of {sorted(EPOCHS)}{did_you_mean(dataset, EPOCHS)}")
  folder = data or f"data/{dataset}"
  c = config.default(method.removesuffix("_repo"), "ViT-Nano/8@32px", "repo" if method.endswith("_repo") else "paper")
  c.batch_size = 256
  c.duration = config.duration(epochs=EPOCHS[dataset])
  c.data.train = (f"webdataset:{folder}/train-*.tar",)
  c.data.blur_radius = (0.1, 0.5)  # the papers' radii are for images of 224 pixels
  c.data.mask_slots = 2  # captions are short: 15 % of 7 to 12 tokens
  c.data.threads = 2
  c.model.dtype = "float32"
  c.model.heads.bank_size = 8192
  if method.endswith("_repo"):
    c.model.heads.norm_groups = c.model.heads.bank_groups = 2  # of 128 pairs each
    c.model.heads.bank_size = 4096
    c.data.evaluation_resize = 0  # as for all other methods
  c.optimizer.learning_rate = 1e-3
  c.optimizer.warmup, c.optimizer.weight_decay = config.duration(steps=100), 0.2
  c.log_every = 10
  c.evaluate_every = config.duration(epochs=EPOCHS[dataset] / 4)
  c.evaluate_batch_size = 256
  c.checkpoint.every = config.duration(epochs=EPOCHS[dataset] / 4)
  test = f"webdataset:{folder}/test-*.tar"
  if method == "simclr":  # it has no text tower
    return c
  if dataset == "fashion44k":
    c.evals.zero_shot = config.zero_shot(test, FASHION_TEMPLATES)
    c.evals.retrieval = config.retrieval(test, equal_texts=True)  # titles repeat
  else:
    c.evals.retrieval = config.retrieval(test)
  return c
