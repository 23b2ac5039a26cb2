"""Checkpoints by orbax: the train state, the position of the input, and the config, written in the background.

A checkpoint has four items: `model` (parameters and collections; evaluation and export read nothing else), `training`
(step, moments, counters), `data` (the position of the input stream, JSON) and `config` (JSON). Behind the
commit each host seals it: `checksums.HOST.json` has size and CRC-32 of every file that the host wrote. What is damaged
later, be it a single bit, is noticed before it is used, and the checkpoint before is taken.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
import contextlib
import json
import logging
import math
import os
from pathlib import Path
import re
import shutil
import threading
import time
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from declip_jax.runtime.hosts import agree
from declip_jax.training.state import State

Tree = Any
_SEAL = "checksums.{}.json"  # of a host; written last, so a checkpoint may lack it if the run was killed just then
_SCORES = "scores.json"  # what an evaluation found; it comes behind the seal
_CHUNK = 2**24  # bytes that are read at once
_BACK_OFF = 30.0, 600.0  # seconds before a save that failed is tried again: at first, and at most
_TELL_SECONDS = 10.0  # between messages about a check that takes long
_log = logging.getLogger(__name__)


class Restored(NamedTuple):
  """What a run goes on from.

  Attributes:
    step: of the checkpoint.
    state: on the devices.
    data: position of the input.
    passed_over: a line for each newer checkpoint that is damaged: why, and what became of it.
  """

  step: int
  state: State
  data: dict[str, Any]
  passed_over: list[str]


class Checkpoints:
  """The checkpoints of one run, under `workdir/checkpoints`.

  Saving that fails, because the disk is full or a mount is gone, is a warning and not an error: the loop goes on, and
  `due` tells when to try again. Only `finish` insists.

  Args:
    workdir: of the run, the same directory for all hosts.
    keep_last: how many of the newest are kept.
    keep_best: how many of the best by `best_metric` are kept besides.
    best_metric: name of an evaluation metric, higher is better; "" keeps only the newest.
    keep_every: of each so many steps the first checkpoint is kept besides; 0 keeps none.
    minutes: after which `due` asks for the next save; 0 is never.
  """

  def __init__(
    self,
    workdir: str | Path,
    *,
    keep_last: int = 1,
    keep_best: int = 0,
    best_metric: str = "",
    keep_every: int = 0,
    minutes: float = 0,
  ):
    self._folder = (Path(workdir) / "checkpoints").resolve()
    self._keep = _Keep(self._folder, keep_last, keep_best if best_metric else 0, best_metric, keep_every)
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._keep,
        save_decision_policy=ocp.checkpoint_managers.FixedIntervalPolicy(1),  # the loop decides
      ),
      item_handlers={
        "model": ocp.PyTreeCheckpointHandler(),
        "training": ocp.PyTreeCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
      },
    )
    self._interval, self._began = 60 * minutes, time.monotonic()
    self._writing: threading.Thread | None = None
    self._step = 0  # that it writes
    self._error: Exception | None = None  # of the latest save, until it is collected
    self._reason, self._pause, self._retry_at = "", _BACK_OFF[0], 0.0
    self.failed = 0  # saves that this process saw fail

  def latest(self) -> int | None:
    """The newest complete step, None if there is none."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """All complete steps, oldest first."""
    return sorted(self._manager.all_steps())

  def save(
    self,
    step: int,
    state: State,
    *,
    data: Mapping[str, Any],
    config: Mapping[str, Any],
  ) -> None:
    """Starts to write a checkpoint and returns as soon as the arrays are copied to the host."""
    self.wait()
    if self._reason:  # the mount may be back, with what was on it
      self._reload()
    if step in self.steps():
      return
    self._began = time.monotonic()
    args = ocp.args.Composite(
      model=ocp.args.PyTreeSave(_model(state)),
      training=ocp.args.PyTreeSave(_training(state)),
      data=ocp.args.JsonSave(dict(data)),
      config=ocp.args.JsonSave(dict(config)),
    )
    try:
      # Orbax's hosts meet at barriers: one that cannot write must not leave the others waiting there.
      if reason := agree(self._cannot_write()):
        raise OSError(reason)
      self._manager.save(step, args=args)
    except Exception as error:
      self._error = error
      self._collect(step)
      return
    self._writing = threading.Thread(target=self._complete, args=(step,), name="checkpoint", daemon=True)
    self._step = step
    self._writing.start()

  def score(self, step: int, metrics: Mapping[str, float]) -> None:
    """Notes how good a checkpoint is, from the next save on; one that could not be written has no score."""
    self.wait()
    self._keep.scores[step] = {name: float(value) for name, value in metrics.items()}
    path = self._folder / str(step) / _SCORES
    if jax.process_index() == 0 and step in self.steps():
      try:
        path.with_suffix(".tmp").write_text(json.dumps(self._keep.scores[step]))
        os.replace(path.with_suffix(".tmp"), path)
      except OSError as error:
        _log.warning("%s was not written: %s", path, error)

  def due(self) -> bool:
    """Whether this process's clock asks for a save: the interval has passed, or a failed one should be tried again."""
    if self._writing and not self._writing.is_alive():
      self.wait()
    now = time.monotonic()
    if self._reason:
      return now >= self._retry_at
    return bool(self._interval) and now - self._began >= self._interval

  def finish(self, step: int, save: Callable[[], None], patience: float) -> None:
    """Waits until a step is written; tries again where that fails.

    Args:
      step: that `save` saves.
      save: calls `save` of this object; every host calls it equally often.
      patience: seconds for which it is tried.

    Raises:
      OSError: it could not be written; names the reason and the newest checkpoint that there is.
    """
    deadline, pause = time.monotonic() + patience, 1.0
    while True:
      self.wait()
      reason = agree("" if step in self.steps() else self._reason or "not written")
      if not reason:
        return
      if agree("over" if time.monotonic() + pause > deadline else ""):
        raise OSError(
          f"the checkpoint of step {step} cannot be written to {self._folder}, tried for {patience:.0f} s: {reason}; "
          f"the newest one there is of step {self.latest() or 'none'}"
        )
      time.sleep(pause)
      pause = min(2 * pause, _BACK_OFF[0])
      save()

  def restore_newest(self, abstract: State) -> Restored | None:
    """The newest checkpoint that is whole, None if there is none at all; damaged ones are set aside.

    Raises:
      ValueError: all of them are damaged, or one that is whole does not fit `abstract`.
    """
    damaged: dict[int, str] = {}
    failed: Exception | None = None
    for step in reversed(self.steps()):
      damage, sealed = self.check(step)
      if not damage:
        try:
          state, data = self.restore(step, abstract)
        except Exception as error:
          if sealed:  # then it is as it was written, and the run is another one
            raise
          failed, damage = failed or error, f"cannot be read: {_first_line(error)}"
        damage = agree(damage)
      if not damage:
        return Restored(step, state, data, [self.set_aside(step, why) for step, why in damaged.items()])
      damaged[step] = damage
    if failed:
      raise failed
    if damaged:
      lines = "; ".join(f"step {step}: {damage}" for step, damage in damaged.items())
      raise ValueError(f"all checkpoints in {self._folder} are damaged ({lines}); move them away to start anew")
    return None

  def check(self, step: int, items: Sequence[str] = ()) -> tuple[str, bool]:
    """What is damaged in a checkpoint by its checksums, "" if nothing, the same on every host; whether it has any.

    The hosts share the reading, each in several threads. Given `items`, the others are not looked at.
    """
    folder = self._folder / str(step)
    expected, unreadable = _read_seals(folder)
    if items:
      expected = {name: sums for name, sums in expected.items() if "/" not in name or name.split("/")[0] in items}
    mine = sorted(expected)[jax.process_index() :: jax.process_count()]
    return agree(unreadable or _damage(folder, {name: expected[name] for name in mine})), bool(expected)

  def set_aside(self, step: int, why: str, suffix: str = "damaged") -> str:
    """Renames a checkpoint so that it counts no more and its step can be saved again; returns a line that says so."""
    folder = self._folder / str(step)
    target, number = folder.with_name(f"{step}.{suffix}"), 1
    while target.exists():
      target, number = folder.with_name(f"{step}.{suffix}.{number + 1}"), number + 1
    agree("")  # nobody looks for a free name after it is taken
    if jax.process_index() == 0:
      os.rename(folder, target)
    agree("")
    self._manager.reload()
    return f"the checkpoint of step {step} is passed over: {why}; it is kept as {target}"

  def restore(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
    """State and input position of a step, laid out as `abstract` says, whatever mesh they were saved from.

    Raises:
      ValueError: it is a state of another model or optimizer; names an array in which they differ.
    """
    saved, training = self._manager.item_metadata(step), _training(abstract)
    counters = saved["training"].tree["skipped"]
    new = {name: leaf for name, leaf in abstract.skipped.items() if name not in counters}  # of an older version
    training["skipped"] = {name: leaf for name, leaf in abstract.skipped.items() if name in counters}
    if others := [*_others(saved["model"].tree, _model(abstract)), *_others(saved["training"].tree, training)]:
      more = f", and {len(others) - 1} more like it" if len(others) > 1 else ""
      raise ValueError(
        f"the checkpoint {self._folder / str(step)} does not fit the config: {others[0]}{more}; give the config that "
        "it was saved with, or take another workdir (config.init_from.path takes over what fits)"
      )
    args = ocp.args.Composite(
      model=_restore(_model(abstract)),
      training=_restore(training),
      data=ocp.args.JsonRestore(),
    )
    found = self._manager.restore(step, args=args)
    found["training"]["skipped"] |= jax.tree.map(_zeros, new)
    return State(**found["model"], **found["training"]), found["data"]

  def restore_model(self, step: int, params: Tree, collections: Tree) -> tuple[Tree, Tree]:
    """Parameters and collections only, as NumPy arrays; the arguments are their shapes."""
    abstract = {"params": params, "collections": collections}
    found = self._manager.restore(step, args=ocp.args.Composite(model=restore_as_numpy(abstract)))["model"]
    return found["params"], found["collections"]

  def config(self, step: int) -> dict[str, Any]:
    """The config with which a step was saved; its tuples have become lists."""
    return self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]

  def preempted(self, step: int) -> bool:
    """Whether any process of a multi-process run was told to go; each asks at every step, by numbers that only rise."""
    return self._manager.reached_preemption(step)

  def wait(self) -> None:
    """Blocks until what was begun is written and sealed, or has failed."""
    if not self._writing:
      return
    self._writing.join()
    self._writing = None
    self._collect(self._step)

  def tidy(self) -> None:
    """Removes what a killed run had begun to write; of the process that holds the run's lock."""
    if jax.process_index() == 0:
      for unfinished in self._folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(unfinished, ignore_errors=True)

  def close(self) -> None:
    """Waits and frees the background threads."""
    self.wait()
    self._manager.close()

  def _complete(self, step: int) -> None:
    """In the background: waits for the commit and seals the checkpoint."""
    try:
      self._manager.wait_until_finished()
      _seal(self._folder / str(step))
    except Exception as error:
      self._error = error

  def _collect(self, step: int) -> None:
    """Takes note of how the latest save ended."""
    error, self._error = self._error, None
    if error is None:
      self._reason, self._pause = "", _BACK_OFF[0]
      return
    with contextlib.suppress(Exception):  # it would be raised again at the next save, once in each thread
      self._manager.wait_until_finished()
    if jax.process_index() == 0:
      with contextlib.suppress(OSError):
        for unfinished in self._folder.glob(f"{step}.orbax-checkpoint-tmp*"):  # it may be what fills the disk
          shutil.rmtree(unfinished, ignore_errors=True)
    self._reload()  # it has forgotten those that it would have deleted
    self.failed += 1
    self._reason = _first_line(error)
    self._retry_at = time.monotonic() + self._pause
    _log.warning(
      "the checkpoint of step %d was not written: %s; training goes on, the next try is in %.0f s or at the next save",
      step,
      self._reason,
      self._pause,
    )
    self._pause = min(2 * self._pause, _BACK_OFF[1])

  def _reload(self) -> None:
    try:
      self._manager.reload()
    except OSError as error:
      _log.warning("the checkpoints in %s cannot be listed: %s", self._folder, error)

  def _cannot_write(self) -> str:
    """Why this host cannot write at all, "" if it can."""
    probe = self._folder / f".writable.{jax.process_index()}"
    try:
      probe.write_bytes(bytes(4096))
      probe.unlink()
    except OSError as error:
      with contextlib.suppress(OSError):
        probe.unlink(missing_ok=True)
      return str(error)
    return ""


class _Keep:
  """Which checkpoints are kept; what orbax calls a preservation policy. The newest always is.

  Attributes:
    scores: metrics of the steps that this process saved.
  """

  def __init__(self, folder: Path, last: int, best: int, metric: str, every: int):
    self._folder, self._last, self._best, self._metric, self._every = folder, last, best, metric, every
    self.scores: dict[int, Mapping[str, float]] = {}

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    steps = sorted(checkpoint.step for checkpoint in checkpoints)
    kept = set(steps[-max(self._last, 1) :])
    if self._best:
      kept |= set(sorted(filter(self._scored, steps), key=self._score)[-self._best :])
    if self._every:
      first = {step // self._every: step for step in reversed(steps) if step >= self._every}
      kept |= set(first.values())
    return [checkpoint.step in kept for checkpoint in checkpoints]

  def _scored(self, step: int) -> bool:
    return not math.isnan(self._scores(step).get(self._metric, math.nan))

  def _score(self, step: int) -> tuple[float, int]:
    return self._scores(step)[self._metric], step  # of equal ones the newest

  def _scores(self, step: int) -> Mapping[str, float]:
    if step not in self.scores:
      try:
        self.scores[step] = json.loads((self._folder / str(step) / _SCORES).read_text())
      except (OSError, ValueError):  # of an older version, or damaged
        self.scores[step] = {}
    return self.scores[step]


def _seal(folder: Path) -> None:
  """Writes the checksums of this host's files, atomically: its own arrays, and host 0 all that bears no number."""
  host, hosts = jax.process_index(), jax.process_count()

  def owner(name: str) -> int:
    number = re.search(r"process_(\d+)", name)
    return int(number[1]) if number and int(number[1]) < hosts else 0

  names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
  names = [name for name in names if owner(name) == host and not re.fullmatch(r"checksums\.\d+\.json.*", name)]
  with ThreadPoolExecutor(_threads()) as pool:
    sums = dict(zip(names, pool.map(lambda name: _measure(folder / name), names), strict=True))
  temporary = folder / (_SEAL.format(host) + ".tmp")
  with temporary.open("w") as file:
    json.dump(sums, file)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, folder / _SEAL.format(host))


def _read_seals(folder: Path) -> tuple[dict[str, tuple[int, int]], str]:
  """Size and checksum of every file by the seals of all hosts, and which seal cannot be read, if one cannot."""
  expected: dict[str, tuple[int, int]] = {}
  for path in sorted(folder.glob(_SEAL.format("*"))):
    try:
      expected |= {name: (int(size), int(checksum)) for name, (size, checksum) in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
      return expected, f"{path}: {error}"
  return expected, ""


def _damage(folder: Path, expected: Mapping[str, tuple[int, int]]) -> str:
  """The first file that is not as expected, and why; "" if all are."""
  total, done, told = sum(size for size, _ in expected.values()), 0, time.monotonic()
  # Sizes first: they cost nothing, and most damage is a file that is cut off or gone.
  for name, (size, _) in expected.items():
    try:
      found = (folder / name).stat().st_size
    except OSError:
      return f"{folder / name} is missing"
    if found != size:
      return f"{folder / name} has {found:,} bytes, not {size:,}"
  pool = ThreadPoolExecutor(_threads())
  try:
    running = {pool.submit(_measure, folder / name): name for name in expected}
    for future in as_completed(running):
      name = running[future]
      try:
        same = future.result() == expected[name]
      except OSError as error:
        return f"{folder / name}: {error}"
      if not same:
        return f"{folder / name} has another checksum than when it was written"
      done += expected[name][0]
      if time.monotonic() - told > _TELL_SECONDS:
        told = time.monotonic()
        _log.warning("%s: %.1f of %.1f GB are checked", folder, done / 1e9, total / 1e9)
    return ""
  finally:
    pool.shutdown(cancel_futures=True)


def _measure(path: Path) -> tuple[int, int]:
  """Size and CRC-32 of a file; zlib lets go of Python's lock."""
  size, checksum = 0, 0
  with path.open("rb", buffering=0) as file:
    while chunk := file.read(_CHUNK):
      size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
  return size, checksum


def _threads() -> int:
  return min(16, 2 * (os.cpu_count() or 1))


def _first_line(error: Exception) -> str:
  line = re.split(r" \[[a-z_ ]+='", (str(error).splitlines() or [""])[0])[0]  # tensorstore adds its whole specification
  if len(line) > 300:  # and says at the end what it is about
    line = f"{line[:140]} ... {line[-140:]}"
  return f"{type(error).__name__}: {line}"


def _zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
  return jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()


def restore_as_numpy(abstract: Tree) -> ocp.args.PyTreeRestore:
  """Arguments that restore a tree of these shapes on the host, whatever devices it was saved from."""
  arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
  return ocp.args.PyTreeRestore(abstract, restore_args=arguments)


def _model(state: State) -> dict[str, Any]:
  # One item, since orbax warns at every save of one without arrays, as CLIP's collections are.
  return {"params": state.params, "collections": state.collections}


def _training(state: State) -> dict[str, Any]:
  return {"step": state.step, "opt_state": state.opt_state, "skipped": state.skipped}


def _others(saved: Tree, abstract: Tree) -> Iterator[str]:
  """The arrays that a checkpoint and a state do not have in common, or not in the same shape."""
  there, here = _shapes(saved), _shapes(abstract)
  for name in sorted(there.keys() | here.keys()):
    if there.get(name) != here.get(name):
      of_file, of_config = (str(shapes[name]) if name in shapes else "none" for shapes in (there, here))
      yield f"{name} is {of_file} in the checkpoint and {of_config} by the config"


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
  return {name: tuple(leaf.shape) for name, leaf in ocp.tree.to_flat_dict(tree, sep="/").items()}


def _restore(abstract: Tree) -> ocp.args.PyTreeRestore:
  # Without explicit restore_args orbax uses the saved shardings and ignores those of `abstract`.
  return ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
