"""`python -m declip_jax.new`: the file that it writes is the config `pretrain`, and its comments are legal."""

from pathlib import Path
import re

from absl import flags
import pytest

from declip_jax import config_files, new
from declip_jax.planning import choose


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
  """The path of a table, which an empty folder has."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "pairs.csv").write_text('image,caption\na.jpg,"a"\n')
  return "pairs.csv"


def test_the_file_is_the_config_pretrain(table: str, tmp_path: Path) -> None:
  for number, data in enumerate((table, 'a "b", c\\d.csv', "table:x.csv?root={y}")):
    path = tmp_path / f"config_{number}.py"
    path.write_text(new.template(path, "slip_repo", "RN50", data))
    expected = config_files.load_module("pretrain").get_config("slip_repo", "RN50", data)
    assert config_files.load(str(path)).to_dict() == expected.to_dict()
  assert config_files.load(f"{path}:method=clip").objective.simclr.weight == 0


def test_every_comment_can_be_uncommented(table: str, tmp_path: Path) -> None:
  path = tmp_path / "uncommented.py"
  text, count = re.subn(r"^  # (?=c\.)", "  ", new.template(path, "declip", "ViT-B/32", table), flags=re.MULTILINE)
  assert count >= 8
  path.write_text(text)
  c = config_files.load(str(path))
  assert c.data.train == (f"table:{table}",)
  assert {*c.evals} == {"retrieval", "test", "classes"}
  assert choose.open_fields(c) == ["model.heads.bank_size"]
  assert all(str(value) in text for value in (c.batch_size, c.optimizer.weight_decay, c.init_from.path))


@pytest.mark.parametrize(
  ("method", "architecture"), [("declip_repo", "ViT-B/32"), ("simclr", "ViT-Nano/8@32px"), ("clip", "RN50")]
)
def test_the_comments_have_the_values_of_the_config(method: str, architecture: str, table: str, tmp_path: Path) -> None:
  path = tmp_path / "values.py"
  text = new.template(path, method, architecture, table)
  path.write_text(text)
  before = config_files.load(str(path))
  path.write_text(re.sub(r"^  # (?=c\.optimizer)", "  ", text, flags=re.MULTILINE))
  assert config_files.load(str(path)).optimizer.to_dict() == before.optimizer.to_dict()
  assert ("c.evals.retrieval" in text) == (method != "simclr")


def test_a_file_is_never_replaced(table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  values = flags.FlagValues()
  for name, value in {"data": table, "method": "clip", "architecture": "RN50"}.items():
    flags.DEFINE_string(name, value, "", flag_values=values)
  values.mark_as_parsed()
  monkeypatch.setattr(new.flags, "FLAGS", values)
  path = tmp_path / "configs" / "mine.py"
  new._command([str(path)])
  before = path.read_bytes()
  values.method = "slip"
  with pytest.raises(ValueError, match=r"mine\.py"):
    new._command([str(path)])
  assert path.read_bytes() == before
  with pytest.raises(ValueError, match=r"mine\.yaml"):
    new._command(["mine.yaml"])
  values.data = "missing.xyz"
  with pytest.raises(FileNotFoundError, match=r"missing\.xyz"):
    new._command(["other.py"])
  assert not Path("other.py").exists()
