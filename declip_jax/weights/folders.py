"""Names of the files in folders of weights, and which folders are runs."""

import contextlib
from pathlib import Path

from declip_jax.spelling import close_names
from declip_jax.weights.tensor_files import INDEX, listed

EXPORT_FILE = "weights.json"  # next to the arrays of an orbax export
ARRAYS = "arrays"  # folder of the arrays of an orbax export
# Files of weights in a folder of open_clip or Hugging Face; the first one that is there is read.
WEIGHT_FILES = (
  "open_clip_model.safetensors",
  "open_clip_pytorch_model.bin",
  "model.safetensors",
  f"model.safetensors{INDEX}",
  "pytorch_model.bin",
  f"pytorch_model.bin{INDEX}",
  "flax_model.msgpack",
)
EXPECTED = f"{WEIGHT_FILES[0]}, model.safetensors, pytorch_model.bin or {EXPORT_FILE}"  # for messages
_SHOWN = 3  # runs in a message


def nearby_runs(path: Path) -> str:
  """The runs in a folder that has no weights itself, or next to a path that does not exist, for an error message.

  Returns:
    Up to three, those with the closest names first, such as "; runs nearby: runs/demo, runs/mine"; "" for none.
  """
  folders = [folder for folder in (path, path.parent) if folder.is_dir()]
  with contextlib.suppress(OSError):
    runs = {child.name: child for folder in folders for child in sorted(folder.iterdir()) if is_run(child)}
    names = dict.fromkeys([*close_names(path.name, runs), *runs])
    if shown := [str(runs[name]) for name in [*names][:_SHOWN]]:
      return f"; runs nearby: {', '.join(shown)}{' ...' if len(names) > _SHOWN else ''}"
  return ""


def is_run(folder: Path) -> bool:
  """Whether a folder is the working directory of a run, with checkpoints."""
  return (folder / "checkpoints").is_dir()


def weights_file(folder: Path) -> Path:
  """The file of weights in a folder of open_clip or Hugging Face.

  Raises:
    FileNotFoundError: the folder has none; the message names what it has.
  """
  for name in WEIGHT_FILES:
    if (folder / name).exists():
      return folder / name
  found = listed(sorted(file.name for file in folder.iterdir()))
  raise FileNotFoundError(
    f"{folder} has no weights: expected {EXPECTED}, or checkpoints/; found {found}{nearby_runs(folder)}"
  )
