"""The evaluations of one model, one after the other: splits and texts that several of them use are encoded once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from absl import logging
import jax
from jaxtyping import Int
import numpy as np

from declip_jax.data.sources import Source
from declip_jax.evals import EVALUATORS, defaults
from declip_jax.evals.encoders import Encoders, encode_texts
from declip_jax.evals.features import (
  Encode,
  EncodeTexts,
  Features,
  Read,
  Split,
  Texts,
  encode,
  make_data,
  read_batches,
)
from declip_jax.evals.options import check_values
from declip_jax.evals.results import Scores
from declip_jax.runtime.hosts import first_error


@dataclass(frozen=True)
class DataSource:
  """A source of a split.

  Attributes:
    source: images, captions and labels; jobs that share this object share features.
    classes: class of each label of the source, see `Split`; several splits with other classes share its features.
  """

  source: Source
  classes: Int[np.ndarray, "labels"] | None = None


@dataclass(frozen=True)
class Job:
  """One evaluation.

  Attributes:
    name: its name among the jobs of a model.
    dataset: name of the data set.
    kind: a key of `EVALUATORS`.
    splits: sources of `test` and, where the evaluator needs them, `train` and `val`.
    options: options of the evaluator.
    data: facts on the data set: `classnames`, `parent`, `prompts`, `metric` and others of `EvaluationData`.
    variant: tells the result apart from others of the same kind on the same data set, such as with other prompts.
    about: what else the result should say, such as the key of the data set in the catalogue.
    curve: name of the one curve that shows the job, such as "slip26/pets"; "" shows all its metrics.
  """

  name: str
  dataset: str
  kind: str
  splits: Mapping[str, DataSource]
  options: Mapping[str, Any] = field(default_factory=dict)
  data: Mapping[str, Any] = field(default_factory=dict)
  variant: str = ""
  about: Mapping[str, Any] = field(default_factory=dict)
  curve: str = ""

  def curves(self, scores: Scores) -> dict[str, float]:
    """What curves over a training show: all metrics, or the headline metric of a data set of a suite."""
    if self.curve:
      return {f"eval/{self.curve}": scores.metrics[scores.headline]}
    return {f"eval/{self.name}/{name}": value for name, value in scores.metrics.items()}


def run_jobs(
  jobs: Sequence[Job],
  encoders: Encoders,
  picture: Callable[[Job], Path | None],
  *,
  encode: Encode = encode,
  encode_texts: EncodeTexts = encode_texts,
  read: Read = read_batches,
  seen: Callable[[Job, Split], None] = lambda job, test: None,
) -> Iterator[tuple[Job, Scores | ValueError | OSError]]:
  """Runs jobs in their order, and yields the scores of each, or the error of one that cannot run, on every host.

  Every host has to call this with the same jobs. A ValueError means that a job cannot run on these data; evaluators
  raise it on every host. Any other error may be one of this host alone, which would leave the others waiting: on a
  single host it ends the job, on several ones all. That memory has run out always ends all.

  Args:
    jobs: evaluations.
    encoders: encode functions of the model.
    picture: the picture that a job may draw, None for none.
    encode: function that returns features of a source.
    encode_texts: function that returns embeddings of texts.
    read: function that reads images of a source.
    seen: called after each job that has scores with its test split, on all hosts.

  Raises:
    ValueError: before anything is read; an option of a job is illegal.
  """
  for job in jobs:
    check_values({**defaults(job.kind), **job.options}, job.name)
  texts, opened, features = Texts(encoders, encode_texts), {}, {}

  def encode_once(source: Source, *others: Any) -> Features:
    if id(source) not in features:
      features[id(source)] = encode(source, *others)
    return features[id(source)]

  texts.add(prompt for job in jobs for own in job.data.get("prompts") or () for prompt in own)
  for number, job in enumerate(jobs):
    for split in job.splits.values():
      if id(split) not in opened:
        opened[id(split)] = Split(split.source, encoders, classes=split.classes, encode=encode_once, read=read)
    data = make_data(encoders, texts, **{name: opened[id(split)] for name, split in job.splits.items()}, **job.data)
    try:
      scores = EVALUATORS[job.kind].function(data, picture(job), **job.options)
      seen(job, data.test)
    except ValueError as error:
      scores = error
    except (LookupError, ArithmeticError, TypeError, OSError) as error:  # the other jobs still run
      if jax.process_count() > 1:  # the other hosts may not have it, and would wait for this one
        raise
      logging.exception("%s failed", job.name)
      scores = error if isinstance(error, OSError) else ValueError(f"{type(error).__name__}: {error}")
    failed = first_error(str(scores) if isinstance(scores, Exception) else "")  # all hosts continue alike
    if failed and not isinstance(scores, Exception):
      scores = ValueError(failed)
    yield job, scores
    after = jobs[number + 1 : number + 2]
    if not any(other.splits["test"] is job.splits["test"] for other in after):
      texts.drop_tokens()
    later = [split for other in jobs[number + 1 :] for split in other.splits.values()]
    # The tokens of a source may be large.
    opened = {name: split for name, split in opened.items() if name in set(map(id, later))}
    for name in features.keys() - {id(split.source) for split in later}:
      del features[name]
