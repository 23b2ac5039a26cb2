"""Names of the files in folders of weights."""

from pathlib import Path

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
)
EXPECTED = f"{WEIGHT_FILES[0]}, model.safetensors, pytorch_model.bin or {EXPORT_FILE}"  # for messages


def weights_file(folder: Path) -> Path:
  """The file of weights in a folder of open_clip or Hugging Face.

  Raises:
    FileNotFoundError: the folder has none; the message names what it has.
  """
  for name in WEIGHT_FILES:
    if (folder / name).exists():
      return folder / name
  found = listed(sorted(file.name for file in folder.iterdir()))
  raise FileNotFoundError(f"{folder} has no weights: expected {EXPECTED}, or checkpoints/; found {found}")
