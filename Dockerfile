# docker build --build-arg EXTRA=gpu -t declip_jax .
# docker run --gpus=all --volume=/data/runs:/runs declip_jax --config=demo --workdir /runs/demo
FROM python:3.12-slim AS wheel
WORKDIR /build
COPY LICENSE README.md setup.py pyproject.toml ./
COPY configs configs
COPY declip_jax declip_jax
RUN pip wheel --no-cache-dir --no-deps --wheel-dir=/wheel .

FROM python:3.12-slim AS build
# Extras of setup.py: gpu, tpu, gcs, s3, ..., separated by commas; none is for the CPU. train is always installed.
ARG EXTRA=""
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
# Dependencies first, so that a change of the code does not install them again. __init__.py has the version.
COPY setup.py pyproject.toml constraints.txt ./
COPY declip_jax/__init__.py declip_jax/
RUN touch README.md && pip install --no-cache-dir -c constraints.txt ".[train${EXTRA:+,$EXTRA}]"
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir --no-deps --force-reinstall /wheel/*.whl

FROM python:3.12-slim
# --build-arg RUN_AS=root for hosts whose device files belong to root.
ARG RUN_AS=declip
RUN useradd --create-home --uid 1000 declip && install --directory --owner=declip /runs
COPY --from=build /opt/venv /opt/venv
# xpk copies a checkout to /app, where Python finds the code before that in /opt/venv.
WORKDIR /app
COPY LICENSE ./
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
USER $RUN_AS
ENTRYPOINT ["python", "-m", "declip_jax.train"]
