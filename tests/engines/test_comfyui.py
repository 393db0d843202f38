"""Workflows on a ComfyUI: a program with its API, or a real checkout, which the same tests run against by

COMFYUI_DIRECTORY=/path/to/ComfyUI COMFYUI_PYTHON=/path/to/its/python pytest tests/engines/test_comfyui.py
"""

import base64
import io
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from marshmallow import ValidationError
from PIL import Image

from engines.catalogue import JobType, UnknownModel
from engines.comfyui import engine as comfyui
from engines.comfyui import outputs
from engines.comfyui.progress import Nodes
from engines.contract import (
    Device,
    EngineBroken,
    EngineError,
    InvalidInput,
    JobCancelled,
    JobTimedOut,
    OutOfMemory,
    Progress,
    ServerAway,
)
from engines.loading import load, resolve
from engines.schemas import RESULTS, load_params
from tests.gpu_admin.comfyui_server import REAL, ComfyUi, blurred
from tests.rig import free_port, until

program_only = pytest.mark.skipif(bool(REAL), reason="orders the program what a real ComfyUI does by chance only")
COLORS = itertools.count(1)
SAVED = {"class_type": "SaveImage", "inputs": {"images": ["p", 0], "filename_prefix": "kept/cat"}}


def picture(color: tuple[int, int, int] = (10, 20, 30), kind: str = "PNG") -> str:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def empty(side: int = 8, **changes: int) -> dict[str, Any]:
    inputs = {"width": side, "height": side, "batch_size": 1, "color": next(COLORS), **changes}
    return {"class_type": "EmptyImage", "inputs": inputs}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUi]:
    started = ComfyUi(tmp_path_factory.mktemp("comfyui"))
    yield started
    started.kill()


@pytest.fixture(scope="module")
def engine(server: ComfyUi) -> Iterator[Any]:
    loaded = load(resolve(JobType.COMFYUI, server.url), Device("cpu"))
    yield loaded
    loaded.close()


@pytest.fixture
def fragile(tmp_path: Path) -> Iterator[tuple[ComfyUi, Any]]:
    """A server to be killed, and its engine."""
    started = ComfyUi(tmp_path)
    loaded = load(resolve(JobType.COMFYUI, started.url), Device("cpu"))
    yield started, loaded
    loaded.close()
    started.kill()


def run(engine: Any, workflow: dict[str, Any], report: Callable[[Any], None] = lambda _: None, **images: str) -> Any:
    named = {name.replace("_", "."): text for name, text in images.items()}
    return engine.run(load_params(JobType.COMFYUI, {"workflow": workflow, "images": named}), report)


class Stop:
    """A report that raises once it is told to."""

    def __init__(self, interruption: Exception | None = None) -> None:
        self.interruption = interruption or JobCancelled()
        self.now = threading.Event()
        self.heard: list[Progress] = []

    def __call__(self, event: Progress) -> None:
        self.heard.append(event)
        if self.now.is_set():
            raise self.interruption


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


# --- what comes back


def test_pictures_and_texts_come_back_by_node(engine: Any) -> None:
    workflow = {
        "p": empty(color=0xFF8000),
        "s": SAVED,
        "t": {"class_type": "PreviewAny", "inputs": {"source": "你好"}},
        "v": {"class_type": "PreviewImage", "inputs": {"images": ["p", 0]}},
    }

    result = run(engine, workflow)

    assert RESULTS[JobType.COMFYUI].validate(result) == {}
    images = {image["node"]: image for image in result["images"]}
    assert images.keys() == {"s", "v"}
    assert (images["s"]["format"], images["s"]["width"], images["s"]["height"]) == ("png", 8, 8)
    assert images["s"]["filename"].startswith("kept/cat_0")
    shown = Image.open(io.BytesIO(base64.b64decode(images["s"]["image_base64"])))
    assert shown.convert("RGB").getpixel((0, 0)) == (255, 128, 0)
    assert result["texts"] == [{"node": "t", "text": "你好"}]
    assert (result["files"], result["model"]) == ([], "comfyui")


def test_pictures_that_come_along_are_what_nodes_of_their_name_load(engine: Any, server: ComfyUi) -> None:
    workflow = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "cat.png"}},
        "p": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
        "s": SAVED,
    }

    first = run(engine, workflow, cat_png=picture((10, 20, 30)))
    other = run(engine, workflow, cat_png=picture((200, 0, 0), "WEBP"))

    pixels = []
    for result in (first, other):
        shown = Image.open(io.BytesIO(base64.b64decode(result["images"][0]["image_base64"])))
        pixels.append(shown.convert("RGB").getpixel((0, 0)))
    assert pixels[0] == (245, 235, 225)
    assert pixels[1] != pixels[0]
    # Two jobs' pictures of one name lie beside each other.
    assert {file.suffix for file in (server.folder / "input").iterdir()} >= {".png", ".webp"}


@program_only
def test_files_that_are_no_pictures_come_back_as_files(engine: Any) -> None:
    result = run(engine, {"w": {"class_type": "SaveWords", "inputs": {"text": "a song"}}})

    assert base64.b64decode(result["files"][0].pop("file_base64")) == b"a song"
    assert result["files"] == [{"node": "w", "filename": "words.txt"}]


def test_outputs_that_were_cleared_away_are_computed_anew(engine: Any, server: ComfyUi) -> None:
    workflow = {"p": empty(), "s": SAVED}
    first = run(engine, workflow)["images"][0]
    again = run(engine, workflow)["images"][0]
    (server.folder / "output" / first["filename"]).unlink()

    anew = run(engine, workflow)["images"][0]

    assert again["filename"] == first["filename"]
    assert base64.b64decode(anew["image_base64"]).startswith(b"\x89PNG")


def test_an_output_that_comfyui_leaves_out_is_warned_of(engine: Any) -> None:
    missing = {"class_type": "SaveImage", "inputs": {"images": ["p", 0]}}

    result = run(engine, {"p": empty(), "s": SAVED, "bad": missing})

    assert [image["node"] for image in result["images"]] == ["s"]
    assert "node bad (SaveImage), input filename_prefix" in result["warnings"][0]


def test_more_than_a_result_may_hold_fails_the_job(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "MOST_BYTES", 20)

    with pytest.raises(EngineError) as refused:
        run(engine, {"p": empty(), "s": SAVED})

    assert refused.value.code == "output_too_large"


# --- progress


def test_progress_counts_nodes_and_climbs_to_all_of_them(engine: Any) -> None:
    stop = Stop()
    workflow = blurred(6, next(COLORS))

    run(engine, workflow, stop)
    again = Stop()
    run(engine, workflow, again)

    done = [event.done for event in stop.heard]
    assert done == sorted(done)
    assert any(0 < some < 8 for some in done)
    assert stop.heard[-1] == again.heard[-1] == Progress(8, 8, "node")


def test_a_nodes_own_steps_count_and_progress_never_goes_back() -> None:
    nodes, told = Nodes(["1", "2", "3"]), []

    for kind, data in (
        ("execution_cached", {"nodes": ["1"]}),
        ("executing", {"node": "2"}),
        ("progress", {"node": "2", "value": 5, "max": 20}),
        ("progress", {"node": "2", "value": 19, "max": 20}),
        ("progress", {"node": "2", "value": 1, "max": 20}),
        ("executing", {"node": "2.0.1", "display_node": "2"}),
        ("executing", {"node": "3"}),
    ):
        assert nodes.hear({"type": kind, "data": {"prompt_id": "a", **data}}, "a") is False
        told.append(nodes.progress.done)

    assert told == [1, 1, 1.25, 1.95, 1.95, 1.95, 2]
    assert nodes.hear({"type": "executing", "data": {"prompt_id": "b", "node": None}}, "a") is False
    assert nodes.hear({"type": "executing", "data": {"prompt_id": "a", "node": None}}, "a") is True


# --- cancel and time-out


@pytest.mark.parametrize("era", [""] if REAL else ["old", "", "new"], ids=lambda era: era or "present")
def test_a_cancelled_workflow_stops_and_others_prompts_go_on(
    era: str, tmp_path: Path, background: ThreadPoolExecutor
) -> None:
    server = ComfyUi(tmp_path, era)
    try:
        engine: Any = load(resolve(JobType.COMFYUI, server.url), Device("cpu"))
        # Running.
        stop = Stop()
        job = background.submit(run, engine, blurred(80, 1), stop)
        until(server.running)
        ours = server.running()
        other = server.post("/prompt", prompt=blurred(3, 2)).json()["prompt_id"]
        stop.now.set()
        with pytest.raises(JobCancelled):
            job.result(15)
        assert ours[0] not in server.running()
        until(lambda: other in server.statuses(), 60)
        assert "execution_interrupted" in server.statuses()[ours[0]]
        assert "execution_success" in server.statuses()[other]

        # Waiting.
        other = server.post("/prompt", prompt=blurred(12, 3)).json()["prompt_id"]
        until(server.running)
        stop = Stop(JobTimedOut("late"))
        job = background.submit(run, engine, blurred(2, 4), stop)
        until(server.waiting)
        ours = server.waiting()
        stop.now.set()
        with pytest.raises(JobTimedOut):
            job.result(15)
        assert server.waiting() == []
        until(lambda: other in server.statuses(), 60)
        assert "execution_success" in server.statuses()[other]
        assert ours[0] not in server.statuses()
        engine.close()
    finally:
        server.kill()


def test_who_is_stopped_in_comfyui_itself_fails_and_says_so(
    engine: Any, server: ComfyUi, background: ThreadPoolExecutor
) -> None:
    first = background.submit(run, engine, blurred(80, next(COLORS)))
    until(server.running)
    second = background.submit(run, engine, blurred(2, next(COLORS)))
    until(server.waiting)

    server.post("/queue", delete=server.waiting())
    server.post("/interrupt")

    with pytest.raises(EngineError, match="interrupted it") as interrupted:
        first.result(30)
    with pytest.raises(EngineError, match="took it out") as removed:
        second.result(30)
    assert [error.value.code for error in (interrupted, removed)] == ["interrupted", "removed"]


# --- a server that fails


@program_only
def test_a_lost_socket_does_not_lose_the_job(engine: Any, server: ComfyUi, background: ThreadPoolExecutor) -> None:
    stop = Stop()
    job = background.submit(run, engine, blurred(20, next(COLORS)), stop)
    until(lambda: stop.heard and stop.heard[-1].done)

    server.post("/stand_in/cut")

    assert job.result(20)["images"]
    assert stop.heard[-1].done == 22


def test_a_server_that_dies_under_a_job_breaks_the_engine(
    fragile: tuple[ComfyUi, Any], background: ThreadPoolExecutor
) -> None:
    server, engine = fragile
    job = background.submit(run, engine, blurred(80, 1))
    until(server.running)

    server.kill()

    with pytest.raises(EngineBroken, match="went away"):
        job.result(20)
    with pytest.raises(EngineBroken, match="nobody listens"):
        run(engine, blurred(1, 2))


@program_only
def test_a_server_that_was_started_again_meanwhile_breaks_the_engine_too(
    engine: Any, server: ComfyUi, background: ThreadPoolExecutor
) -> None:
    job = background.submit(run, engine, blurred(20, next(COLORS)))
    until(server.running)

    server.post("/stand_in/forget")

    with pytest.raises(EngineBroken, match="does not know the prompt"):
        job.result(20)


def test_a_server_that_does_not_answer_at_start_is_waited_for_and_then_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfyui, "PATIENCE_S", 0.3)
    url = f"http://127.0.0.1:{free_port()}"

    with pytest.raises(ServerAway, match=f"{url}.*GPU_COMFYUI_URL"):
        load(resolve(JobType.COMFYUI, url), Device("cpu"))


def test_a_closed_engine_withdraws_what_runs_and_takes_nothing_more(
    fragile: tuple[ComfyUi, Any], background: ThreadPoolExecutor
) -> None:
    server, engine = fragile
    job = background.submit(run, engine, blurred(80, 1))
    until(server.running)

    engine.close()
    engine.close()

    with pytest.raises(EngineBroken, match="closed"):
        job.result(20)
    assert server.running() == []
    with pytest.raises(EngineBroken, match="closed"):
        run(engine, blurred(1, 2))


# --- workflows that fail


@pytest.mark.parametrize(
    ("workflow", "words"),
    [
        ({"7": {"class_type": "NoSuchNode", "inputs": {}}}, r"NoSuchNode does not exist.*#7"),
        ({"p": {"class_type": "EmptyImage", "inputs": {}}}, "no outputs"),
        (
            {"p": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1}}, "s": SAVED},
            r"node p \(EmptyImage\), input color: Required input is missing",
        ),
        (
            {"p": {"class_type": "LoadImage", "inputs": {"image": "none.png"}}, "s": SAVED},
            r"node p \(LoadImage\).*Invalid image file: none.png",
        ),
    ],
    ids=["node", "outputs", "input", "picture"],
)
def test_a_workflow_that_comfyui_refuses_is_the_jobs_fault_with_its_node(
    engine: Any, workflow: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidInput, match=words):
        run(engine, workflow)


def test_memory_that_is_not_there_fails_the_job_with_its_node_and_the_next_one_runs(engine: Any) -> None:
    huge = empty(16384, batch_size=4096)

    with pytest.raises(OutOfMemory, match=r"Node p \(EmptyImage\)"):
        run(engine, {"p": huge, "s": SAVED})

    assert run(engine, {"p": empty(), "s": SAVED})["images"]


@program_only
def test_a_node_that_fails_is_named(engine: Any) -> None:
    broken = base64.b64encode(base64.b64decode(picture())[:-30]).decode()
    workflow = {"p": {"class_type": "LoadImage", "inputs": {"image": "cat.png"}}, "s": SAVED}

    with pytest.raises(EngineError, match=r"Node p \(LoadImage\) failed") as failed:
        run(engine, workflow, cat_png=broken)

    assert failed.value.code == "node_failed"


# --- params

DEEP: Any = []
for _ in range(40):
    DEEP = [DEEP]
NODE = {"class_type": "LoadImage", "inputs": {"image": "a.png"}}


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, "Missing data"),
        ({"workflow": {"nodes": [], "links": [], "version": 0.4}}, r"Export \(API\)"),
        ({"workflow": {}}, "1 to 500 nodes"),
        ({"workflow": {"1": {"inputs": {}}}}, "class_type"),
        ({"workflow": {"1": {"class_type": "A"}}}, "inputs"),
        ({"workflow": {"1": {"class_type": "A", "inputs": {}, "mode": 0}}}, "Unknown field"),
        ({"workflow": {"1": {"class_type": "A", "inputs": {"x": DEEP}}}}, "At most 16 lists"),
        ({"workflow": {"1": {"class_type": "A", "inputs": {"x": "\ud800"}}}}, "surrogate"),
        ({"workflow": {"1": "A"}}, "must be an object"),
        ({"workflow": {"1": NODE}, "images": {"../a.png": picture()}}, "plain file name"),
        ({"workflow": {"1": NODE}, "images": {"a.png": "bm90IGEgcGljdHVyZQ=="}}, "Not a picture"),
        ({"workflow": {"1": NODE}, "images": {"b.png": picture()}}, "No input of the workflow names it"),
        ({"workflow": {"1": NODE}, "client_id": "x"}, "Unknown field"),
    ],
)
def test_params_that_no_comfyui_could_take_are_refused_by_field(params: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        load_params(JobType.COMFYUI, params)


def test_only_types_with_a_server_are_named_by_url() -> None:
    assert resolve(JobType.COMFYUI, "http://10.0.0.5:8188/").url == "http://10.0.0.5:8188"
    assert resolve(JobType.COMFYUI, "comfyui").url == "http://127.0.0.1:8188"
    with pytest.raises(UnknownModel, match="llm names a model"):
        resolve(JobType.LLM, "http://10.0.0.5:8188")
    for wrong in ("ftp://host", "http://", "http://h:0", "http://u:p@h", "cumfy"):
        with pytest.raises(UnknownModel):
            resolve(JobType.COMFYUI, wrong)
