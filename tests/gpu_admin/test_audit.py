"""The file of who changed what on a host."""

import json
import logging
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gpu_admin.audit import KEPT, Audit, Caller
from tests.rig import ROOT

OPS = Caller("ops", "10.0.0.7")


def test_an_event_is_one_line_with_time_key_address_and_facts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "state" / "audit.log"

    with caplog.at_level(logging.INFO):
        Audit(path).record("process.killed", OPS, pid=7, command="a\nb \udcff", path=tmp_path)

    [line] = path.read_text().splitlines()
    said = json.loads(line)
    at = datetime.fromisoformat(said.pop("time"))
    assert abs(datetime.now(UTC) - at) < timedelta(minutes=1)
    assert said == {
        "event": "process.killed",
        "key": "ops",
        "address": "10.0.0.7",
        "pid": 7,
        "command": "a\nb \udcff",
        "path": str(tmp_path),
    }
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.INFO] == [f"audit: {line}"]


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    audit = Audit(path, max_bytes=100)

    for number in range(3):
        audit.record("event", OPS, number=number)

    modes = {stat.S_IMODE(file.stat().st_mode) for file in (path, tmp_path / "audit.log.1")}
    assert modes == {0o600}


def test_several_processes_and_threads_lose_no_line_while_files_are_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    program = f"""if True:
        import sys
        from pathlib import Path
        from gpu_admin.audit import Audit, Caller
        for number in range(50):
            Audit(Path({str(path)!r}), 6000).record("event", Caller(sys.argv[1], ""), number=number)
    """
    command = [sys.executable, "-c", program]
    children = [subprocess.Popen([*command, name], cwd=ROOT) for name in ("a", "b")]
    audit = Audit(path, 6000)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: audit.record("event", Caller("c", ""), number=number), range(50)))
    codes = [child.wait(60) for child in children]

    files = [path, *tmp_path.glob("audit.log.[0-9]")]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert codes == [0, 0]
    assert len(files) > 1
    assert sorted((line["key"], line["number"]) for line in lines) == [(key, n) for key in "abc" for n in range(50)]


def test_the_oldest_files_go(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    audit = Audit(path, max_bytes=1)

    for number in range(KEPT + 3):
        audit.record("event", OPS, number=number)

    files = [path, *(tmp_path / f"audit.log.{number}" for number in range(1, KEPT + 1))]
    assert [json.loads(file.read_text())["number"] for file in files] == list(range(KEPT + 2, 1, -1))
    assert not (tmp_path / f"audit.log.{KEPT + 1}").exists()


def test_a_full_disk_is_logged_with_the_event_and_disturbs_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "audit.log"
    path.symlink_to("/dev/full")

    Audit(path).record("process.killed", OPS, pid=7)

    [error] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "No space left on device" in error.getMessage()
    assert '"pid": 7' in error.getMessage()


def test_a_disk_that_fills_up_in_the_middle_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    # A limit on files is the full disk of one process.
    program = f"""if True:
        import resource
        from pathlib import Path
        from gpu_admin.audit import Audit, Caller
        audit = Audit(Path({str(path)!r}))
        audit.record("first", Caller("ops", ""))
        resource.setrlimit(resource.RLIMIT_FSIZE, (Path({str(path)!r}).stat().st_size + 20, resource.RLIM_INFINITY))
        audit.record("second", Caller("ops", ""))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        audit.record("third", Caller("ops", ""))
    """

    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)

    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["first", "third"]
