"""Package metadata; constraints.txt has the exact versions that are tested.

Without extras, the package loads weights, encodes, evaluates, searches, exports and reports. declip_jax/extras.py has
the packages that the extras install; nothing else may import them.
"""

from pathlib import Path
import re

from setuptools import find_packages, setup

_FOLDER = Path(__file__).parent
# Read and not imported: nothing that the package imports is installed yet.
_SOURCE = (_FOLDER / "declip_jax" / "__init__.py").read_text()
_VERSION, _ADDRESS = (
  next(line for line in _SOURCE.splitlines() if line.startswith(name)).split('"')[1]
  for name in ("__version__", "ADDRESS")
)
# Links to files lead to the repository, also on the page of a package index.
_README = re.sub(r"\]\((?!https?:|#)", f"]({_ADDRESS}/blob/main/", (_FOLDER / "README.md").read_text())
_COMMANDS = (
  "train",
  "evaluate",
  "report",
  "export",
  "new",
  "plan",
  "overlap",
  "search",
  "embed",
  "data.convert",
  "data.inspect",
)

setup(
  name="declip_jax",
  version=_VERSION,
  description="Pretraining of CLIP, SLIP and DeCLIP in JAX and Flax on TPUs and GPUs",
  long_description=_README,
  long_description_content_type="text/markdown",
  project_urls={
    "Source": _ADDRESS,
    "Changelog": f"{_ADDRESS}/blob/main/CHANGELOG.md",
    "Issues": f"{_ADDRESS}/issues",
    "Security": f"{_ADDRESS}/blob/main/SECURITY.md",
  },
  keywords=[
    "CLIP",
    "DeCLIP",
    "SLIP",
    "SigLIP",
    "FILIP",
    "JAX",
    "Flax",
    "TPU",
    "contrastive learning",
    "vision-language",
  ],
  license="Apache-2.0",
  license_files=["LICENSE", "declip_jax/data/text/SYNONYMS_LICENSE.txt", "declip_jax/evals/data_sets/LICENSE.txt"],
  classifiers=[
    "Development Status :: 4 - Beta",
    "Environment :: GPU :: NVIDIA CUDA",
    "Intended Audience :: Science/Research",
    "Operating System :: POSIX",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
  ],
  python_requires=">=3.11",
  packages=find_packages(include=["declip_jax", "declip_jax.*"]),  # declip_jax/configs is a link to configs/
  package_data={
    "declip_jax": ["py.typed"],
    "declip_jax.data.text": ["*.gz", "*.txt"],
    "declip_jax.evals": ["*.csv", "*.json", "data_sets/*"],
    "declip_jax.image_search": ["*.html"],
    "declip_jax.weights": ["*.gz"],
  },
  install_requires=[
    "absl-py>=2.1",
    "einops>=0.8",
    "flax>=0.12.8,<0.13",
    "fsspec>=2024.6",  # reads data in place: memory://, https://, and with the extras below gs:// and s3://
    "ftfy>=6.3",
    "instant-clip-tokenizer>=0.1.1",
    "jax>=0.10,<0.12",
    "jaxtyping>=0.3",
    "matplotlib>=3.9",
    "ml_collections>=1.1",
    "ml_dtypes>=0.5",
    "msgpack>=1.0",
    "numpy>=2.0",
    "opencv-python-headless>=4.10",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8,<1.0",  # its top-level API changes with 1.0
    "pillow>=11",
    "safetensors>=0.5",
    "scipy>=1.14",
    "simplejpeg>=1.8",
    "tensorboardX>=2.6",
    "tqdm>=4.66",
  ],
  entry_points={
    "console_scripts": [f"declip-{name.split('.')[-1]} = declip_jax.{name}:main" for name in _COMMANDS],
  },
  extras_require={
    "train": [
      "array_record>=0.8.6",
      "grain>=0.2.18,<0.3",
      "importlib_resources>=6",  # tensorflow-datasets imports it to prepare data sets, but does not require it
      "pyarrow>=18",
      "tensorflow-datasets>=4.9.10",  # reads prepared data sets; TensorFlow is not needed
    ],
    "tpu": ["jax[tpu]>=0.10,<0.12"],
    "gpu": ["jax[cuda13]>=0.10,<0.12"],
    "gcs": ["gcsfs>=2024.6"],
    "s3": ["s3fs>=2024.6"],
    "https": ["aiohttp>=3.12"],
    "huggingface": ["datasets>=3.0"],
    "hub": ["huggingface_hub>=1.0"],  # hf-hub:ORG/NAME
    "onnx": ["onnx>=1.20"],  # export --format onnx
    "search": ["usearch>=2.26"],  # the search page with more than a million images
    "tokenizers": ["sentencepiece>=0.2", "tokenizers>=0.21"],
    "wandb": ["wandb>=0.31"],
    "mlflow": ["mlflow-skinny>=3.17", "alembic>=1.13", "sqlalchemy>=2.0"],  # the last two are for its local store
    "trackio": ["trackio>=0.43"],
    "docs": [
      "ipykernel>=7",
      "latex2mathml>=3.78",
      "mkdocs>=1.6,<2",
      "mkdocs-material>=9.7",
      "mkdocstrings[python]>=1.0",
      "nbclient>=0.11",
      "ruff>=0.14",  # formats the signatures of the API reference
    ],
    "dev": [
      "beartype>=0.20",
      "declip_jax[hub,huggingface,onnx,tokenizers,train]",
      "onnxruntime>=1.24",
      "psutil>=6",
      "pyrefly>=1.5",
      "pytest>=8",
      "pytest-timeout>=2.3",
      "pytest-xdist>=3.6",
      "ruff>=0.14",
      "setuptools>=77",  # builds the wheel in the tests, without the network
    ],
  },
)
