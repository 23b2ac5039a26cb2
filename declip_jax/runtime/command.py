"""Runs a command that has a working directory and may be one of several processes."""

from collections.abc import Callable, Sequence
import contextlib
from pathlib import Path
import traceback

from absl import flags

from declip_jax import command_line
from declip_jax.data.readers import disable_opencv_threads
from declip_jax.reporting.progress import drop_lost_streams
from declip_jax.runtime.hosts import check_backend, join_processes
from declip_jax.runtime.workdir import OtherRunError, local_path
from declip_jax.weights.folders import is_run


def launch(
  command: Callable[..., None],
  doc: str | None,
  required: Sequence[str] = (),
  *,
  needs_workdir: bool = True,
  is_training: bool = False,
) -> None:
  """Parses the command line, joins the other processes, and calls `command` with `--workdir`.

  Defines the flags that these commands share; TPU pods and Slurm need only `--multihost`. An error that the user can
  correct is one line and exit code 2; that of a training leaves its traceback in `error.txt`, unless the directory
  belongs to another run. A disk, a mount or a network that fails is exit code 74, since a retry may succeed.

  Args:
    command: called with the working directory, None without one.
    doc: what `--help` prints above the flags.
    required: flags that have to be given besides `--workdir`.
    needs_workdir: whether `--workdir` has to be given.
    is_training: whether the command trains the run in `--workdir`; an error of another one is none of that run.
  """
  flags.DEFINE_string("workdir", None, "Working directory: checkpoints, metrics, pictures, results.")
  flags.DEFINE_bool("multihost", False, "Join the processes that JAX finds by itself (TPU pod, Slurm, GKE).")
  flags.DEFINE_string("coordinator", None, "host:port of process 0, where JAX cannot find it by itself.")
  flags.DEFINE_integer("processes", None, "Number of processes, with --coordinator.", lower_bound=1)
  flags.DEFINE_integer("process", None, "Number of this process from 0, with --coordinator.", lower_bound=0)
  flags.DEFINE_integer("heartbeat", 60, "Seconds of silence after which a process counts as dead and all exit.", 1)

  def main(_: list[str]) -> int:
    try:
      disable_opencv_threads()
      join_processes()
      check_backend()
      workdir = flags.FLAGS.workdir
      command(None if workdir is None and not needs_workdir else local_path(workdir))
    except command_line.USER_ERRORS as error:
      failed = is_training and not isinstance(error, OtherRunError)
      return command_line.report(error, _write_traceback(flags.FLAGS.workdir) if failed else "")
    finally:
      drop_lost_streams()
    return 0

  command_line.run(main, doc, required=(*required, "workdir") if needs_workdir else required)


def _write_traceback(directory: str | None) -> str:
  """Writes `error.txt` into the directory of a run; returns a note that names it, or an empty string."""
  workdir = Path(directory or "")
  if not directory or not is_run(workdir):  # nothing was trained there
    return ""
  with contextlib.suppress(OSError):  # the disk itself may be full
    (workdir / "error.txt").write_text(traceback.format_exc())
    return f" (traceback in {workdir / 'error.txt'})"
  return ""
