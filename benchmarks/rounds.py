"""Times several functions in turn, round after round, so that other load on the machine affects all of them alike."""

from collections.abc import Callable, Mapping, Sequence
import statistics
import time


def seconds_in_turn(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
  """Seconds of each call, in every round."""
  seconds: dict[str, list[float]] = {name: [] for name in functions}
  for _ in range(rounds):
    for name, call in functions.items():
      start = time.perf_counter()
      call()
      seconds[name].append(time.perf_counter() - start)
  return seconds


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
  """Median over the rounds of the ratio of two functions in the same round."""
  return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
