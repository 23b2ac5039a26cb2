"""Exports trained weights: python -m declip_jax.export --workdir RUN --format open_clip --output DIR

  open_clip    a folder for open_clip.create_model_and_transforms("local-dir:DIR") and CLIP_benchmark
  huggingface  a folder for CLIPModel and CLIPProcessor of transformers
  orbax        parameters only, for declip_jax.load and config.init_from; the only format for FILIP and SimCLR

RUN is the working directory of a run, or any checkpoint that declip_jax.load reads. DIR must be empty or not exist yet.
--settings supplies what a file does not contain, as declip_jax.load reports it: --settings=text.activation=gelu
If a run averages its weights (config.optimizer.ema), the average is exported; --settings=average=False exports the
weights themselves.
"""

from pathlib import Path

from absl import flags
import jax

from declip_jax.runtime.command import launch
from declip_jax.weights.read import parse_step, read
from declip_jax.weights.settings import parse_settings
from declip_jax.weights.write import FORMATS, write


def _command(workdir: Path) -> None:
  if jax.process_index() > 0:
    return
  given = flags.FLAGS
  weights = read(workdir, parse_settings(given.settings, "--settings"), parse_step(given.step))
  notes = [*weights.remarks, *write(weights, given.output, given.format)]
  num_parameters = sum(leaf.size for leaf in jax.tree.leaves(weights.params))
  print(f"{weights.origin}: {num_parameters:,} parameters")
  for note in notes:
    print(note)
  print(f"wrote {given.output} in the format of {given.format}")


def main() -> None:
  """Runs the command."""
  flags.DEFINE_enum("format", None, sorted(FORMATS), "Format to write.", required=True)
  flags.DEFINE_string("output", None, "Folder to write; it must be empty or not exist yet.", required=True)
  flags.DEFINE_string("step", None, "Step of the checkpoint to export, or best; the newest by default.")
  flags.DEFINE_multi_string(
    "settings", [], "What the file does not contain, such as text.activation=gelu. Repeat the flag for several."
  )
  launch(_command, __doc__)


if __name__ == "__main__":
  main()
