"""Symptoms of a run that does not learn, found in its metrics while it trains.

docs/when_it_does_not_learn.md has a section on each, with causes and remedies.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
import math

from declip_jax.objectives.diagnostics import MOST_ROWS

PAGE = "docs/when_it_does_not_learn.md"
LINES = 10  # of metrics.jsonl over which a symptom has to last
# Losses that are the cross-entropy of finding the partner among a number of candidates, by batch size; at its logarithm
# a model ranks them at random.
_CANDIDATES: dict[str, Callable[[int], int]] = {
  "clip": lambda batch: batch,
  "mvs": lambda batch: batch,
  "nns": lambda batch: batch,
  "filip": lambda batch: batch,
  "simclr": lambda batch: 2 * batch - 1,
}
_GRACE = 100  # steps after the warm-up, which may leave a model at chance
_LEAST_DEVIATION = 0.1  # of features whose deviation is at most about 1
_NEAR = 0.01  # relative distance at which a value is at a bound, or at that of chance
_LARGEST_SHARE = 0.95  # of the loss, in one of several terms
_LONGEST_WAIT = 0.2  # share of the time
_MOST_SKIPPED = 1  # steps within `LINES` lines
_LEAST_ACCURACY = 0.7  # of the highest so far
_EARLY = 0.1  # of the run


@dataclass(frozen=True)
class Facts:
  """What a run is, as far as symptoms depend on it.

  Attributes:
    batch_size: number of pairs that the losses compare with each other: those of the global batch.
    warmup: steps until the learning rate has its peak; nothing is reported until 100 steps later.
    total: number of steps of the stage and those before it.
    scales: smallest and largest inverse temperature; () for no limits.
  """

  batch_size: int
  warmup: int
  total: int
  scales: tuple[float, ...] = ()


def chance_losses(batch_size: int) -> dict[str, float]:
  """The loss of a model that answers at random, for each term that has one, when this many pairs are compared."""
  return {term: math.log(candidates(batch_size)) for term, candidates in _CANDIDATES.items()}


class Symptoms:
  """Watches the lines of metrics.jsonl.

  Args:
    facts: the run.
  """

  def __init__(self, facts: Facts):
    self._facts = facts
    self._lines: deque[Mapping[str, float]] = deque(maxlen=LINES)
    self._reported: set[str] = set()
    self._best: dict[str, float] = {}

  def check(self, step: int, values: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
    """Adds a line of metrics.

    Args:
      step: number of steps done.
      values: its metrics; those that are not finite count as absent.

    Returns:
      `warning/NAME` is 1 for each symptom that the last `LINES` lines have, for metrics.jsonl; and a message for each
      symptom that has not been reported before.
    """
    if step <= self._facts.warmup + _GRACE:
      return {}, []
    self._lines.append({name: value for name, value in values.items() if math.isfinite(value)})
    if len(self._lines) < LINES:
      return {}, []
    means = {name: mean for name in self._lines[-1] if (mean := self._mean(name)) is not None}
    found = {name: text for name, test in _TESTS.items() if (text := next(test(self, step, means), None))}
    new = [
      f"warning: {text}; see {PAGE}#{name.replace('_', '-')}" for name, text in found.items() if self._is_new(name)
    ]
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
    values = [line[name] for line in self._lines if name in line]
    return sum(values) / LINES if len(values) == LINES else None

  def _collapsed(self, step: int, means: Mapping[str, float]) -> Iterator[str]:
    for name, value in _matching(means, "diagnostics/*/deviation"):
      if value < _LEAST_DEVIATION:
        yield (
          f"step {step}: the features of {name.split('/')[1]} are almost equal for all samples (deviation {value:.2f}, "
          "where 1 is healthy): lower config.optimizer.learning_rate or lengthen config.optimizer.warmup"
        )

  def _at_chance(self, step: int, means: Mapping[str, float]) -> Iterator[str]:
    for term, chance in chance_losses(self._facts.batch_size).items():
      if abs(means.get(f"loss/{term}", math.inf) - chance) < _NEAR * chance:
        pairs = "" if term == "simclr" else "check with data.inspect that images and captions belong together, or "
        yield (
          f"step {step}: the loss of {term} is {means[f'loss/{term}']:.2f}, which is chance: {pairs}change "
          "config.optimizer.learning_rate"
        )
    pairs = min(self._facts.batch_size, MOST_ROWS)
    for name, value in _matching(means, "diagnostics/image_text/*_accuracy"):  # of a sigmoid loss
      if value < 2 / pairs:
        yield (
          f"step {step}: {name.rpartition('/')[2]} in the batch is {value:.2%}, which is chance: check with "
          "data.inspect that images and captions belong together, or change config.optimizer.learning_rate"
        )

  def _temperature_at_bound(self, step: int, means: Mapping[str, float]) -> Iterator[str]:
    if "temperature" not in means or not self._facts.scales:
      return
    value, (smallest, largest) = means["temperature"], self._facts.scales
    if value < (1 + _NEAR) / largest and step < _EARLY * self._facts.total:
      yield (
        f"step {step}: the temperature is already at its lower bound, {1 / largest:.3g}: lower "
        "config.optimizer.learning_rate, or that of the temperature by config.optimizer.multipliers"
      )
    elif value > (1 - _NEAR) / smallest:
      yield (
        f"step {step}: the temperature is at its upper bound, {1 / smallest:.3g}, at which all candidates look alike: "
        "lower config.optimizer.learning_rate, or check config.model.heads.logit_scale_init"
      )

  def _one_term(self, step: int, means: Mapping[str, float]) -> Iterator[str]:
    shares = dict(_matching(means, "share/*"))
    for name, value in shares.items():
      if len(shares) > 1 and value > _LARGEST_SHARE:
        term = name.removeprefix("share/")
        yield f"step {step}: {value:.0%} of the loss is {term}: lower config.objective.{term}.weight"

  def _skipped(self, step: int, means: Mapping[str, float]) -> Iterator[str]:
    if "skipped_total" in means:
      count = round(self._lines[-1]["skipped_total"] - self._lines[0]["skipped_total"])
      if count > _MOST_SKIPPED:
        yield (
          f"step {step}: {count} of the last steps were skipped (loss, gradient or learning rate not finite, or a "
          "spike): lower config.optimizer.learning_rate, set config.optimizer.gradient_clip=1, or "
          "config.model.dtype=float32"
        )

  def _waiting(self, step: int, means: Mapping[str, float]) -> Iterator[str]:
    if (share := means.get("time/data", 0.0)) > _LONGEST_WAIT:
      yield (
        f"step {step}: {share:.0%} of the time is spent waiting for data: raise config.data.workers or "
        "config.data.threads, or convert the data by data.convert to files that read faster"
      )

  def _accuracy_falls(self, step: int, means: Mapping[str, float]) -> Iterator[str]:
    for name, value in _matching(means, "*image_accuracy", "*text_accuracy"):
      best = self._best[name] = max(value, self._best.get(name, 0.0))
      if value < _LEAST_ACCURACY * best and best > 10 / self._facts.batch_size:
        yield (
          f"step {step}: {name} in the batch has fallen from {best:.1%} to {value:.1%}: training has become unstable; "
          "resume an earlier checkpoint with a lower config.optimizer.learning_rate"
        )


def _matching(means: Mapping[str, float], *patterns: str) -> Iterator[tuple[str, float]]:
  return ((name, value) for name, value in means.items() if any(fnmatch(name, pattern) for pattern in patterns))


# By the name of the symptom: what yields a message if the lines have it.
_TESTS: dict[str, Callable[[Symptoms, int, Mapping[str, float]], Iterator[str]]] = {
  "collapsed": Symptoms._collapsed,
  "at_chance": Symptoms._at_chance,
  "temperature_at_bound": Symptoms._temperature_at_bound,
  "one_term": Symptoms._one_term,
  "skipped": Symptoms._skipped,
  "waiting": Symptoms._waiting,
  "accuracy_falls": Symptoms._accuracy_falls,
}
NAMES = tuple(_TESTS)
