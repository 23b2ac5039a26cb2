"""Config files: where they are found, and how `NAME:ARGUMENT=VALUE,...` becomes a config.

A name such as `slip/slip_base_25ep`, with or without `.py` and with or without `configs/` before it, is a file of
`declip_jax.configs`, from any folder and from an installed package. A path of your own file that ends with `.py` takes
precedence; without `.py`, the name of a config does.

The arguments are the parameters of the file's `get_config`, by name or by position:
`pretrain:method=slip,data=/data/pairs.csv`. A comma inside brackets does not separate arguments. A function whose only
parameter is called `arg` gets the whole text and parses it itself.

The `config.json` of a run is also a config; fields that it lacks have the defaults of this version.
"""

import ast
from collections.abc import Callable, Iterator
import importlib
import importlib.util
import inspect
from pathlib import Path
import re
import sys
import traceback
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.spelling import close_names, did_you_mean, suggest

_FOLDER = (Path(__file__).parent / "configs").resolve()  # in a checkout, the one at the top
_WHOLE_TEXT = ("arg", "config_string")  # ml_collections' own convention: one string


def names() -> list[str]:
  """Returns the name of every config in `declip_jax.configs`, such as "demo" or "slip/slip_base_25ep"."""
  files = (path.relative_to(_FOLDER).with_suffix("") for path in _FOLDER.rglob("*.py"))
  return sorted(file.as_posix() for file in files if file.name not in ("__init__", "recipe"))


def find(name: str) -> Path:
  """Returns the file of a config.

  Args:
    name: the path of a file, or the name of a config in `declip_jax.configs`.

  Raises:
    ValueError: the file does not exist; the message lists close matches.
  """
  short = name.removeprefix("./").removeprefix("configs/").removesuffix(".py")
  ours, own = _FOLDER / f"{short}.py", (Path(name), Path(f"{name}.py"))
  for path in (*own, ours) if name.endswith(".py") or name.startswith(".") else (ours, *own):
    if path.is_file():
      return path
  if (Path(name) / "config.json").is_file():
    raise ValueError(f"{name} is a folder; its config is {Path(name) / 'config.json'}")
  own = [str(path) for path in sorted(Path(name).glob("*.py")) if "def get_config(" in path.read_text()]
  inside = [known for known in names() if known.startswith(f"{short.strip('/')}/")]
  if own or inside:
    raise ValueError(f"{name} is a folder; its configs: {', '.join(own or inside)}")
  tails = {known.rpartition("/")[2]: known for known in names()}
  near = [str(path.with_suffix("")) for path in Path(name).parent.glob("*.py")]
  candidates = near if Path(name).is_absolute() else [*names(), *tails, *near]
  close = dict.fromkeys(tails.get(match, match) for match in close_names(short, candidates))
  missing = f"{name} does not exist" if name.endswith(".py") else f"no config {name!r}"
  raise ValueError(f"{missing}{suggest(close)} (python -m declip_jax lists all configs)")


def load_module(name: str) -> ModuleType:
  """Imports the file of a config; see `find`."""
  path = find(name).resolve()
  if path.is_relative_to(_FOLDER):
    parts = path.relative_to(_FOLDER).with_suffix("").parts
    return importlib.import_module(".".join(("declip_jax.configs", *parts)))
  if str(path.parent) not in sys.path:
    sys.path.append(str(path.parent))  # so that a file can import its neighbours, as a script can
  spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  return module


def load(text: str) -> ConfigDict:
  """Returns a config by the name of its file and, after a colon, arguments of its `get_config`.

  Raises:
    ValueError: no such file or argument, or the file raised; the message names the file's line.
  """
  name, colon, arguments = text.partition(":")
  path = find(name)
  if path.suffix == ".json":
    if colon:
      raise ValueError(f"{name} takes no arguments, got {arguments!r}")
    return _load_json(path)
  try:
    get_config = load_module(name).get_config
  except Exception as error:
    raise ValueError(_where(error, path)) from error
  given = _arguments(get_config, name, arguments) if colon else {}
  try:
    made = get_config(**given)
  except ValueError:
    raise  # the value of an argument is wrong, and the message says how
  except FileNotFoundError as error:  # the message names the path
    raise ValueError(str(error)) from error
  except Exception as error:
    raise ValueError(_where(error, path)) from error
  if not isinstance(made, ConfigDict):
    raise ValueError(f"{name}: get_config returned {type(made).__name__}, not a ConfigDict")
  return made


def _load_json(path: Path) -> ConfigDict:
  try:
    return config.changeable(config.from_json(path.read_text()))
  except (ValueError, AttributeError, TypeError) as error:
    raise ValueError(f"{path}: {_one_line(error)}") from error


def _arguments(get_config: Callable[..., Any], name: str, text: str) -> dict[str, Any]:
  """Returns the arguments of `get_config` by name."""
  parameters = inspect.signature(get_config).parameters
  order = list(parameters)
  if len(order) == 1 and order[0] in _WHOLE_TEXT:
    return {order[0]: text}
  takes = f"{name} takes {', '.join(order) or 'no arguments'}"
  given: dict[str, Any] = {}
  for position, item in enumerate(re.split(r",(?![^\[{(]*[\]})])", text)):
    key, equals, value = item.partition("=")
    if not (equals and key.isidentifier()):  # by position, where an empty one keeps the default
      key, value = order[position] if position < len(order) else "", item
      if not value:
        continue
    if not key:
      raise ValueError(f"{item!r} is one argument too many: {takes}")
    if key not in parameters:
      raise ValueError(f"{name} has no argument {key!r}{did_you_mean(key, order)}; {takes}")
    if key in given:
      raise ValueError(f"argument {key!r} is given twice: {takes}")
    given[key] = _convert(value, parameters[key].default, key)
  return given


def _convert(text: str, default: Any, name: str) -> Any:
  if isinstance(default, str) or default is inspect.Parameter.empty:
    return text
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError):
    raise ValueError(f"{name}={text}: expected {type(default).__name__}, such as {name}={default!r}") from None


def _where(error: Exception, path: Path) -> str:
  files = {path, path.resolve()}
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) in files]
  place = f"{path}, line {lines[-1]}" if lines else str(path)
  text = _one_line(error)
  if isinstance(error, (AttributeError, KeyError)) and (field := re.match(r"""['"]*(?:Key ")?(\w+)['"]""", text)):
    return f"{place}: {no_field(config.default(), field[1])}"  # ml_collections adds the whole config
  return f"{place}: {type(error).__name__}: {text}"


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())


def no_field(c: ConfigDict, field: str) -> str:
  """Returns the message that `c` has no `field` of this dotted path, with its new name or the closest fields."""
  message = f"the config has no field {field!r}"
  if renamed := [*_renamed(field)]:
    return f"{message}; {', '.join(renamed)}"
  known = [name for name, _ in fields(c)]
  same = [name for name in known if name.rpartition(".")[2] == field.rpartition(".")[2]]
  return message + (suggest(same[:3]) if same else did_you_mean(field, known))


def _renamed(field: str) -> Iterator[str]:
  """Yields "OLD is now NEW" for each field of an older version that `field` names in full or in part."""
  for old, new in config.RENAMED.items():
    if match := re.fullmatch(re.escape(old).replace(r"\*", r"([\w.]+)"), field):
      yield f"{field} is now {new.replace('*', match[1]) if '*' in new else new}"
    elif old.startswith(f"{field}.") or old.endswith(f".{field}"):
      yield f"{old} is now {new}".replace("*", "TERM")


def fields(c: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields the dotted path and the value of each field and subtree."""
  for name, value in c.items(preserve_field_references=True):
    yield f"{prefix}{name}", value
    if isinstance(value, ConfigDict):
      yield from fields(value, f"{prefix}{name}.")
