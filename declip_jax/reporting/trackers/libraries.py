"""The trackers of other projects. Each library is imported when a run uses it.

A library reads its own environment variables, such as `WANDB_MODE=offline`, `MLFLOW_TRACKING_URI` and
`TRACKIO_SPACE_ID`. None of them can take back what it has recorded: after a rollback, it has the repeated steps twice.
"""

from collections.abc import Callable, Iterator, Mapping
import html
from pathlib import Path
import re
import time
from typing import Any

from declip_jax.reporting.progress import message
from declip_jax.reporting.trackers.background import CLOSE_SECONDS
from declip_jax.reporting.trackers.base import TrackedRun, Tracker


class WandB(Tracker):
  """A run of Weights & Biases, whose files are in `workdir/wandb`.

  W&B drops what is logged at an earlier step than before. The step is therefore a metric, the x-axis of all others, and
  W&B's own counter of steps counts calls.

  Args:
    run: the run.
    project: project of W&B.

  Raises:
    ValueError: nobody is logged in.
  """

  def __init__(self, run: TrackedRun, project: str):
    import wandb  # pyrefly: ignore[missing-import]: an extra

    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):  # `init` would wait for an answer
      raise ValueError("run wandb login, or set WANDB_API_KEY or WANDB_MODE=offline")
    self._wandb = wandb
    self._run = wandb.init(
      project=project,
      id=run.id,
      name=run.name,
      dir=run.workdir,
      resume="allow",
      # The status line of a run is redrawn, which W&B's copy of the terminal would record.
      settings=wandb.Settings(console="off", silent=True, finish_timeout=CLOSE_SECONDS),
    )
    self._run.config.update(dict(run.config), allow_val_change=True)
    self._run.define_metric("*", step_metric="step")
    if self._run.url:  # there is none offline
      message(f"Weights & Biases: {self._run.url}")

  def log(self, step: int, values: Mapping[str, Any]) -> None:
    self._run.log({**values, "step": step})

  def picture(self, step: int, name: str, path: Path) -> None:
    self.log(step, {name: self._wandb.Image(str(path))})

  def text(self, step: int, name: str, text: str) -> None:
    self.log(step, {f"{name}_text": self._wandb.Html(f"<pre>{html.escape(text)}</pre>")})

  def close(self, finished: bool) -> None:
    self._run.finish(exit_code=0 if finished else 1)


class MLflow(Tracker):
  """A run of MLflow, found by its tag `declip_jax.run_id` when it resumes.

  Fields of the config are parameters, which MLflow cannot change: `config.json`, an artifact, is that of the last
  start. A character that MLflow forbids in a name becomes "_".

  Args:
    run: the run.
    project: experiment of MLflow; it is made if it does not exist.
  """

  _TAG = "declip_jax.run_id"
  _BATCH = 100  # parameters in a call; MLflow's limit
  _LENGTH = 500  # characters of a parameter's value; the least of the limits of MLflow's stores

  def __init__(self, run: TrackedRun, project: str):
    from mlflow import MlflowClient  # pyrefly: ignore[missing-import]: an extra
    from mlflow.entities import Metric, Param  # pyrefly: ignore[missing-import]: an extra

    self._client, self._metric = MlflowClient(), Metric
    found = self._client.get_experiment_by_name(project)
    experiment = self._client.create_experiment(project) if found is None else found.experiment_id
    runs = self._client.search_runs([experiment], f"tags.`{self._TAG}` = '{run.id}'", max_results=1)
    tracked = runs[0] if runs else self._client.create_run(experiment, run_name=run.name, tags={self._TAG: run.id})
    self._id = tracked.info.run_id
    self._client.update_run(self._id, status="RUNNING")
    fields = ((name, str(value)[: self._LENGTH]) for name, value in _flat(run.config))
    new = [Param(name, value) for name, value in fields if value and name not in tracked.data.params]
    for first in range(0, len(new), self._BATCH):
      self._client.log_batch(self._id, params=new[first : first + self._BATCH])
    self._client.log_dict(self._id, dict(run.config), "config.json")

  def log(self, step: int, values: Mapping[str, float]) -> None:
    now = round(1000 * time.time())
    metrics = [self._metric(self._name(name), value, now, step) for name, value in values.items()]
    self._client.log_batch(self._id, metrics=metrics)

  def picture(self, step: int, name: str, path: Path) -> None:
    from PIL import Image

    with Image.open(path) as image:
      self._client.log_image(self._id, image.convert("RGB"), key=self._name(name), step=step)

  def text(self, step: int, name: str, text: str) -> None:
    self._client.log_text(self._id, text, f"{self._name(name)}.md")

  def close(self, finished: bool) -> None:
    self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")

  def _name(self, name: str) -> str:
    return re.sub(r"[^\w./ :-]", "_", name)


class Trackio(Tracker):
  """A run of trackio, whose name contains the identity of the run, since trackio finds runs by name.

  Args:
    run: the run.
    project: project of trackio.
  """

  def __init__(self, run: TrackedRun, project: str):
    import trackio  # pyrefly: ignore[missing-import]: an extra

    self._trackio = trackio
    name = f"{run.name}-{run.id[:8]}"
    self._run = trackio.init(project, name=name, config=dict(run.config), resume="allow", embed=False)

  def log(self, step: int, values: Mapping[str, Any]) -> None:
    self._run.log(dict(values), step=step)

  def picture(self, step: int, name: str, path: Path) -> None:
    self.log(step, {name: self._trackio.Image(str(path))})

  def text(self, step: int, name: str, text: str) -> None:
    self.log(step, {f"{name}_text": self._trackio.Markdown(text)})

  def close(self, finished: bool) -> None:
    del finished  # trackio does not record it
    self._run.finish()


# The trackers by their field of `config.trackers`, which is also the name of the library and of the extra: functions of
# a run and the value of the field, `project`.
TRACKERS: dict[str, Callable[..., Tracker]] = {"wandb": WandB, "mlflow": MLflow, "trackio": Trackio}


def _flat(fields: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in fields.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f"{path}{name}.")
    else:
      yield f"{path}{name}", value
