"""What every command line has in common: help, `--print_config`, and wrong flags in one line."""

import ast
from collections.abc import Callable
import json
import os
from pathlib import Path
import subprocess
import sys

from absl import flags
import pytest

from declip_jax import ADDRESS, command_line, config, config_files
from declip_jax.__main__ import COMMANDS
from declip_jax.architectures import ARCHITECTURES
from declip_jax.methods import NAMES

Parse = Callable[..., tuple[int, str, str]]


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> flags.FlagValues:
  """The flags of a command, in an empty folder."""
  monkeypatch.chdir(tmp_path)
  defined = flags.FlagValues()
  command_line.define_config(defined)
  flags.DEFINE_string("workdir", None, "Directory of the run.", flag_values=defined)
  flags.DEFINE_enum("format", "a", ["a", "b"], "What to write.", flag_values=defined)
  flags.DEFINE_float("share", None, "A share.", 0, 1, flag_values=defined)
  return defined


@pytest.fixture
def parse(values: flags.FlagValues, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Parse:
  """Parses a command line that exits; returns its exit code, output and errors."""

  def call(*arguments: str) -> tuple[int, str, str]:
    command = ["train", *arguments]
    monkeypatch.setattr("sys.argv", command)  # config_flags reads fields from it
    with pytest.raises(SystemExit) as stopped:
      command_line.parse_flags(command, required=("config", "workdir"), values=values)
    captured = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, captured.out, captured.err

  return call


@pytest.mark.parametrize(
  ("arguments", "named"),
  [
    (["--config=demo", "--config.batch_sise=3"], ["'batch_sise'", "did you mean batch_size"]),
    (["--config=demo", "--config.modle.dtype=float32"], ["'modle.dtype'", "model.dtype"]),
    (["--config=demo", "--config.learning_rate=3"], ["'learning_rate'", "did you mean optimizer.learning_rate?"]),
    (["--config=demo", "--config.hang_timeout=3"], ["'hang_timeout'", "hang_timeout is now safety.hang_timeout"]),
    (["--config=demo", "--config.weights.nns=0"], ["'weights.nns'", "objective.nns.weight"]),
    (["--config=demo", "--config.terms.nns.warmup=0"], ["'terms.nns.warmup'", "objective"]),
    (["--config=demo", "--config.optimizer.end=0"], ["'optimizer.end'", "is now optimizer.end_learning_rate"]),
    (["--config=demo", "--config.model.image.heads=3"], ["'model.image.heads'", "model.text.heads"]),
    (["--config=demo", "--noconfig.nesterov"], ["'nesterov'", "optimizer.nesterov"]),
    (["--config=demo", "--config.optimizer.nesterov=yes"], ["nesterov=yes", "true or false"]),
    (["--config=demo", "--config.batch-size=3"], ["'batch-size'", "did you mean batch_size"]),
    (["--config=demo", "--config.data.train[0]=scenes:test"], ["config.data.train[0]", "whole tuple"]),
    (["--config=demo", "--config.seed=None"], ["config.seed cannot be None"]),
    (["--config=demo", "--config.evals="], ["--config.evals=: expected fields in braces"]),
    (
      ["--config=demo", "--config.stages.a.duration.steps=3", "--config.stages.a.imagesize=3"],
      ["'stages.a.imagesize'", "did you mean stages.a.image_size"],
    ),
    (
      ["--config=demo", "--config.stages.a.image_size=3"],
      ["stages.a.image_size", "--config.stages.a.duration.share="],
    ),
    (["--config=demo", "--config.evals.mine.kind=zeroshot"], ["config.evals.mine.kind", "did you mean zero_shot?"]),
    (
      ["--config=demo", "--config.evals.mine.data=x"],
      ["evals.mine.data", "--config.evals.mine.kind=", "|retrieval|", "|zero_shot adds"],
    ),
    (["--config=demo", "--config.batch_size=many"], ["--config.batch_size=many", "not an integer"]),
    (["--config=demo", "--config.optimizer.learning_rate=high"], ["learning_rate=high", "not a number"]),
    (["--config=demo", "--workdir=x", "--share=nan"], ["error: --share=nan: expected a finite number\n"]),
    (["--config=demo", "--workdir=x", "--share=1.5"], ["--share=1.5", "[0, 1]"]),
    (
      ["--config=demo", "--config.optimizer.learning_rate=inf"],
      ["--config.optimizer.learning_rate=inf: expected a fin"],
    ),
    (["--config=demo", "--config.optimizer=adam"], ["config.optimizer", "'adam'", "learning_rate"]),
    (["--config=demo:method=slpi"], ["--config=demo:method=slpi", "'slpi'", "'slip'"]),
    (["--config=demo:mehtod=slip"], ["'mehtod'", "did you mean method"]),
    (["--config=demmo", "--workdir=x"], ["--config=demmo", "demo"]),
    (["--config=demo", "--wrkdir=x"], ["error: there is no flag --wrkdir; did you mean --workdir?\n"]),
    (["--config=demo", "--batch_size=32"], ["no flag --batch_size; did you mean --config.batch_size?\n"]),
    (
      ["--config=demo", "--config.batch_siz=3"],
      ["error: the config has no field 'batch_siz'; did you mean batch_size?\n"],
    ),
    (["--config=demo", "--workdir=x", "--format=c"], ["--format=c", "a|b"]),
    (["--config=demo", "--workdir=x", "more"], ["'more'"]),
    (["--config=demo"], ["--workdir is required"]),
    (["--workdir=x", "--config.batch_size=3"], ["--config is required"]),
    ([], ["--config is required"]),
  ],
)
def test_a_wrong_command_line_is_one_line_with_a_suggestion(
  arguments: list[str], named: list[str], parse: Parse
) -> None:
  code, printed, error = parse(*arguments)
  assert (code, printed) == (2, "")
  assert error.startswith("error: ")
  assert error.count("\n") == 1
  assert all(word in error for word in named), error


def test_print_config_prints_what_would_train(parse: Parse) -> None:
  overrides = ["--config.optimizer.learning_rate=0.25", "--config.data.train=('scenes:test',)"]
  code, printed, error = parse("--config=slip/slip_base_25ep:data=/d", *overrides, "--print_config")
  expected = config_files.load("slip/slip_base_25ep:data=/d")
  expected.optimizer.learning_rate, expected.data.train = 0.25, ("scenes:test",)
  assert (code, error) == (0, "")
  assert json.loads(printed) == json.loads(expected.to_json_best_effort())


def test_a_stage_can_be_added(parse: Parse) -> None:
  low = ["--config.stages.low.duration.epochs=2", "--config.stages.low.image_size=16"]
  code, printed, error = parse("--config=demo", *low, "--config.stages.low.learning_rate=1e-3", "--print_config")
  assert (code, error) == (0, "")
  expected = config.stage(duration=config.duration(epochs=2), image_size=16, learning_rate=1e-3)
  assert json.loads(printed)["stages"] == {"low": expected.to_dict()}
  code, printed, error = parse("--config=demo", "--config.stages.low.duration.share=0.5", "--print_config")
  assert (code, json.loads(printed)["stages"]["low"]["duration"]["share"]) == (0, 0.5)


def test_an_evaluation_can_be_added(parse: Parse) -> None:
  mine = ["--config.evals.mine.data=scenes:test", "--config.evals.mine.kind=zero_shot"]
  code, printed, error = parse("--config=demo", *mine, "--config.evals.mine.templates=('{}',)", "--print_config")
  assert (code, error) == (0, "")
  evals = json.loads(printed)["evals"]
  assert evals.pop("mine") == {"kind": "zero_shot", "data": "scenes:test", "templates": ["{}"], "suite": "", "every": 1}
  assert evals == json.loads(config_files.load("demo").to_json_best_effort())["evals"]


@pytest.mark.parametrize(("given", "set_to"), [(("2", "None"), None), (("None", "2"), 2), (("None",), None)])
def test_a_field_that_may_be_none_can_be_set_back(given: tuple[str, ...], set_to: int | None, parse: Parse) -> None:
  texts = [f"--config.data.workers={value}" for value in given]
  code, printed, error = parse("--config=demo", *texts, "--config.data.blur_radius=None", "--print_config")
  assert (code, error) == (0, "")
  assert json.loads(printed)["data"]["workers"] == set_to
  assert json.loads(printed)["data"]["blur_radius"] is None


def test_print_config_needs_no_data(parse: Parse) -> None:
  code, printed, error = parse("--config=pretrain:data=/nowhere/pairs.csv", "--print_config")
  assert (code, error) == (0, "")
  assert json.loads(printed)["data"]["train"] == ["kept:10%,5000:table:/nowhere/pairs.csv"]


def test_a_missing_file_of_an_unknown_kind_is_named(parse: Parse) -> None:
  code, printed, error = parse("--config=pretrain:data=/nowhere/pairs.json", "--print_config")
  assert (code, printed) == (2, "")
  assert "pairs.json: " in error
  assert "/nowhere" in error
  assert "FileNotFoundError" not in error


def test_parsed_flags_are_the_config_and_the_positional_arguments(
  values: flags.FlagValues, monkeypatch: pytest.MonkeyPatch
) -> None:
  command = ["convert", "--config", "demo:clip", "first", "--config.seed=3", "second"]
  monkeypatch.setattr("sys.argv", command)
  assert command_line.parse_flags(command, positional=("FROM", "TO"), values=values) == ["first", "second"]
  assert values.config.seed == 3
  assert values.config.is_locked


def test_help_shows_the_doc_and_the_flags(values: flags.FlagValues, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr("sys.argv", [__name__])  # the command is the module that defines flags
  text = "\n".join(command_line.help_text("Does it.\n", values))
  assert text.startswith("Does it.\n\nconfigs, for --config=NAME:\n")
  assert "\n\nflags:\n  --config=NAME" in text
  assert "  --format=a|b\n      What to write. (default: a)\n" in text
  assert "--[no]print_config\n" in text
  assert "--config.FIELD=VALUE" in text


def test_help_lists_what_a_config_can_name_and_where_its_fields_are_explained() -> None:
  done = _listing("declip_jax.train", "--help")
  for names in (config_files.names(), NAMES, ARCHITECTURES):
    assert not {*names} - _names(done)
  fields = done[done.index("fields of a config") :]
  assert all(text in fields for text in ("--print_config", "python -m declip_jax.new", f"{ADDRESS}/blob/main/docs/api"))
  assert "python -m declip_jax lists all commands" in done
  assert max(map(len, done.splitlines())) <= 120


def test_the_list_of_all_commands_has_methods_and_architectures_and_imports_no_jax() -> None:
  code = "import runpy, sys; runpy.run_module('declip_jax', run_name='__main__'); sys.exit('jax' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
  assert not {*NAMES, *ARCHITECTURES} - _names(done.stdout)


def _listing(module: str, flag: str) -> str:
  command = [sys.executable, "-m", module, flag]
  return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def _names(listing: str) -> set[str]:
  """The names in lists with commas, over lines that begin with two spaces."""
  return {name for line in listing.splitlines() for name in line.strip().rstrip(",").split(", ")}


@pytest.mark.parametrize(
  ("error", "code"),
  [(ValueError("x"), 2), (FileNotFoundError("x"), 2), (OSError(5, "x"), 74), (TimeoutError("x"), 74)],
)
def test_exit_codes_distinguish_a_users_error_from_a_disk_that_failed(
  error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
  assert command_line.report(error) == code
  assert capsys.readouterr().err == f"error: {error}\n"
  command_line.report(ValueError("two\n  lines"))
  assert capsys.readouterr().err == "error: two lines\n"


def _run(code: str, *arguments: str, closed: bool = False) -> tuple[int, str]:
  """Runs Python, with `closed` into a pipe without a reader; returns the exit code and the errors."""
  read, write = os.pipe()
  if closed:
    os.close(read)
  command = [sys.executable, "-c", code, *arguments]
  done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
  os.close(write)
  if not closed:
    os.close(read)
  return done.returncode, done.stderr


def test_ctrl_c_is_one_word_and_exit_code_130() -> None:
  ours = "import signal; signal.signal(2, signal.default_int_handler)"  # shells ignore Ctrl-C in the background
  interrupt = "from declip_jax import command_line as c; c.run(lambda _: signal.raise_signal(2), '')"
  assert _run(f"{ours}; {interrupt}") == (130, "interrupted\n")


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_output_that_nobody_reads_ends_a_command_quietly(arguments: list[str]) -> None:
  code = "from declip_jax import command_line; command_line.run(lambda _: print('x' * 100000), 'Prints.')"
  assert _run(code, *arguments, closed=True) == (141, "")


def test_a_default_of_several_values_is_shown_as_it_is_typed(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr("sys.argv", [__name__])
  values = flags.FlagValues()
  flags.DEFINE_multi_string("prompt", ["a {}.", "{}"], "Prompts.", flag_values=values)
  flags.DEFINE_multi_string("setting", [], "Settings.", flag_values=values)
  lines = command_line.help_text("", values)
  assert '      Prompts. (default: "a {}.", {})' in lines
  assert "      Settings." in lines


def test_the_list_of_commands_matches_the_installed_scripts() -> None:
  setup = ast.parse((Path(__file__).parents[1] / "setup.py").read_text())
  assigned = {ast.unparse(node.targets[0]): node.value for node in setup.body if isinstance(node, ast.Assign)}
  scripts = {module.split(".")[-1]: f"declip_jax.{module}" for module in ast.literal_eval(assigned["_COMMANDS"])}
  assert scripts == {name: module for name, (module, _) in COMMANDS.items()}


@pytest.mark.parametrize(
  ("arguments", "meant"),
  [(["declip_jax", "tarin"], "declip_jax.train"), (["declip_jax.inspect"], "declip_jax.data.inspect")],
)
def test_a_command_at_another_place_is_suggested(arguments: list[str], meant: str) -> None:
  command = [sys.executable, "-m", *arguments]
  done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.endswith(f"; did you mean python -m {meant}?\n")


def test_every_number_that_a_command_takes_has_a_lower_bound() -> None:
  """Negative numbers are then errors of the flag; numbers that are not finite are so for all flags."""
  found = 0
  for path in Path(command_line.__file__).parent.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and ast.unparse(node.func) in ("flags.DEFINE_integer", "flags.DEFINE_float"):
        names = {keyword.arg for keyword in node.keywords}
        assert len(node.args) > 3 or "lower_bound" in names, ast.unparse(node)
        found += 1
  assert found > 10
