"""The configs: `demo`, `small`, `pretrain`, `finetune_pairs`, `finetune`, a folder per paper with a file for each
published result, and `studies`, some of whose grids are trained by benchmarks of the same names.

A config is found by its name from any folder; the parameters of its `get_config` are named arguments:

  python -m declip_jax.train --config=slip/slip_base_25ep:data=FOLDER,imagenet=FOLDER --workdir runs/slip_base_25ep

The `recipe` next to a published result names the paper and the data, lists where we differ, and contains what its
results share. Each result has its numbers in `PUBLISHED`, as its source reports them; they are not ours:

  source                 paper and table
  imagenet_top1_percent  top-1 accuracy on ImageNet by protocol: zero_shot, linear_probe, fine_tuned
  top1_percent           the same on the data set that the model was fine-tuned on
  parameters             trained parameters
  hardware               devices and time; missing if not published
  second_hand            which of these come from another publication: check them before you quote them

Zero-shot accuracies were measured with OpenAI's 80 prompts or, in `slip`, with SLIP's seven. OpenAI's are not in this
repository: `imagenet` evaluates with one prompt, which costs CLIP's own models about 3.5 points; set your own with
`--config.evals.imagenet.templates`.
"""

import os

from ml_collections import ConfigDict

from declip_jax import config


def to_source(data: str) -> str:
  """Returns the source for an argument `data`.

  Args:
    data: any path that `data.inspect` recognises, or KIND:LOCATION. A folder that is not on this machine counts as one
      of WebDataset shards, *.tar.

  Raises:
    FileNotFoundError: a file that does not exist and whose suffix does not determine its kind.
    ValueError: a file or folder that is not recognised.
  """
  is_path = ":" not in data or "://" in data
  place = data.partition("?")[0]  # options, such as ?root=/images, follow
  if is_path and not any(map(os.path.isdir, (data, place))) and not os.path.splitext(place)[1]:
    return f"webdataset:{data.rstrip('/')}/*.tar"
  from declip_jax.data.guess import guess  # on demand: it imports the image codecs

  return guess(data)


def read_data(c: ConfigDict, data: str, imagenet: str, templates: tuple[str, ...] = ("a photo of a {}.",)) -> None:
  """Sets what a published result trains on and how it is evaluated, in place.

  Args:
    c: the config.
    data: the training data; see `to_source`.
    imagenet: ImageNet's validation images, with `classnames.txt` next to the shards. They are classified every
      `c.evaluate_every`, and the best checkpoint is kept. If empty, nothing is evaluated.
    templates: the prompts for its classes.
  """
  c.data.train = (to_source(data),)
  if imagenet:
    c.evals.imagenet = config.zero_shot(to_source(imagenet), templates)
    c.checkpoint.best_metric = "eval/imagenet/top1"
