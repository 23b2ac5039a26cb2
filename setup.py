"""Package metadata; exact versions that are tested stand in constraints.txt."""

from setuptools import find_packages, setup

setup(
  name="declip_jax",
  version="0.1.0",
  description="Pretraining of CLIP, SLIP and DeCLIP in JAX and Flax on TPUs and GPUs",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["declip_jax", "declip_jax.*"]),
  package_data={"declip_jax.data.text": ["*.gz", "*.txt"], "declip_jax.weights": ["*.gz"]},
  install_requires=[
    "absl-py>=2.1",
    "array_record>=0.8.6",
    "einops>=0.8",
    "flax>=0.12.8,<0.13",
    "fsspec>=2024.6",  # reads data where it lies: memory://, https://, and gs:// and s3:// by the extras below
    "ftfy>=6.3",
    "grain>=0.2.18,<0.3",
    "importlib_resources>=6",  # tensorflow-datasets needs it to prepare data sets and does not say so
    "instant-clip-tokenizer>=0.1.1",
    "jax>=0.10,<0.12",
    "jaxtyping>=0.3",
    "matplotlib>=3.9",
    "ml_collections>=1.1",
    "msgpack>=1.0",
    "numpy>=2.0",
    "opencv-python-headless>=4.10",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8,<1.0",  # its top-level API changes with 1.0
    "pillow>=11",
    "pyarrow>=18",
    "safetensors>=0.5",
    "simplejpeg>=1.8",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.10",  # reads prepared data sets; TensorFlow is not needed
    "tqdm>=4.66",
  ],
  extras_require={
    "tpu": ["jax[tpu]>=0.10,<0.12"],
    "gpu": ["jax[cuda13]>=0.10,<0.12"],
    "gcs": ["gcsfs>=2024.6"],
    "s3": ["s3fs>=2024.6"],
    "https": ["aiohttp>=3.9"],
    "huggingface": ["datasets>=3.0"],
    "tokenizers": ["sentencepiece>=0.2", "tokenizers>=0.21"],
    "dev": [
      "beartype>=0.20",
      "datasets>=3.0",
      "psutil>=6",
      "pytest>=8",
      "pytest-xdist>=3.6",
      "ruff>=0.14",
      "sentencepiece>=0.2",
      "tokenizers>=0.21",
    ],
  },
)
