"""Models on the Hugging Face hub: `hf-hub:ORG/NAME`, or `hf-hub:ORG/NAME@REVISION` for a branch, tag or commit.

Needs the extra `hub`. Files are downloaded by huggingface_hub into its cache, `HF_HUB_CACHE`, which its other users
share. Processes of one machine wait for each other by its locks, so each machine downloads a file once. Without a
network, or with `HF_HUB_OFFLINE=1`, what is in the cache is used.
"""

from collections.abc import Iterator, Sequence
import contextlib
from fnmatch import fnmatchcase
import logging
import os
from pathlib import Path
import re
from typing import Any, NamedTuple

from declip_jax.extras import import_package
from declip_jax.reporting.progress import message
from declip_jax.spelling import did_you_mean
from declip_jax.weights.folders import ARRAYS, EXPECTED, EXPORT_FILE, WEIGHT_FILES
from declip_jax.weights.model_configs import settings_beside
from declip_jax.weights.tensor_files import INDEX, listed

_SCHEME = "hf-hub:"
_DEFAULT_REVISION = "main"
CARD = "README.md"  # the model card of a repository
_LOG_IN = "log in by hf auth login, or set HF_TOKEN"
_OPEN_CLIP_CONFIG, _CONFIG = "open_clip_config.json", "config.json"
# Loggers of huggingface_hub that report retries, and what these messages contain.
_RETRYING = ("huggingface_hub.utils._http", "huggingface_hub.file_download")
_RETRIES = re.compile(r"thrown while requesting|^Retrying in |^Error while downloading from ")
# Configs, and the vocabularies that tokenizers may need; all are small.
_BESIDE = (
  *(_OPEN_CLIP_CONFIG, _CONFIG, "preprocessor_config.json", "processor_config.json"),
  *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
  *("spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
)


class Repository(NamedTuple):
  """A repository of a model on the hub.

  Attributes:
    name: `ORG/NAME`.
    revision: branch, tag or commit; empty for the newest commit.
  """

  name: str
  revision: str = ""

  def __str__(self) -> str:
    return f"{_SCHEME}{self.name}{'@' if self.revision else ''}{self.revision}"


def is_address(path: str | os.PathLike[str]) -> bool:
  """Whether a path is the address of a model on the hub."""
  return os.fspath(path).startswith(_SCHEME)


def parse(address: str | os.PathLike[str]) -> Repository:
  """The repository at an address.

  Raises:
    ValueError: it is not an address of a model.
  """
  found = re.fullmatch(rf"{_SCHEME}([\w.-]+/[\w.-]+)(?:@(\S+))?", os.fspath(address))
  if not found:
    raise ValueError(f"{os.fspath(address)}: expected {_SCHEME}ORG/NAME or {_SCHEME}ORG/NAME@REVISION")
  return Repository(found[1], found[2] or "")


def hint(path: str) -> str:
  """What to write instead of another kind of address of a model on the hub; "" for anything else."""
  found = re.match(r"(?:hf://|https://(?:huggingface\.co|hf\.co)/)([\w.-]+/[\w.-]+)", path)
  found = found or re.fullmatch(r"([A-Za-z][\w-]+/[\w.-]+-[\w.-]+)", path)  # such as openai/clip-vit-base-patch32
  return f"; for a model on the Hugging Face hub, write {_SCHEME}{found[1]}" if found else ""


def client() -> Any:
  """The module huggingface_hub.

  Raises:
    ModuleNotFoundError: it is not installed; the message says how to install it.
  """
  import_package("huggingface_hub.errors")
  return import_package("huggingface_hub")


def download(address: str | os.PathLike[str]) -> Path:
  """The folder, in the cache of huggingface_hub, with the files of a model that `weights.read` reads, and no others.

  Configs are downloaded first, so that a model that cannot be read is rejected before its weights are downloaded. If
  the hub cannot be reached, the files that were downloaded before are used, with a message.

  Raises:
    FileNotFoundError: the model or revision does not exist or has no weights, or it is not in the cache while
      `HF_HUB_OFFLINE` is set.
    PermissionError: the model is gated.
    OSError: the hub cannot be reached, and the model is not in the cache.
    ModuleNotFoundError: huggingface_hub is not installed.
    ValueError: the address is wrong, or a config describes a model that cannot be read.
  """
  repository, hub = parse(address), client()
  try:
    with _hidden_retries():
      return _fetch(hub, repository)
  except (OSError, _http_error(hub)) as error:
    if (refusal := _refusal(hub, repository, error)) is not None:
      raise refusal from None
    if not _is_network(hub, error):  # such as a full disk
      raise
    return _cached(hub, repository, error)


@contextlib.contextmanager
def _hidden_retries() -> Iterator[None]:
  """Hides the messages of huggingface_hub about failed attempts, of which the last one becomes our error."""

  def shown(record: logging.LogRecord) -> bool:
    return not _RETRIES.search(record.getMessage())

  loggers = [logging.getLogger(name) for name in _RETRYING]
  for logger in loggers:
    logger.addFilter(shown)
  try:
    yield
  finally:
    for logger in loggers:
      logger.removeFilter(shown)


def parse_destination(address: str) -> Repository:
  """The repository to which `push` uploads, once this is known to be possible.

  Raises:
    ValueError: it is not the address of a repository, or has a revision: uploads are commits to its main branch.
    ModuleNotFoundError: huggingface_hub is not installed.
    PermissionError: nobody is logged in.
  """
  repository = parse(address)
  if repository.revision:
    raise ValueError(f"{address}: an upload is a commit to the main branch: leave out @{repository.revision}")
  if client().get_token() is None:
    raise PermissionError(f"{address}: nobody is logged in: {_LOG_IN}")
  return repository


def push(folder: Path, repository: Repository, *, public: bool = False) -> list[str]:
  """Uploads a folder to the main branch of a repository.

  Other files of the repository stay as they are, and so does its README.md, which may have been edited.

  Args:
    folder: what to upload.
    repository: where to; it is created if it does not exist.
    public: whether a repository that is created is public; otherwise it is private.

  Returns:
    Lines that say what was done.

  Raises:
    PermissionError: the token may not write there.
    OSError: the hub cannot be reached.
  """
  hub = client()
  api, lines = hub.HfApi(), []
  try:
    url = api.create_repo(repository.name, private=not public, exist_ok=True)
    is_kept = (folder / CARD).exists() and api.file_exists(repository.name, CARD)
    api.upload_folder(
      repo_id=repository.name,
      folder_path=folder,
      commit_message="Export of declip_jax",
      ignore_patterns=[CARD] if is_kept else None,
    )
  except (OSError, _http_error(hub)) as error:
    raise _not_pushed(hub, repository, error) from error
  if is_kept:
    lines.append(f"{CARD} of {repository} was kept: it may have been edited")
  return [*lines, f"uploaded to {url}"]


def _not_pushed(hub: Any, repository: Repository, error: Exception) -> Exception:
  status = error.response.status_code if isinstance(error, hub.errors.HfHubHTTPError) else 0
  if status in (401, 403, 404):
    return PermissionError(
      f"{repository}: {hub.constants.ENDPOINT} does not let this token write there (status {status}): {_LOG_IN}, with "
      f"a token that may write to {repository.name.partition('/')[0]}"
    )
  if (refusal := _refusal(hub, repository, error)) is not None:
    return refusal
  return OSError(f"{repository}: {_unreachable(hub, error)}") if _is_network(hub, error) else error


def _fetch(hub: Any, repository: Repository) -> Path:
  """Downloads all files that are needed, from one commit; the file that `_cached` looks for is the last one."""
  names = hub.HfApi().list_repo_files(repository.name, revision=repository.revision or None)
  beside, weights = _needed(names, repository)
  folder: Path | None = None
  for name in (*beside, *weights):
    if folder and name == weights[0]:
      _check_configs(folder, weights[-1], repository)
    commit = folder.name if folder else repository.revision or None
    path = hub.hf_hub_download(repository.name, name, revision=commit)
    folder = folder or Path(path).parents[name.count("/")]
  assert folder
  return folder


def _needed(names: Sequence[str], repository: Repository) -> tuple[list[str], list[str]]:
  """The configs and vocabularies, and the files of weights, of which the last one is that which `weights.read` opens.

  Raises:
    FileNotFoundError: there are no weights.
  """
  if EXPORT_FILE in names:
    return [], [*(name for name in names if name.startswith(f"{ARRAYS}/")), EXPORT_FILE]
  file = next((name for name in WEIGHT_FILES if name in names), None)
  if file is None:
    raise FileNotFoundError(f"{repository} has no weights: expected {EXPECTED}; found {listed(sorted(names))}")
  stem, _, suffix = file.removesuffix(INDEX).rpartition(".")
  parts = [name for name in names if file.endswith(INDEX) and fnmatchcase(name, f"{stem}-*.{suffix}")]
  return [name for name in _BESIDE if name in names], [*parts, file]


def _check_configs(folder: Path, weights: str, repository: Repository) -> None:
  """Rejects a model that cannot be read, by its configs."""
  try:
    settings_beside(folder / weights)
  except ValueError as error:
    raise ValueError(str(error).replace(str(folder), str(repository))) from error


def _cached(hub: Any, repository: Repository, error: Exception) -> Path:
  """The folder of a model that was downloaded before.

  Raises:
    FileNotFoundError: it is not in the cache, and `HF_HUB_OFFLINE` is set.
    OSError: it is not in the cache, and the hub cannot be reached.
  """
  revision = repository.revision or _DEFAULT_REVISION
  offline = isinstance(error, hub.errors.OfflineModeIsEnabled)
  for name in (EXPORT_FILE, *WEIGHT_FILES):
    found = hub.try_to_load_from_cache(repository.name, name, revision=revision)
    if not isinstance(found, str):
      continue
    folder = Path(found).parent
    if name == EXPORT_FILE or (folder / (_OPEN_CLIP_CONFIG if name.startswith("open_clip") else _CONFIG)).exists():
      if not offline:
        message(f"{repository}: {_unreachable(hub, error)}; using the files of {folder}")
      return folder
  absent = f"the cache, {hub.constants.HF_HUB_CACHE}, does not have this model"
  if offline:
    raise FileNotFoundError(f"{repository}: HF_HUB_OFFLINE is set, and {absent}") from None
  raise OSError(f"{repository}: {_unreachable(hub, error)}, and {absent}") from None


def _http_error(hub: Any) -> type[Exception]:
  """The error of the HTTP library that huggingface_hub uses, which differs between its versions."""
  return next(kind for kind in hub.errors.HfHubHTTPError.__mro__[1:] if kind.__name__ == "HTTPError")


def _is_network(hub: Any, error: Exception) -> bool:
  """Whether an error is due to the network or to the hub itself, so that a retry may succeed."""
  return isinstance(error, (_http_error(hub), hub.errors.LocalEntryNotFoundError, ConnectionError, TimeoutError))


def _unreachable(hub: Any, error: Exception) -> str:
  """Says that the hub cannot be reached, and why."""
  causes = [error]
  while causes[-1].__cause__ is not None:
    causes.append(causes[-1].__cause__)
  text = " ".join(str(causes[-1]).split())
  return f"cannot reach {hub.constants.ENDPOINT} ({type(causes[-1]).__name__}: {text:.150})"


def _refusal(hub: Any, repository: Repository, error: Exception) -> Exception | None:
  """What to raise for an answer of the hub that a retry does not change; None for other errors."""
  errors = hub.errors
  page = f"{hub.constants.ENDPOINT}/{repository.name}"
  if isinstance(error, errors.GatedRepoError):
    return PermissionError(f"{repository} is gated: accept its conditions at {page}, and {_LOG_IN}")
  if isinstance(error, errors.RepositoryNotFoundError):
    return FileNotFoundError(
      f"{repository}: {hub.constants.ENDPOINT} has no model {repository.name}, or it is private: check the name, or "
      f"{_LOG_IN}"
    )
  if isinstance(error, errors.RevisionNotFoundError):
    return FileNotFoundError(f"{repository} has no revision {repository.revision!r}{_revisions(hub, repository)}")
  if isinstance(error, errors.HfHubHTTPError):
    status = error.response.status_code
    if status in (401, 403):
      return PermissionError(f"{repository}: {page} refuses access (status {status}): {_LOG_IN}")
    if status < 500 and status not in (408, 429):
      return ValueError(f"{repository}: {page} refuses the request: {' '.join(str(error).split()):.200}")
  return None


def _revisions(hub: Any, repository: Repository) -> str:
  """The branches and tags of a repository, for a message; "" if the hub does not say."""
  try:
    refs = hub.HfApi().list_repo_refs(repository.name)
  except (OSError, _http_error(hub)):
    return ""
  names = [ref.name for ref in (*refs.branches, *refs.tags)]
  return f": choose one of {listed(names)}, or a commit{did_you_mean(repository.revision, names)}" if names else ""
