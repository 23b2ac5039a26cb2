"""Times several contestants in turn, round after round, so that noise of the machine affects all of them alike."""

from collections.abc import Callable, Mapping, Sequence
import statistics
import time


def seconds_in_turn(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
  """Seconds of each call, in every round."""
  seconds: dict[str, list[float]] = {name: [] for name in contestants}
  for _ in range(rounds):
    for name, call in contestants.items():
      start = time.perf_counter()
      call()
      seconds[name].append(time.perf_counter() - start)
  return seconds


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
  """Median over the rounds of the ratio of two contestants in the same round."""
  return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
