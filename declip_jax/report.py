"""Compares evaluations: python -m declip_jax.report runs/clip runs/declip --baseline runs/clip --output report

Each argument is a folder of results of `declip_jax.evaluate`, or a working directory with a folder `results`. Runs
whose names differ only in a final number, as clip-0 and clip-1, are seeds of one method if they were trained in the
same way; files of weights never are. --output receives report.md, report.html (one page that needs no other file),
report.json, results.csv (as `clip_benchmark build` writes it), pictures, and with --latex report.tex, the tables for
LaTeX.

Runs of several sizes, such as methods x shares of the data x seeds, also give curves of scores against training FLOPs,
pairs and parameters, and the number of pairs with which each method reaches a score of the baseline, or else of the
first method: python -m declip_jax.report grid/* --output report

With --data, the working directories are first evaluated on the data sets of that file, as `declip_jax.evaluate` does
with --suite, --data and --tasks; results that are there are not computed again. Runs that fail do not stop the others:
the report shows what there is, and the command then ends with the errors of all.

Models that were evaluated on different data under one name are rejected: other numbers of samples, or other ids,
labels, captions or bytes of test images. --shift names data sets of one task under distribution shift, such as
--shift=own/photo:own/sketch,own/cartoon; the shifts of ImageNet are known. --standard names results of models with
standard training; a line fitted through them gives the accuracy that is expected under shift. --overlap names working
directories of `declip_jax.overlap`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
import sys

from absl import flags

from declip_jax import command_line, config_files
from declip_jax.command_line import together
from declip_jax.data.storage.indexes import cache_folder
from declip_jax.evals import suites
from declip_jax.evals.comparison import Method, check_data, read_methods, results_in, tasks
from declip_jax.evals.report.compared import Published, Report
from declip_jax.evals.report.document import document
from declip_jax.evals.report.files import to_csv, to_json
from declip_jax.evals.report.published import of_config, of_papers
from declip_jax.evaluate import evaluate
from declip_jax.reporting.documents import to_html, to_latex, to_markdown
from declip_jax.reporting.progress import message
from declip_jax.runtime.records import write
from declip_jax.spelling import did_you_mean

_MODELS_OF_A_LINE = 3  # with which a line has residuals


def write_report(report: Report, output: Path, *, latex: bool = False) -> None:
  """Writes the files of a report; the same results give the same bytes.

  Args:
    report: what to compare.
    output: folder to write to.
    latex: whether to write the tables for LaTeX, too.

  Raises:
    ValueError: methods have been evaluated on different data under one name.
    OSError: a file cannot be written.
  """
  every = [*report.methods, *report.interpolated, *report.standard]
  for task in tasks(every):
    check_data([scored for method in every for scored in method.of(task)])
  output.mkdir(parents=True, exist_ok=True)
  blocks = document(report, output)
  texts = {
    "report.md": to_markdown(blocks, output),
    "report.html": to_html(blocks, "Evaluation"),
    "report.json": to_json(report),
    "results.csv": to_csv(report),
    **({"report.tex": to_latex(blocks)} if latex else {}),
  }
  for name, text in texts.items():
    write(output / name, text.encode())


def published() -> list[Published]:
  """Published scores: those of the configs of this package, and those of tables of papers."""
  modules = {name: config_files.load_module(name) for name in config_files.names()}
  own = [row for name, module in modules.items() for row in of_config(name, getattr(module, "PUBLISHED", {}))]
  return [*own, *of_papers()]


def _find(methods: Sequence[Method], folders: Sequence[str], name: str) -> Method:
  """The method of a folder.

  Raises:
    ValueError: the folder has several, or one that is not among the methods.
  """
  read = read_methods([Path(folder) for folder in folders])
  own = {scored.path for method in read for run in method.runs for scored in run.values() if method.share is None}
  same = [method for method in methods if own & {one.path for run in method.runs for one in run.values()}]
  found = [method.label for method in read]
  if len(same) != 1:
    raise ValueError(f"{name}: expected the results of one of {[method.label for method in methods]}, not of {found}")
  return same[0]


def _shifts(texts: Sequence[str]) -> dict[str, list[str]]:
  """Parses --shift.

  Raises:
    ValueError: a text has another form.
  """
  found = {}
  for text in texts:
    source, colon, shifted = text.partition(":")
    if not (source and colon and all(shifted.split(","))):
      raise ValueError(f"--shift={text}: expected DATA_SET:SHIFTED,SHIFTED")
    found[source] = shifted.split(",")
  return found


def _check_shifts(shifts: Mapping[str, Sequence[str]], methods: Sequence[Method]) -> None:
  """Rejects data sets of --shift of which no method has a result."""
  known = {key for method in methods for run in method.runs for key in (one.key for one in run.values())}
  for key in dict.fromkeys(key for source, shifted in shifts.items() for key in (source, *shifted)):
    if key not in known:
      raise ValueError(f"--shift: no result of {key!r}{did_you_mean(key, sorted(known))}")


def _command(folders: list[str]) -> None:
  given = flags.FLAGS
  shifts = _shifts(given.shift)
  every = list(dict.fromkeys([*folders, *given.baseline]))
  failed: Mapping[str, Exception] = {}
  if given.data:
    failed = _evaluate(every)
  elif given.suite or given.tasks:
    raise ValueError("--suite and --tasks need --data, a file that says where the data sets are")
  known = [folder for folder in every if folder not in failed or results_in(Path(folder))]
  if failed and not (set(known) & set(folders) and set(given.baseline) <= set(known)):
    raise together(failed)
  _report([folder for folder in folders if folder in known], shifts)
  if failed:
    raise together(failed)


def _report(folders: Sequence[str], shifts: Mapping[str, Sequence[str]]) -> None:
  """Writes the report of the results in some folders, as flags say.

  Raises:
    ValueError, OSError: see `read_methods`, `_find` and `write_report`.
  """
  given = flags.FLAGS
  found = read_methods([Path(folder) for folder in [*folders, *given.baseline]])
  methods = [method for method in found if method.share is None]
  interpolated = [method for method in found if method.share is not None]
  if not methods:
    raise ValueError(
      f"{', '.join(folders)}: only results of interpolated weights; add those of the model by python -m "
      "declip_jax.evaluate with the same --data and --tasks, but without --interpolate_with"
    )
  _check_shifts(shifts, methods)
  baseline = _find(methods, given.baseline, f"--baseline={','.join(given.baseline)}") if given.baseline else None
  standard = [model for folder in given.standard for model in read_methods([Path(folder)])]  # each seed is a point
  if given.standard and len(standard) < _MODELS_OF_A_LINE:
    raise ValueError(f"--standard={','.join(given.standard)}: the line needs {_MODELS_OF_A_LINE} models or more")
  overlaps = tuple(map(Path, given.overlap))
  report = Report(methods, baseline, shifts, standard, overlaps, interpolated, published())
  write_report(report, Path(given.output), latex=given.latex)
  message(
    f"{Path(given.output) / 'report.html'}: methods: {len(methods)}, tasks: {len(report.tasks)}", stream=sys.stdout
  )


def _evaluate(workdirs: Sequence[str]) -> dict[str, Exception]:
  """Evaluates runs on the data sets that flags name; returns the errors of those that failed, by working directory."""
  given = flags.FLAGS
  jobs, remarks = suites.read_jobs(given.data, given.suite, given.tasks)
  for remark in remarks:
    message(remark)
  failed: dict[str, Exception] = {}
  for workdir in workdirs:
    message(f"{workdir}:")
    try:
      evaluate(Path(workdir), jobs=jobs, cache=cache_folder() / "features")
    except (ValueError, OSError) as error:  # the other runs are still evaluated
      failed[workdir] = error
  return failed


def main() -> None:
  """Runs the command."""
  flags.DEFINE_string("output", None, "Folder of the report.")
  flags.DEFINE_list("baseline", [], "Folders of results of the method to compare with; several are seeds of it.")
  flags.DEFINE_multi_string("shift", [], "DATA_SET:SHIFTED,SHIFTED, keys of data sets. Repeat the flag for several.")
  flags.DEFINE_list("standard", [], "Folders of results of models with standard training.")
  flags.DEFINE_bool("latex", False, "Also write report.tex, the tables for LaTeX.")
  flags.DEFINE_list("overlap", [], "Working directories of declip_jax.overlap.")
  flags.DEFINE_string("data", None, "File that says where your data sets are; the runs are first evaluated on them.")
  flags.DEFINE_list("suite", [], "Suites to evaluate; without it, all data sets of --data.")
  flags.DEFINE_list("tasks", [], "What to evaluate, see declip_jax.evaluate.")
  command_line.run(_command, __doc__, positional=("RESULTS...",), required=("output",))


if __name__ == "__main__":
  main()
