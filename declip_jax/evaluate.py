"""Evaluates a run: python -m declip_jax.evaluate --workdir runs/demo

Without further flags it repeats the evaluations of the run's config. With --zero_shot or --retrieval it measures on any
source instead:

  --zero_shot=webdataset:/data/test-*.tar --template="a photo of a {}." --template="a drawing of a {}."
  --retrieval=webdataset:/data/test-*.tar

With --weights it measures any other checkpoint that `declip_jax.load` reads, such as OpenAI's or one of open_clip.

Results are printed and added, one JSON object a line, to evaluations.jsonl in the run's directory.
"""

import json
import os
from pathlib import Path
from typing import Any

from absl import flags
import jax
from ml_collections import ConfigDict

from declip_jax import config as config_lib
from declip_jax.build import make_evaluators
from declip_jax.clip import load
from declip_jax.reporting.metrics import summary_table
from declip_jax.runtime.command import launch


def evaluate(
  workdir: Path,
  step: int | None = None,
  evals: ConfigDict | None = None,
  weights: str | os.PathLike[str] | None = None,
  batch_size: int | None = None,
) -> dict[str, Any]:
  """Evaluates a checkpoint and adds the results to `workdir/evaluations.jsonl`.

  Args:
    workdir: of a run, or where to put the results for other `weights`.
    step: checkpoint of the run; by default the newest.
    evals: what to measure; by default what the config of the run does.
    weights: what to evaluate in place of the run.
    batch_size: images and texts that are encoded at once; by default the config's, or 256.

  Raises:
    FileNotFoundError: no such run or checkpoint.
    ValueError: there is nothing to evaluate.
  """
  clip = load(weights or workdir, step=step)
  config_file = workdir / "config.json"
  config = config_lib.from_json(config_file.read_text()) if config_file.exists() else config_lib.default()
  evals = config.evals if evals is None else evals
  if not len(evals):
    raise ValueError(f"{workdir} has no config with evals: give --zero_shot or --retrieval")
  encoders = clip.encoders(batch_size or (config.evaluate_batch_size if config_file.exists() else 256))
  about = {"step": clip.step} if weights is None else {"weights": os.fspath(weights), "origin": clip.origin}
  results = {**about, **make_evaluators(evals, workdir)(encoders)}
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "evaluations.jsonl").open("a") as file:
      file.write(json.dumps({"evals": evals.to_dict(), **results}) + "\n")
  return results


def _asked() -> ConfigDict | None:
  evals = ConfigDict()
  if flags.FLAGS.zero_shot:
    evals.zero_shot = config_lib.zero_shot(flags.FLAGS.zero_shot, tuple(flags.FLAGS.template))
  if flags.FLAGS.retrieval:
    evals.retrieval = config_lib.retrieval(flags.FLAGS.retrieval, flags.FLAGS.equal_texts)
  return evals if len(evals) else None


def _command(workdir: Path) -> None:
  given = flags.FLAGS
  results = evaluate(workdir, given.step, _asked(), given.weights, given.batch_size)
  if jax.process_index() == 0:
    print(summary_table({"run": str(workdir), **results}))


def main() -> None:
  """Runs the command."""
  flags.DEFINE_integer("step", None, "Checkpoint to evaluate; the newest by default.")
  flags.DEFINE_string("weights", None, "Checkpoint file or folder to evaluate in place of the run in --workdir.")
  flags.DEFINE_integer("batch_size", None, "Images and texts encoded at once; by default the run's, or 256.")
  flags.DEFINE_string("zero_shot", None, "Source to classify, such as webdataset:/data/test-*.tar")
  flags.DEFINE_multi_string("template", ["a photo of a {}."], "Prompt with {} for the class name; may be repeated.")
  flags.DEFINE_string("retrieval", None, "Source to search.")
  flags.DEFINE_bool("equal_texts", False, "In retrieval, captions of the same wording match each other's images.")
  launch(_command, __doc__)


if __name__ == "__main__":
  main()
