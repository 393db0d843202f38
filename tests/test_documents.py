"""The documents: every block of code in them is run, read, or says why not; what they name exists.

What a block is checked by stands in the line above it, and nothing is left out by silence:

    <!-- run: platform -->                  bash and Python, in order, against a real platform with the echo engine
    <!-- run: platform, answers 422 -->     the same; its last request is refused with this status
    <!-- run: settings -->                  NAME=value lines, which the API is told
    <!-- run: engine -->                    an engine, which runs a job
    <!-- run by: tests/app/test_cli.py -->  that file reads the page and runs it
    <!-- not run: why -->                   shell and Python are still read for their grammar

JSON, YAML and INI are parsed without being told to; `text` is no code.
"""

import ast
import configparser
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from dotenv import dotenv_values
from flask import Flask
from markdown_it import MarkdownIt
from PIL import Image
from werkzeug.exceptions import MethodNotAllowed, NotFound

import gpu_admin
from app import create_app
from app.cli.commands import gpuctl
from app.keys import Keys, Scope
from app.settings import Settings
from app.tables import open_database
from engines.catalogue import JobType, find
from engines.contract import Device, Text
from engines.schemas import RESULTS, load_params
from gpu_admin.settings import Settings as AdminSettings
from tasks.options import BY_VARIABLE
from tasks.settings import load_regions
from tests.app.conftest import api_of
from tests.rig import ROOT, Platform, free_port

PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = ("bash", "sh")
#: These are data, read without being told to.
DATA = ("json", "yaml", "ini")
#: Where the pages say that things are.
API = re.compile(r"http://(localhost|127\.0\.0\.1):8000")
KEY = re.compile(r"gpi_\.\.\.|\$KEY\b")
MARK = re.compile(r"<!-- (?P<how>run|run by|not run): (?P<what>[^\n]+?)(, answers (?P<status>\d{3}))? -->$")
#: A worker's name in docs/fleet.md.
WORKER = "asia-east-gpu7-cuda0"
BLOCK_S = 60
#: curl as a reader has it, but a refusal is a failure, and its status is told.
CURL = """
curl() {
  command curl --silent --show-error --fail-with-body --max-time 30 "$@" -w '%{stderr}\\nstatus %{http_code}\\n'
}
set -euo pipefail
"""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    mark: re.Match[str] | None

    @property
    def name(self) -> str:
        """Where it stands."""
        return f"{self.page.name}:{self.line}"

    def marked(self, how: str, what: str = "") -> bool:
        """Whether it says so of itself."""
        return self.mark is not None and self.mark["how"] == how and what in ("", self.mark["what"])


def blocks_of(page: Path) -> list[Block]:
    """Every block of a page, first one first."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found = []
    for token in MarkdownIt().parse("\n".join(lines)):
        if token.type == "fence" and token.map:
            first = token.map[0]
            mark = MARK.match(lines[first - 1].strip()) if first else None
            found.append(Block(page, first + 1, token.info.strip(), token.content, mark))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
#: With the first key, every request needs one: pages without come first, then the one that makes its own.
KEYLESS, OWN_KEY, KEYED = range(3)


def needs(page: Path) -> int:
    """What a page needs of keys."""
    text = page.read_text(encoding="utf-8")
    return OWN_KEY if "\nKEY=$(" in text else KEYED if KEY.search(text) else KEYLESS


RUN = sorted({block.page for block in BLOCKS if block.marked("run", "platform")}, key=lambda page: (needs(page), page))


class Reader:
    """Somebody who follows a page: a folder with a photo and a sound, and what the blocks before have set."""

    def __init__(self, url: str, key: str, folder: Path) -> None:
        self.url = url
        self.key = key
        self.folder = folder
        bin_folder = Path(sys.executable).parent
        self.environ = {
            **{name: value for name, value in os.environ.items() if name not in BY_VARIABLE},
            "PATH": f"{ROOT}:{bin_folder}:{os.environ['PATH']}",
            "URL": url,
            "KEY": key,
            "GPU_API_URL": url,
            "GPU_API_KEY": key,
            "no_proxy": "127.0.0.1",
        }
        self._names: dict[str, object] = {}
        for name in ("photo.jpg", "circle.png"):
            Image.new("RGB", (32, 32), (255, 140, 0)).save(folder / name)
        for name in ("speech.ogg", "talk.mp3"):
            shutil.copy(ROOT / "local" / "speech.ogg", folder / name)

    def follow(self, block: Block) -> None:
        """Do what a block says; fails as it fails."""
        text = API.sub(self.url, block.text).replace("gpi_...", self.key)
        if block.language == "python":
            exec(compile(text, block.name, "exec"), self._names)
            return
        after = self.folder / "environ"
        done = subprocess.run(
            ["bash", "-c", f"{CURL}set -a\n{text}\nset +a; env -0 > {after}"],
            cwd=self.folder,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=BLOCK_S,
            check=False,
        )
        said = f"{block.name}\n{done.stdout}\n{done.stderr}"
        if block.mark and (status := block.mark["status"]):
            assert re.findall(r"^status (\d+)$", done.stderr, re.MULTILINE)[-1] == status, said
            return
        assert done.returncode == 0, said
        # A stream is answered with 200 whatever becomes of its job.
        assert not re.search(r'"status": ?"failed"', done.stdout), said
        self.environ = dict(pair.split("=", 1) for pair in after.read_text().split("\0") if pair)


@pytest.fixture(scope="module")
def platform(echo_platform: Callable[..., Platform]) -> Iterator[tuple[Platform, str]]:
    """The API on a port, control, and a worker of every type, which takes direct jobs too."""
    direct = free_port()
    made = echo_platform(
        GPU_NAME=WORKER,
        GPU_DIRECT_ENABLED="1",
        GPU_DIRECT_HOST="127.0.0.1",
        GPU_DIRECT_PORT=str(direct),
        GPU_DIRECT_PUBLIC_URL=f"http://127.0.0.1:{direct}",
    )
    with api_of(made) as url:
        yield made, url


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flask]:
    """The API's commands and routes, with nothing behind them."""
    folder = tmp_path_factory.mktemp("routes")
    made = create_app(Settings(f"sqlite:///{folder / 'jobs.db'}", str(folder), load_regions({}), "asia-east"))
    yield made
    made.extensions["dispatch"].close()
    made.extensions["database"].dispose()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_a_page_is_followed_from_its_first_line_to_its_last(platform, page, tmp_path, monkeypatch):
    missing = [program for program in ("bash", "curl", "jq") if not shutil.which(program)]
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"these are missing: {missing}")
    made, url = platform
    keys = Keys(open_database(made.database_url))
    key = keys.create("reader", list(Scope)) if needs(page) == KEYED else ""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "client", sys.modules["app.client"])
    reader = Reader(url, key, tmp_path)

    for block in blocks_of(page):
        if block.marked("run", "platform"):
            monkeypatch.setenv("KEY", reader.environ["KEY"])
            reader.follow(block)


def test_the_engine_that_is_shown_answers_a_job():
    (block,) = (block for block in BLOCKS if block.marked("run", "engine"))
    names: dict[str, Any] = {}
    exec(compile(block.text, block.name, "exec"), names)
    said: list[str] = []
    engine = names["Engine"](find(JobType.LLM, "echo"), Device("cpu"))

    params = load_params(JobType.LLM, {"messages": [{"role": "user", "content": "olleh uoy"}]})
    result = engine.run(params, lambda heard: said.append(heard.delta) if isinstance(heard, Text) else None)
    engine.close()

    assert RESULTS[JobType.LLM].validate(result) == {}
    assert "".join(said) == result["response"] == "you hello"


def test_both_front_doors_show_the_same_code():
    """One of them is run."""

    def code(page: Path) -> list[str]:
        return [re.sub(r" +#.*", "", block.text) for block in blocks_of(page) if block.language != "text"]

    assert code(PAGES[0]) == code(PAGES[1])


def test_no_block_is_silent_about_how_it_is_checked():
    assert [b.name for b in BLOCKS if b.language not in (*DATA, "text") and b.mark is None] == []
    assert [
        b.name
        for b in BLOCKS
        if b.marked("run") and b.mark and b.mark["what"] not in ("platform", "settings", "engine")
    ] == []
    for block in BLOCKS:
        if block.marked("run by") and block.mark:
            assert block.page.name in (ROOT / block.mark["what"]).read_text(encoding="utf-8"), block.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_data_and_programs_can_be_read(page):
    for block in blocks_of(page):
        match block.language:
            case "json":
                lines = block.text.splitlines()
                texts = lines if all(line.startswith("{") and line.endswith("}") for line in lines) else [block.text]
                assert all(json.loads(text) for text in texts), block.name
            case "yaml":
                assert yaml.safe_load(block.text), block.name
            case "ini" if not block.marked("run", "settings"):
                parser = configparser.RawConfigParser(strict=False)
                parser.read_string(block.text)
                assert parser.sections(), block.name
            case "python":
                ast.parse(block.text, block.name)
            case "bash" | "sh":
                read = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
                assert read.returncode == 0, (block.name, read.stderr)


def test_what_is_shown_as_settings_is_taken():
    for block in (block for block in BLOCKS if block.marked("run", "settings")):
        told = {name: value or "" for name, value in dotenv_values(stream=io.StringIO(block.text)).items()}
        settings = Settings.from_environ({"GPU_ALLOW_PLAINTEXT": "1", **told})
        assert settings != Settings.from_environ({}), block.name


def test_every_link_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), (page.name, target)


def test_both_front_doors_name_every_page():
    for page in PAGES[:2]:
        text = page.read_text(encoding="utf-8")
        assert [one.name for one in PAGES[2:] if f"docs/{one.name}" not in text] == []


def commands() -> Iterator[tuple[str, str]]:
    """Each command line of a shell block, with where it stands."""
    for block in BLOCKS:
        if block.language in SHELL:
            text = block.text.replace("\\\n", " ")
            for line in text.splitlines():
                yield block.name, line


def test_commands_and_modules_that_are_named_exist(app: Flask):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for where, line in commands():
        for target in re.findall(r"^make ((?:\w+ ?)+)", line):
            assert set(target.split()) <= set(targets), where
        for module in re.findall(r"python -m ([\w.]+)", line):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or path.is_dir() or module in ("pytest", "venv"), where
        for words in re.findall(r"flask --app wsgi ((?:[a-z]+ ?)+)", line):
            _find(app.cli, words.split(), where)
        for words in re.findall(r"^gpuctl ((?:[a-z]+ ?)+)", line):
            _find(gpuctl, words.split(), where)


def _find(group: click.Command, words: list[str], where: str) -> None:
    for word in words:
        if not isinstance(group, click.Group):
            return
        assert word in group.commands, (where, word)
        group = group.commands[word]


def test_requests_that_are_shown_have_a_route(app: Flask, tmp_path: Path):
    admin = gpu_admin.create_app(
        AdminSettings.from_environ({"GPU_ADMIN_DATA_DIR": str(tmp_path), "GPU_ADMIN_CONFIG": os.devnull})
    )
    for where, line in commands():
        for command in re.findall(r"curl [^|;)]*", line):
            if not (found := re.search(r"(?:(localhost|127\.0\.0\.1):(8000|6004)|\$URL)(/[\w./$*{}<>-]*)", command)):
                continue
            path = re.sub(r"\$\{?\w+\}?", "x", found[3])
            said = re.search(r"-X (\w+)|--request (\w+)", command)
            posts = re.search(r" (-d|--json|-F) ", command)
            method = (said[1] or said[2]) if said else "POST" if posts else "GET"
            urls = (admin if found[2] == "6004" else app).url_map.bind("localhost")
            try:
                urls.match(path, method=method)
            except (NotFound, MethodNotAllowed) as error:
                raise AssertionError(f"{where}: {method} {path}") from error
