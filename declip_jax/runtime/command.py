"""What the commands share: flags, several processes, and errors as one line and an exit code."""

from collections.abc import Callable
import contextlib
from pathlib import Path
import re
import sys
import traceback

from absl import app, flags, logging

from declip_jax.runtime.hosts import join_processes
from declip_jax.runtime.workdir import local_path

USER_ERRORS = (ValueError, FloatingPointError, OSError, ModuleNotFoundError)


# Of these what a path explains; any other OSError is a disk, a mount or a network, and may be gone the next time.
_PATH_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)


_IO_EXIT_CODE = 74


def launch(command: Callable[[Path], None]) -> None:
  """Runs a command of the command line: parses flags, joins the other processes, calls it with `--workdir`.

  What the user can mend is one line on the screen and exit code 2, with the traceback in a file beside the run; so is a
  disk, a mount or a network that fails, with exit code 74, since it may be back the next time. Defines the flags that
  all commands share; TPU pods and Slurm need only `--multihost`.
  """
  flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, pictures.", required=True)
  flags.DEFINE_bool("multihost", False, "One of several processes that JAX finds by itself (TPU pod, Slurm, GKE).")
  flags.DEFINE_string("coordinator", None, "host:port of process 0, where JAX cannot find it by itself.")
  flags.DEFINE_integer("processes", None, "With --coordinator: number of processes.", lower_bound=1)
  flags.DEFINE_integer("process", None, "With --coordinator: number of this process, from 0.", lower_bound=0)
  flags.DEFINE_integer("heartbeat", 60, "Seconds of silence after which a process counts as dead and all end.", 1)
  for name in ("workdir", "multihost", "coordinator", "processes", "process", "heartbeat"):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])  # so that --help shows it

  def main(_: list[str]) -> int:
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # orbax tells a lot at every save
    workdir = Path(flags.FLAGS.workdir)
    try:
      join_processes()
      command(local_path(flags.FLAGS.workdir))
    except USER_ERRORS as error:
      return _report(error, workdir)
    return 0

  app.run(main, flags_parser=parse_flags)


def parse_flags(arguments: list[str]) -> list[str]:
  # A wrong flag or field, or a config file that refuses its argument, raises here, the last within a flag's error.
  try:
    rest = flags.FLAGS(arguments)
    if "config" in flags.FLAGS:
      flags.FLAGS.config.items()  # raises here, and not later, if the file could not be read
    return rest
  except (flags.Error, AttributeError, ImportError, KeyError, OSError, TypeError, ValueError) as error:
    print(f"error: {_reason(error)}", file=sys.stderr)
    sys.exit(2)


def _reason(error: Exception) -> str:
  """What is wrong with a flag, without what absl and ml_collections wrap it in."""
  if isinstance(error, ModuleNotFoundError) and error.name == "configs":
    return "this config imports others of configs/: run the command in the folder that holds it"
  if no_file := re.search(r"\[Errno \d+\] (?:No such file or|Is a) directory: '(.+?)'", str(error)):
    return _no_config(Path(no_file[1]))
  missing = error.args[0] if isinstance(error, AttributeError) and error.args else error
  if isinstance(missing, KeyError) and str(missing.args[0]).startswith("'"):  # 'name', and below it what may be meant
    return "the config has no field " + ". ".join(str(missing.args[0]).split("\n"))
  lines = [line for line in str(error).replace("\\n", "\n").split("\n") if line.strip()]
  raised = [match[1] for line in lines if (match := re.match(r"\s*\w+Error: (.+)", line))]
  return "\n".join(line.replace("\\'", "'") for line in raised[-1:] or lines)


def _no_config(path: Path) -> str:
  folder = path if path.is_dir() else next(folder for folder in path.parents if folder.is_dir())
  configs = [file.name for file in folder.glob("*.py") if "\ndef get_config(" in file.read_text()]
  folders = [f"{inner.name}/" for inner in folder.iterdir() if (inner / "recipe.py").exists()]
  return f"--config={path} is no file; {folder} has {', '.join(sorted(configs + folders)) or 'no configs'}"


def _report(error: Exception, workdir: Path) -> int:
  message = f"error: {error}"
  with contextlib.suppress(OSError):  # it may be the disk that is full
    if (workdir / "checkpoints").is_dir():  # a run, and no folder of somebody's weights
      (workdir / "error.txt").write_text(traceback.format_exc())
      message += f"\n(traceback in {workdir / 'error.txt'})"
  print(message, file=sys.stderr)
  return _IO_EXIT_CODE if isinstance(error, OSError) and not isinstance(error, _PATH_ERRORS) else 2
