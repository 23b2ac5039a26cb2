"""Data files: where a user's data sets are, one line per data set.

    # key    = test                     | train                | val
    food101  = tfds:food101:validation  | tfds:food101:train
    pets     = clip_benchmark:/data/wds_vtab-pets?split=test
    own/mine = folder:/data/mine/test   | folder:/data/mine/train

Keys are those of the catalogue; a data set that it lacks is named own/NAME, and has the names of classes and the
prompts of its source: classnames.txt and zeroshot_classification_templates.txt next to its files. Blank lines and those
that start with # are skipped.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
import os
from pathlib import Path

from declip_jax.data.sources import SOURCES, lists
from declip_jax.data.storage import patterns, remote
from declip_jax.evals import catalogue
from declip_jax.evals.catalogue import DataSet, Suite
from declip_jax.spelling import did_you_mean

_FORM = "KEY = TEST [| TRAIN [| VAL]]"
# A published copy of the data sets of CLIP_benchmark and of DataComp, each a folder of `clip_benchmark:`.
_HUBS = {
  "clip_benchmark": "https://huggingface.co/datasets/clip-benchmark",
  "datacomp": "https://huggingface.co/datasets/djghosh",
}
_NAMES = ("test", "train", "val")
KINDS = ("tfds", "clip_benchmark", "datacomp", "folder")


@dataclass(frozen=True)
class Splits:
  """The sources of a data set; None for those that it lacks.

  Attributes:
    test, train, val: specs of the sources.
    place: where they are written, "FILE:LINE: KEY", for messages; "" if in no file.
  """

  test: str
  train: str | None = None
  val: str | None = None
  place: str = field(default="", compare=False)

  @property
  def specs(self) -> dict[str, str]:
    """The specs of the splits that there are, by their names."""
    return {name: spec for name in _NAMES if (spec := getattr(self, name))}


def read_data(path: str | os.PathLike[str]) -> dict[str, Splits]:
  """Reads a data file; the sources are not opened.

  Raises:
    OSError: the file cannot be read.
    ValueError: a line is wrong; the message names the file, the line and the bad value.
  """
  try:
    text = Path(path).read_text("utf-8")
  except FileNotFoundError:
    raise FileNotFoundError(f"{path}: no such data file; evaluate --print_data writes one to start from") from None
  except IsADirectoryError:
    raise ValueError(
      f"--data={path} is a folder: expected a data file, as evaluate --print_data writes it; --zero_shot={path} and "
      f"--retrieval={path} evaluate on what is in the folder"
    ) from None
  return parse_data(text, os.fspath(path))


def parse_data(text: str, name: str) -> dict[str, Splits]:
  """Parses the text of a data file; see `read_data`.

  Args:
    text: the lines.
    name: the name of the file, for messages.
  """
  found: dict[str, Splits] = {}
  for number, line in enumerate(text.splitlines(), 1):
    if not line.strip() or line.lstrip().startswith("#"):
      continue
    place = f"{name}:{number}"
    key, equals, rest = line.partition("=")
    key, specs = key.strip(), [spec.strip() for spec in rest.split("|")]
    if not equals or not key:
      raise ValueError(f"{place}: {line.strip()!r}: expected {_FORM}")
    if key in found:
      raise ValueError(f"{place}: {key} is already defined; a data set has one line")
    found[key] = _splits(key, specs, place)
  if not found:
    raise ValueError(f"{name}: no data set; expected lines {_FORM}")
  return found


def print_data(kind: str, root: str = "", suites: Sequence[Suite] = ()) -> str:
  """The text of a data file for all data sets that a kind of source has.

  | kind | `root` | what is expected there |
  |---|---|---|
  | tfds | the data_dir of TFDS, by default its own | NAME/CONFIG/VERSION |
  | clip_benchmark, datacomp | a folder or URL, by default that of their published copies | wds_NAME folders |
  | folder | a folder | KEY/test and KEY/train, folders of one folder per class, or the file of the entry |

  Such files are Karpathy's dataset_*.json, Winoground's examples.jsonl and WinoGAViL's winogavil_dataset.csv.

  Data sets that are not there, or that this kind of source does not have, are comments.

  Args:
    kind: one of `KINDS`.
    root: where the data are.
    suites: the suites whose data sets to write, with the splits of the first that has a data set; by default, all data
      sets.

  Raises:
    ValueError: the kind is unknown, or a folder needs a root.
  """
  if kind not in KINDS:
    raise ValueError(f"--print_data={kind}: expected one of {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
  if kind == "folder" and not root:
    raise ValueError("--print_data=folder: expected folder:PATH, the folder that has the data sets")
  if root and "://" not in root and not Path(root).is_dir():
    raise ValueError(f"--print_data={kind}:{root}: no such folder")
  root = (root or _HUBS.get(kind, "")).rstrip("/")
  wanted = list(dict.fromkeys(key for suite in suites for key in suite.keys)) or catalogue.keys()
  lines = [f"# Data sets of {kind}: {root or 'the default data_dir of TFDS'}", "# key = test | train | val"]
  width = max(map(len, wanted))
  for key in wanted:
    specs, remark = _sources(kind, root, catalogue.data_set(key), suites)
    lines.append(f"{key:{width}} = {' | '.join(specs)}" if specs and not remark else f"# {key}: {remark}")
  return "\n".join(lines) + "\n"


def _splits(key: str, specs: Sequence[str], place: str) -> Splits:
  try:
    catalogue.data_set(key)
  except ValueError as error:
    raise ValueError(f"{place}: {error}") from None
  if len(specs) > len(_NAMES):
    raise ValueError(f"{place}: {key} has {len(specs)} sources: expected {_FORM}")
  for split, spec in zip(_NAMES, specs, strict=False):
    kind, _, location = spec.partition(":")
    if split == "train" and not spec and len(specs) > 2:
      raise ValueError(f"{place}: {key} has a source for val, but none for train")
    if kind not in SOURCES or not location:
      hint = "" if kind in SOURCES else did_you_mean(kind, SOURCES)
      if not location and spec.endswith(".tar"):
        hint = f"; did you mean webdataset:{spec}?"
      legal = f"expected KIND:LOCATION, where KIND is one of {', '.join(SOURCES)}"
      raise ValueError(f"{place}: {key}: bad source for {split}, {spec!r}: {legal}{hint}")
  return Splits(*specs, place=f"{place}: {key}")


def _sources(kind: str, root: str, data: DataSet, suites: Sequence[Suite]) -> tuple[list[str], str]:
  """The specs of a data set, or a remark that says what is missing."""
  if data.images:
    return [], f"the line of {data.images} serves it"
  own = next((suite.sources[data.key] for suite in suites if data.key in suite.keys and data.key in suite.sources), {})
  known = {**data.sources, **own}.get(kind, ())
  if kind == "folder":
    return _in_folder(f"{root}/{data.key}", known)
  if kind == "tfds" and known:
    return _in_tfds(root, known)
  if len(known) < 2:  # at most a name in its results
    files = data.sources.get("folder", ())
    return [], f"not in {kind}" + (f"; its files: {data.key} = {_spec('FOLDER', files[0])}" if files else "")
  folder = _hub_folder(kind, root, known[0])
  if not remote.is_url(folder) and not os.path.isdir(folder):
    return [], f"no folder {folder}"
  return [f"clip_benchmark:{folder}?split={split}" for split in known[1:]], ""


def _hub_folder(kind: str, root: str, name: str) -> str:
  """The folder of a data set in CLIP_benchmark's layout; on the hub each is a repository."""
  name = f"{name.removeprefix('fairness/')}_test" if kind == "datacomp" else name
  folder = f"{root}/wds_{name.replace('/', '-')}"
  return f"{folder}/resolve/main" if root.startswith("https://huggingface.co/") else folder


def _in_tfds(root: str, specs: Iterable[str]) -> tuple[list[str], str]:
  if not root:
    return [f"tfds:{spec}" for spec in specs], ""
  found = []
  for spec in specs:
    name, _, split = spec.partition(":")
    versions = patterns.folders(f"{root}/{name}")
    if not versions:
      return [], f"no prepared version in {root}/{name}"
    found.append(f"tfds:{root}/{name}/{max(versions, key=_version)}:{split}")
  return found, ""


def _version(folder: str) -> list[int]:
  return [int(number) for number in folder.split(".") if number.isdecimal()]


def _in_folder(folder: str, specs: Sequence[str]) -> tuple[list[str], str]:
  """The source in a folder: the first of some specs of files whose file is there, else folders of splits."""
  for spec in specs:
    name, _ = lists.parse(spec.partition(":")[2], ("split",))
    if os.path.isfile(f"{folder}/{name}"):
      return [_spec(folder, spec)], ""
  splits = list(_existing(folder))
  return [f"folder:{path}" for path in splits], "" if splits else f"no folder {folder}/test"


def _spec(folder: str, spec: str) -> str:
  """A spec of a file, KIND:FILE, with the folder of the file."""
  kind, _, location = spec.partition(":")
  return f"{kind}:{folder}/{location}"


def _existing(folder: str) -> Iterator[str]:
  """The folders of test, train and val, as far as they follow each other."""
  for split in _NAMES:
    if not os.path.isdir(f"{folder}/{split}"):
      return
    yield f"{folder}/{split}"
