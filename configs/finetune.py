"""Any image tower fine-tuned on your own labelled images.

  python -m declip_jax.train --config=finetune:init=RUN,data=FOLDER,test=FOLDER --workdir runs/finetune

The procedure is BeiT's, which SLIP uses for ViT-B on ImageNet (slip/finetune_base), with a learning rate in proportion
to the batch size. With `head=text`, as in WiSE-FT, the classifier reads joint embeddings and starts as the zero-shot
classifier of the class names.
"""

import os

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs import to_source

HEADS = ("random", "text")


def get_config(
  init: str = "",
  data: str = "",
  test: str = "",
  architecture: str = "",
  head: str = "random",
  epochs: int = 50,
  batch_size: int = 1024,
  classes: int = 0,
) -> ConfigDict:
  """Returns the config.

  Args:
    init: a run, one of its checkpoints, or any weights that `declip_jax.load` reads; empty to train from scratch.
    data: labelled training images, such as a folder with a folder of images for each class; see `to_source`. Training
      needs it.
    test: labelled images on which the accuracy is measured after each epoch; the best checkpoint is kept.
    architecture: one of `architectures.ARCHITECTURES`; by default that of the run `init`, else ViT-B/16.
    head: how the classifier starts, "random" or "text".
    epochs: length of training; a fifth of it is warm-up.
    batch_size: images per step.
    classes: number of classes; 0 for as many as `data` names.

  Raises:
    ValueError: an unknown architecture or head.
  """
  if head not in HEADS:
    raise ValueError(f"head {head!r}: choose one of {HEADS}")
  c = config.default("finetune", architecture or "ViT-B/16")
  saved = f"{init.partition('/checkpoints')[0]}/config.json"
  if init and not architecture and os.path.isfile(saved):
    copy_tower(c, saved)
  c.batch_size = batch_size
  c.duration, c.optimizer.warmup = config.duration(epochs=epochs), config.duration(epochs=epochs / 5)
  c.data.train = (to_source(data),) if data else ()
  c.data.interpolation = "bicubic"
  c.data.evaluation_resize = c.data.image_size * 256 // 224
  c.init_from.path, c.init_from.groups = init, ("image",)
  c.model.heads.num_classes = classes
  if head == "text":
    c.model.heads.classify_joint, c.init_from.templates = True, config.TEMPLATES
  if c.model.image.kind == "vit":
    c.model.drop_path, c.optimizer.layer_decay = 0.1, 0.65
  c.optimizer.update({"learning_rate": 4e-3 * batch_size / 1024, "end_learning_rate": 1e-6, "weight_decay": 0.05})
  c.optimizer.update({"b2": 0.999, "epsilon": 1e-8, "decay_mask": "finetune", "logit_scale_range": ()})
  if test:
    c.evals.test = config.classify(to_source(test))
    c.checkpoint.best_metric = "eval/test/top1"
  return c


def copy_tower(c: ConfigDict, path: str) -> None:
  """Sets the image tower, its projection, and the preprocessing of images to those of a saved config, in place."""
  with open(path) as file:
    saved = config.from_json(file.read())
  c.model.image, c.model.mean, c.model.std = saved.model.image, saved.model.mean, saved.model.std
  c.model.dtype, c.data.image_size = saved.model.dtype, saved.data.image_size
  c.model.heads.embed_dim, c.model.heads.image_bias = saved.model.heads.embed_dim, saved.model.heads.image_bias
