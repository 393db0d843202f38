"""The bare engine or the bare library in a process of its own: both ends of what bench.engines asks of it.

A line of JSON asks, a line of JSON answers; the first answer says that the model is loaded.
"""

import argparse
import importlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from statistics import median
from threading import Event
from typing import Any, Self

import psutil

from bench.rig import ROOT
from bench.samples import JOBS, SAMPLES, Params
from engines.catalogue import JobType, Model
from engines.contract import Device, JobCancelled, Progress, Text
from engines.schemas import load_params
from tasks.settings import MODEL_VARIABLES

MIB = 2**20
#: Whole jobs whose steps are timed before any is cancelled.
TIMED = 5
#: Reports that lie closer together tell of the same step.
LEAST_STEP_S = 0.001


class Side:
    """The asking end."""

    def __init__(self, kind: str, job_type: JobType) -> None:
        """kind: "engine" or "library"."""
        self._name = f"{kind} of {job_type}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.sides", kind, job_type],
            cwd=ROOT,
            env={**os.environ, "GOMP_SPINCOUNT": "10000", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )

    @cached_property
    def loaded(self) -> Params:
        """What it said of itself; waits until it is loaded."""
        said: Params = self._read()
        return said

    def ask(self, what: str, **arguments: Any) -> Any:
        """Call a method there."""
        assert self.loaded
        assert self._process.stdin
        self._process.stdin.write(json.dumps([what, arguments]).encode() + b"\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            sys.exit(f"The {self._name} ended:\n{self._log.read().decode()[-3000:]}")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._log.close()


# The answering end.


class BareLibrary:
    """The library, called by one thread."""

    def __init__(self, job_type: JobType, model: Model, device: Device) -> None:
        from bench.libraries import LIBRARIES, Library

        self._jobs = SAMPLES[job_type].jobs()
        self._library: Library = LIBRARIES[job_type](model, device)
        self.about: Params = {}

    def rate(self, together: int, seconds: float, jobs: int | None) -> float:
        """Jobs per second, so many in one call."""
        calls = None if jobs is None else max(1, jobs // together)
        return together * closed_loop(lambda: lambda call: self._call(call * together, together), 1, seconds, calls)

    def answers(self, count: int, together: int) -> list[Any]:
        """The answers to the first jobs, so many in one call."""
        return [answer for first in range(0, count, together) for answer in self._call(first, together)][:count]

    def _call(self, first: int, together: int) -> list[Any]:
        import torch

        with torch.inference_mode():
            return self._library([self._jobs[number % JOBS] for number in range(first, first + together)])


class BareEngine:
    """The engine that a worker holds, called by as many threads as are asked for."""

    def __init__(self, job_type: JobType, model: Model, device: Device) -> None:
        from engines.loading import load

        resident = [rss()]
        importlib.import_module(model.engine.partition(":")[0])
        resident.append(rss())
        self._engine = load(model, device)
        resident.append(rss())
        #: MiB with our own code and torch, with the engine's libraries, with the model.
        self.about: Params = {"slots": self._engine.slots, "resident": resident}
        sample = SAMPLES[job_type]
        self._job_type = job_type
        self._jobs, self._tiny, self._long = (
            [load_params(job_type, job) for job in sample.jobs(changes)] for changes in ({}, sample.tiny, sample.long)
        )

    def rate(self, together: int, seconds: float, jobs: int | None) -> float:
        """Jobs per second of so many threads."""
        return closed_loop(lambda: lambda number: self._run(self._jobs, number), together, seconds, jobs)

    def answers(self, count: int, together: int) -> list[Any]:
        """The answers to the first jobs, so many at a time."""
        with ThreadPoolExecutor(together) as pool:
            results = pool.map(lambda number: self._run(self._jobs, number), range(count))
            return [answer_of(self._job_type, result) for result in results]

    def memory(self, warm: int, jobs: int) -> list[int]:
        """MiB after that many tiny jobs to warm up, after half of the others, and after all."""
        clients = min(self._engine.slots, JOBS)
        resident = []
        for count in (warm, jobs // 2, jobs - jobs // 2):
            closed_loop(lambda: lambda number: self._run(self._tiny, number), clients, jobs=count)
            resident.append(rss())
        return resident

    def cancels(self, count: int) -> Params:
        """Seconds from the moment that report() raises until run() has raised, for jobs that run alone.

        Also how many jobs were completed instead, since no report followed; the median time between two steps of a job
        and the longest time without a report, its begin and its end included.
        """
        steps, longest, whole = [], 0.0, []
        for number in range(TIMED):
            watched, began = Watched(), time.perf_counter()
            self._engine.run(self._long[number], watched)
            times = [began, *watched.times, time.perf_counter()]
            gaps = [after - before for before, after in itertools.pairwise(times)]
            steps += [gap for gap in gaps[1:-1] if gap > LEAST_STEP_S]
            longest = max(longest, *gaps)
            whole.append(times[-1] - began)
        waits: list[float] = []
        too_late = 0
        draw = random.Random(0)
        with ThreadPoolExecutor(1) as pool:
            while len(waits) < count:
                watched = Watched()
                ended = pool.submit(self._stopped_at, self._long[len(waits) % JOBS], watched)
                time.sleep(draw.uniform(0, median(whole)))
                began = time.perf_counter()
                watched.stop.set()
                stopped = ended.result()
                if stopped is None:
                    too_late += 1
                else:
                    waits.append(stopped - began)
        return {"waits": waits, "too_late": too_late, "step": median(steps), "longest": longest, "job": median(whole)}

    def _run(self, jobs: Sequence[dict[str, Any]], number: int) -> dict[str, Any]:
        return self._engine.run(jobs[number % JOBS], lambda _: None)

    def _stopped_at(self, params: Params, watched: "Watched") -> float | None:
        """When run() had raised; None if it was completed."""
        try:
            self._engine.run(params, watched)
        except JobCancelled:
            return time.perf_counter()
        return None


class Watched:
    """A report() that keeps when it was told of progress, and raises once it is to stop."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.stop = Event()

    def __call__(self, event: Progress | Text) -> None:
        # A token is told as text and as progress: one step.
        if isinstance(event, Progress):
            self.times.append(time.perf_counter())
        if self.stop.is_set():
            raise JobCancelled("by the measurement")


def closed_loop(
    connect: Callable[[], Callable[[int], object]], clients: int, seconds: float = 0, jobs: int | None = None
) -> float:
    """Jobs per second of so many threads, each doing one after the other.

    connect: gives each thread what it calls with the number of a job. jobs: how many in all; None for as many as are
    begun in that many seconds, and one for each thread at least.
    """
    numbers = itertools.count() if jobs is None else iter(range(jobs))
    began = time.perf_counter()

    def work(_: int) -> int:
        call, done = connect(), 0
        while (number := next(numbers, None)) is not None:
            call(number)
            done += 1
            if jobs is None and time.perf_counter() - began > seconds:
                break
        return done

    with ThreadPoolExecutor(clients) as pool:
        done = sum(pool.map(work, range(clients)))
    return done / (time.perf_counter() - began)


def answer_of(job_type: JobType, result: Params) -> Any:
    """What is compared of a result."""
    if job_type is JobType.EMBEDDING:
        return result["embeddings"][0]
    return result[{JobType.IMAGE_GEN: "image_base64", JobType.WHISPER: "text"}.get(job_type, "response")]


def variable_of(job_type: JobType) -> str:
    """The setting that names the type's model."""
    return next(name for name, known in MODEL_VARIABLES.items() if known is job_type)


def rss() -> int:
    """Resident memory of this process, in MiB."""
    return round(psutil.Process().memory_info().rss / MIB)


def main() -> None:
    """Load, say so, and answer until nobody asks any more."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("kind", choices=("engine", "library"))
    parser.add_argument("job_type", type=JobType)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # What libraries print is no answer.
    os.dup2(2, 1)

    from engines.loading import detect_device, pick_dtype, resolve

    model, device = resolve(options.job_type, os.environ[variable_of(options.job_type)]), detect_device()
    kind = BareEngine if options.kind == "engine" else BareLibrary
    side = kind(options.job_type, model, device)
    about = {"model": model.id, "device": device.name, "dtype": pick_dtype(device), **side.about}
    print(json.dumps(about), file=answers)
    for line in sys.stdin:
        what, arguments = json.loads(line)
        print(json.dumps(getattr(side, what)(**arguments)), file=answers)


if __name__ == "__main__":
    main()
