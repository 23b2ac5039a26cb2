"""Writes trained weights for other tools: python -m declip_jax.export --workdir RUN --format open_clip --output DIR

  open_clip    a folder for open_clip.create_model_and_transforms("local-dir:DIR") and CLIP_benchmark
  huggingface  a folder for transformers' CLIPModel and CLIPProcessor
  orbax        parameters only, for declip_jax.load and config.init_from; the one format for FILIP and SimCLR

RUN is the directory of a run, or any checkpoint that declip_jax.load reads. The folder must not exist yet, or be empty.
"""

from pathlib import Path

from absl import flags
import jax

from declip_jax.runtime.command import launch
from declip_jax.weights.read import read
from declip_jax.weights.write import FORMATS, write


def _command(workdir: Path) -> None:
  if jax.process_index() > 0:
    return
  given = flags.FLAGS
  weights = read(workdir, step=given.step)
  notes = [*weights.remarks, *write(weights, given.output, given.format)]
  count = sum(leaf.size for leaf in jax.tree.leaves(weights.params))
  print(f"{weights.origin}: {count:,} parameters")
  for note in notes:
    print(note)
  print(f"written for {given.format}: {given.output}")


def main() -> None:
  """Runs the command."""
  flags.DEFINE_enum("format", None, sorted(FORMATS), "What to write.", required=True)
  flags.DEFINE_string("output", None, "Folder to write; it must not exist yet, or be empty.", required=True)
  flags.DEFINE_integer("step", None, "Checkpoint of the run; the newest by default.")
  launch(_command, __doc__)


if __name__ == "__main__":
  main()
