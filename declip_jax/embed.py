"""Writes embeddings for other tools: python -m declip_jax.embed --weights FILE --images SOURCE --output DIR

  --images    a folder, path, pattern or URL, or KIND:LOCATION

DIR receives parts of --images_per_part images each, in the layout of clip-retrieval, which autofaiss reads as well:

  img_emb/img_emb_00000.npy             embeddings of unit norm, [images dimensions]
  text_emb/text_emb_00000.npy           with --texts, those of the first caption of each of these images
  metadata/metadata_00000.parquet       one row for each of them: row (its number in the source), key, captions, class

Images that cannot be read are left out, and with --texts those without a caption. An interrupted command continues
after its last part. No more than one part is held in memory. Needs the extra train.

Several machines that share DIR can encode a source together: run the command with --shard=0/8 to --shard=7/8, or with
--shard=auto in a Slurm array from 0, as in sbatch --array=0-7, or with --shard=auto/8 in an indexed job of Kubernetes
with 8 completions. Machine I writes every part whose number is I modulo 8.
"""

from collections.abc import Sequence
import dataclasses
import io
import json
import os
from pathlib import Path
import sys
from typing import Any, NamedTuple

from absl import flags
import numpy as np

from declip_jax import command_line
from declip_jax.clip import Clip, load
from declip_jax.data.guess import guess
from declip_jax.data.mixture import has_captions
from declip_jax.data.readers import disable_opencv_threads
from declip_jax.data.sources import Source, open_source
from declip_jax.data.storage import jobs
from declip_jax.evals.encoders import Encoders, encode_texts
from declip_jax.evals.feature_cache import numerics
from declip_jax.evals.features import Features, encode_batches, join, read_batches, surely
from declip_jax.evals.similarity import unit_rows
from declip_jax.extras import import_package, pyarrow, pyarrow_parquet
from declip_jax.reporting.progress import Bar, drop_lost_streams, message
from declip_jax.runtime import records
from declip_jax.runtime.hosts import check_backend
from declip_jax.spelling import counted
from declip_jax.weights.settings import parse_settings

_BATCH_SIZE = 256
_IMAGES_PER_PART = 2**16
_ABOUT = "about.json"  # what the parts of a folder are of
_MOST_DIGITS = 5  # of the number of a part


def embed(
  weights: str,
  images: str,
  output: Path,
  *,
  settings: Sequence[str] = (),
  batch_size: int = _BATCH_SIZE,
  features_dtype: str = "float32",
  images_per_part: int = _IMAGES_PER_PART,
  texts: bool = False,
  shard: jobs.Part = jobs.WHOLE,
) -> int:
  """Writes the parts that a folder does not have yet, and returns the number of images in all of this machine's.

  Args:
    weights: checkpoint that `clip.load` reads.
    images: spec of a source, or a path.
    output: folder of the parts.
    settings: see `parse_settings`.
    batch_size: images encoded at once.
    features_dtype: "float32" or "float16", to which embeddings of unit norm are rounded.
    images_per_part: images of the source for each part.
    texts: whether the first caption of each image is encoded, too.
    shard: the parts that this machine writes, by default all.

  Raises:
    OSError: the weights or the images are not there, or cannot be read now.
    ModuleNotFoundError: the extra `train` is not installed, which writes Parquet.
    ValueError: the model has no joint space or compares tokens, the folder has embeddings of something else, captions
      are missing, or there are fewer parts than machines.
  """
  import_package("pyarrow")  # before anything is encoded in vain
  with command_line.naming("--weights"):
    clip = load(weights, parse_settings(settings, "--settings"))
  if clip.tokens or not clip.feature_widths[1]:
    problem = "compares tokens (FILIP)" if clip.tokens else "has no joint space"
    raise ValueError(f"--weights={weights} {problem}: expected a model that compares embeddings")
  encoders = clip.encoders(batch_size, needs_text=texts, field="--batch_size")
  source = open_source(guess(images), "--images")
  if texts and not has_captions(source):
    raise ValueError(f"--texts: none of a few samples of {source.name} has a caption")
  parts = [range(len(source))[start : start + images_per_part] for start in range(0, len(source), images_per_part)]
  shard.check(len(parts), "parts of --images_per_part images")
  work = _Work(source, encoders, features_dtype, texts)
  _begin(output, _about(clip, work, images_per_part))
  own, count = [*enumerate(parts)][shard.index :: shard.count], 0
  with Bar("encoding", sum(len(rows) for _, rows in own), "images") as bar:
    for number, rows in own:
      part = _part(output, number)
      if part.images.exists():
        bar.update(len(rows))
      else:
        _write_part(work, rows, part, bar)
      count += len(np.load(part.images, "r"))
  return count


class _Work(NamedTuple):
  """What is encoded and written; see `embed`."""

  source: Source | Sequence[Any]
  encoders: Encoders
  features_dtype: str
  texts: bool


def _about(clip: Clip, work: _Work, images_per_part: int) -> dict[str, Any]:
  """What embeddings depend on, and how they are divided into parts, as JSON."""
  about = {
    "weights": clip.weights_hash,
    "origin": clip.origin,
    "source": work.source.name,
    "stamp": work.source.stamp,
    "samples": len(work.source),
    "view": dataclasses.asdict(work.encoders.view),
    "dtype": clip.dtype,
    "features_dtype": work.features_dtype,
    "texts": work.texts,
    "images_per_part": images_per_part,
    **numerics(),
  }
  return json.loads(json.dumps(about))


def _begin(output: Path, about: dict[str, Any]) -> None:
  """Writes what the embeddings of a folder are of, and makes its subfolders, if no other machine has done so.

  Raises:
    ValueError: the folder has embeddings of something else, or other files.
  """
  file = output / _ABOUT
  names = os.listdir(output) if output.is_dir() else []
  names = [name for name in names if not name.startswith(f".{_ABOUT}.")]  # that of another machine, not yet complete
  if _ABOUT in names:
    before = {"texts": False, **json.loads(file.read_text())}
    if differing := [name for name in about if before.get(name) != about[name]]:
      shown = ", ".join(f"{name} {before.get(name)!r:.60}, not {about[name]!r:.60}" for name in differing)
      raise ValueError(f"--output={output} has embeddings with {shown}: choose another folder")
  elif names or output.is_file():
    raise ValueError(f"--output={output} already exists, and has no embeddings: choose a new folder")
  else:
    output.mkdir(parents=True, exist_ok=True)
    records.write(file, (json.dumps(about, indent=2) + "\n").encode())
  for path in _part(output, 0):
    path.parent.mkdir(exist_ok=True)


class _Part(NamedTuple):
  """The files of a part."""

  images: Path
  texts: Path
  metadata: Path


def _part(output: Path, number: int) -> _Part:
  digits = f"{number:0{_MOST_DIGITS}}"
  return _Part(
    output / "img_emb" / f"img_emb_{digits}.npy",
    output / "text_emb" / f"text_emb_{digits}.npy",
    output / "metadata" / f"metadata_{digits}.parquet",
  )


def _write_part(work: _Work, rows: range, part: _Part, bar: Bar) -> None:
  """Encodes and writes some rows; the embeddings of images last, since they mark a part as complete."""
  batches = []
  for batch in encode_batches(work.source, work.encoders, rows, surely(read_batches)):
    batches.append(dataclasses.replace(batch, pooled=np.zeros((len(batch.label), 0), np.float32)))  # it is not written
    bar.update(len(batch.label))
  features = join(batches)
  kept = np.flatnonzero(features.readable)
  if work.texts:
    kept = np.array([row for row in kept if features.captions[row]], int)
    captions = [features.captions[row][0] for row in kept]
    encoded = encode_texts(captions, work.encoders) if captions else features.embedding[:0]
    _write_array(part.texts, encoded, work.features_dtype)
  records.write(part.metadata, _parquet(features, kept, rows.start, work.source.classnames))
  _write_array(part.images, features.embedding[kept], work.features_dtype)


def _write_array(path: Path, embeddings: np.ndarray, dtype: str) -> None:
  """Writes embeddings, scaled to unit norm."""
  file = io.BytesIO()
  np.save(file, unit_rows(embeddings).astype(dtype))
  records.write(path, file.getvalue())


def _parquet(features: Features, kept: np.ndarray, start: int, classnames: Sequence[str]) -> bytes:
  """Metadata of the images that were kept, as a Parquet file."""

  def class_of(label: int) -> str | None:
    return None if label < 0 else classnames[label] if label < len(classnames) else str(label)

  columns = {
    "row": pyarrow.array(start + kept, pyarrow.int64()),
    "key": pyarrow.array([str(features.id[row]) for row in kept], pyarrow.string()),
    "captions": pyarrow.array([[*features.captions[row]] for row in kept], pyarrow.list_(pyarrow.string())),
    "class": pyarrow.array([class_of(int(features.label[row])) for row in kept], pyarrow.string()),
  }
  file = io.BytesIO()
  pyarrow_parquet.write_table(pyarrow.table(columns), file)
  return file.getvalue()


def _command(_: list[str]) -> None:
  given = flags.FLAGS
  disable_opencv_threads()
  check_backend()
  try:
    shard = jobs.Part.of(given.shard, os.environ)
    count = embed(
      given.weights,
      given.images,
      Path(given.output),
      settings=given.settings,
      batch_size=given.batch_size,
      features_dtype=given.features_dtype,
      images_per_part=given.images_per_part,
      texts=given.texts,
      shard=shard,
    )
    what = f"{counted(count, 'image')}{' and their texts' if given.texts else ''}"
    which = "" if shard == jobs.WHOLE else f" (shard {shard.index}/{shard.count})"
    message(f"{given.output}: embeddings of {what}{which}", stream=sys.stdout)
  finally:
    drop_lost_streams()


def main() -> None:
  """Runs the command."""
  flags.DEFINE_string("weights", None, "Run, checkpoint file or folder, or hf-hub:ORG/NAME.")
  flags.DEFINE_string("images", None, "Images to encode, such as a folder or webdataset:/data/test-*.tar.")
  flags.DEFINE_string("output", None, "Folder to write, or to continue.")
  flags.DEFINE_multi_string(
    "settings", [], "Setting that the checkpoint does not contain, such as text.activation=gelu. Can be repeated."
  )
  flags.DEFINE_integer("batch_size", _BATCH_SIZE, "Images encoded at once.", lower_bound=1)
  flags.DEFINE_enum(
    "features_dtype", "float32", ["float32", "float16"], "Dtype of stored embeddings; float16 takes half the space."
  )
  flags.DEFINE_integer("images_per_part", _IMAGES_PER_PART, "Images of the source for each part.", lower_bound=1)
  flags.DEFINE_bool("texts", False, "Also encode the first caption of each image.")
  flags.DEFINE_string(
    "shard", "0/1", "I/N, auto or auto/N: this machine writes shard I of N of the parts, with I from 0."
  )
  command_line.run(_command, __doc__, required=("weights", "images", "output"))


if __name__ == "__main__":
  main()
