"""The model card of an export: a README.md with the front matter that the Hugging Face hub reads.

Its fields are those of https://huggingface.co/docs/hub/model-cards; results are in the format model-index.
"""

from collections.abc import Iterator, Mapping, Sequence
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from declip_jax import __version__
from declip_jax.evals import results
from declip_jax.evals.evaluation import describe
from declip_jax.evals.feature_cache import tree_hash
from declip_jax.evals.results import Result
from declip_jax.planning.training_facts import training_facts
from declip_jax.spelling import counted
from declip_jax.weights import hub
from declip_jax.weights.read import Weights, run_of

_LIBRARIES = {"open_clip": "open_clip", "huggingface": "transformers", "onnx": "onnx", "orbax": "declip_jax"}
_LICENCES = "https://huggingface.co/docs/hub/repositories-licenses"
# The hub's names of our evaluators; others keep their names in results.
_TASKS = {
  "zero_shot": "zero-shot-image-classification",
  **dict.fromkeys(
    ("classify", "few_shot", "knn", "linear_probe", "nearest_mean", "sgd_probe"),
    "image-classification",
  ),
}
_METRICS = {"top1": "accuracy"}
_PROJECT = "declip_jax"

_USE = {
  "open_clip": """import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("hf-hub:{name}")
tokenizer = open_clip.get_tokenizer("hf-hub:{name}")""",
  "huggingface": """from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained("{name}")
processor = CLIPProcessor.from_pretrained("{name}")""",
  "onnx": """import huggingface_hub, onnxruntime

folder = huggingface_hub.snapshot_download("{name}")
image, text = (onnxruntime.InferenceSession(f"{{folder}}/{{side}}.onnx") for side in ("image", "text"))""",
}
_USE_HERE = """import declip_jax

clip = declip_jax.load("hf-hub:{name}")
similarity = clip.encode_image(["one.jpg", "two.jpg"]) @ clip.encode_text(["a red circle", "a blue star"]).T"""
_USE_IMAGES = """import declip_jax.weights.read

weights = declip_jax.weights.read.read("hf-hub:{name}")  # an image tower, to start from by config.init_from"""


class Export(NamedTuple):
  """What a model card describes.

  Attributes:
    weights: the exported weights.
    path: path that they were read from; the card has the training and the results of a run.
    format: one of `write.FORMATS`.
    name: name of the repository, `ORG/NAME`.
    notes: what was omitted or changed, see `write.write`.
    license: name of a licence on the hub; empty to leave it to the reader of the card.
  """

  weights: Weights
  path: Path
  format: str
  name: str
  notes: Sequence[str] = ()
  license: str = ""


def make_card(export: Export) -> str:
  """The model card of an export.

  Raises:
    ModuleNotFoundError: huggingface_hub, which makes the front matter, is not installed.
  """
  run = run_of(export.path)
  training = training_facts(run, export.weights.step) if run and export.weights.step is not None else {}
  found = _results(export.weights, run / "results") if run else []
  sections = [
    f"# {export.name.partition('/')[2]}",
    _opening(export, training),
    f"## Use\n\n```python\n{_use(export)}\n```",
  ]
  if training:
    sections.append(f"## Training\n\n{_table(('', ''), _training_rows(export, training))}")
  if found:
    rows = [(one.dataset, _task_name(one), _score(one)) for one in found]
    sections.append(f"## Evaluation\n\nWith 95 % intervals.\n\n{_table(('data', 'task', 'score'), rows)}")
  if export.notes:
    sections.append("## Notes on the export\n\n" + "\n".join(f"* {note}" for note in export.notes))
  return "\n\n".join([_front_matter(export, training, found), *sections]) + "\n"


def _results(weights: Weights, folder: Path) -> list[Result]:
  """The results of these weights, with this preprocessing of images, in a folder."""
  weights_hash = tree_hash({"params": weights.params, "collections": weights.collections})
  view = json.loads(json.dumps(vars(weights.view)))
  found = [result for _, result in results.read_all([folder])]
  return [one for one in found if (one.ours["weights"].get("hash"), one.ours["view"]) == (weights_hash, view)]


def _front_matter(export: Export, training: Mapping[str, Any], found: Sequence[Result]) -> str:
  client = hub.client()
  scores = [client.EvalResult(**fields) for result in found for fields in _scores(result)]
  tags = ["clip", *([training["method"]] if "method" in training else []), _PROJECT]
  data = client.ModelCardData(
    library_name=_LIBRARIES[export.format],
    license=export.license or None,
    pipeline_tag="zero-shot-image-classification" if _has_text(export) else "image-feature-extraction",
    tags=[*dict.fromkeys(tags)],
    model_name=export.name.partition("/")[2] if scores else None,
    eval_results=scores or None,
  )
  missing = "" if export.license else f"# license: add the name of a licence, see {_LICENCES}\n"
  return f"---\n{missing}{data.to_yaml().strip()}\n---"


def _scores(result: Result) -> Iterator[dict[str, Any]]:
  """The fields of the hub's results for each metric; counts are left out."""
  kind = result.ours["kind"]
  for name, value in result.ours["metrics"].items():
    if isinstance(value, float) and math.isfinite(value):
      yield {
        "task_type": _TASKS.get(kind, result.task),
        "task_name": _task_name(result),
        "dataset_type": result.dataset,
        "dataset_name": result.dataset,
        "metric_type": _METRICS.get(name, name),
        "metric_name": name,
        "metric_value": value,
      }


def _task_name(result: Result) -> str:
  return " ".join(filter(None, (result.ours["kind"].replace("_", " "), result.ours.get("variant", ""))))


def _score(result: Result) -> str:
  headline = result.ours["headline"]
  return describe(headline, result.ours["metrics"], result.ours["intervals"])


def _opening(export: Export, training: Mapping[str, Any]) -> str:
  image = export.weights.model["image"]
  tower = f"ViT with patches of {image['patch']} pixels" if "patch" in image else image["kind"]
  texts = f" and texts of up to {export.weights.model['text']['context_length']} tokens" if _has_text(export) else ""
  how = f", trained by the method `{training['method']}`" if "method" in training else f" from {export.weights.origin}"
  size = export.weights.view.size
  return f"A {tower} for images of {size} x {size} pixels{texts}{how}, exported by {_PROJECT} {__version__}."


def _has_text(export: Export) -> bool:
  return "joint" in export.weights.heads


def _use(export: Export) -> str:
  ours = _USE_HERE if _has_text(export) else _USE_IMAGES
  parts = [_USE[export.format]] if export.format in _USE else []
  if export.format != "onnx":  # which `load` does not read
    parts.append(ours)
  return "\n\n".join(part.format(name=export.name) for part in parts)


def _training_rows(export: Export, training: Mapping[str, Any]) -> list[tuple[str, str]]:
  rows = {
    "method": f"`{training['method']}`",
    "config": f"`{training['config']}`" if "config" in training else "",
    "started from": f"`{training['init_from']}`" if "init_from" in training else "",
    "data": ", ".join(f"`{name}` ({counted(size, 'sample')})" for name, size in training.get("data", {}).items()),
    "steps": f"{export.weights.step:,}",
    "pairs seen": f"{training['pairs_seen']:,}",
    "epochs": f"{training['epochs']:g}" if "epochs" in training else "",
    "FLOPs": f"{training['flops']:.3g}" if "flops" in training else "",
    "average of the weights": f"decay {export.weights.average:g}" if export.weights.average else "",
    "seed": str(training["seed"]),
  }
  return [(name, value) for name, value in rows.items() if value]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)
