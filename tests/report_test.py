import json
from pathlib import Path
import re
import subprocess
import sys
from types import SimpleNamespace

from evals.comparison_test import classified, weighted, write
import numpy as np
from PIL import Image
import pytest

from declip_jax import report
from declip_jax.evals.comparison import read_methods
from declip_jax.evals.report.compared import Report
from declip_jax.reporting.documents import Heading, Listing, Table, to_html, to_latex, to_markdown


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Results of two runs on three data sets, one of them under a shift."""
  root = tmp_path_factory.mktemp("results")
  for seed, (key, better, worse) in enumerate((("own/photo", 0.9, 0.6), ("own/sketch", 0.7, 0.4), ("dtd", 0.5, 0.5))):
    write(root / "declip", "declip", classified(better, seed), key=key)
    write(root / "clip", "clip", classified(worse, seed + 9), key=key)
  for index in range(4):
    for key, loss in (("own/photo", 0.0), ("own/sketch", 0.2)):
      write(root / "standard", f"s{index}x", classified(0.5 + 0.1 * index - loss, index), key=key)
  return root


@pytest.mark.slow
def test_a_report_marks_what_the_intervals_support(folder: Path, tmp_path: Path) -> None:
  folders = [folder / "clip", folder / "declip"]
  overlap = folder / "overlap"
  overlap.mkdir()
  about = {"test": "a", "train": "b", "images": 2140, "threshold": 0.8125, "overlap": 31, "contamination": 31 / 2140}
  (overlap / "overlap.json").write_text(json.dumps(about))
  Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(overlap / "overlap.png")
  options = [
    f"--overlap={overlap}",
    f"--baseline={folder / 'clip'}",
    f"--standard={folder / 'standard'}",
    "--shift=own/photo:own/sketch",
    "--latex",
  ]
  command = [sys.executable, "-m", "declip_jax.report", *folders, *options, f"--output={tmp_path}"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  markdown = (tmp_path / "report.md").read_text()
  lines = {
    line.split(" | ")[0].removeprefix("| "): line for line in markdown.splitlines() if " | top-1 accuracy | " in line
  }
  assert "\\*\\*" in lines["own/photo"]
  assert "\\*" not in lines["dtd"]
  assert "**" in lines["own/sketch"].replace("\\*", "")
  assert "Effective robustness" in markdown
  assert "| a | b | 2,140 | 0.812 | 31 (1.4 %) |" in markdown
  pictures = sorted((tmp_path / "pictures").glob("*.png"))
  assert len(pictures) == 4
  for path in pictures:
    assert f"](pictures/{path.name})" in markdown
    assert len(np.unique(Image.open(path).convert("L"))) > 10
  page = (tmp_path / "report.html").read_text()
  assert page.count("data:image/png;base64,") == len(pictures)
  assert not re.search(r"<script|src=\"(?!data:)|href=", page)
  assert (tmp_path / "results.csv").read_text().splitlines()[0].startswith("dataset,model,pretrained,task,language,")
  files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
  methods, standard = read_methods(folders), read_methods([folder / "standard"])
  again = Report(methods, methods[0], {"own/photo": ["own/sketch"]}, standard, [overlap], (), report.published())
  report.write_report(again, tmp_path, latex=True)
  assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_a_document_is_escaped() -> None:
  table = Table(("a|b", "n", "m"), [("**x**", "1\\*", "2")], texts=2)
  blocks = [Heading("A < B", 1), table, "see `<b>`", Listing(["one", "two"])]
  markdown, page = to_markdown(blocks, Path()), to_html(blocks, "<title>")
  assert "| a\\|b | n | m |\n|---|---|--:|\n| **x** | 1\\* | 2 |" in markdown
  assert "* one\n* two" in markdown
  assert '<td class="text"><b>x</b></td><td class="text">1*</td><td>2</td>' in page
  assert "<code>&lt;b&gt;</code>" in page
  assert "A &lt; B" in page
  assert "<ul><li>one</li><li>two</li></ul>" in page


def test_tables_for_latex() -> None:
  blocks = [Heading("Scores & more"), "text", Table(("a_b", "n"), [("**x & y**", "+1.0\\* 5 %"), ("`c`", "2 ‡")])]
  assert to_latex(blocks) == (
    "% Scores & more\n\\begin{tabular}{lr}\n\\toprule\na\\_b & n \\\\\n\\midrule\n"
    "\\textbf{x \\& y} & +1.0* 5 \\% \\\\\n\\texttt{c} & 2 $^\\ddagger$ \\\\\n\\bottomrule\n\\end{tabular}\n"
  )


@pytest.mark.parametrize("text", ["photo", "photo:", ":sketch", "photo:sketch,"])
def test_a_bad_shift_is_rejected(text: str) -> None:
  with pytest.raises(ValueError, match=f"--shift={text}: expected"):
    report._shifts([text])


def test_a_shift_of_data_without_results_is_rejected(folder: Path) -> None:
  methods = read_methods([*folder.iterdir()])
  report._check_shifts({"own/photo": ["own/sketch"]}, methods)
  with pytest.raises(ValueError, match="--shift: no result of 'own/skech'; did you mean own/sketch"):
    report._check_shifts({"own/photo": ["own/sketch", "own/skech"]}, methods)


def test_errors_of_all_runs_are_raised_together_after_the_report_of_the_others(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  errors = {"bad": ValueError("no such split"), "disk": OSError(5, "Input/output error"), "partly": ValueError("dtd")}
  for name in ("good", "partly"):
    write(tmp_path / name / "results", name, classified(0.7, 1), key="pets")
  evaluated = []

  def evaluate(workdir: Path, **_: object) -> None:
    evaluated.append(workdir.name)
    if workdir.name in errors:
      raise errors[workdir.name]

  given = {"shift": [], "data": "sets.txt", "suite": [], "tasks": [], "baseline": [], "standard": [], "overlap": []}
  given |= {"output": str(tmp_path / "out"), "latex": False}
  monkeypatch.setattr(report.flags, "FLAGS", SimpleNamespace(**given))
  monkeypatch.setattr(report.suites, "read_jobs", lambda *arguments: ([], []))
  monkeypatch.setattr(report, "evaluate", evaluate)
  folders = [str(tmp_path / name) for name in ("bad", "disk", "partly", "good")]
  with pytest.raises(OSError, match="bad: no such split; .*disk: .*Input/output error; .*partly: dtd"):
    report._command(folders)
  assert evaluated == ["bad", "disk", "partly", "good"]
  assert [*json.loads((tmp_path / "out" / "report.json").read_text())["scores"][0]["methods"]] == ["partly", "good"]
  with pytest.raises(ValueError, match="bad: no such split"):
    report._command(folders[:1])
  report.flags.FLAGS.standard = folders[3:] * 2
  with pytest.raises(ValueError, match="--standard=.*good: the line needs 3 models or more"):
    report._command(folders[3:])


def test_the_baseline_is_found_by_its_folder_among_runs_of_one_name(tmp_path: Path) -> None:
  folders = [tmp_path / name / "clip" for name in ("exp1", "exp2")]
  for seed, folder in enumerate(folders):
    weighted(folder / "results", "clip", str(folder), seed, 9)
  methods = read_methods([*folders, folders[0]])
  assert [report._find(methods, [str(folder)], "--baseline") for folder in folders] == methods


def test_a_report_of_other_data_is_rejected_without_a_baseline(tmp_path: Path) -> None:
  for name in "ab":
    write(tmp_path, name, classified(0.7, 1), data={"test": {"source": f"folder:/{name}", "samples": ord(name)}})
  methods = read_methods([tmp_path])
  for rejected in (
    Report(methods),
    Report(methods[:1], standard=methods[1:]),
    Report(methods[:1], interpolated=methods[1:]),
  ):
    with pytest.raises(ValueError, match="folder:/a, 97 samples.*folder:/b, 98 samples"):
      report.write_report(rejected, tmp_path / "out")
  assert not (tmp_path / "out").exists()
