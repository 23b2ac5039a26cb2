# docker build --build-arg EXTRA=gpu -t declip_jax .
# docker run --gpus=all --volume=/data/runs:/runs declip_jax --config configs/demo.py --workdir /runs/demo
FROM python:3.12-slim AS build
# Extras of setup.py: gpu, tpu, gcs, s3, ..., several with commas between; none is for the CPU.
ARG EXTRA=""
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
# The dependencies first and without the code, so that a change of the code does not install them again.
COPY setup.py pyproject.toml constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt ".${EXTRA:+[$EXTRA]}"
COPY declip_jax declip_jax
RUN pip install --no-cache-dir --no-deps --force-reinstall .

FROM python:3.12-slim
# Where the device files belong to root: --build-arg RUN_AS=root.
ARG RUN_AS=declip
RUN useradd --create-home --uid 1000 declip && install --directory --owner=declip /runs
COPY --from=build /opt/venv /opt/venv
# xpk lays a checkout over /app, and Python finds the code there before that in /opt/venv.
WORKDIR /app
COPY LICENSE ./
COPY configs configs
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
USER $RUN_AS
ENTRYPOINT ["python", "-m", "declip_jax.train"]
