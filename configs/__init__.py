"""What there is to train: `demo`, `small`, `pretrain`, and a folder for each published recipe with a file for each row.

A row's file tells its command, the published number and the hardware; `recipe` beside it the paper, the data, where we
differ, and what all rows share. Rows import these, so commands run in the folder that holds configs/. Each takes
FOLDER,IMAGENET as its argument:

  python -m declip_jax.train --config=configs/slip/slip_base_25ep.py:FOLDER,IMAGENET --workdir runs/slip_base_25ep

All published numbers that are called zero-shot need OpenAI's 80 prompts or, for SLIP's rows, its seven. OpenAI's are
not in this repository: IMAGENET measures with one, which costs points (about 3.5 with CLIP's own models);
`--config.evals.imagenet.templates` takes all.
"""

from ml_collections import ConfigDict

from declip_jax import config


def read_folders(c: ConfigDict, arg: str, default: str, templates: tuple[str, ...] = ("a photo of a {}.",)) -> None:
  """Sets where a row reads, by its argument: empty, FOLDER or FOLDER,IMAGENET.

  Args:
    c: changed in place.
    arg: FOLDER holds the training shards, *.tar. IMAGENET, if given, holds those of ImageNet's validation images with
      classnames.txt beside them: they are classified every `c.evaluate_every`, and the best checkpoint is kept.
    default: in place of an empty FOLDER.
    templates: prompts to classify with.
  """
  folder, _, imagenet = arg.partition(",")
  c.data.train = (f"webdataset:{folder or default}/*.tar",)
  if imagenet:
    c.evals.imagenet = config.zero_shot(f"webdataset:{imagenet}/*.tar", templates)
    c.checkpoint.best_metric = "eval/imagenet/top1"
