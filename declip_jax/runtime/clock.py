"""The time that a run spends on data, steps, saves, evaluations and compiling, and the speed of the steps."""

from collections.abc import Callable, Iterator
import contextlib
import functools
import math
import time

import jax

_SPEED_MEMORY = 30.0  # seconds after which a measured speed counts 1/e in the average
_PAUSES = ("save", "evaluation")  # left out of the speed
ACTIVITIES = ("data", "step", *_PAUSES)


class Clock:
  """Measures the time of a loop.

  The speed is an average over about the last half minute. It leaves out saves, evaluations, and the first step of each
  program, which compiles; texts of another length need another one. An update comes when a step is dispatched and the
  one before it has finished, so the first step that counts is the one after the first update with a step in flight.

  Args:
    start: step from which the loop starts.
    batch_size: global batch size.
    devices: number of devices that share the batch.
    peak: function from the length of texts to images per second if all devices multiplied matrices at their peak rate;
      None if unknown.
    now: returns seconds.
  """

  def __init__(
    self,
    start: int,
    batch_size: int,
    *,
    devices: int = 1,
    peak: Callable[[int], float] | None = None,
    now: Callable[[], float] = time.perf_counter,
  ):
    self._batch_size, self._devices, self._now = batch_size, devices, now
    self._peak = functools.cache(peak) if peak else None
    self._program = 0  # length of the texts of the current step
    self._first_calls: dict[int, float] = {}  # seconds, by program
    self._compiled: set[int] = set()  # programs whose first step has finished
    self._in_flight = True  # whether the device is busy with a step at the next update
    self._before = 0  # the program of the step that has finished at the next update
    self._steps, self._seconds = 0.0, 0.0  # decaying sums: their quotient is the speed
    self._seconds_at_peak = 0.0  # a decaying sum, of the same steps
    self._last_line = (0.0, 0.0)  # seconds waited for data and seconds in all, between the last two lines
    self.roll_back(start)

  def begin(self, text_length: int) -> None:
    """Names the program of the step that begins by the length of its texts, 0 without texts."""
    self._program = text_length

  @property
  def programs(self) -> int:
    """Number of programs whose first step has finished."""
    return len(self._compiled)

  @property
  def has_compiled(self) -> bool:
    """Whether the first step of the current program has finished."""
    return self._program in self._compiled

  @property
  def shares(self) -> dict[str, float]:
    """Share of each activity in the time since the last `values`."""
    total = max(self._now() - self._began, 1e-9)
    return {activity: seconds / total for activity, seconds in self._spent.items()}

  @property
  def wait(self) -> float:
    """Share of the time spent waiting for data since the last line but one: right after a line, little has passed."""
    waited, seconds = self._last_line
    return (waited + self._spent["data"]) / max(seconds + self._now() - self._began, 1e-9)

  @property
  def images_per_second(self) -> float:
    """Images per second over all processes; NaN until a step was measured."""
    return self._batch_size * self._steps / self._seconds if self._seconds else math.nan

  @property
  def utilisation(self) -> float | None:
    """Model FLOPs utilisation, 0 to 1 (Chowdhery et al. 2022, appendix B); None if peak or speed is unknown."""
    return self._seconds_at_peak / self._seconds if self._peak and self._seconds else None

  @contextlib.contextmanager
  def spending(self, activity: str) -> Iterator[None]:
    """Attributes the time inside the context to one of `ACTIVITIES`."""
    before = self._now()
    try:
      yield
    finally:
      seconds = self._now() - before
      self._spent[activity] += seconds
      if activity in _PAUSES and self._mark is not None:
        self._mark += seconds

  @contextlib.contextmanager
  def compiling(self) -> Iterator[None]:
    """Measures the first call of a program, which compiles it and returns before it has run."""
    before = self._now()
    yield
    self._first_calls.setdefault(self._program, self._now() - before)

  def first_step_done(self) -> str:
    """Records that the first step of a program has finished; returns a message with its compile time and memory."""
    self._compiled.add(self._program)
    self._in_flight, self._mark = False, None
    if self._peak:
      self._peak(self._program)  # which takes seconds, now rather than in a step that is measured
    memory = peak_memory()
    texts = f", for texts of up to {self._program} tokens" if self._program else ""
    usage = f"; {memory:.1f} GiB of memory on a device" if memory else ""
    return f"compiled in {self._first_calls[self._program]:.0f} s{texts}{usage}"

  def update(self, step: int) -> None:
    """Records that `step` steps are done."""
    now = self._now()
    if self._mark is not None:
      seconds = now - self._mark
      decay = math.exp(-seconds / _SPEED_MEMORY)
      self._steps = decay * self._steps + step - self._step
      self._seconds = decay * self._seconds + seconds
      at_peak = (step - self._step) * self._batch_size / self._peak(self._before) if self._peak else 0.0
      self._seconds_at_peak = decay * self._seconds_at_peak + at_peak
    self._step, self._mark = step, now if self._in_flight else None
    self._in_flight, self._before = True, self._program

  def roll_back(self, step: int) -> None:
    """Continues from `step`; what was measured since the last line is dropped."""
    self._step, self._mark = step, None  # the last step measured, and when
    self._restart()

  def values(self) -> dict[str, float]:
    """Returns what the clock adds to a line of metrics.jsonl, and starts the next line."""
    values = {f"time/{activity}": share for activity, share in self.shares.items()}
    speed = self.images_per_second
    if math.isfinite(speed):  # not yet known at the first step
      values |= {"images_per_second": speed, "images_per_second_per_device": speed / self._devices}
    known = {
      "utilisation": self.utilisation,
      "compile_seconds": sum(self._first_calls.values()) if self._first_calls else None,
      "device_memory_gib": peak_memory(),
    }
    self._last_line = (self._spent["data"], self._now() - self._began)
    self._restart()
    return values | {name: value for name, value in known.items() if value is not None}

  def _restart(self) -> None:
    self._began = self._now()
    self._spent = dict.fromkeys(ACTIVITIES, 0.0)


def peak_memory() -> float | None:
  """Returns the peak memory of this host's fullest device in GiB; None where the backend does not report it (CPU)."""
  peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
  return max(peaks) / 2**30 if None not in peaks else None
