"""MoCo v3's transfer to small data sets, with DeiT's fine-tuning.

Chen et al. 2021, "An Empirical Study of Training Self-Supervised Vision Transformers", arXiv 2104.02057; commands of
facebookresearch/moco-v3, transfer, for ViT-B/16 that was trained without labels on ImageNet. SLIP names DeiT's recipe
for these data sets, too, but neither settings nor results.

Where we differ: a cosine per step instead of per epoch, and bfloat16 instead of float16.
"""

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs import finetune


def make(
  init: str, data: str, test: str, *, classes: int, weight_decay: float, mixup: float, cutmix: float
) -> ConfigDict:
  """Returns the config of a result.

  Args:
    init: the run or the weights to start from.
    data, test: labelled images for training, and to measure the accuracy on; see `configs.to_source`.
    classes: number of classes.
    weight_decay: weight decay.
    mixup, cutmix: parameters of the weights' distributions; 0 omits the method.
  """
  c = finetune.get_config(init, data, test, "SLIP ViT-B/16", epochs=100, classes=classes)
  c.model.mean, c.model.std = config.IMAGENET_MEAN, config.IMAGENET_STD
  c.data.erase_probability, c.data.mixup, c.data.cutmix = 0.0, mixup, cutmix
  c.optimizer.learning_rate, c.optimizer.weight_decay = 3e-4 * c.batch_size / 512, weight_decay
  c.optimizer.warmup, c.optimizer.warmup_start = config.duration(epochs=3), 1e-6
  c.optimizer.end_learning_rate, c.optimizer.layer_decay = 1e-5, 1.0
  c.optimizer.decay_mask = "finetune"
  return c
