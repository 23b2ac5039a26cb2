"""Writes a config file of your own, with comments: python -m declip_jax.new my_config.py --data pairs.csv

  FILE    the file to write; it must not exist yet

The file trains as it is, with the config `pretrain` and your data, any path that declip_jax.data.inspect recognises or
KIND:LOCATION. Its comments show the fields that are most often changed:

  python -m declip_jax.train --config=my_config.py --workdir runs/my_config
"""

import json
from pathlib import Path
import re
import shlex

from absl import flags

from declip_jax import command_line
from declip_jax.architectures import ARCHITECTURES
from declip_jax.configs import pretrain, to_source
from declip_jax.methods import NAMES
from declip_jax.planning.architecture import suggested
from declip_jax.reporting.progress import message

# The command fills in what is in braces. A comment that begins with "# c." is a line to uncomment.
TEMPLATE = '''"""My captions: python -m declip_jax.train --config={file} --workdir runs/{stem}

--print_config prints all fields, --steps 100 makes a short try, and --config.FIELD=VALUE overrides a field.
"""

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs import pretrain


def get_config(method: str = {method}, architecture: str = {architecture}, data: str = {data}) -> ConfigDict:
  """Returns the config; the arguments can be given as --config={file}:method=clip."""
  c = pretrain.get_config(method, architecture, data)

  # The training data; {held_out} are held out{for_what}. To train on all of them, or on
  # several sources with weights{instead}:
  # c.data.train, c.data.mixture = ({source},), (1.0,)
  # Views that leave colours or sides as they are, if the captions name them:
  # c.data.jitter_probability, c.data.grayscale_probability, c.data.flip_probability = 0.0, 0.0, 0.0

  # Chosen for the data and the devices when a run starts, which prints the values. To choose them yourself, such as:
  # c.batch_size = 256
  # c.duration = config.duration(epochs=32)
  # c.model.dtype, c.model.remat = "bfloat16", "dots"

  # The optimiser, with the values that it has:
  # c.optimizer.learning_rate = {learning_rate}
  # c.optimizer.weight_decay = {weight_decay}

  # The weights to start from: a run, or any file that declip_jax.load reads:
  # c.init_from.path = "runs/other"

  # How often evaluations run, and others to add:
  c.evaluate_every = config.duration(share=0.1)  # of the run; epochs=1 and steps=1000 are other units
{evaluations}  return c
'''


_OF_TEXTS = """  # c.evals.test = config.retrieval("table:/data/test.csv?root=/data")
  # c.evals.classes = config.zero_shot("folder:/data/classes", templates=("a photo of a {}.",))
"""
_OF_IMAGES = """  # c.evals.classes = config.knn("folder:/data/classes/test", train="folder:/data/classes/train")
"""


def template(path: Path, method: str, architecture: str, data: str) -> str:
  """The text of a config file.

  Args:
    path: where the file will be.
    method, architecture, data: default values of the arguments of its `get_config`, see `pretrain`.

  Raises:
    FileNotFoundError, ValueError: the data are not recognised, see `to_source`.
  """
  texts = {"method": method, "architecture": architecture, "data": data, "source": to_source(data)}
  quoted = {name: json.dumps(text, ensure_ascii=False) for name, text in texts.items()}
  c, (share, most) = pretrain.get_config(method, architecture, data), pretrain.HELD_OUT.split(",")
  retrieves = "retrieval" in c.evals
  return TEMPLATE.format(
    file=path,
    stem=path.stem,
    held_out=f"{share.replace('%', ' %')}, at most {int(most):,},",
    for_what=" for c.evals.retrieval" if retrieves else "",
    instead=" (give c.evals.retrieval.data other samples then)" if retrieves else "",
    learning_rate=c.optimizer.learning_rate,
    weight_decay=c.optimizer.weight_decay,
    evaluations=_OF_TEXTS if retrieves else _OF_IMAGES,
    **quoted,
  )


def _command(arguments: list[str]) -> None:
  path, values = Path(arguments[0]), flags.FLAGS
  if path.suffix != ".py":
    raise ValueError(f"{path}: expected the name of a Python file, such as {path.with_suffix('.py')}")
  text = template(path, values.method, values.architecture or suggested(), values.data)
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    with path.open("x") as file:
      file.write(text)
  except FileExistsError:
    raise ValueError(f"{path} exists already, and is not replaced: choose another name") from None
  print(f"wrote {path}, for {to_source(values.data)}")
  if re.fullmatch(r"[^:*?{\[]+", values.data) and not Path(values.data).exists():
    message(f"warning: {values.data} does not exist on this machine")
  print(f"python -m declip_jax.train --config={shlex.quote(str(path))} --workdir runs/{path.stem}")


def main() -> None:
  """Runs the command."""
  flags.DEFINE_string("data", None, "Data to train on: a path, pattern, folder or URL, or KIND:LOCATION.")
  flags.DEFINE_enum("method", "declip", NAMES, "Method to train.")
  flags.DEFINE_enum("architecture", None, [*ARCHITECTURES], "Architecture to train, by default one for this machine.")
  command_line.run(_command, __doc__, positional=("FILE",), required=("data",))


if __name__ == "__main__":
  main()
