"""A real Docker engine of the test run's own, with an image of this machine's tritonserver that needs no network.

A machine may have no engine, or forbid one (no root, no mounts, no cgroups): then the tests are skipped, in CI too.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import docker
import psutil
import pytest
from docker.errors import DockerException

from tests.gpu_admin import triton_server

IMAGE = "tests/tritonserver:25.04-py3"
STARTED_S = 60
STOPPED_S = 20
#: What neither the server nor its Python backend reads.
_NOT_NEEDED = re.compile(
    r"/(test|tests|idlelib|lib2to3|tkinter|ensurepip|turtledemo|config-[^/]*|f2py)(/|$)|\.opt-[12]\.pyc$"
)


class DockerEngine:
    """A dockerd with its own socket, data and containerd; no bridge and no iptables, so the host's network alone."""

    def __init__(self) -> None:
        """Answers and has the image when this returns; skips the test where it cannot."""
        dockerd = shutil.which("dockerd") or "/usr/sbin/dockerd"
        if not Path(dockerd).exists():
            pytest.skip("dockerd is not installed (Debian's docker.io)")
        if os.geteuid() != 0:
            pytest.skip("dockerd needs root")
        triton_server.program()
        # Not under pytest's folder: the path of a socket must be short.
        self._folder = Path(tempfile.mkdtemp(prefix="dockerd-"))
        self.url = f"unix://{self._folder / 'docker.sock'}"
        self._log = self._folder / "log"
        with self._log.open("wb") as out:
            # It finds the best storage that works here: most copy nothing for a container.
            self._process = subprocess.Popen(
                [
                    dockerd,
                    "--bridge=none",
                    "--iptables=false",
                    "--ip6tables=false",
                    f"--data-root={self._folder / 'data'}",
                    f"--exec-root={self._folder / 'exec'}",
                    f"--pidfile={self._folder / 'pid'}",
                    f"--host={self.url}",
                    # A containerd of the system, which it would use, keeps ours apart.
                    f"--containerd-namespace={self._folder.name}",
                    f"--containerd-plugins-namespace={self._folder.name}-plugins",
                ],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self.client = self._connect()
            self._import()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End it with its containers; nothing of it is left."""
        with suppress(AttributeError, DockerException, OSError):
            for container in self.client.containers.list(all=True):
                container.remove(force=True)
            self.client.close()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOPPED_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._end_others()
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            place = line.split()[1]
            if Path(place).is_relative_to(self._folder):
                subprocess.run(["umount", "--lazy", place], check=False)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _end_others(self) -> None:
        """End what a dockerd that was killed leaves: its containerd, and the containers' keepers with all in them."""
        for keeper in psutil.process_iter():
            with suppress(psutil.NoSuchProcess):
                if any(str(self._folder) in argument for argument in keeper.cmdline()):
                    for process in (*keeper.children(recursive=True), keeper):
                        process.kill()

    def _connect(self) -> docker.DockerClient:
        end = time.monotonic() + STARTED_S
        while self._process.poll() is None and time.monotonic() < end:
            with suppress(DockerException):
                return docker.DockerClient(base_url=self.url, timeout=60)
            time.sleep(0.05)
        pytest.skip(f"dockerd does not run here: {self._log.read_text(errors='replace')[-600:]}")

    def _import(self) -> None:
        """Put the image there and see that a container of it can run at all."""
        archive = self._folder / "image.tar"
        _write_image(archive)
        environ = triton_server.environ({"PATH": "/usr/bin:/bin"})
        changes = [f"ENV {name}={value}" for name, value in environ.items()]
        repository, tag = IMAGE.split(":")
        try:
            self.client.api.import_image_from_file(str(archive), repository=repository, tag=tag, changes=changes)
            archive.unlink()
            self.client.containers.run(IMAGE, ["/bin/bash", "-c", "exit 0"], network_mode="host", remove=True)
        except DockerException as error:
            pytest.skip(f"a Docker engine runs here, but no container: {error}")


def _write_image(archive: Path) -> None:
    """A root folder with tritonserver and all that it needs, each where it lies on this machine."""
    environment = triton_server.ENVIRONMENT
    library = Path(sysconfig.get_path("stdlib"))
    packages = environment / "lib" / library.name / "site-packages"
    trees = [
        environment / "pyvenv.cfg",
        environment / "bin",
        packages / "numpy",
        packages / "pytriton" / "tritonserver",
        *(entry for entry in library.iterdir() if entry.name != "site-packages"),
    ]
    programs = [
        triton_server.program(),
        Path("/bin/bash"),
        Path(sys.base_prefix) / "bin" / f"python{triton_server.PYTHON}",
    ]
    backends = triton_server.backends()
    modules = [path for tree in (library / "lib-dynload", environment, backends) for path in tree.rglob("*.so*")]
    modules.append(backends / "python" / "triton_python_backend_stub")
    start = f'#!/bin/bash\nexec {programs[0]} --backend-directory={backends} "$@"\n'
    with tarfile.open(archive, "w") as tar:
        for tree in trees:
            tar.add(tree, filter=_needed)
        for path in {*programs, *_libraries([*programs, *modules])}:
            if not any(path.is_relative_to(tree) for tree in trees):
                # Libraries are reached by links, which the image need not have.
                tar.add(path.resolve(), arcname=str(path))
        _write(tar, "usr/bin/tritonserver", start, 0o755)
        _write(tar, "bin/sh", '#!/bin/bash\nexec /bin/bash "$@"\n', 0o755)
        _write(tar, "etc/passwd", "root:x:0:0:root:/root:/bin/bash\n", 0o644)
        _write(tar, "tmp/.keep", "", 0o644)


def _needed(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if _NOT_NEEDED.search(f"/{entry.name}") else entry


def _libraries(programs: Iterable[Path]) -> set[Path]:
    """The shared libraries that these are linked with, the dynamic loader among them."""
    said = subprocess.run(
        ["ldd", *programs], env=triton_server.environ(), capture_output=True, text=True, check=False
    ).stdout
    return {Path(os.path.normpath(found)) for found in re.findall(r"(?:=> |^\t)(/\S+) \(0x", said, re.MULTILINE)}


def _write(tar: tarfile.TarFile, name: str, text: str, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(text.encode()), mode
    tar.addfile(entry, BytesIO(text.encode()))
