"""What all commands share: flags by absl, a short `--help`, and errors as one line and an exit code.

A command defines its flags in `main()` and calls `run`. This module imports no JAX.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import math
import os
import re
import select
import sys
import textwrap
import threading
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, FieldReference, config_flags

from declip_jax import ADDRESS, config_files
from declip_jax.architectures import ARCHITECTURES
from declip_jax.config import EVALUATIONS, stage
from declip_jax.methods import NAMES
from declip_jax.reporting.progress import message
from declip_jax.spelling import close_names, did_you_mean, suggest

USER_ERRORS = (ValueError, FloatingPointError, MemoryError, OSError, ModuleNotFoundError)
IO_EXIT_CODE = 74
COMPILER = "compiler"  # name of the threads in which XLA compiles
# The OSErrors that are due to a path. Any other is due to a disk, a mount or a network, and a retry may succeed.
_PATH_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
_UNBROKEN = "\u00a0"  # a space at which no line is broken
_HELP = ("--help", "-help", "-h", "--helpshort")


def run(
  main: Callable[[list[str]], int | None], doc: str | None, positional: Sequence[str] = (), required: Sequence[str] = ()
) -> None:
  """Parses the command line, calls `main` with the positional arguments, and exits with what it returns.

  Exit codes: 2 for an error that the user can correct, also if memory runs out, 74 for a disk, a mount or a network
  that failed, 130 for Ctrl-C; each of these prints one line. 141, without a line, if the reader of the output has
  closed it, as in `| head`.

  Args:
    main: the command; a returned `None` is exit code 0.
    doc: what `--help` prints above the flags.
    positional: names of the positional arguments, all of which have to be given; the last one may end with "...", for
      one or more arguments.
    required: flags that have to be given.
  """

  def parse(arguments: list[str]) -> list[str]:
    if set(_HELP) & set(arguments):
      print("\n".join(help_text(doc or "", flags.FLAGS)))
      sys.exit(0)
    if "--helpfull" in arguments:
      print(doc, flags.FLAGS.get_help(), sep="\n")
      sys.exit(0)
    return parse_flags(arguments, positional, required)

  def call(arguments: list[str]) -> int:
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # orbax logs a lot at every save
    try:
      return main(arguments) or 0
    except USER_ERRORS as error:
      return report(error)
    except KeyboardInterrupt:
      message("interrupted")
      return 130

  with _unfinished_compiler_exits(), closed_pipe_exits():
    app.run(call, flags_parser=parse)


@contextlib.contextmanager
def _unfinished_compiler_exits() -> Iterator[None]:
  """Exits at once if XLA is still compiling: it crashes when Python cleans up around it."""
  try:
    yield
  except SystemExit as ended:
    if not any(thread.name == COMPILER for thread in threading.enumerate()):
      raise
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1)


@contextlib.contextmanager
def closed_pipe_exits() -> Iterator[None]:
  """Exits with 141, as a program killed by SIGPIPE, if the reader of standard output has closed it."""
  try:
    try:
      yield
    finally:
      sys.stdout.flush()
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # at exit, Python flushes once more
    sys.exit(141)


def report(error: Exception, note: str = "") -> int:
  """Prints an error as one line and returns the exit code: 2, or 74 for a disk or a network that failed.

  Raises:
    BrokenPipeError: `error`, if the pipe is standard output; see `closed_pipe_exits`.
  """
  if isinstance(error, BrokenPipeError) and _is_output_closed():
    raise error
  message(f"error: {' '.join(str(error).split())}{note}")
  return exit_code(error)


def exit_code(error: Exception) -> int:
  """2, or 74 for a disk or a network that failed."""
  return IO_EXIT_CODE if isinstance(error, OSError) and not isinstance(error, _PATH_ERRORS) else 2


@contextlib.contextmanager
def naming(flag: str) -> Iterator[None]:
  """Names the flag with a path in the message that it does not exist."""
  try:
    yield
  except FileNotFoundError as error:
    raise FileNotFoundError(f"{flag}: {error}") from error


def together(errors: Mapping[str, Exception]) -> Exception:
  """One error for several, by what failed; an OSError, with the exit code of a failing disk, if any of them is one."""
  text = "; ".join(f"{name}: {error}" for name, error in errors.items())
  return OSError(text) if any(exit_code(error) == IO_EXIT_CODE for error in errors.values()) else ValueError(text)


def _is_output_closed() -> bool:
  poll = select.poll()
  poll.register(1, 0)
  return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def parse_flags(
  arguments: list[str],
  positional: Sequence[str] = (),
  required: Sequence[str] = (),
  values: flags.FlagValues = flags.FLAGS,
) -> list[str]:
  """Parses flags and returns the positional arguments; prints one line and exits with 2 if something is wrong.

  With `--print_config` it prints the config and exits with 0.
  """
  try:
    if "config" in values and not any(re.match("--?(config|flagfile)(=|$)", text) for text in arguments):
      raise ValueError("--config is required, such as --config=demo")
    rest = values(_without_none(arguments))[1:]
    _set_none(arguments, values)
    _check_finite(values)
    printing = "print_config" in values and values.print_config
    if not printing and (missing := [name for name in required if values[name].value is None]):
      raise ValueError(f"--{missing[0]} is required")
    if len(rest) > len(positional) and not (positional and positional[-1].endswith("...")):
      raise ValueError(f"unexpected argument {rest[len(positional)]!r}; flags are --NAME=VALUE")
    if len(rest) < len(positional):
      raise ValueError(f"{positional[len(rest)]} is missing; the arguments are {' '.join(positional)} (see --help)")
  except (flags.Error, AttributeError, ImportError, KeyError, OSError, TypeError, ValueError) as error:
    print(f"error: {_one_line(error, values)}", file=sys.stderr)
    sys.exit(2)
  if printing:
    print(values.config.to_json_best_effort(indent=2, sort_keys=True))
    sys.exit(0)
  return rest


def _without_none(arguments: Sequence[str]) -> list[str]:
  return [text for text in arguments if not re.match(r"--?config\..*=None$", text)]


def _set_none(arguments: Sequence[str], values: flags.FlagValues) -> None:
  """Sets to None the fields whose last value is None, which the parsers of their types would reject.

  Raises:
    ValueError: a field cannot be None.
  """
  for field, value in _field_values(arguments).items() if "config" in values else ():
    if value != "None":
      continue
    current = dict(config_files.fields(values.config))[field]
    if not isinstance(current, FieldReference):
      raise ValueError(f"config.{field} cannot be None, only a value such as {current!r}")
    current.set(None)


def _check_finite(values: flags.FlagValues) -> None:
  """Rejects numbers that are not finite, which the bounds of flags let pass.

  Raises:
    ValueError: the message names the flag.
  """
  for name in values:
    if values[name].present and isinstance(values[name].value, float) and not math.isfinite(values[name].value):
      raise ValueError(f"--{name}={values[name].value}: expected a finite number")


def define_config(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines `--config`, whose fields are flags, and `--print_config`; `FLAGS.config` is the locked config."""
  config_flags.DEFINE_config_file("config", None, "Config: a name such as demo, or the path of a file.", values)
  values["config"].parser = _ConfigParser()
  flags.DEFINE_bool("print_config", False, "Print the config with all overrides as JSON, and exit.", flag_values=values)


class _ConfigParser(flags.ArgumentParser):
  """Reads `--config` by `config_files` and checks the names of the fields that the command line sets."""

  def parse(self, argument: str) -> ConfigDict:
    config = config_files.load(argument).lock()
    values = _field_values(sys.argv[1:])
    _add_stages(config, values)
    _add_evaluations(config, values)
    for field, value in values.items():
      check_field(config, field, value)
    return config

  def flag_type(self) -> str:
    return "config"


def _field_values(arguments: Sequence[str]) -> dict[str, str]:
  """Returns the fields that a command line sets, and their last values, as texts."""
  texts = flags.FLAGS.read_flags_from_files(list(arguments), force_gnu=False)
  found = filter(None, (re.match(r"--?(?:no)?config\.([^=]*)=?(.*)", text, re.DOTALL) for text in texts))
  return {field[1]: field[2] for field in found}


def _add_stages(config: ConfigDict, values: Mapping[str, str]) -> None:
  """Adds the stages whose `duration` a command line sets to a `config` that does not have them."""
  for field in values:
    new = re.fullmatch(r"stages\.([^.]+)\.duration\.(?:steps|epochs|examples|share)", field)
    if new and "stages" in config and new[1] not in config.stages:
      with config.unlocked():
        config.stages[new[1]] = stage()


def _add_evaluations(config: ConfigDict, values: Mapping[str, str]) -> None:
  """Adds the evaluations whose `kind` a command line sets to a `config` that does not have them."""
  for field, kind in values.items():
    new = re.fullmatch(r"evals\.([^.]+)\.kind", field)
    if not new or "evals" not in config or new[1] in config.evals:
      continue
    if kind not in EVALUATIONS:
      raise ValueError(f"config.{field}={kind!r}: choose one of {sorted(EVALUATIONS)}{did_you_mean(kind, EVALUATIONS)}")
    with config.unlocked():
      config.evals[new[1]] = EVALUATIONS[kind]("")


def check_field(config: ConfigDict, field: str, value: str) -> None:
  """Checks that a `value` can be set for a dotted `field`.

  Raises:
    ValueError: `config` has no such field, and the message names the closest ones; or the field has fields itself.
  """
  known = dict(config_files.fields(config))
  if field in known:
    if isinstance(known[field], ConfigDict) and value and not value.startswith("{"):
      raise ValueError(f"config.{field} cannot be {value!r}, since it has fields: {', '.join(known[field])}")
    return
  if "[" in field:
    raise ValueError(f"config.{field}: a single entry cannot be set; pass the whole tuple")
  hint = ""
  if new := re.fullmatch(r"evals\.([^.]+)\..+", field):
    hint = f"; --config.evals.{new[1]}.kind={'|'.join(sorted(EVALUATIONS))} adds an evaluation"
  new = re.fullmatch(r"stages\.([^.]+)\..+", field)
  if new and "stages" in config and new[1] not in config.stages:
    raise ValueError(
      f"config.{field}: the config has no stage {new[1]!r}; it is added by its duration, such as "
      f"--config.stages.{new[1]}.duration.share=0.8"
    )
  raise ValueError(config_files.no_field(config, field) + hint)


def _close_flags(name: str, values: flags.FlagValues) -> list[str]:
  """The fields of the config with this name, else the flags with a similar one, without those of libraries."""
  config = values["config"].value if "config" in values else None
  found = [field for field, _ in config_files.fields(config) if field.rpartition(".")[2] == name] if config else []
  own = [flag for flag in values if not flag.startswith("grain_")]
  return [f"--config.{field}" for field in found[:3]] or [f"--{flag}" for flag in close_names(name, own)]


def _one_line(error: Exception, values: flags.FlagValues) -> str:
  """Returns what is wrong with a flag, without the text that absl wraps it in."""
  if isinstance(error, flags.UnrecognizedFlagError):
    return f"there is no flag --{error.flagname}{suggest(_close_flags(error.flagname, values))}"
  text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
  if missing := re.findall(r"Flag --(\w+) must have a value other than None", text):
    return f"--{' and --'.join(missing)} {'are' if len(missing) > 1 else 'is'} required"
  text = re.sub(r"^flag --config=.*?: (?=config\.|the config has no field )", "", text)  # another flag sets that field
  text = re.sub("Failed to parse .* as a ConfigDict.*", "expected fields in braces, such as {}", text)
  text = re.sub("[(]'Non-boolean argument.*", "expected true or false", text)
  text = re.sub("invalid literal for int.. with base 10:.*", "not an integer", text)
  return re.sub("could not convert string to float:.*", "not a number", text)


def help_text(doc: str, values: flags.FlagValues) -> list[str]:
  """Returns the lines of `--help`: `doc`, and the flags that this package defines."""
  own = [
    flag
    for module, defined in values.flags_by_module_dict().items()
    if module.startswith("declip_jax") or module == sys.argv[0]
    for flag in defined
  ]
  lines = doc.strip().splitlines()
  if "config" in values:
    own.insert(0, values["config"])  # ml_collections defines it
    lines += ["", *_config_lines()]
  lines += ["", "flags:"]
  for flag in dict.fromkeys(own):
    lines += _flag_lines(flag)
    if flag.name == "config":
      lines.append("  --config.FIELD=VALUE")
      lines.append("      Set a field of the config, such as --config.optimizer.learning_rate=1e-3; may be repeated.")
  return [*lines, "  --helpfull", "      Show the flags of all libraries too."]


def named_lines() -> Iterator[str]:
  """Yields the lines that list the methods and the architectures, by the arguments of a config that name them."""
  yield from _list_lines("methods, for --config=pretrain:method=NAME:", NAMES)
  yield ""
  yield from _list_lines("architectures, for --config='pretrain:architecture=NAME':", ARCHITECTURES)


def _config_lines() -> Iterator[str]:
  """Yields the lines about what `--config` can name, and about where its fields are explained."""
  yield from _list_lines("configs, for --config=NAME:", config_files.names())
  yield ""
  yield from named_lines()
  yield ""
  yield "fields of a config, for --config.FIELD=VALUE:"
  yield "  --print_config prints all of them, and python -m declip_jax.new writes a config file with comments on those"
  yield f"  that are most often changed. What each means: {ADDRESS}/blob/main/docs/api/config.md"


def _list_lines(head: str, names: Iterable[str]) -> Iterator[str]:
  """Yields a head and, in lines of at most 120 characters, names, which are not broken at their spaces."""
  text = ", ".join(name.replace(" ", _UNBROKEN) for name in names)
  lines = textwrap.wrap(text, 120, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
  yield head
  yield from (line.replace(_UNBROKEN, " ") for line in lines)


def _flag_lines(flag: flags.Flag) -> list[str]:
  if flag.boolean:
    head = f"--[no]{flag.name}"
  else:
    head = f"--{flag.name}={_value_name(flag)}"
  default = "" if flag.default in (None, "", False, []) else f" (default: {_typed(flag.default)})"
  # absl adds the values of an enum, and that a flag can be repeated.
  text = re.sub(r"^<[^>]*>: |;\s+repeat this option.*", "", flag.help or "", flags=re.DOTALL)
  margin = " " * 6
  return [f"  {head}", *textwrap.wrap(f"{text}{default}", 120, initial_indent=margin, subsequent_indent=margin)]


def _typed(default: Any) -> str:
  """A default as it would be typed in a shell; several values of a repeated flag are separated by commas."""
  if isinstance(default, list):
    return ", ".join(f'"{value}"' if " " in str(value) else str(value) for value in default)
  return str(default)


def _value_name(flag: flags.Flag) -> str:
  if flag.name == "config":
    return "NAME[:ARGUMENT=VALUE,...]"
  if isinstance(flag.parser, flags.EnumParser):
    return "|".join(flag.parser.enum_values)
  return {"int": "INTEGER", "float": "NUMBER"}.get(flag.flag_type(), "TEXT")
