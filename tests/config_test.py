"""Configs: durations, methods, unknown fields. `configs_test.py` builds every file under configs/."""

from pathlib import Path

from absl import flags
from ml_collections import config_flags
import pytest

from declip_jax import config, run

DEMO = Path(__file__).resolve().parent.parent / "configs" / "demo.py"


@pytest.mark.parametrize("method", config.METHODS)
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
def test_a_wrong_flag_is_told_in_a_line(
  argument: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  defined = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=defined)
  monkeypatch.setattr(flags, "FLAGS", defined)
  command = ["train", f"--config={DEMO}", argument]
  monkeypatch.setattr("sys.argv", command)  # where config_flags looks for fields
  with pytest.raises(SystemExit):
    run.parse_flags(command)
  said = capsys.readouterr().err
  assert said.startswith("error: ")
  assert message in said
  assert said.count("\n") == 1
