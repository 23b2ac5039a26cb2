"""Exports trained weights: python -m declip_jax.export --workdir RUN --format open_clip --output DIR

  open_clip    a folder for open_clip.create_model_and_transforms("local-dir:DIR") and CLIP_benchmark
  huggingface  a folder for CLIPModel, or SiglipModel, and a processor of transformers
  onnx         image.onnx and text.onnx for onnxruntime and others, with the files of a processor (extra onnx)
  orbax        parameters only, for declip_jax.load and config.init_from; the only format for FILIP and SimCLR

RUN is the working directory of a run, or one of its checkpoints; --weights exports any other checkpoint that
declip_jax.load reads. DIR must be empty or not exist yet.
--settings supplies what a file does not contain, as declip_jax.load reports it: --settings=text.activation=gelu
If a run averages its weights (config.optimizer.ema), the average is exported; --settings=average=False exports the
weights themselves.

--push=hf-hub:ORG/NAME uploads the export to the Hugging Face hub, with a model card that has the training and the
results of the run. A repository that does not exist yet is created, and is private unless --public is given.
"""

from collections.abc import Iterator
import contextlib
from pathlib import Path
import tempfile

from absl import flags
import jax

from declip_jax import command_line, model_card
from declip_jax.runtime.command import launch
from declip_jax.weights import hub
from declip_jax.weights.folders import nearby_runs
from declip_jax.weights.read import parse_step, read
from declip_jax.weights.settings import parse_settings
from declip_jax.weights.write import FORMATS, write


def _command(workdir: Path | None) -> None:
  if jax.process_index() > 0:
    return
  given = flags.FLAGS
  _check_combination(workdir)
  path = given.weights or workdir
  repository = hub.parse_destination(given.push) if given.push else None  # before anything is exported
  with _folder(given.output) as folder:
    with command_line.naming("--weights" if given.weights else "--workdir"):
      weights = read(path, parse_settings(given.settings, "--settings"), parse_step(given.step))
    omitted = write(weights, folder, given.format)
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(weights.params))
    print(f"{weights.origin}: {num_parameters:,} parameters")
    for note in (*weights.remarks, *omitted):
      print(note)
    if given.output:
      print(f"wrote {given.output} in the format of {given.format}")
    if repository:
      export = model_card.Export(weights, Path(path), given.format, repository.name, omitted, given.license)
      (folder / hub.CARD).write_text(model_card.make_card(export), encoding="utf-8")
      for line in hub.push(folder, repository, public=given.public):
        print(line)


def _check_combination(workdir: Path | None) -> None:
  """Rejects flags that are missing or have no effect.

  Raises:
    ValueError: the message names them.
  """
  given = flags.FLAGS
  if (workdir is None) == (given.weights is None):
    runs = nearby_runs(Path("runs")) if workdir is None else ""
    raise ValueError(f"expected --workdir, a run to export, or --weights, any other checkpoint{runs}")
  if not (given.output or given.push):
    raise ValueError("--output is required, or --push")
  for name in ("public", "license"):
    if given[name].present and not given.push:
      raise ValueError(f"--{name} has an effect only with --push")


@contextlib.contextmanager
def _folder(output: str | None) -> Iterator[Path]:
  """The folder to write: a temporary one if none is given."""
  if output:
    yield Path(output)
    return
  with tempfile.TemporaryDirectory() as folder:
    yield Path(folder)


def main() -> None:
  """Runs the command."""
  flags.DEFINE_string("weights", None, "Checkpoint file, folder or hf-hub:ORG/NAME to export instead of a run.")
  flags.DEFINE_enum("format", None, sorted(FORMATS), "Format to write.", required=True)
  flags.DEFINE_string("output", None, "Folder to write; it must be empty or not exist yet. Optional with --push.")
  flags.DEFINE_string("step", None, "Step of the checkpoint to export, or best; the newest by default.")
  flags.DEFINE_multi_string(
    "settings", [], "What the file does not contain, such as text.activation=gelu. Repeat the flag for several."
  )
  flags.DEFINE_string("push", None, "Repository on the Hugging Face hub to upload to, hf-hub:ORG/NAME.")
  flags.DEFINE_bool("public", False, "Make a repository public that --push creates.")
  flags.DEFINE_string("license", "", "Licence of the weights in the model card, by the hub's name, such as apache-2.0.")
  launch(_command, __doc__, needs_workdir=False)


if __name__ == "__main__":
  main()
