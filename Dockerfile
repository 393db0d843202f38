# A GPU worker: docker build -t gpu-worker . && docker run --gpus all -v $(pwd)/config.yaml:/app/config.yaml gpu-worker
# See docs/workers.md. The CUDA libraries come with torch; the host needs its NVIDIA driver and container toolkit only.
FROM python:3.11-slim-bookworm

# ffmpeg: for audio as M4A, AAC or WebM.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ffmpeg \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
# Before the code, so that a change of it does not install torch again.
COPY requirements/worker.txt requirements/constraints.txt requirements/
RUN pip install --no-cache-dir -r requirements/worker.txt
COPY engines engines
COPY tasks tasks
COPY celeryconfig.py main.py pyproject.toml ./

# Downloaded models: a volume, so that they outlive the container.
ENV HF_HOME=/models PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 worker && install -d -o worker -g worker /models /app/var
USER worker
VOLUME /models

# It drains at SIGTERM and then ends with 0; run with --stop-timeout above load_control.drain_grace_seconds.
ENTRYPOINT ["python", "main.py"]
