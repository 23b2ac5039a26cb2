"""Evaluates a run or any checkpoint: python -m declip_jax.evaluate --workdir runs/demo

Without further flags, the evaluations of the run's config are repeated. Others are chosen by one of:

  --suite=slip26,shifts --data=sets.txt --tasks=zero_shot,linear_probe
  --data=sets.txt
  --zero_shot=/data/pets/test --template="a photo of a {}." --template="a drawing of a {}."
  --retrieval=webdataset:/data/test-*.tar

The kind of a plain path, as of /data/pets/test, is detected and printed, as by python -m declip_jax.data.inspect.
--option=few_shot.method=ridge sets an option of one of the tasks. --list prints all suites and data sets, and
--print_data=folder:/data prints a data file, which says where your data sets are. --dry_run shows what would be
evaluated.

--weights evaluates any other checkpoint that `declip_jax.load` reads, such as one of OpenAI's CLIP or of open_clip, or
hf-hub:ORG/NAME, a model on the Hugging Face hub.
--settings supplies what such a file does not contain, as `declip_jax.load` reports it: --settings=text.activation=gelu
If a run averages its weights (config.optimizer.ema), the average is evaluated; --settings=average=False evaluates the
weights themselves.

--interpolate_with evaluates mixtures of --workdir and other weights (WiSE-FT); --alpha gives the shares of --workdir:

  --workdir runs/pets --interpolate_with runs/clip --alpha 0,0.25,0.5,0.75,1

Results are printed, and written to --output, by default WORKDIR/results: one JSON file per model, data set and task,
which `clip_benchmark build` reads, too, and the predictions. Results that are already there are not computed again, so
an evaluation that was interrupted continues. Features of images and embeddings of texts are kept in --cache for other
evaluations. The TensorBoard of a run shows the results of its checkpoints, under results.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
from functools import partial
import json
import math
import os
from pathlib import Path
import shlex
import sys
from typing import Any, NamedTuple

from absl import flags
import jax
from ml_collections import ConfigDict

from declip_jax import command_line
from declip_jax import config as config_lib
from declip_jax.build import describe_seen, make_jobs
from declip_jax.clip import Clip, load
from declip_jax.data.guess import guess_test, read_as, short_name
from declip_jax.data.hangs import SECONDS
from declip_jax.data.images import LARGEST_LIMIT, MAX_PIXELS
from declip_jax.data.pipeline import Reading
from declip_jax.data.storage.indexes import cache_folder
from declip_jax.evals import EVALUATORS, catalogue, data_files, results, suites, variant_of
from declip_jax.evals.evaluation import Evaluation, ModelFacts, describe
from declip_jax.evals.feature_cache import LIMIT, json_hash
from declip_jax.evals.jobs import Job
from declip_jax.evals.prompts import check_templates
from declip_jax.evals.results import Result
from declip_jax.mixtures import mixtures
from declip_jax.planning.training_facts import training_facts
from declip_jax.reporting.metrics import summary_table
from declip_jax.reporting.progress import message
from declip_jax.runtime.checkpoint import Checkpoints
from declip_jax.runtime.command import launch
from declip_jax.runtime.compile_cache import compile_cache
from declip_jax.runtime.memory import explained
from declip_jax.runtime.workdir import read_config
from declip_jax.weights.folders import nearby_runs
from declip_jax.weights.hub import is_address
from declip_jax.weights.read import Step, parse_step, run_of
from declip_jax.weights.settings import parse_settings

_BATCH_SIZE = 256  # without a run's config
_LONGEST = 60  # signs of the name of a data set
_MOST_GIB = 2**30  # of --cache_limit
_ALPHA = [f"{part / 20:g}" for part in range(21)]  # those of WiSE-FT


class Place(NamedTuple):
  """Where the model of an evaluation is from, and where its results go.

  Attributes:
    weights: path of the weights.
    output: folder of the results.
    run: working directory of the run whose checkpoint is evaluated, whose TensorBoard shows the results; None for none.
      Where a run has an average of the weights, those are its results, not those of the weights themselves.
  """

  weights: str | os.PathLike[str]
  output: Path
  run: Path | None


class Encoding(NamedTuple):
  """How images and texts are encoded, and where the results are kept; see `evaluate`."""

  batch_size: int | None
  max_pixels: int | None
  max_seconds: float | None
  cache: Path | None
  cache_limit: int
  features_dtype: str


def evaluate(
  workdir: Path | None,
  step: Step = None,
  evals: ConfigDict | None = None,
  weights: str | os.PathLike[str] | None = None,
  batch_size: int | None = None,
  settings: Mapping[str, Any] | None = None,
  *,
  jobs: Sequence[Job] | None = None,
  output: Path | None = None,
  cache: Path | None = None,
  cache_limit: int = LIMIT,
  max_pixels: int | None = None,
  max_seconds: float | None = None,
  features_dtype: str = "float32",
) -> dict[str, Any]:
  """Evaluates a checkpoint, writes the results that are not there yet, and returns all metrics, `eval/NAME/METRIC`.

  Args:
    workdir: working directory of a run, or, with `weights`, any directory for the results; None if `output` is given.
    step: checkpoint of the run, the newest by default; "best" is the best by its `config.checkpoint.best_metric`.
    evals: evaluations, those of the run's config by default.
    weights: checkpoint file or folder to evaluate instead of a run.
    batch_size: images and texts encoded at once, that of the run's config by default, or 256.
    settings: fields that override what was recognised; see `clip.load`.
    jobs: evaluations instead of `evals`.
    output: folder of the results, `workdir/results` by default.
    cache: folder of features, None for none.
    cache_limit: see `FeatureCache`.
    max_pixels: largest number of pixels of an image, that of the run's config by default, see `images.open_photo`.
    max_seconds: seconds for reading one image, 0 for no limit, that of the run's config by default, see `Reading`.
    features_dtype: "float32", or "float16", to which features of images are then rounded, for half the size of `cache`.

  Raises:
    FileNotFoundError: no such run or checkpoint.
    ValueError: no evaluation is given, or one that cannot run, or a setting does not fit.
    OutOfMemory: memory ran out.
  """
  clip, config = _load(workdir, step, weights, settings)
  if jobs is None:
    jobs = make_jobs(config.evals if evals is None and config else evals or ConfigDict())
  is_run = not weights and (settings or {}).get("average", True)
  place = Place(weights or workdir, output or workdir / "results", workdir if is_run else None)
  encoding = Encoding(batch_size, max_pixels, max_seconds, cache, cache_limit, features_dtype)
  evaluation = _prepare(clip, config, _model_facts(clip, place.weights), jobs, place, encoding)
  return {**_about(clip, weights), **_metrics(_run(evaluation, jobs))}


def _load(
  workdir: Path | None, step: Step, weights: str | os.PathLike[str] | None, settings: Mapping[str, Any] | None
) -> tuple[Clip, ConfigDict | None]:
  """The model to evaluate, and the config of the run, if there is one."""
  if (path := workdir if weights is None else weights) is None:
    raise ValueError("--workdir is required, or --weights and --output")
  clip = load(path, settings, step=step)
  return clip, _config_of_run(workdir, clip.step if weights is None else None) if workdir else None


def _prepare(
  clip: Clip, config: ConfigDict | None, facts: ModelFacts, jobs: Sequence[Job], place: Place, encoding: Encoding
) -> Evaluation:
  """The evaluation of a model; see `evaluate`."""
  if not jobs:
    none = "no config.json" if config is None else "no evaluations in its config"
    raise ValueError(f"{place.weights} has {none}: pass --suite, --data, --zero_shot or --retrieval")
  size = encoding.batch_size or (config.evaluate_batch_size if config else _BATCH_SIZE)
  needs_text = any(EVALUATORS[job.kind].needs_text for job in jobs)
  encoders = clip.encoders(size, needs_text=needs_text, reading=_reading(config, encoding), field="--batch_size")
  encoders = dataclasses.replace(encoders, features_dtype=encoding.features_dtype)
  if (cache := encoding.cache) is None:
    return Evaluation(facts, encoders, place.output, run_folder=place.run)
  images, texts = clip.feature_cache(cache, encoding.cache_limit), clip.text_cache(cache)
  return Evaluation(facts, encoders, place.output, images, texts, place.run)


def _run(evaluation: Evaluation, jobs: Sequence[Job]) -> dict[str, Result]:
  with explained("lower --batch_size"):
    return evaluation.run(jobs)


def _about(clip: Clip, weights: str | os.PathLike[str] | None) -> dict[str, Any]:
  """What a summary says about the weights."""
  if weights is not None:
    return {"weights": os.fspath(weights), "origin": clip.origin}
  return {"step": clip.step, **({"average": clip.average} if clip.average else {})}


def _metrics(found: Mapping[str, Result]) -> dict[str, float]:
  ours = {name: result.ours["metrics"] for name, result in found.items()}
  return {f"eval/{name}/{key}": value for name, own in ours.items() for key, value in own.items()}


def _reading(config: ConfigDict | None, encoding: Encoding) -> Reading:
  """How images are read: with the limits that are given, or those of a run's config, if there is one."""
  pixels, seconds = (MAX_PIXELS, SECONDS) if config is None else (config.data.max_pixels, config.data.max_seconds)
  if encoding.max_seconds is not None:
    seconds = encoding.max_seconds
  return Reading(max_pixels=encoding.max_pixels or pixels, seconds=seconds)


def _model_facts(clip: Clip, path: str | os.PathLike[str]) -> ModelFacts:
  """What results say about a model from a path."""
  path, training = Path(path), dict
  if clip.step is None:
    stem = path.name if is_address(path) else path.name.split(".")[0]
    name, pretrained = stem or path.name, clip.origin
  else:
    run = run_of(path) or path
    name, pretrained = run.resolve().name, f"step-{clip.step}{'-average' if clip.average else ''}"
    training = partial(training_facts, run, clip.step)
  weights = {"path": os.fspath(path), "origin": clip.origin, "step": clip.step, "hash": clip.weights_hash}
  weights |= {"average": clip.average} if clip.average else {}
  weights["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(clip.params))
  view = {field: list(value) if isinstance(value, tuple) else value for field, value in vars(clip.view).items()}
  fields = {**clip.fields, "tokens": clip.tokens}
  return ModelFacts(name, results.slug(pretrained), weights, view, clip.dtype, training, fields)


def _config_of_run(workdir: Path, step: int | None) -> ConfigDict | None:
  """The config in a working directory, or, if it cannot be read, that of a checkpoint there; None if there is none."""
  fields = read_config(workdir)
  if fields is not None or step is None:
    return fields and config_lib.from_json(json.dumps(fields))
  with contextlib.closing(Checkpoints(workdir)) as checkpoints:
    return config_lib.from_json(json.dumps(checkpoints.config(step)))


def _jobs_from_flags() -> list[Job] | None:
  """The evaluations that the flags choose; None means those of the run's config.

  Raises:
    ValueError: flags contradict each other, or an evaluation cannot run.
  """
  given = flags.FLAGS
  _check_combination()
  if given.suite or given.data:
    return _suite_jobs()
  evals = ConfigDict()
  check_templates(tuple(given.template), "--template")
  if given.zero_shot:
    evals.zero_shot = config_lib.zero_shot(read_as(given.zero_shot, "--zero_shot", guess_test), tuple(given.template))
  if given.retrieval:
    evals.retrieval = config_lib.retrieval(read_as(given.retrieval, "--retrieval", guess_test), given.equal_texts)
  if not len(evals):
    return None
  return [
    dataclasses.replace(job, dataset=_dataset(evals[job.name].data), variant=variant_of(job.kind, job.options))
    for job in make_jobs(evals, "--")
  ]


def _dataset(spec: str) -> str:
  """The name of a source in results: a readable one, and a hash, so that two sources do not share a file."""
  return f"{results.slug(short_name(spec))[:_LONGEST]}-{json_hash(spec)[:6]}"


def _check_combination() -> None:
  """Rejects flags that would have no effect beside others.

  Raises:
    ValueError: the message names both.
  """
  given = flags.FLAGS
  of_suites, of_sources = [bool(given.suite or given.data), bool(given.zero_shot or given.retrieval)]
  if of_suites and of_sources:
    pair = ["--data" if given.data else "--suite", "--zero_shot" if given.zero_shot else "--retrieval"]
    raise ValueError(f"{pair[0]} and {pair[1]} are two evaluations: choose one of them")
  needed = {
    "tasks": ("--data", of_suites),
    "prompts": ("--data", of_suites),
    "option": ("--data", of_suites),
    "template": ("--zero_shot or --interpolate_with", bool(given.zero_shot or given.interpolate_with)),
    "equal_texts": ("--retrieval", bool(given.retrieval)),
  }
  for name, (others, is_given) in needed.items():
    if given[name].present and not is_given:
      raise ValueError(f"--{name} has an effect only with {others}")


def _suite_jobs() -> list[Job]:
  given = flags.FLAGS
  if not given.data:
    raise ValueError(f"--suite={','.join(given.suite)} needs --data, a file that says where the data sets are")
  jobs, remarks = suites.read_jobs(given.data, given.suite, given.tasks, given.prompts, given.option)
  for remark in remarks:
    message(remark)
  return jobs


def _steps(workdir: Path) -> list[Step]:
  """The checkpoints that flags choose."""
  if not flags.FLAGS.every_checkpoint:
    return [parse_step(flags.FLAGS.step)]
  if flags.FLAGS.step or flags.FLAGS.weights:
    raise ValueError("--every_checkpoint evaluates a run: leave --step and --weights out")
  with contextlib.closing(Checkpoints(workdir)) as checkpoints:
    steps = checkpoints.steps()
  if not steps:
    raise FileNotFoundError(f"{workdir} has no checkpoint")
  return [*steps]


def _command(workdir: Path | None) -> None:
  given = flags.FLAGS
  if given.list or given.print_data:
    _print_catalogue()
    return
  if workdir is None and not (given.weights and given.output):
    runs = nearby_runs(Path("runs"))
    raise ValueError(f"--workdir is required, or --weights and --output{runs}")
  chosen, output = _jobs_from_flags(), Path(given.output) if given.output else workdir / "results"
  cache = None if given.cache == "off" else Path(given.cache or cache_folder() / "features")
  limit = int(given.cache_limit * 2**30)
  encoding = Encoding(given.batch_size, given.max_pixels, given.max_seconds, cache, limit, given.features_dtype)
  settings = parse_settings(given.settings, "--settings")
  is_run = not (given.weights or given.interpolate_with) and settings.get("average", True)
  place = Place(given.weights or workdir, output, workdir if is_run else None)
  said = ""
  for step in _steps(workdir):
    with _named_settings(), command_line.naming("--weights" if given.weights else "--workdir"):
      clip, config = _load(workdir, step, given.weights, settings)
    jobs = chosen if chosen is not None else make_jobs(config.evals if config else ConfigDict())
    tested = {job.name: job.splits["test"].source.name for job in jobs}
    seen = describe_seen(tested, config.data.train) if is_run and config else ""
    if seen and seen != said and jax.process_index() == 0:
      message(seen)
    said = seen
    for model, facts in _models(clip, config, place.weights):
      evaluation = _prepare(model, config, facts, jobs, place, encoding)
      if given.dry_run:
        lines = evaluation.plan(jobs)
        if jax.process_index() == 0:
          message("\n".join(lines), stream=sys.stdout)
        continue
      found = _run(evaluation, jobs)
      if jax.process_index() == 0:
        about = {"run": str(workdir or given.output), **_about(clip, given.weights)}
        about |= {name: facts.weights[name] for name in ("share",) if name in facts.weights}
        message(summary_table({**about, **_summary(found)}), stream=sys.stdout)
  if jax.process_index() == 0 and not given.dry_run:
    command = f"python -m declip_jax.report {shlex.quote(str(given.output or workdir))} --output report"
    message(f"results and predictions: {output}; with intervals, chance and pictures: {command}")


@contextlib.contextmanager
def _named_settings() -> Iterator[None]:
  """Names the settings of the flag, if there are any, in an error of the model that may come from them."""
  try:
    yield
  except ValueError as error:
    if not (given := flags.FLAGS.settings) or str(error).startswith("--"):
      raise
    raise ValueError(f"with {' '.join(f'--settings={text}' for text in given)}: {error}") from error


def _models(clip: Clip, config: ConfigDict | None, path: str | os.PathLike[str]) -> Iterator[tuple[Clip, ModelFacts]]:
  """The models to evaluate, and what results say about them: the one from a path, or its mixtures with other weights.

  Raises:
    ValueError: --alpha is wrong, or the weights cannot be mixed.
  """
  given = flags.FLAGS
  facts = _model_facts(clip, path)
  if not given.interpolate_with:
    if given.alpha:
      raise ValueError(f"--alpha={','.join(given.alpha)} needs --interpolate_with, the weights to mix with")
    yield clip, facts
    return
  shares = _shares(given.alpha or _ALPHA)
  with command_line.naming("--interpolate_with"):
    start = load(given.interpolate_with, {"image_size": clip.view.size})
  own = config.init_from.templates if config and not given["template"].present else ()
  other = _model_facts(start, given.interpolate_with).weights
  try:
    for share, mixed in mixtures(start, clip, shares, own or given.template):
      weights = {**facts.weights, "hash": mixed.weights_hash, "share": share, "interpolated_with": other}
      pretrained = f"{facts.pretrained}-share-{share:g}"
      yield mixed, dataclasses.replace(facts, pretrained=pretrained, weights=weights)
  except ValueError as error:
    raise ValueError(f"--interpolate_with={given.interpolate_with}: {error}") from error


def _shares(alpha: Sequence[str]) -> list[float]:
  """The numbers of --alpha.

  Raises:
    ValueError: one is not a number from 0 to 1.
  """
  shares = []
  for text in alpha:
    try:
      shares.append(float(text))
    except ValueError:
      shares.append(math.nan)
    if not 0 <= shares[-1] <= 1:
      raise ValueError(f"--alpha={','.join(alpha)}: {text!r} is not a number from 0 to 1")
  return shares


def _cached(workdir: Path | None) -> None:
  """The command, which compiles what several checkpoints share only once."""
  with compile_cache(cache_folder() / "compiled"):
    _command(workdir)


def _summary(found: Mapping[str, Result]) -> dict[str, Any]:
  """All metrics; or, of suites and data files, the headline metrics with their intervals, and the means of suites."""
  given = flags.FLAGS
  if not (given.suite or given.data):
    return _metrics(found)
  headlines = {
    name: describe(result.ours["headline"], result.ours["metrics"], result.ours["intervals"])
    for name, result in found.items()
  }
  means = suites.means(found, [catalogue.suite(name) for name in given.suite])
  return {**headlines, **{name: f"{value:.1%}" for name, value in means.items()}}


def _print_catalogue() -> None:
  """What --list and --print_data print."""
  given = flags.FLAGS
  chosen = [catalogue.suite(name) for name in given.suite]
  if given.print_data:
    kind, _, root = given.print_data.partition(":")
    text = data_files.print_data(kind, root, chosen)
  else:
    text = suites.table(chosen)
  message(text.rstrip("\n"), stream=sys.stdout)


def main() -> None:
  """Runs the command."""
  tasks = [name for name, evaluator in EVALUATORS.items() if evaluator.of]
  flags.DEFINE_string("step", None, "Step of the checkpoint to evaluate, or best; the newest by default.")
  flags.DEFINE_bool("every_checkpoint", False, "Evaluate all checkpoints of the run.")
  flags.DEFINE_string("weights", None, "Checkpoint file, folder or hf-hub:ORG/NAME to evaluate instead of the run.")
  flags.DEFINE_multi_string(
    "settings", [], "Setting that the checkpoint does not contain, such as text.activation=gelu. Can be repeated."
  )
  flags.DEFINE_string(
    "interpolate_with", None, "Weights before fine-tuning, to evaluate mixtures with those of --workdir (WiSE-FT)."
  )
  flags.DEFINE_list(
    "alpha",
    None,
    f"Shares of --workdir in the mixtures, 0 to 1; by default {_ALPHA[0]},{_ALPHA[1]}, ..., {_ALPHA[-1]}.",
  )
  flags.DEFINE_integer(
    "batch_size", None, "Images and texts encoded at once; by default that of the run, or 256.", lower_bound=1
  )
  flags.DEFINE_list("suite", [], "Suites to evaluate, such as slip26,shifts; --list prints all.")
  flags.DEFINE_string(
    "data", None, "File that says where your data sets are, see --print_data; without --suite, all are evaluated."
  )
  flags.DEFINE_list(
    "tasks",
    [],
    f"What to evaluate of --data, of {', '.join(tasks)}; by default, all that need neither training nor a classifier.",
  )
  flags.DEFINE_string("prompts", "", "Name or file of prompts for --data; by default, those of the suite.")
  flags.DEFINE_multi_string(
    "option",
    [],
    "Option of a task of --data, such as few_shot.method=ridge or retrieval.folds=5. Repeat the flag for several.",
  )
  flags.DEFINE_string("zero_shot", None, "Path or source for zero-shot classification, such as /data/pets/test.")
  flags.DEFINE_multi_string(
    "template", list(config_lib.TEMPLATES), "Prompt with {} for the class name. Repeat the flag for several."
  )
  flags.DEFINE_string("retrieval", None, "Path or source for image-text retrieval, such as /data/pairs.csv.")
  flags.DEFINE_bool("equal_texts", False, "In retrieval, let identical captions match each other's images.")
  flags.DEFINE_string("output", None, "Folder of the results, by default WORKDIR/results.")
  flags.DEFINE_string("cache", None, "Folder of features, or off; by default in the user's cache folder.")
  flags.DEFINE_enum(
    "features_dtype", "float32", ["float32", "float16"], "Rounds features of images; float16 takes half the space."
  )
  flags.DEFINE_float(
    "cache_limit", LIMIT / 2**30, "GiB of --cache, beyond which the oldest features are removed.", 0, _MOST_GIB
  )
  flags.DEFINE_integer(
    "max_pixels", None, "Largest number of pixels of an image, by default that of the run.", 1, LARGEST_LIMIT
  )
  flags.DEFINE_float(
    "max_seconds", None, f"Seconds for reading an image; by default as in the run, or {SECONDS:g}; 0 means no limit.", 0
  )
  flags.DEFINE_bool("dry_run", False, "Only print what would be evaluated, and about how long it takes.")
  flags.DEFINE_bool("list", False, "Only print the suites, or the data sets of --suite.")
  flags.DEFINE_string("print_data", None, "Only print a data file, for KIND or KIND:ROOT, such as folder:/data.")
  launch(_cached, __doc__, needs_workdir=False)


if __name__ == "__main__":
  main()
