"""Tests of the embeddings for other tools: their values and metadata, interruptions, several machines, and folders of
something else.
"""

from collections.abc import Callable
import copy
import functools
from pathlib import Path

from absl import flags
from clips import Counting, make_clip
import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest

from declip_jax import command_line
from declip_jax import embed as command
from declip_jax.data.storage import jobs
from declip_jax.embed import embed


@pytest.fixture
def images(tmp_path: Path) -> Path:
  """40 images with captions, one of which cannot be read."""
  folder = tmp_path / "images"
  folder.mkdir()
  for number in range(40):
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(folder / f"{number:02}.png")
    (folder / f"{number:02}.txt").write_text(f"caption {number}")
  (folder / "17.png").write_bytes(b"broken")
  return folder


def test_embeddings_and_metadata_are_written_once_even_if_interrupted(
  images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  output, clip = tmp_path / "out", make_clip(0)
  (images / "20.txt").unlink()
  options = {"images_per_part": 16, "features_dtype": "float16", "texts": True}
  with monkeypatch.context() as patch:
    Counting(patch, command, clip, batches=3)  # of which two are the first part
    with pytest.raises(KeyboardInterrupt):
      embed("weights", str(images), output, **options)
  for batches in (3, 0):
    with monkeypatch.context() as patch:
      counting = Counting(patch, command, clip)
      assert embed("weights", str(images), output, **options) == 38
      assert counting.batches == batches
  numbers = [number for number in range(40) if number not in (17, 20)]
  parts = [np.load(path) for path in sorted((output / "img_emb").glob("*.npy"))]
  assert [(part.shape, part.dtype) for part in parts] == [((size, 16), np.float16) for size in (16, 14, 8)]
  expected = clip.encode_image([images / f"{number:02}.png" for number in numbers])
  np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-3)
  texts = np.concatenate([np.load(path) for path in sorted((output / "text_emb").glob("*.npy"))])
  np.testing.assert_allclose(texts, clip.encode_text([f"caption {number}" for number in numbers]), atol=1e-3)
  rows = [
    row for path in sorted((output / "metadata").glob("*")) for row in pyarrow.parquet.read_table(path).to_pylist()
  ]
  assert [row["row"] for row in rows] == numbers
  assert [row["captions"] for row in rows] == [[f"caption {number}"] for number in numbers]
  assert all(f"{number:02}.png" in row["key"] for number, row in zip(numbers, rows, strict=True))

  Counting(monkeypatch, command, clip)
  with pytest.raises(ValueError, match=r"--output=.*out has embeddings with texts True, not False: choose"):
    embed("weights", str(images), output, **{**options, "texts": False})
  Counting(monkeypatch, command, make_clip(1))
  with pytest.raises(ValueError, match=r"--output=.*out has embeddings with weights '.*: choose another folder"):
    embed("weights", str(images), output, **options)
  with pytest.raises(ValueError, match=r"--output=.*images already exists, and has no embeddings"):
    embed("weights", str(images), images, **options)
  for text in images.glob("*.txt"):
    text.unlink()
  with pytest.raises(ValueError, match=r"--texts: none of a few samples of .*images has a caption"):
    embed("weights", str(images), tmp_path / "new", **options)


def _contents(folder: Path) -> dict[str, bytes]:
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_several_machines_write_the_parts_of_one(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  alone, output, clip = tmp_path / "alone", tmp_path / "out", make_clip(0)

  def write(folder: Path, shard: jobs.Part = jobs.WHOLE, batches: int = 9) -> tuple[int, int]:
    """The images of the parts that a machine has written, and the batches of 8 that it encoded until it stopped."""
    counting = Counting(monkeypatch, command, clip, batches)
    count = embed("weights", str(images), folder, images_per_part=8, texts=True, shard=shard)
    return count, counting.batches

  assert write(alone) == (39, 5)
  output.mkdir()
  (output / ".about.json.01234567.tmp").touch()  # of a machine that is starting
  assert write(output, jobs.Part(2, 3)) == (7, 1)
  assert {path.name for path in (output / "img_emb").iterdir()} == {"img_emb_00002.npy"}
  with pytest.raises(KeyboardInterrupt):
    write(output, jobs.Part(1, 3), batches=1)
  assert write(output, jobs.Part(1, 3)) == (16, 1)
  assert write(output, jobs.Part(0, 3)) == (16, 2)
  assert _contents(output) == _contents(alone)
  assert write(output) == (39, 0)
  with pytest.raises(ValueError, match="shard=0/6: expected at most as many machines as parts of --images_per_part"):
    write(tmp_path / "new", jobs.Part(0, 6))
  assert not (tmp_path / "new").exists()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
  """The command with some arguments."""

  def run_command(*arguments: str) -> None:
    values = flags.FlagValues()
    with monkeypatch.context() as patch:
      patch.setattr(flags, "FLAGS", values)
      for name in ("string", "bool", "integer", "multi_string", "enum"):
        patch.setattr(flags, f"DEFINE_{name}", functools.partial(getattr(flags, f"DEFINE_{name}"), flag_values=values))
      patch.setattr(command_line, "run", lambda *_, **kwargs: values(["embed", *arguments]))
      command.main()
      command._command([])

  return run_command


def test_the_flag_shard_chooses_the_parts(
  run: Callable[..., None],
  images: Path,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  Counting(monkeypatch, command, make_clip(0))
  monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
  monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
  given = ["--weights=w", f"--images={images}", f"--output={tmp_path / 'out'}", "--images_per_part=16"]
  run(*given, "--shard=auto/2")
  assert capsys.readouterr().out == f"{tmp_path / 'out'}: embeddings of 15 images (shard 1/2)\n"
  run(*given)
  assert capsys.readouterr().out == f"{tmp_path / 'out'}: embeddings of 39 images\n"
  for wrong in ("2/2", "-1/2", "1", "", "auto", "0/0"):
    with pytest.raises(ValueError, match=f"shard={wrong}: "):
      run(*given, f"--shard={wrong}")


def test_models_without_joint_embeddings_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  clip = copy.copy(make_clip(0))
  clip.tokens = True
  monkeypatch.setattr(command, "load", lambda *arguments: clip)
  with pytest.raises(ValueError, match=r"--weights=w compares tokens \(FILIP\): expected a model that compares"):
    embed("w", str(tmp_path), tmp_path / "out")
