"""Evaluates a run: python -m declip_jax.evaluate --workdir runs/demo

Without further flags, the evaluations of the run's config are repeated. --zero_shot and --retrieval evaluate on other
data instead:

  --zero_shot=webdataset:/data/test-*.tar --template="a photo of a {}." --template="a drawing of a {}."
  --retrieval=webdataset:/data/test-*.tar

--weights evaluates any other checkpoint that `declip_jax.load` reads, such as one of OpenAI's CLIP or of open_clip.
--settings gives what such a file does not contain, as `declip_jax.load` warns: --settings=image.activation=gelu

Results are printed, and appended to evaluations.jsonl in the working directory, one JSON object per line.
"""

from collections.abc import Mapping
import contextlib
import json
import os
from pathlib import Path
import sys
from typing import Any

from absl import flags
import jax
from ml_collections import ConfigDict

from declip_jax import config as config_lib
from declip_jax.build import evals_with_text, make_evaluators
from declip_jax.clip import load
from declip_jax.reporting.metrics import summary_table
from declip_jax.reporting.progress import message
from declip_jax.runtime.checkpoint import Checkpoints
from declip_jax.runtime.command import launch
from declip_jax.runtime.memory import explained
from declip_jax.runtime.records import add_line
from declip_jax.runtime.workdir import read_config
from declip_jax.weights.read import Step, parse_step
from declip_jax.weights.settings import parse_settings

_BATCH_SIZE = 256  # without a run's config


def evaluate(
  workdir: Path,
  step: Step = None,
  evals: ConfigDict | None = None,
  weights: str | os.PathLike[str] | None = None,
  batch_size: int | None = None,
  settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Evaluates a checkpoint and appends the results to `workdir/evaluations.jsonl`.

  Args:
    workdir: working directory of a run, or, with `weights`, any directory for the results.
    step: checkpoint of the run, the newest by default; "best" is the best by its `config.checkpoint.best_metric`.
    evals: evaluations, those of the run's config by default.
    weights: checkpoint file or folder to evaluate instead of a run.
    batch_size: images and texts encoded at once, that of the run's config by default, or 256.
    settings: fields that override what was recognised; see `clip.load`.

  Raises:
    FileNotFoundError: no such run or checkpoint.
    ValueError: no evaluation is given, or one that cannot run, or a setting does not fit.
    OutOfMemory: memory ran out.
  """
  clip = load(weights or workdir, settings, step=step)
  config = _config_of_run(workdir, clip.step if weights is None else None)
  if evals is None:
    evals = config.evals if config else ConfigDict()
  if not len(evals):
    raise ValueError(f"{workdir} has no config.json with evaluations: pass --zero_shot or --retrieval")
  run = make_evaluators(evals, workdir)
  size = batch_size or (config.evaluate_batch_size if config else _BATCH_SIZE)
  encoders = clip.encoders(size, needs_text=bool(evals_with_text(evals)))
  about = {"step": clip.step} if weights is None else {"weights": os.fspath(weights), "origin": clip.origin}
  with explained("lower --batch_size"):
    results = {**about, **run(encoders, 0)}
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    add_line(workdir / "evaluations.jsonl", {"evals": evals.to_dict(), **results})
  return results


def _config_of_run(workdir: Path, step: int | None) -> ConfigDict | None:
  """The config in a working directory, or, if it cannot be read, that of a checkpoint there; None if there is none."""
  fields = read_config(workdir)
  if fields is not None or step is None:
    return fields and config_lib.from_json(json.dumps(fields))
  with contextlib.closing(Checkpoints(workdir)) as checkpoints:
    return config_lib.from_json(json.dumps(checkpoints.config(step)))


def _evals_from_flags() -> ConfigDict | None:
  evals = ConfigDict()
  if flags.FLAGS.zero_shot:
    evals.zero_shot = config_lib.zero_shot(flags.FLAGS.zero_shot, tuple(flags.FLAGS.template))
  if flags.FLAGS.retrieval:
    evals.retrieval = config_lib.retrieval(flags.FLAGS.retrieval, flags.FLAGS.equal_texts)
  return evals if len(evals) else None


def _command(workdir: Path) -> None:
  given = flags.FLAGS
  settings = parse_settings(given.settings, "--settings")
  step = parse_step(given.step)
  results = evaluate(workdir, step, _evals_from_flags(), given.weights, given.batch_size, settings)
  if jax.process_index() == 0:
    message(summary_table({"run": str(workdir), **results}), stream=sys.stdout)


def main() -> None:
  """Runs the command."""
  flags.DEFINE_string("step", None, "Step of the checkpoint to evaluate, or best; the newest by default.")
  flags.DEFINE_string("weights", None, "Checkpoint file or folder to evaluate instead of the run in --workdir.")
  flags.DEFINE_multi_string(
    "settings", [], "What the file does not contain, such as image.activation=gelu. Repeat the flag for several."
  )
  flags.DEFINE_integer(
    "batch_size", None, "Images and texts encoded at once; by default that of the run, or 256.", lower_bound=1
  )
  flags.DEFINE_string("zero_shot", None, "Source for zero-shot classification, such as webdataset:/data/test-*.tar.")
  flags.DEFINE_multi_string(
    "template", list(config_lib.TEMPLATES), "Prompt with {} for the class name. Repeat the flag for several."
  )
  flags.DEFINE_string("retrieval", None, "Data to search, such as webdataset:/data/test-*.tar.")
  flags.DEFINE_bool("equal_texts", False, "In retrieval, let identical captions match each other's images.")
  launch(_command, __doc__)


if __name__ == "__main__":
  main()
