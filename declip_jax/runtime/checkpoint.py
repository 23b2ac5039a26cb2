"""Checkpoints by orbax: the train state, the input position, and the config, written in the background.

A checkpoint has four items: `model` (parameters and collections), `training` (step, moments, counters), `data` (the
position of the input stream and the batch sizes so far, JSON) and `config` (JSON). A fifth one, `average`, is there if
the run has an average of the weights. Evaluation and export read neither `training` nor `data`. `_CHECKPOINT_METADATA`
has the version of declip_jax, under `custom_metadata`. After the commit each host seals all this with checksums (see
`runtime.seal`): a checkpoint that is damaged later is skipped, and the previous one is used.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import os
from pathlib import Path
import re
import shutil
import threading
import time
from typing import Any, NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from declip_jax import __version__
from declip_jax.batch_sizes import BatchSizes
from declip_jax.runtime.hosts import any_host, barrier, first_error
from declip_jax.runtime.plain_paths import plain_path
from declip_jax.runtime.retention import KeepBest, KeepFirstOfEach, make_policy
from declip_jax.runtime.seal import find_damage, is_sealed, read_seals, write_seal
from declip_jax.spelling import counted
from declip_jax.training.state import State, start_average, weights_of, with_weights

Tree = Any
_BATCH_SIZES = "batch_sizes"  # key in the JSON of the input position
_LATE_WRITES = 5.0  # seconds for which the writes of a failed save may still add files
_BACK_OFF = 30.0, 600.0  # seconds until a failed save is retried: the first time, and at most


class DoesNotFitError(ValueError):
  """A checkpoint is of another model or optimizer than the state to restore."""


class Restored(NamedTuple):
  """The checkpoint that a run resumes from.

  Attributes:
    step: step of the checkpoint.
    state: train state, on the devices.
    data: input position.
    messages: one line for each newer checkpoint that was skipped: why, and its new name; and one if the run has an
      average of the weights and the checkpoint has none, or the other way round.
  """

  step: int
  state: State
  data: dict[str, Any]
  messages: list[str]


class Checkpoints:
  """The checkpoints of one run, under `workdir/checkpoints`.

  A save that fails, because the disk is full or a mount is gone, causes a warning and not an error: training continues,
  and `due` says when to retry. Only `finish` raises an error.

  Args:
    workdir: working directory of the run, the same for all hosts.
    keep_last: number of newest checkpoints to keep.
    keep_best: number of best checkpoints by `best_metric` to keep in addition.
    best_metric: name of an evaluation metric, higher is better; "" keeps only the newest.
    keep_every: the first checkpoint in each interval of this many steps is kept in addition; 0 keeps none.
    minutes: time after which `due` asks for the next save; 0 never does.

  Attributes:
    first: decides which checkpoints are the first of an interval.
    failed: number of saves that failed in this process.
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
    if not self._folder.is_dir():
      self._folder.mkdir(parents=True, exist_ok=True)
    self.first = KeepFirstOfEach(keep_every)
    self._best = KeepBest(self._folder, keep_best if best_metric else 0, best_metric)
    self._manager = ocp.CheckpointManager(
      plain_path(self._folder),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=make_policy(keep_last, self.first, self._best),
        save_decision_policy=ocp.checkpoint_managers.FixedIntervalPolicy(1),  # the loop decides
      ),
      item_handlers={
        "model": ocp.PyTreeCheckpointHandler(),
        "training": ocp.PyTreeCheckpointHandler(),
        "average": ocp.PyTreeCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
      },
    )
    self._interval, self._began = 60 * minutes, time.monotonic()
    self._writing: threading.Thread | None = None
    self._step = 0  # that is being written
    self._error: Exception | None = None  # of the latest save, until it is collected
    self._reason, self._pause, self._retry_at = "", _BACK_OFF[0], 0.0
    self.failed = 0

  def latest(self) -> int | None:
    """Returns the newest complete step, None if there is none."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """Returns all complete steps, oldest first."""
    return sorted(self._manager.all_steps())

  def save(
    self,
    step: int,
    state: State,
    *,
    data: Mapping[str, Any],
    config: Mapping[str, Any],
    batch_sizes: BatchSizes | None = None,
  ) -> None:
    """Starts to write a checkpoint and returns as soon as the arrays are copied to the host.

    Args:
      step: number of steps done.
      state: train state.
      data: input position.
      config: the config to store with it.
      batch_sizes: batch sizes so far; None if they are not known.
    """
    self.wait()
    if self._reason:  # the mount may be back, with its checkpoints, or the folder may have been deleted
      with contextlib.suppress(OSError):
        self._folder.mkdir(exist_ok=True)
      self._reload()
    if step in self.steps():
      return
    self._began = time.monotonic()
    args = ocp.args.Composite(
      model=ocp.args.PyTreeSave(_model(state)),
      training=ocp.args.PyTreeSave(_training(state)),
      **({"average": ocp.args.PyTreeSave(state.average)} if state.average else {}),
      data=ocp.args.JsonSave({**data, **({_BATCH_SIZES: batch_sizes.changes} if batch_sizes else {})}),
      config=ocp.args.JsonSave(dict(config)),
    )
    try:
      # Orbax's hosts meet at barriers: a host that cannot write must not leave the others waiting there.
      if error := first_error(self._write_error()):
        raise OSError(error)
      self._manager.save(step, args=args, custom_metadata={"declip_jax": __version__})
    except Exception as error:
      self._error = error
      self._collect(step)
      return
    self._writing = threading.Thread(target=self._complete, args=(step,), name="checkpoint", daemon=True)
    self._step = step
    self._writing.start()

  def score(self, step: int, metrics: Mapping[str, float]) -> None:
    """Records the metrics of a checkpoint, which determine whether it is kept, unless it was not written."""
    self.wait()
    try:
      self._best.record(step, metrics, write=jax.process_index() == 0 and step in self.steps())
    except OSError as error:
      logging.warning("the metrics of checkpoint %d were not written: %s", step, error)

  def due(self) -> bool:
    """Returns whether this process's clock asks for a save: the interval has passed, or a failed save can be retried.

    The clocks of several hosts differ: see `hosts.any_host`.
    """
    if self._writing and not self._writing.is_alive():
      self.wait()
    now = time.monotonic()
    if self._reason:
      return now >= self._retry_at
    return bool(self._interval) and now - self._began >= self._interval

  def finish(self, step: int, save: Callable[[], None], patience: float) -> None:
    """Waits until the checkpoint of a step is written, and retries if that fails.

    Args:
      step: step that `save` saves.
      save: calls `save` of this object; every host calls it equally often.
      patience: seconds after which to give up.

    Raises:
      OSError: it could not be written; the message names the reason and the newest checkpoint.
    """
    deadline, pause = time.monotonic() + patience, 1.0
    while True:
      self.wait()
      error = first_error("" if step in self.steps() else self._reason or "not written")
      if not error:
        return
      if any_host(time.monotonic() + pause > deadline):
        raise OSError(
          f"checkpoint {step} could not be written to {self._folder} for {patience:.0f} s: {error}; "
          f"the newest checkpoint is {self.latest() or 'none'}"
        )
      time.sleep(pause)
      pause = min(2 * pause, _BACK_OFF[0])
      save()

  def restore_newest(self, abstract: State) -> Restored | None:
    """Restores the newest undamaged checkpoint and renames the damaged ones; None if there are no checkpoints.

    Raises:
      ValueError: all of them are damaged.
      DoesNotFitError: an undamaged one does not fit `abstract`.
    """
    damaged: dict[int, str] = {}
    failed: Exception | None = None
    for step in reversed(self.steps()):
      damage, sealed = self.check(step)
      if not damage:
        try:
          state, data = self.restore(step, abstract)
        except Exception as error:
          if sealed:  # it is as it was written, so the run is a different one
            raise
          failed, damage = failed or error, f"cannot be read: {_first_line(error)}"
        damage = first_error(damage)
      if not damage:
        self._seal(step)
        renamed = [self.rename(newer, why) for newer, why in damaged.items()]
        return Restored(step, state, data, [*renamed, *self._about_average(step, bool(abstract.average))])
      damaged[step] = damage
    if failed:
      raise failed
    if damaged:
      lines = "; ".join(f"step {step}: {damage}" for step, damage in damaged.items())
      raise ValueError(f"all checkpoints in {self._folder} are damaged ({lines}); move them away to start from scratch")
    return None

  def _has_average(self, step: int) -> bool:
    return (self._folder / str(step) / "average").is_dir()

  def _about_average(self, step: int, wanted: bool) -> Iterator[str]:
    """Reports an average of the weights that a run has begun or given up since a checkpoint."""
    if wanted and not self._has_average(step):
      yield f"checkpoint {step} has no average of the weights (config.optimizer.ema): it starts from the weights there"
    if not wanted and self._has_average(step):
      yield f"the average of the weights in checkpoint {step} is not continued, since config.optimizer.ema is 0"

  def _seal(self, step: int) -> None:
    """Seals a checkpoint that a run killed after the commit could not seal: it was just read without errors."""
    folder = self._folder / str(step)
    try:
      if not is_sealed(folder):
        write_seal(folder)
    except OSError as error:
      logging.warning("%s was not sealed: %s", folder, error)

  def check(self, step: int, items: Sequence[str] = ()) -> tuple[str, bool]:
    """Compares a checkpoint with its checksums; the hosts share the reading, each in several threads.

    Args:
      step: step of the checkpoint.
      items: items to check; () checks all.

    Returns:
      The damage, "" if there is none, the same on every host; and whether the checkpoint has checksums at all.
    """
    folder = self._folder / str(step)
    expected, unreadable = read_seals(folder)
    if items:
      expected = {name: sums for name, sums in expected.items() if "/" not in name or name.split("/")[0] in items}
    mine = sorted(expected)[jax.process_index() :: jax.process_count()]
    damage = unreadable or find_damage(folder, {name: expected[name] for name in mine})
    return first_error(damage), bool(expected)

  def rename(self, step: int, reason: str, suffix: str = "damaged") -> str:
    """Renames a checkpoint, so that its step can be saved again; returns a message with the reason and the new name."""
    folder = self._folder / str(step)
    target, number = folder.with_name(f"{step}.{suffix}"), 1
    while target.exists():
      target, number = folder.with_name(f"{step}.{suffix}.{number + 1}"), number + 1
    barrier()  # all hosts have found the free name before it is taken
    if jax.process_index() == 0:
      os.rename(folder, target)
    barrier()
    self._manager.reload()
    return f"checkpoint {step} was skipped: {reason}; it was renamed to {target}"

  def restore(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
    """Restores state and input position of a step onto the shardings of `abstract`, from any mesh.

    An average of the weights that the checkpoint does not have starts from its weights.

    Raises:
      DoesNotFitError: the checkpoint has another model or optimizer; the message names an array that differs.
    """
    saved, training = self._manager.item_metadata(step), _training(abstract)
    counters = saved["training"].tree["skipped"]
    new = {name: leaf for name, leaf in abstract.skipped.items() if name not in counters}  # saved by an older version
    training["skipped"] = {name: leaf for name, leaf in abstract.skipped.items() if name in counters}
    items = {"model": _model(abstract), "training": training}
    if abstract.average and self._has_average(step):
      items["average"] = abstract.average
    differences = [line for item, tree in items.items() for line in _differences(saved[item].tree, tree)]
    if differences:
      others = len(differences) - 1
      more = f", and {counted(others, 'other array')} {'differs' if others == 1 else 'differ'}" if others else ""
      raise DoesNotFitError(
        f"checkpoint {self._folder / str(step)} does not fit the config: {differences[0]}{more}; use the config that "
        "it was saved with, or another workdir (config.init_from.path copies the arrays that fit)"
      )
    restored = {item: _restore(tree) for item, tree in items.items()}
    found = self._manager.restore(step, args=ocp.args.Composite(**restored, data=ocp.args.JsonRestore()))
    found["training"]["skipped"] |= jax.tree.map(_zeros, new)
    found["data"].pop(_BATCH_SIZES, None)
    state = State(**found["model"], **found["training"])
    if "average" in items:
      return state.replace(average=found["average"]), found["data"]
    return start_average(state) if abstract.average else state, found["data"]

  def restore_model(self, step: int, params: Tree, collections: Tree, *, average: bool = False) -> tuple[Tree, Tree]:
    """Restores only parameters and collections, as NumPy arrays.

    Args:
      step: step of the checkpoint.
      params, collections: their shapes.
      average: whether to read the average of the weights, which the checkpoint has to have, instead of the weights.
    """
    if not average:
      abstract = {"params": params, "collections": collections}
      found = self._manager.restore(step, args=ocp.args.Composite(model=restore_as_numpy(abstract)))["model"]
      return found["params"], found["collections"]
    weights = weights_of(params, collections)
    found = self._manager.restore(step, args=ocp.args.Composite(average=restore_as_numpy(weights)))["average"]
    others = {half: _without(entries, "batch_stats") for half, entries in collections.items()}
    if wanted := {half: entries for half, entries in others.items() if entries}:  # an empty one would count as a leaf
      args = ocp.args.Composite(model=restore_as_numpy({"collections": wanted}, partial=True))
      others |= self._manager.restore(step, args=args)["model"]["collections"]
    return with_weights(others, found)

  def config(self, step: int) -> dict[str, Any]:
    """Returns the config with which a step was saved; its tuples have become lists."""
    return self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]

  def batch_sizes(self, step: int) -> BatchSizes | None:
    """Returns the batch sizes of the run up to a step, None if they are not known.

    Older versions did not save them: there it is that of the config of the checkpoint.
    """
    data = self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]
    if _BATCH_SIZES in data:
      return BatchSizes(tuple((first, size) for first, size in data[_BATCH_SIZES]))
    size = self.config(step).get("batch_size")
    return size and BatchSizes.constant(size)

  def preempted(self, number: int) -> bool:
    """Returns whether any process of several received SIGTERM; each calls it at every step, with rising numbers."""
    return self._manager.reached_preemption(number)

  def wait(self) -> None:
    """Blocks until the latest save is written and sealed, or has failed."""
    if not self._writing:
      return
    self._writing.join()
    self._writing = None
    self._collect(self._step)

  def tidy(self) -> None:
    """Removes unfinished checkpoints of a killed run; call it only while holding the lock of the run."""
    self._remove_unfinished("*.")

  def close(self) -> None:
    """Waits for the latest save and frees the background threads."""
    self.wait()
    self._manager.close()

  def _complete(self, step: int) -> None:
    """Waits, in the background, for the commit, and seals the checkpoint."""
    try:
      self._manager.wait_until_finished()
      write_seal(self._folder / str(step))
    except Exception as error:
      self._error = error

  def _collect(self, step: int) -> None:
    """Records how the latest save ended."""
    error, self._error = self._error, None
    if error is None:
      self._reason, self._pause = "", _BACK_OFF[0]
      return
    with contextlib.suppress(Exception):  # otherwise it is raised again at the next save, once in each thread
      self._manager.wait_until_finished()
    self._remove_unfinished(f"{step}.", patience=_LATE_WRITES)  # it may be what fills the disk
    self._reload()  # the manager has forgotten the checkpoints that it was about to delete
    self.failed += 1
    self._reason = _first_line(error)
    self._retry_at = time.monotonic() + self._pause
    logging.warning(
      "checkpoint %d was not written: %s; training continues, and the save is retried in %.0f s or with the next one",
      step,
      self._reason,
      self._pause,
    )
    self._pause = min(2 * self._pause, _BACK_OFF[1])

  def _remove_unfinished(self, prefix: str, patience: float = 0) -> None:
    """Removes unfinished checkpoints whose names begin like this.

    The first array that cannot be written ends a save, while other arrays are still being written: they may add files
    while their directory is removed, and even make it anew.

    Args:
      prefix: beginning of the names, a pattern.
      patience: seconds for which writes may still add files.
    """
    if jax.process_index() != 0:
      return
    deadline, empty = time.monotonic() + patience, 0
    while True:
      unfinished = []
      with contextlib.suppress(OSError):
        unfinished = list(self._folder.glob(f"{prefix}orbax-checkpoint-tmp*"))
      for folder in unfinished:
        shutil.rmtree(folder, ignore_errors=True)
      empty = 0 if unfinished else empty + 1
      if empty == 3 or time.monotonic() >= deadline:
        return
      time.sleep(0.1)

  def _reload(self) -> None:
    try:
      self._manager.reload()
    except OSError as error:
      logging.warning("the checkpoints in %s cannot be listed: %s", self._folder, error)

  def _write_error(self) -> str:
    """Returns why this host cannot write, "" if it can."""
    probe = self._folder / f".writable.{jax.process_index()}"
    try:
      probe.write_bytes(bytes(4096))
      probe.unlink()
    except OSError as error:
      with contextlib.suppress(OSError):
        probe.unlink(missing_ok=True)
      return str(error)
    return ""


def _first_line(error: Exception) -> str:
  line = re.split(r" \[[a-z_ ]+='", (str(error).splitlines() or [""])[0])[
    0
  ]  # tensorstore appends its whole specification
  if len(line) > 300:  # the end names the cause
    line = f"{line[:140]} ... {line[-140:]}"
  return f"{type(error).__name__}: {line}"


def _zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
  return jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()


def restore_as_numpy(abstract: Tree, partial: bool = False) -> ocp.args.PyTreeRestore:
  """Returns arguments that restore a tree as NumPy arrays, whatever devices it was saved from.

  Args:
    abstract: shapes.
    partial: whether the checkpoint may have more arrays, which are not read.
  """
  arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
  return ocp.args.PyTreeRestore(abstract, restore_args=arguments, partial_restore=partial)


def _without(entries: Mapping[str, Tree], name: str) -> dict[str, Tree]:
  return {other: entry for other, entry in entries.items() if other != name}


def _model(state: State) -> dict[str, Any]:
  # One item: orbax warns at every save of an item without arrays, such as CLIP's collections.
  return {"params": state.params, "collections": state.collections}


def _training(state: State) -> dict[str, Any]:
  return {"step": state.step, "opt_state": state.opt_state, "skipped": state.skipped}


def _differences(saved: Tree, abstract: Tree) -> Iterator[str]:
  """Yields the arrays that only one of a checkpoint and a state has, or that differ in shape."""
  there, here = _shapes(saved), _shapes(abstract)
  for name in sorted(there.keys() | here.keys()):
    if there.get(name) != here.get(name):
      in_file, in_config = (str(shapes[name]) if name in shapes else "missing" for shapes in (there, here))
      yield f"{name} is {in_file} in the checkpoint and {in_config} in the config"


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
  return {name: tuple(leaf.shape) for name, leaf in ocp.tree.to_flat_dict(tree, sep="/").items()}


def _restore(abstract: Tree) -> ocp.args.PyTreeRestore:
  # Without explicit restore_args orbax uses the saved shardings and ignores those of `abstract`.
  return ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
