"""CLIP, SLIP or DeCLIP with one small ViT on a small WebDataset, for two CPU cores: docs/results.md has the figures.

  --config=configs/small.py:METHOD,DATASET,FOLDER

METHOD is clip, slip or declip. DATASET is fashion44k (product photos, their titles, 68 article types) or flickr8k
(photos with five captions each). FOLDER holds train-*.tar and test-*.tar, for fashion44k also classnames.txt.
All methods see the same pairs, the same number of them, and train the same towers.
"""

from ml_collections import ConfigDict

from declip_jax import architectures, config

EPOCHS = {"fashion44k": 6, "flickr8k": 20}
# Titles are like "Puma Women Black Crazy Slide Flats", not like "a photo of flats".
FASHION_TEMPLATES = tuple(
  f"{who} {color} {{}}"
  for who in ("Men", "Women")
  for color in ("Black", "White", "Blue", "Red", "Brown", "Pink", "Grey")
)


def get_config(arg: str = "clip,fashion44k,data/fashion44k") -> ConfigDict:
  """`arg` is METHOD,DATASET,FOLDER."""
  method, dataset, folder = arg.split(",", 2)
  if dataset not in EPOCHS:
    raise ValueError(f"data set {dataset!r}: choose one of {sorted(EPOCHS)}")
  c = config.default(method)
  c.batch_size = 256
  c.duration = config.duration(epochs=EPOCHS[dataset])
  c.data.train = (f"webdataset:{folder}/train-*.tar",)
  c.data.image_size = 32
  c.data.blur_radius = (0.1, 0.5)  # the papers' are for images of 224 pixels
  c.data.mask_slots = 2  # captions are short: 15 % of some 7 to 12 tokens
  c.data.threads = 2
  c.model.dtype = "float32"
  c.model.image = architectures.vit(patch=8, width=128, depth=4, heads=4)
  c.model.text.update({"width": 64, "depth": 3, "heads": 2, "context_length": 24})
  c.model.heads.update({"embed_dim": 128, "bank_size": 8192, "simclr_projector": (512, 512, 128)})
  c.model.heads.update({"simsiam_projector": (256, 256, 256), "simsiam_predictor": (128, 256)})
  c.optimizer.learning_rate = 1e-3
  c.optimizer.warmup = config.duration(steps=100)
  c.log_every = 10
  c.evaluate_every = config.duration(epochs=EPOCHS[dataset] / 4)
  c.evaluate_batch_size = 256
  c.checkpoint.every = config.duration(epochs=EPOCHS[dataset] / 4)
  test = f"webdataset:{folder}/test-*.tar"
  if dataset == "fashion44k":
    c.evals.zero_shot = config.zero_shot(test, FASHION_TEMPLATES)
    c.evals.retrieval = config.retrieval(test, equal_texts=True)  # titles repeat
  else:
    c.evals.retrieval = config.retrieval(test)
  return c
