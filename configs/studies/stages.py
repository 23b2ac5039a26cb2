"""CLIP in two stages: most epochs on small images, few of their patches and short texts, the last ones on whole images.

  python -m declip_jax.train --config=studies/stages:patch_dropout=0.75,data=FOLDER --workdir runs/stages

The model and the data sets are those of `small`. With share=0 the run has one stage, which is `small` itself; with
image_size=32 and context_length=24 the first stage differs only by its patch dropout, as in FLIP (Li et al. 2023,
section 3), and with patch_dropout=0 only by its resolution and text length, as in CLIPA (Li et al. 2023).
"""

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs import small


def get_config(
  method: str = "clip",
  share: float = 0.8,
  patch_dropout: float = 0.5,
  image_size: int = 16,
  context_length: int = 12,
  learning_rate: float = 4e-4,
  epochs: float = 0.0,
  dataset: str = "fashion44k",
  data: str = "",
) -> ConfigDict:
  """Returns the config of one run.

  Args:
    method: see `small`.
    share: share of the epochs that are the first stage; 0 for one stage.
    patch_dropout: share of the patches that the first stage drops.
    image_size: width and height of the images of the first stage, in pixels; `small` has 32, and patches of 8.
    context_length: number of tokens of the texts of the first stage; `small` has 24.
    learning_rate: peak of the last stage, if there are two; that of the first one is that of `small`.
    epochs: epochs of both stages together; 0 for those of `small`.
    dataset, data: see `small`.

  Raises:
    ValueError: a share that leaves nothing for the last stage, or an unknown data set.
  """
  if not 0 <= share < 1:
    raise ValueError(f"share={share}: expected 0 or more and less than 1")
  c = small.get_config(method, dataset, data)
  c.duration = config.duration(epochs=epochs or c.duration.epochs)
  c.evaluate_every = config.duration(epochs=c.duration.epochs / 4)
  if not share:
    return c
  c.stages.first = config.stage(
    duration=config.duration(epochs=share * c.duration.epochs),
    image_size=image_size,
    patch_dropout=patch_dropout,
    context_length=context_length,
    learning_rate=c.optimizer.learning_rate,
    warmup=c.optimizer.warmup,
  )
  c.optimizer.learning_rate, c.optimizer.warmup = learning_rate, config.duration(steps=20)
  return c
