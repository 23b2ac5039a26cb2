"""CLIP, SLIP and DeCLIP on a share of the pairs, for equally many steps; benchmarks/data_efficiency.py trains the grid.

  python -m declip_jax.train --config=studies/data_efficiency:method=declip,share=10%,data=FOLDER --workdir runs/declip

The model and the data sets are those of `small`. Few pairs, seen often, are the regime of the claim: CLIP overfits, and
further supervision helps (Li et al. 2022, figure 1; Mu et al. 2021, section 5.2).
"""

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs import small
from declip_jax.spelling import did_you_mean

# Each part of the strong views that can be left out, and its value then.
_WITHOUT = {
  "strong_scale": (0.5, 1.0),  # the weak crop of CLIP
  "jitter_probability": 0.0,
  "grayscale_probability": 0.0,
  "flip_probability": 0.0,
  "blur_probability": (0.0,),
  "text_operations": (),
}
# The fields that are left out, by the name of the views: those of the paper; plain ones, a large crop and the caption
# as it is; and plain ones with one part of the paper's.
VIEWS = {
  "paper": (),
  "plain": (*_WITHOUT,),
  **{part: tuple(field for field in _WITHOUT if field != part) for part in _WITHOUT},
}


def get_config(
  method: str = "clip",
  share: str = "100%",
  dataset: str = "fashion44k",
  data: str = "",
  views: str = "text_operations",
  steps: int = 500,
) -> ConfigDict:
  """Returns the config of one cell.

  Args:
    method: a name of `methods.METHODS`, `methods.OURS` or `methods.ABLATIONS`.
    share: share of the training pairs, such as 10%: a fixed random subset, which larger shares contain.
    dataset, data: see `small`.
    views: a key of `VIEWS`, "text_operations" by default: a large crop, which keeps colours and details, and augmented
      texts. Methods without strong views or augmented texts are not affected.
    steps: number of steps, whatever the share.

  Raises:
    ValueError: unknown views or an unknown data set.
  """
  if views not in VIEWS:
    raise ValueError(f"views {views!r}: choose one of {', '.join(VIEWS)}{did_you_mean(views, VIEWS)}")
  c = small.get_config(method, dataset, data)
  if share != "100%":
    c.data.train = tuple(f"heldout:{share}:{source}" for source in c.data.train)
  c.model.text.context_length = 40  # no caption is longer
  for field in VIEWS[views]:
    c.data[field] = _WITHOUT[field]
  c.duration = config.duration(steps=steps)
  c.evaluate_every = config.duration(steps=-(-steps // 6))
  c.checkpoint.every = config.duration(steps=-(-steps // 3))
  return c
