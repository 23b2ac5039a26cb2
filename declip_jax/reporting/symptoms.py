"""Symptoms of a run that does not learn, found in its metrics while it trains.

docs/when_it_does_not_learn.md has a section on each, with causes and remedies.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
import math

from declip_jax import ADDRESS
from declip_jax.objectives.diagnostics import MOST_ROWS
from declip_jax.reporting.chance import chance_losses
from declip_jax.spelling import listed

PAGE = "docs/when_it_does_not_learn.md"
_LASTS = 0.1  # of the run, for which a symptom has to last
_LEAST_LINES, _MOST_LINES = 2, 10  # of metrics.jsonl, which this share may be
_GRACE, _MOST_GRACE = 0.05, 100  # of the run and in steps, after the warm-up, which may leave a model at chance
_LEAST_GRACE = 40  # steps that random weights need
_EARLY = 0.1  # of the run
_LEAST_DEVIATION = 0.1  # of features whose deviation is at most about 1
_NEAR = 0.01  # relative distance at which a value is at a bound, or at that of chance
_LARGEST_SHARE = 0.95  # of the loss, in one of several terms
_LONGEST_WAIT = 0.2  # share of the time
_MOST_SKIPPED = 1  # steps within the lines
_LEAST_ACCURACY = 0.7  # of the highest so far
_SIGMAS = 3  # standard errors of an accuracy, within which it is not said to have fallen


@dataclass(frozen=True)
class Facts:
  """What a run, or a stage of it, is, as far as symptoms depend on it.

  Attributes:
    batch_size: number of pairs that the losses compare with each other: those of the global batch.
    warmup: number of steps of the run until the learning rate has its peak.
    total: number of steps of the stage and those before it.
    scales: smallest and largest inverse temperature; () for no limits.
    first: number of steps of the run before the stage.
    log_every: steps from one line of metrics to the next; 0 for a line at the end only.
    is_fresh: whether the stage starts from random weights.
  """

  batch_size: int
  warmup: int
  total: int
  scales: tuple[float, ...] = ()
  first: int = 0
  log_every: int = 1
  is_fresh: bool = True

  @property
  def every(self) -> int:
    """Steps from one line to the next."""
    return self.log_every or self.length

  @property
  def length(self) -> int:
    """Steps of the stage."""
    return max(1, self.total - self.first)

  @property
  def lines(self) -> int:
    """Lines of metrics over which a symptom has to last."""
    return min(_MOST_LINES, max(_LEAST_LINES, int(_LASTS * self.length / self.every)))

  @property
  def grace(self) -> float:
    """The step until which a model may still be at chance, or have odd features."""
    return self.warmup + min(_MOST_GRACE, max(_GRACE * self.length, _LEAST_GRACE * self.is_fresh))

  @property
  def early(self) -> float:
    """The last step at which the temperature is at its lower bound too early; 0 for weights that may start there."""
    return max(_EARLY * self.length, self.grace + self.lines * self.every) if self.is_fresh else 0


def link(name: str) -> str:
  """The address of the section on a symptom."""
  return f"{ADDRESS}/blob/main/{PAGE}#{name.replace('_', '-')}"


class Symptoms:
  """Watches the lines of metrics.jsonl.

  Args:
    facts: the run.
  """

  def __init__(self, facts: Facts):
    self._facts = facts
    self._lines: deque[tuple[int, Mapping[str, float]]] = deque(maxlen=facts.lines)
    self._has_started = False
    self._reported: set[str] = set()
    self._best: dict[str, float] = {}

  def check(self, step: int, values: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
    """Adds a line of metrics.

    Args:
      step: number of steps done.
      values: its metrics; those that are not finite count as absent.

    Returns:
      `warning/NAME` is 1 for each symptom that the last lines have, for metrics.jsonl; and a message for each symptom
      that has not been reported before.
    """
    line = {name: value for name, value in values.items() if math.isfinite(value)}
    if not self._has_started:  # the time of the first line is that of compiling and of starting the readers
      line.pop("time/data", None)
    self._has_started = True
    self._lines.append((step, line))
    means = {name: mean for name in line if (mean := self._mean(name)) is not None}
    for name, value in _accuracies(means):
      self._best[name] = max(value, self._best.get(name, 0.0))
    has_learned = self._lines[0][0] > self._facts.grace
    tests = {name: test for name, (test, needs_learning) in _TESTS.items() if has_learned or not needs_learning}
    found = {name: text for name, test in tests.items() if (text := test(self, step, means))}
    new = [f"warning: step {step}: {text}; see {link(name)}" for name, text in found.items() if self._is_new(name)]
    return {f"warning/{name}": 1.0 for name in found}, new

  def roll_back(self, step: int) -> None:
    """Forgets the lines after a step, as the run does; the earlier ones will be too old to count."""
    del step
    self._lines.clear()

  def _is_new(self, name: str) -> bool:
    known = name in self._reported
    self._reported.add(name)
    return not known

  def _mean(self, name: str) -> float | None:
    values = [line[name] for _, line in self._lines if name in line]
    return sum(values) / len(values) if len(values) == self._facts.lines else None

  def _collapsed(self, step: int, means: Mapping[str, float]) -> str:
    del step
    deviations = {name.split("/")[1]: value for name, value in _matching(means, "diagnostics/*/deviation")}
    found = [f"{name} (deviation {value:.2f})" for name, value in deviations.items() if value < _LEAST_DEVIATION]
    if not found:
      return ""
    return (
      f"the features of {listed(found)} are almost equal for all samples, where a deviation of 1 is healthy: lower "
      "config.optimizer.learning_rate or lengthen config.optimizer.warmup"
    )

  def _at_chance(self, step: int, means: Mapping[str, float]) -> str:
    del step
    losses = {
      term: means[f"loss/{term}"]
      for term, chance in chance_losses(self._facts.batch_size).items()
      if abs(means.get(f"loss/{term}", math.inf) - chance) < _NEAR * chance
    }
    accuracies = [  # of a sigmoid loss
      f"{name.rpartition('/')[2]} in the batch ({value:.2%})"
      for name, value in _matching(means, "diagnostics/image_text/*_accuracy")
      if value < 2 / self._rows
    ]
    found = [*(f"the loss of {term} ({value:.2f})" for term, value in losses.items()), *accuracies]
    if not found:
      return ""
    of_images = losses.keys() == {"simclr"} and not accuracies
    pairs = "" if of_images else "check with data.inspect that images and captions belong together, or "
    verb = "is" if len(found) == 1 else "are"
    return f"{listed(found)} {verb} at chance: {pairs}change config.optimizer.learning_rate"

  def _temperature_at_bound(self, step: int, means: Mapping[str, float]) -> str:
    if "temperature" not in means or not self._facts.scales:
      return ""
    value, (smallest, largest) = means["temperature"], self._facts.scales
    if value < (1 + _NEAR) / largest and step <= self._facts.early:
      return (
        f"the temperature is already at its lower bound, {1 / largest:.3g}: lower config.optimizer.learning_rate, or "
        "that of the temperature by config.optimizer.multipliers"
      )
    if value > (1 - _NEAR) / smallest:
      return (
        f"the temperature is at its upper bound, {1 / smallest:.3g}, at which all candidates look alike: lower "
        "config.optimizer.learning_rate, or check config.model.heads.logit_scale_init"
      )
    return ""

  def _one_term(self, step: int, means: Mapping[str, float]) -> str:
    del step
    shares = {name.removeprefix("share/"): value for name, value in _matching(means, "share/*")}
    for term, value in shares.items() if len(shares) > 1 else ():
      if value > _LARGEST_SHARE:  # which only one can have
        return f"{value:.0%} of the loss is {term}: lower config.objective.{term}.weight"
    return ""

  def _skipped(self, step: int, means: Mapping[str, float]) -> str:
    del step, means
    totals = [line["skipped_total"] for _, line in self._lines if "skipped_total" in line]
    count = round(totals[-1] - totals[0]) if totals else 0
    if count <= _MOST_SKIPPED:
      return ""
    return (
      f"{count} of the last steps were skipped (loss, gradient or learning rate not finite, or a spike): lower "
      "config.optimizer.learning_rate, set config.optimizer.gradient_clip=1, or config.model.dtype=float32"
    )

  def _waiting(self, step: int, means: Mapping[str, float]) -> str:
    del step
    if (share := means.get("time/data", 0.0)) <= _LONGEST_WAIT:
      return ""
    return (
      f"{share:.0%} of the time is spent waiting for data: raise config.data.workers or config.data.threads, or "
      "convert the data by data.convert to files that read faster"
    )

  def _accuracy_falls(self, step: int, means: Mapping[str, float]) -> str:
    del step
    found = [
      f"{name} in the batch has fallen from {self._best[name]:.1%} to {value:.1%}"
      for name, value in _accuracies(means)
      if self._best[name] > 10 / self._facts.batch_size and self._is_far_below(value, self._best[name])
    ]
    if not found:
      return ""
    return (
      f"{listed(found)}: training has become unstable; resume an earlier checkpoint with a lower "
      "config.optimizer.learning_rate"
    )

  def _is_far_below(self, value: float, best: float) -> bool:
    """Whether an accuracy is much lower than the best one, beyond the noise of both."""
    count = self._rows * self._facts.lines  # of samples, in each of the two means
    high, low = (_SIGMAS * math.sqrt(share * (1 - share) / count) for share in (best, value))
    return value + low < _LEAST_ACCURACY * (best - high)

  @property
  def _rows(self) -> int:
    """Number of pairs of a batch among which an accuracy is measured."""
    return min(self._facts.batch_size, MOST_ROWS)


def _accuracies(means: Mapping[str, float]) -> Iterator[tuple[str, float]]:
  return _matching(means, "*image_accuracy", "*text_accuracy")


def _matching(means: Mapping[str, float], *patterns: str) -> Iterator[tuple[str, float]]:
  return ((name, value) for name, value in means.items() if any(fnmatch(name, pattern) for pattern in patterns))


# By the name of the symptom: what returns its message if the lines have it, else ""; and whether a healthy model can
# have it before it has learned.
_TESTS: dict[str, tuple[Callable[[Symptoms, int, Mapping[str, float]], str], bool]] = {
  "collapsed": (Symptoms._collapsed, True),
  "at_chance": (Symptoms._at_chance, True),
  "temperature_at_bound": (Symptoms._temperature_at_bound, True),
  "one_term": (Symptoms._one_term, False),
  "skipped": (Symptoms._skipped, False),
  "waiting": (Symptoms._waiting, False),
  "accuracy_falls": (Symptoms._accuracy_falls, True),
}
NAMES = tuple(_TESTS)
