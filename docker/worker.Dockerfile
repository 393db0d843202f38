# A GPU worker: docker build -t gpu-worker . && docker run --gpus all -v $(pwd)/config.yaml:/app/config.yaml gpu-worker
# See docs/docker.md. The CUDA libraries come with torch; the host needs its NVIDIA driver and container toolkit only.
# Another base needs Python 3.11 and apt.
ARG BASE=python:3.11.14-slim-bookworm
# hadolint ignore=DL3006
FROM ${BASE}

# ffmpeg: for audio as M4A, AAC or WebM. Debian keeps one version of it per release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ffmpeg \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
# For a host without a GPU: the address of PyTorch's index of CPU wheels, which are a tenth of the size.
ARG TORCH_INDEX=
# Before the code, so that a change of it does not install torch again.
COPY requirements/worker.txt requirements/constraints.txt requirements/
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r requirements/worker.txt
COPY engines engines
COPY tasks tasks
COPY celeryconfig.py main.py pyproject.toml ./

# Downloaded models: a volume, so that they outlive the container.
ENV HF_HOME=/models PYTHONUNBUFFERED=1 NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --create-home --uid 1000 worker && install -d -o worker -g worker /models /app/var
USER 1000
VOLUME /models

# It drains at SIGTERM and then ends with 0; run with --stop-timeout above load_control.drain_grace_seconds.
ENTRYPOINT ["python", "main.py"]
