"""`colabs/`: notebooks have the same frame and no outputs, their links lead somewhere, and they run to the end."""

from pathlib import Path
import re
import shutil

from clips import make_weights
from notebook_code import COLABS, code_cells, commands, read, run
import numpy as np
from PIL import Image
import pytest

from declip_jax.data.sources import open_source
from declip_jax.weights.write import write
from tools import notebooks

ROOT = COLABS.parent
REPOSITORY = notebooks.repository()
FILES = f"{REPOSITORY}/blob/main/"
TINY_DEMO = """\
from tiny import tiny_config


def get_config(method: str = "clip"):
  c = tiny_config(method)
  c.checkpoint.best_metric = "eval/heldout/top1"
  return c
"""
FRAME = ["intro", "badge", "runtime", "install-text", "install"]  # the first cells


def text_of(name: str) -> str:
  """The Markdown of a notebook."""
  return "\n\n".join("".join(cell["source"]) for cell in read(name)["cells"] if cell["cell_type"] == "markdown")


def test_all_notebooks_are_listed() -> None:
  assert sorted(notebooks.NAMES) == sorted(path.stem for path in COLABS.glob("*.ipynb"))
  table = re.findall(r"^\| \[\w+\]\(colabs/(\w+)\.ipynb\) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
  assert table == [*notebooks.NAMES]


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_notebooks_have_the_same_frame_and_no_outputs(name: str) -> None:
  notebook = read(name)
  cells = notebook["cells"]
  assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
  names = [cell["id"] for cell in cells]
  assert len({*names}) == len(names)
  assert [*names[: len(FRAME)], names[-1]] == [*FRAME, "next"]
  assert notebook == notebooks.completed(notebook, name)  # else: python tools/notebooks.py
  for cell in cells:
    assert cell["cell_type"] in ("markdown", "code")
    assert cell["source"]
    if cell["cell_type"] == "code":
      assert (cell["outputs"], cell["execution_count"]) == ([], None)
  intro, badge, runtime = ("".join(cell["source"]) for cell in cells[:3])
  assert re.match(r"# \S.*\n\n\S", intro)
  assert f"/github{REPOSITORY.removeprefix('https://github.com')}/blob/main/colabs/{name}.ipynb)" in badge
  assert re.search(r"^\*\*Runtime:\*\* .*(?s:.*)^\*\*Time:\*\* .*\bminutes?\b", runtime, re.MULTILINE)
  assert all(kind in runtime for kind in ("CPU", "GPU", "TPU"))


def test_the_address_of_the_repository_stands_in_one_place() -> None:
  assert re.fullmatch(r"https://github\.com/[\w-]+/declip_jax", REPOSITORY)
  for path in [*COLABS.glob("*.ipynb"), *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "CITATION.cff"]:
    found = {*re.findall(r"github(?:usercontent)?\.com/[\w.-]+/declip_jax", path.read_text())}
    assert found <= {REPOSITORY.removeprefix("https://")}, f"{path.name}: run python tools/notebooks.py"


def test_another_address_is_written_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Into badges, links and installation of the notebooks, and into CITATION.cff."""
  shutil.copytree(COLABS, tmp_path / "colabs")
  shutil.copy(ROOT / "CITATION.cff", tmp_path)
  changed = (ROOT / "declip_jax/__init__.py").read_text().replace(REPOSITORY, "https://github.com/someone/declip_jax")
  (tmp_path / "declip_jax").mkdir()
  (tmp_path / "declip_jax/__init__.py").write_text(changed)
  for name, path in (("ROOT", tmp_path), ("COLABS", tmp_path / "colabs"), ("_CITATION", tmp_path / "CITATION.cff")):
    monkeypatch.setattr(notebooks, name, path)
  notebooks.main()
  assert (tmp_path / "CITATION.cff").read_text().count("github.com/someone/declip_jax") == 1
  for path in [*(tmp_path / "colabs").glob("*.ipynb"), tmp_path / "CITATION.cff"]:
    assert REPOSITORY.removeprefix("https://github.com/") not in path.read_text()
  assert (tmp_path / "colabs" / "demo.ipynb").read_text().count("someone/declip_jax") > 3


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_links_lead_to_files_and_headings(name: str) -> None:
  links = re.findall(r"\]\((\S+?)\)", text_of(name))
  assert all(link.startswith("https://") for link in links)
  own = [link.removeprefix(FILES) for link in links if link.startswith(FILES)]
  assert own
  for path, _, anchor in (link.partition("#") for link in own):
    assert (ROOT / path).exists(), path
    headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.MULTILINE)
    assert not anchor or anchor in [re.sub(r"[^\w -]", "", heading).replace(" ", "-").lower() for heading in headings]


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_the_code_can_be_parsed(name: str) -> None:
  assert len([*code_cells(name)]) > 3
  for words in commands(name):
    assert words[0].startswith("declip_jax.")


@pytest.mark.parametrize("files", [(), ("nvidia0",), ("accel0",), ("vfio/0",)])
@pytest.mark.parametrize("checkout", [False, True])
def test_what_is_installed(
  files: tuple[str, ...], checkout: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
  """What the cell installs on a machine with these devices."""
  exists = {*(f"/dev/{file}" for file in files), *(["../setup.py"] if checkout else [])}
  monkeypatch.setenv("PATH", "/bin")
  monkeypatch.setattr(Path, "exists", lambda path: path.as_posix() in exists)
  called: list[list[str]] = []
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  monkeypatch.setattr("subprocess.run", lambda words, check: called.append(words))
  exec(notebooks.shared_cells("demo")["install"], {})
  extras = {"nvidia0": "train,gpu", "accel0": "train,tpu", "vfio/0": "train,tpu"}.get("".join(files), "train")
  assert [words[-1] for words in called] == [
    f"..[{extras}]" if checkout else f"declip_jax[{extras}] @ git+{REPOSITORY}"
  ]


def test_nothing_is_installed_where_the_package_is(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("PATH", "/bin")
  monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("something was installed"))
  exec(notebooks.shared_cells("demo")["install"], {})


def figures() -> int:
  """The number of figures that are drawn with pyplot."""
  import matplotlib.pyplot as plt

  return len(plt.get_fignums())


@pytest.fixture
def colabs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """A folder like colabs/ of a checkout, in which a notebook runs."""
  (tmp_path / "colabs").mkdir()
  (tmp_path / "docs").symlink_to(ROOT / "docs")
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  monkeypatch.chdir(tmp_path / "colabs")
  Path("tiny_demo.py").write_text(TINY_DEMO)


@pytest.mark.slow
@pytest.mark.usefixtures("colabs")
def test_demo_runs(monkeypatch: pytest.MonkeyPatch) -> None:
  names, shown = run("demo", {"CONFIG": "tiny_demo.py", "STEPS": 2, "BATCH": 8}, monkeypatch)
  assert shown == [f"runs/declip/{picture}.png" for picture in ("views", "curves", "retrieval")]
  assert names["results"]["step"] == names["clip"].step == 2
  assert names["similarity"].shape == (300, 30)
  assert abs(names["similarity"]).max() <= 1 + 1e-5
  assert figures() == 1
  assert sorted(path.name for path in Path().iterdir()) == ["runs", "tiny_demo.py"]  # nothing was downloaded


@pytest.mark.slow
@pytest.mark.usefixtures("colabs")
def test_own_captions_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
  names, shown = run("own_captions", {"IMAGES": 60, "TEST_IMAGES": 20, "STEPS": 2, "BATCH": 8}, monkeypatch)
  assert shown[:3] == ["samples.png", "runs/clip/curves.png", "runs/clip/retrieval.png"]
  assert shown[3].count("data:image/png;base64,") >= 3
  assert names["images"].shape[0] == 20
  assert figures() == 1
  assert abs(names["exported"].encode_image(names["paths"]) - names["images"]).max() < 1e-5
  printed = capsys.readouterr().out
  for text in ("samples      60", "image_to_text_r10", "open_clip_config.json"):
    assert text in printed


@pytest.mark.slow
@pytest.mark.usefixtures("colabs")
def test_methods_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
  constants = {"CONFIG": "tiny_demo.py", "PAIRS": 64, "STEPS": 2, "BATCH": 8, "NAMES": ("clip", "declip")}
  names, shown = run("methods", constants, monkeypatch)
  assert shown == ["runs/methods/declip/views.png"]
  assert [*names["scores"]] == ["clip", "declip"]
  assert re.search(r"^declip +\d+\.\d% ± \d\.\d% ", capsys.readouterr().out, re.MULTILINE)
  panels = names["figure"].axes
  assert [len(axes.lines) for axes in panels] == [3, 3, 2]  # with chance
  assert [[*line.get_xdata()] for line in panels[0].lines[:2]] == [[8, 16]] * 2


@pytest.mark.slow
@pytest.mark.usefixtures("colabs")
def test_evaluate_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
  constants = {"CONFIG": "tiny_demo.py", "STEPS": 2, "BATCH": 8, "TEST_IMAGES": 60, "TRAIN_IMAGES": 140}
  names, shown = run("evaluate", constants, monkeypatch)
  kinds = [("own/seen", "knn"), ("own/seen", "zero_shot"), ("own/unseen", "zero_shot")]
  assert sorted(names["results"]) == [(method, *kind) for method in ("clip", "slip") for kind in kinds]
  result = names["results"]["slip", "own/unseen", "zero_shot"]
  assert result["metrics"]["top1"] == pytest.approx((names["by_slip"] == names["label"]).mean())
  assert names["count"] == 60
  assert shown[0] == "report/pictures/zero_shot_slip_minus_clip.png"
  assert figures() == 1
  assert Path("report/report.md").is_file()
  assert "McNemar's exact test: p = " in (printed := capsys.readouterr().out)
  assert "slip26" in printed


@pytest.mark.slow
@pytest.mark.usefixtures("colabs")
def test_released_weights_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
  """With small random weights in the format of transformers, and scenes in place of photos."""
  write(make_weights(0), tmp_path / "weights", "huggingface")
  source = open_source("scenes:train/40/24")
  for index in range(len(source)):
    path = tmp_path / "photos" / ("n01440764", "n03028079")[index % 2] / f"{index}.JPEG"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(source[index]["image"]).save(path)
  constants = {"WEIGHTS": f"{tmp_path}/weights", "PHOTOS": f"{tmp_path}/photos", "COUNT": 20}
  names, _ = run("released_weights", constants, monkeypatch)
  assert names["clip"].origin == "Hugging Face"
  assert len(names["paths"]) == 20
  assert {*names["labels"]} == {0, 4}
  np.testing.assert_allclose(names["probability"].sum(axis=1), 1, rtol=1e-5)
  assert figures() == 4


@pytest.mark.slow
@pytest.mark.usefixtures("colabs")
def test_plan_pod_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
  """For eight devices of the CPU, without libtpu."""
  choices = {"fsdp=4": {"mesh.fsdp": 4}}
  constants = {"TOPOLOGY": "", "CONFIG": f"{ROOT}/tests/tiny.py:clip", "BATCH": 16, "CHOICES": choices}
  names, _ = run("plan_pod", constants, monkeypatch)
  assert names["reports"]["fsdp=4"]["mesh"] == {"data": 2, "fsdp": 4}
  assert "memory on each device" in capsys.readouterr().out
  assert figures() == 1


@pytest.mark.slow
@pytest.mark.usefixtures("colabs")
def test_data_efficiency_makes_its_data_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
  datasets = pytest.importorskip("datasets")
  rng = np.random.default_rng(0)
  products = [
    {
      "articleType": ("Shoes", "Hats", "Rare")[index % 2 if index else 2],
      "productDisplayName": f"Title {index}" if index else None,
      "image": Image.fromarray(rng.integers(0, 256, (24, 18, 3), np.uint8)),
    }
    for index in range(200)
  ]
  monkeypatch.setattr(datasets, "load_dataset", lambda name, split: products)
  names, _ = run("data_efficiency", {"STEPS": 2, "BATCH": 8}, monkeypatch)
  assert Path("data/fashion44k/classnames.txt").read_text() == "Hats\nShoes"
  assert [*names["scores"]] == [("clip", 100), ("clip", 10), ("declip", 10)]
  assert all(0 <= found[metric] <= 1 for found in names["scores"].values() for metric in names["METRICS"].values())
  assert names["committed"]
  assert figures() == 1


@pytest.mark.slow
@pytest.mark.timeout(600)  # three trainings
@pytest.mark.usefixtures("colabs")
def test_finetune_pairs_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
  constants = {"IMAGES": 60, "TEST_IMAGES": 20, "STEPS": 2, "TUNING": 2, "BATCH": 8}
  constants |= {"PRETRAINING": "scenes:train/60/48", "BEFORE": "scenes:test/20/48"}
  names, _ = run("finetune_pairs", constants, monkeypatch)
  assert {*names["scores"]} == {(kind, way) for kind in ("retrieval", "before") for way in ("full", "lora")}
  for kind in ("retrieval", "before"):  # both start from the same weights
    assert names["scores"][kind, "full"][0] == pytest.approx(names["scores"][kind, "lora"][0], abs=1e-6)
  assert names["cosines"].shape == (3, 20)
  assert figures() == 2
  difference = abs(names["exported"].encode_text(["Stern"]) - names["clip"].encode_text(["Stern"])).max()
  assert difference < 1e-5
