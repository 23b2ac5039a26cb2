"""SLIP: CLIP, SimCLR and SLIP with SLIP's training procedure, and its ablations.

Mu et al. 2021, "SLIP: Self-supervision meets Language-Image Pre-training", arXiv 2112.12750; recipe of its released
code, facebookresearch/SLIP. Results with released weights have the names of these files.

Data: OpenAI's list of YFCC15M, 14.6 M pairs; CC12M with 11.0 M and CC3M with 3.1 M that could still be downloaded.
`data` is data/yfcc15m, data/cc3m or data/cc12m by default. Its samples have all captions of an image, one of which is
drawn each time. `imagenet` is classified after each epoch; SimCLR, which has no text tower, does not take it.

No gradient flows through the candidates of the contrastive loss, as in the released code on several GPUs
(`config.objective.clip.full_gradient`). Where we differ: bfloat16 instead of float16 with loss scaling; a long caption
keeps its end-of-text token; an empty title or description is never drawn.
"""

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs import finetune as finetuning
from declip_jax.configs import read_data, to_source

TEMPLATES = (
  "itap of a {}.",
  "a bad photo of the {}.",
  "a origami {}.",
  "a photo of the large {}.",
  "a {} in a video game.",
  "art of the {}.",
  "a photo of the small {}.",
)


def make(method: str, architecture: str, data: str, imagenet: str = "", *, epochs: int) -> ConfigDict:
  """Returns the config of a result; see `read_data` for `data` and `imagenet`."""
  c = config.default(method, architecture)
  c.batch_size = 4096
  c.duration = config.duration(epochs=epochs)
  c.objective.clip.full_gradient = False
  c.model.mean, c.model.std = config.IMAGENET_MEAN, config.IMAGENET_STD
  c.optimizer.learning_rate, c.optimizer.weight_decay = (5e-4, 0.5) if method.startswith("clip") else (3e-3, 0.1)
  if method == "simclr":
    c.optimizer.learning_rate = 3.2e-3
  c.optimizer.epsilon = 1e-8
  c.optimizer.warmup = config.duration(epochs=2 if epochs == 100 else 1)
  c.optimizer.warmup_start, c.optimizer.end_learning_rate = 1e-6, 1e-5
  read_data(c, data, imagenet, TEMPLATES)
  return c


def finetune(
  architecture: str, init: str, data: str, imagenet: str = "", *, epochs: int, warmup: int, classes: int = 1000
) -> ConfigDict:
  """Returns the config of an end-to-end fine-tuning (BeiT's code at f8f3df8, as in the released `beit_finetuning`).

  The paper reports the best epoch on the validation images; here the best checkpoint is kept, too. Where we differ:
  bfloat16 instead of float16, and erased pixels are noise in 8 bits.

  Args:
    architecture: one of `architectures.ARCHITECTURES`.
    init: the run or the weights to start from.
    data: labelled training images; see `configs.to_source`.
    imagenet: labelled test images; nothing is evaluated if empty.
    epochs, warmup: length of training and of its warm-up, in epochs.
    classes: number of classes.
  """
  c = finetuning.get_config(init, data, "", architecture, epochs=epochs, classes=classes)
  c.model.mean, c.model.std = config.IMAGENET_MEAN, config.IMAGENET_STD
  c.optimizer.warmup = config.duration(epochs=warmup)
  if imagenet:
    c.evals.imagenet = config.classify(to_source(imagenet))
    c.checkpoint.best_metric = "eval/imagenet/top1"
  return c
