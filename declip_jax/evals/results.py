"""The outcome of an evaluation, in memory and, in `results`, as a file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
import math
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Scores:
  """What an evaluator returns.

  Attributes:
    metrics: fractions, and counts as integers; an undefined metric is absent. The first one is the headline.
    intervals: lower and upper end of the 95 % interval of a metric, by its name.
    predictions: arrays with one row per evaluated image or query, for comparisons of models on the same data; `row`
      is the row in the source.
    details: anything else that a reader needs to know, such as the regularisation that was chosen, for JSON.

  Raises:
    ValueError: a metric or an interval is not finite.
  """

  metrics: Mapping[str, float]
  intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
  predictions: Mapping[str, np.ndarray] = field(default_factory=dict)
  details: Mapping[str, Any] = field(default_factory=dict)

  def __post_init__(self) -> None:
    for name, value in self.metrics.items():
      if not math.isfinite(value):
        raise ValueError(f"metric {name} is {value}: an undefined metric has to be left out")
    for name, ends in self.intervals.items():
      if name not in self.metrics or not all(map(math.isfinite, ends)):
        raise ValueError(f"interval {ends} of metric {name}: expected finite ends, of one of {[*self.metrics]}")
