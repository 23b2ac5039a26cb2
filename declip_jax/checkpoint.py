"""Checkpoints by orbax: the train state, the position of the input, and the config, written in the background.

A checkpoint has four items: `model` (parameters and collections; evaluation and export read nothing else), `training`
(step, moments, counters), `data` (the position of the input stream, JSON) and `config` (JSON).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from declip_jax.state import State

Tree = Any
policies = ocp.checkpoint_managers


class Checkpoints:
  """The checkpoints of one run, under `workdir/checkpoints`.

  Args:
    workdir: of the run.
    keep_last: how many of the newest are kept.
    keep_best: how many of the best by `best_metric` are kept besides.
    best_metric: name of an evaluation metric, higher is better; "" keeps only the newest.
  """

  def __init__(self, workdir: str | Path, *, keep_last: int = 1, keep_best: int = 0, best_metric: str = ""):
    keep = [policies.LatestN(keep_last)]
    if best_metric and keep_best:
      keep.append(
        policies.BestN(
          get_metric_fn=lambda metrics: metrics.get(best_metric, float("-inf")),
          n=keep_best,
          keep_checkpoints_without_metrics=False,
        )
      )
    self._manager = ocp.CheckpointManager(
      (Path(workdir) / "checkpoints").resolve(),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keep),
        save_decision_policy=policies.FixedIntervalPolicy(1),  # the loop decides
      ),
      item_handlers={
        "model": ocp.PyTreeCheckpointHandler(),
        "training": ocp.PyTreeCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
      },
    )

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
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts to write a checkpoint and returns as soon as the arrays are copied to the host."""
    args = ocp.args.Composite(
      model=ocp.args.PyTreeSave(_model(state)),
      training=ocp.args.PyTreeSave(_training(state)),
      data=ocp.args.JsonSave(dict(data)),
      config=ocp.args.JsonSave(dict(config)),
    )
    self._manager.save(step, args=args, metrics=dict(metrics or {}))

  def restore(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
    """State and input position of a step, laid out as `abstract` says, whatever mesh they were saved from."""
    args = ocp.args.Composite(
      model=_restore(_model(abstract)),
      training=_restore(_training(abstract)),
      data=ocp.args.JsonRestore(),
    )
    found = self._manager.restore(step, args=args)
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
    """Whether any process of a multi-process run was told to go; every process asks at every step."""
    return self._manager.reached_preemption(step)

  def wait(self) -> None:
    """Blocks until everything is written."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and frees the background threads."""
    self._manager.close()


def restore_as_numpy(abstract: Tree) -> ocp.args.PyTreeRestore:
  """Arguments that restore a tree of these shapes on the host, whatever devices it was saved from."""
  arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
  return ocp.args.PyTreeRestore(abstract, restore_args=arguments)


def _model(state: State) -> dict[str, Any]:
  # One item, since orbax warns at every save of one without arrays, as CLIP's collections are.
  return {"params": state.params, "collections": state.collections}


def _training(state: State) -> dict[str, Any]:
  return {"step": state.step, "opt_state": state.opt_state, "skipped": state.skipped}


def _restore(abstract: Tree) -> ocp.args.PyTreeRestore:
  # Without explicit restore_args orbax uses the saved shardings and ignores those of `abstract`.
  return ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
