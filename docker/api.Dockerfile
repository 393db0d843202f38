# API, control and Flower: docker build -f docker/api.Dockerfile -t gpu-api .
# See docs/docker.md. No torch in it.
FROM python:3.11.14-slim-bookworm

WORKDIR /app
COPY requirements/api.txt requirements/constraints.txt requirements/
RUN pip install --no-cache-dir -r requirements/api.txt
COPY engines engines
COPY tasks tasks
COPY migrations migrations
COPY app app
COPY celeryconfig.py wsgi.py pyproject.toml ./

ENV PYTHONUNBUFFERED=1 HOST=0.0.0.0
RUN useradd --create-home --uid 1000 gpu && install -d -o gpu -g gpu /app/var
USER 1000
# Large inputs and results, where BLOBS_URL names no other place; API and control share it.
VOLUME /app/var
EXPOSE 8000

CMD ["python", "-m", "app.serve"]
