"""Configs: durations, methods, unknown fields. `configs_test.py` builds every file under configs/."""

from collections.abc import Callable
import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags
import pytest
from tiny import tiny_config

from declip_jax import config
from declip_jax.methods import METHODS
from declip_jax.runtime import command as command_lib

OLD = Path(__file__).parent / "fixtures" / "config_6279b88.json"
DEMO = Path(__file__).resolve().parent.parent / "configs" / "demo.py"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
  """What a command line that is refused says, which is one line."""

  def parse(*arguments: str) -> str:
    defined = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=defined)
    monkeypatch.setattr(flags, "FLAGS", defined)
    command = ["train", *arguments]
    monkeypatch.setattr("sys.argv", command)  # where config_flags looks for fields
    with pytest.raises(SystemExit):
      command_lib.parse_flags(command)
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message

  return parse


@pytest.mark.parametrize("method", METHODS)
def test_unknown_field_is_refused(method: str) -> None:
  with pytest.raises(AttributeError, match="bath_size"):
    config.default(method).bath_size = 3
  with pytest.raises(ValueError, match=r"method 'blip', preset 'paper': choose one of \['clip', 'clip_color', "):
    config.default("blip")
  with pytest.raises(ValueError, match=r"method 'siglip', preset 'repo': choose one of \['clip', 'declip', "):
    config.default("siglip", preset="repo")
  with pytest.raises(ValueError, match=r"preset 'papers': choose one of \['paper', 'repo'\]"):
    config.default("clip", preset="papers")


@pytest.mark.parametrize(
  ("length", "steps"), [({"steps": 7}, 7), ({"epochs": 1.5}, 15), ({"examples": 101}, 11), ({"epochs": 0}, 0)]
)
def test_durations_become_steps(length: dict, steps: int) -> None:
  got = config.steps_of(config.duration(**length), name="duration", batch_size=10, epoch_examples=100)
  assert got == steps


@pytest.mark.parametrize("length", [{"steps": 7, "epochs": 1}, {"examples": -1}])
def test_ambiguous_duration_is_refused(length: dict) -> None:
  with pytest.raises(ValueError, match="config.duration=.*set one of steps, epochs, examples"):
    config.steps_of(config.duration(**length), name="duration", batch_size=10, epoch_examples=100)


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--config.batch_sise=3", """no field 'batch_sise'. Did you mean "batch_size" instead of "batch_sise"?"""),
    ("--config.modle.dtype=float32", """no field 'modle'. Did you mean "model" instead of "modle"?"""),
    ("--config.model.image.heads=3", "the config has no field 'heads'"),
    ("--config.batch_size=many", "flag --config.batch_size=many: invalid literal for int() with base 10: 'many'"),
  ],
)
def test_a_wrong_flag_is_told_in_a_line(argument: str, message: str, said: Callable[..., str]) -> None:
  assert message in said(f"--config={DEMO}", argument)


@pytest.mark.parametrize(
  ("path", "offered"),
  [
    ("slip.py", ("demo.py", "slip/")),
    ("slip/blip.py", ("clip_base_25ep.py", "slip_mim.py")),
    ("slip", ("clip_base_25ep.py", "slip_mim.py")),
  ],
)
def test_a_config_that_is_not_there_is_told_with_those_that_are(
  path: str, offered: tuple[str, ...], said: Callable[..., str]
) -> None:
  message = said(f"--config={DEMO.parent / path}")
  assert f"--config={DEMO.parent / path} is no file; " in message
  listed = message.split(" has ")[1].strip().split(", ")
  assert set(offered) <= set(listed)
  assert not {"recipe.py", "__init__.py", "__pycache__/"} & set(listed)


def test_a_row_told_from_another_folder_says_where_to_be(said: Callable[..., str], tmp_path: Path) -> None:
  row = tmp_path / "row.py"
  row.write_text("raise ModuleNotFoundError(\"No module named 'configs'\", name='configs')")
  assert "run the command in the folder that holds it" in said(f"--config={row}")


def test_a_config_of_the_first_release_loads_under_the_names_of_today() -> None:
  """The file is what 6279b88 wrote for tiny_config("declip")."""
  old = json.loads(OLD.read_text())
  old["weight_schedule"]["nns"] = [[0, 0.0], [5, 1.0]]
  old["momentum"], old["contrast"]["form"] = 0.5, "ring"
  found = config.from_json(json.dumps(old))
  expected = tiny_config("declip")
  expected.objective.nns.schedule = ((0, 0.0), (5, 1.0))
  expected.momentum_tower.decay, expected.contrast.method = 0.5, "ring"
  assert found.to_dict() == expected.to_dict()
  assert config.from_json(found.to_json_best_effort()).to_dict() == found.to_dict()


@pytest.mark.parametrize("field", ["batch_sise", "optimizer.wamrup", "model.text.eto"])
def test_an_unknown_field_of_a_config_file_is_named(field: str) -> None:
  saved = tiny_config("clip").to_dict()
  *above, last = field.split(".")
  node = saved
  for name in above:
    node = node.setdefault(name, {})
  node[last] = 3
  with pytest.raises(ValueError, match="config.json has unknown fields") as error:
    config.from_json(json.dumps(saved))
  assert repr(field) in str(error.value)
