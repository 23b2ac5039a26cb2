"""Finding a config by name or path, and the arguments of its `get_config`."""

import json
from pathlib import Path

from ml_collections import ConfigDict
import pytest

from declip_jax import config, config_files
from declip_jax.configs import to_source

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """An empty working directory."""
  monkeypatch.chdir(tmp_path)
  return tmp_path


def write(path: Path, body: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("from ml_collections import ConfigDict\nfrom declip_jax import config\n\n" + body)


@pytest.mark.parametrize(
  "name", ["slip/slip_mim", "slip/slip_mim.py", "configs/slip/slip_mim", "./configs/slip/slip_mim.py"]
)
@pytest.mark.parametrize("place", ["empty folder", "checkout"])
def test_a_name_is_found_from_any_folder(name: str, place: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  if place == "checkout":
    monkeypatch.chdir(ROOT)
  assert config_files.find(name).resolve() == ROOT / "configs/slip/slip_mim.py"
  assert config_files.load_module(name).__name__ == "declip_jax.configs.slip.slip_mim"


def test_every_config_is_listed_and_no_recipe() -> None:
  names = config_files.names()
  assert {"demo", "pretrain", "slip/slip_base_25ep", "clip_wit/rn50"} <= set(names)
  assert not [name for name in names if name.endswith(("recipe", "__init__"))]


@pytest.mark.parametrize("name", ["demo.py", "./demo", "./demo.py", "configs/demo.py", "mine"])
def test_the_path_of_a_users_file_takes_precedence(name: str, folder: Path) -> None:
  write(folder / f"{name.removesuffix('.py')}.py", "def get_config():\n  return ConfigDict({'mine': 1})\n")
  assert config_files.load(name).to_dict() == {"mine": 1}


@pytest.mark.parametrize("name", ["demo", "configs/demo", "slip/slip_mim"])
def test_a_users_file_does_not_replace_a_config_of_that_name(name: str, folder: Path) -> None:
  write(folder / f"{name}.py", "raise RuntimeError('executed')\n")
  assert config_files.find(name).is_relative_to(ROOT)


def test_a_users_file_imports_its_neighbours_and_our_recipes(folder: Path) -> None:
  (folder / "some/where").mkdir(parents=True)
  (folder / "some/where/my_neighbour.py").write_text("WIDTH = 7\n")
  body = "import my_neighbour\nfrom declip_jax.configs.slip import recipe\n\n\n"
  body += "def get_config():\n  return ConfigDict({'width': my_neighbour.WIDTH, 'first': recipe.TEMPLATES[0]})\n"
  write(folder / "some/where/mine.py", body)
  assert config_files.load("some/where/mine.py").to_dict() == {"width": 7, "first": "itap of a {}."}


@pytest.mark.parametrize(
  ("name", "named"),
  [
    ("slip/slip_base_25", ["slip/slip_base_25ep"]),
    ("slip_base_25ep", ["slip/slip_base_25ep"]),
    ("configs/demi.py", ["demo"]),
    ("slip", ["slip/clip_base_25ep", "slip/slip_mim"]),
    ("slip/", ["slip/slip_mim"]),
    ("own", ["own/mine.py"]),
    ("own/mein.py", ["own/mine"]),
    ("nothing like this", ["python -m declip_jax"]),
  ],
)
def test_a_missing_config_is_an_error_that_lists_close_ones(name: str, named: list[str], folder: Path) -> None:
  write(folder / "own/mine.py", "def get_config():\n  return ConfigDict()\n")
  with pytest.raises(ValueError, match=name) as raised:
    config_files.load(name)
  assert all(word in str(raised.value) for word in named)
  assert "recipe" not in str(raised.value)


FIELD = "def get_config():\n  c = config.default()\n  {} = 3\n"
ECHO = "def get_config(method='clip', data='data/train', steps=3):\n"
ECHO += "  return ConfigDict({'method': method, 'data': data, 'steps': steps})\n"


@pytest.mark.parametrize(
  ("arguments", "changed"),
  [
    ("", {}),
    (":", {}),
    (":method=slip", {"method": "slip"}),
    (":data=/d,method=slip", {"method": "slip", "data": "/d"}),
    (":slip", {"method": "slip"}),
    (":slip,/d", {"method": "slip", "data": "/d"}),
    (":,/d", {"data": "/d"}),
    (":slip,data=/d", {"method": "slip", "data": "/d"}),
    (":data=webdataset:/d/{a,b}-*.tar,steps=4", {"data": "webdataset:/d/{a,b}-*.tar", "steps": 4}),
    (":data=table:/d.csv?image=a&caption=b", {"data": "table:/d.csv?image=a&caption=b"}),
  ],
)
def test_arguments_are_given_by_name_or_by_position(arguments: str, changed: dict[str, object], folder: Path) -> None:
  write(folder / "echo.py", ECHO)
  expected = {"method": "clip", "data": "data/train", "steps": 3} | changed
  assert config_files.load(f"echo{arguments}").to_dict() == expected


@pytest.mark.parametrize(
  ("arguments", "named"),
  [
    ("mehtod=slip", ["'mehtod'", "did you mean method?", "takes method, data, steps"]),
    ("slip,/d,3,4", ["'4'", "takes method, data, steps"]),
    ("slip,method=clip", ["'method'", "twice"]),
    ("steps=many", ["steps=many", "int"]),
  ],
)
def test_a_wrong_argument_is_an_error_that_lists_the_names(arguments: str, named: list[str], folder: Path) -> None:
  write(folder / "echo.py", ECHO)
  with pytest.raises(ValueError, match=named[0]) as raised:
    config_files.load(f"echo:{arguments}")
  assert all(word in str(raised.value) for word in named)


def test_a_function_with_one_arg_gets_the_whole_text(folder: Path) -> None:
  write(folder / "whole.py", "def get_config(arg=''):\n  return ConfigDict({'arg': arg})\n")
  assert config_files.load("whole:a=1,b").arg == "a=1,b"
  assert config_files.load("whole").arg == ""


@pytest.mark.parametrize(
  ("body", "named"),
  [
    ("def get_config():\n  return 1 / 0\n", ["line 5", "ZeroDivisionError"]),
    (FIELD.format("c.bath_size"), ["line 6", "'bath_size'", "mean batch_size"]),
    (
      "def get_config():\n  c = config.default()\n  c.optimizer.lerning_rate = 3\n",
      ["line 6", "optimizer.learning_rate"],
    ),
    (
      "def get_config():\n  c = config.default()\n  c.weights.clip = 3\n",
      ["line 6", "'weights'", "objective.TERM.weight"],
    ),
    (FIELD.format("c.divergence.spike"), ["line 6", "safety.spike_factor"]),
    ("import nothing_like_this\n", ["line 4", "nothing_like_this"]),
    ("def get_config(:\n", ["line 4", "SyntaxError"]),
    ("def get_config():\n  return 3\n", ["returned int"]),
    ("x = 3\n", ["get_config"]),
  ],
)
def test_an_error_inside_a_file_names_the_file_and_the_line(body: str, named: list[str], folder: Path) -> None:
  write(folder / "broken.py", body)
  with pytest.raises(ValueError, match="broken") as raised:
    config_files.load("broken")
  assert all(word in str(raised.value) for word in named)
  assert "\n" not in str(raised.value)
  assert len(str(raised.value)) < 300


def test_the_result_is_a_config_whose_fields_can_be_added() -> None:
  c = config_files.load("demo:clip")
  assert isinstance(c, ConfigDict)
  c.evals.more = {"kind": "zero_shot"}


def test_the_config_of_a_run_is_a_config(folder: Path) -> None:
  made = config.default("declip", "RN50")
  made.evals.mine, made.data.workers, made.batch_size = config.zero_shot("scenes:test", ("{}",)), 3, 64
  saved = json.loads(made.to_json_best_effort())
  del saved["safety"], saved["stages"]  # as an older version would
  (folder / "run").mkdir()
  (folder / "run/config.json").write_text(json.dumps(saved))
  found = config_files.load("run/config.json")
  assert found.to_dict() == made.to_dict()
  assert found.is_locked
  found.data.workers = None
  found.evals.more = config.retrieval("scenes:test")
  found.stages.low = config.stage(image_size=112)
  again = config.changeable(config.from_json(found.to_json_best_effort()))
  assert again.stages.to_dict() == found.stages.to_dict()
  again.stages.low.batch_size = 32
  with pytest.raises(TypeError):
    again.stages.low.batch_size = "many"


@pytest.mark.parametrize(
  ("name", "text", "named"),
  [
    ("run/config.json", "", ["run/config.json", "Expecting value"]),
    ("run/config.json", "[]", ["run/config.json"]),
    ("run/config.json", '{"bath_size": 3}', ["run/config.json", "'bath_size'"]),
    ("run/config.json", '{"objective": {"mine": {"loss": "f"}}}', ["objective.mine", "config file"]),
    ("run/config.json:clip", "{}", ["'clip'", "no arguments"]),
    ("run", "{}", ["run is a folder; its config is run/config.json"]),
  ],
)
def test_a_config_of_a_run_that_cannot_be_used_is_named(name: str, text: str, named: list[str], folder: Path) -> None:
  (folder / "run").mkdir()
  (folder / "run/config.json").write_text(text)
  with pytest.raises(ValueError, match="run") as raised:
    config_files.load(name)
  assert all(word in str(raised.value) for word in named)


def test_data_with_options_are_read_as_the_file_or_folder_before_them(tmp_path: Path) -> None:
  (tmp_path / "pairs.csv").write_text("image,caption\na.jpg,a cat\n")
  (tmp_path / "shards").mkdir()
  (tmp_path / "shards" / "0.tar").touch()
  pairs, shards = tmp_path / "pairs.csv", tmp_path / "shards"
  assert to_source(f"{pairs}?root=/images/all") == f"table:{pairs}?root=/images/all"
  assert to_source(f"{shards}?caption=title") == f"webdataset:{shards}/*.tar?caption=title"
  assert to_source("/elsewhere/shards") == "webdataset:/elsewhere/shards/*.tar"
