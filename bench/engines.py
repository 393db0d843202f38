"""Every engine: jobs per second beside its bare library, memory, what a cancel takes, and whether batching shows.

    python -m bench.engines [--types embedding,llm] [--seconds 2 | --jobs N] [--rounds N] [--memory-jobs N]
        [--cancels 50]

The models are the demo's, or those that GPU_LLM_MODEL and its kind name. The ways to compute the same jobs take turns,
round after round; the machine's speed drifts, so read the ratios.
"""

import argparse
import base64
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from bench.rig import Client, Rig, rig
from bench.samples import JOBS, SAMPLES
from bench.sides import Side, closed_loop, variable_of
from engines import catalogue, packaged
from engines.catalogue import DEFAULT_ON_CPU, JobType

CLIENTS = (1, 4, 16)
#: Jobs whose answers are compared.
COMPARED = 8
#: Tiny jobs before memory is first read.
WARM_JOBS = 20


def main() -> None:
    """Measure and print, one type after the other; exit code 1 if one could not be measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--types", default=",".join(SAMPLES), help="some of them, joined by commas")
    parser.add_argument("--seconds", type=float, default=2, help="of each turn; jobs begun by then are waited for")
    parser.add_argument("--jobs", type=int, help="of each turn, instead of seconds; 16 at least for 16 clients")
    parser.add_argument("--rounds", type=int, help="3, for slow types 2, if left out")
    parser.add_argument("--memory-jobs", type=int, help="to watch memory over; 500, for whisper 30, if left out")
    parser.add_argument("--cancels", type=int, default=50)
    options = parser.parse_args()
    missing = []
    for job_type in [JobType(name) for name in options.types.split(",")]:
        if reason := prepare(job_type):
            missing.append(f"{job_type} is not measured: {reason}")
            continue
        sample = SAMPLES[job_type]
        with Side("library", job_type) as library, Side("engine", job_type) as engine:
            said = engine.loaded
            print(f"\n{job_type}: {said['model']}, {said['dtype']} on {said['device']}, {said['slots']} slots")
            # First, since it warms both up.
            equality(job_type, library, engine, min(COMPARED, options.jobs or COMPARED))
            with rig() as made:
                made.start_platform(f"asia-east.{job_type}")
                speed(ways(job_type, made, library, engine, options), options.rounds or sample.rounds)
            cancels(engine, options.cancels)
        memory(job_type, options.memory_jobs or sample.memory_jobs)
    if missing:
        sys.exit("\n".join(missing))


def prepare(job_type: JobType) -> str | None:
    """See to it that every process loads the same model; why it cannot, if its weights are not there."""
    variable, model = variable_of(job_type), catalogue.find(job_type, DEFAULT_ON_CPU[job_type])
    if os.environ.setdefault(variable, model.id) != model.id:
        return None
    if model.packaged:
        packaged.prepare(model.packaged)
    if model.folder and not Path(model.folder).is_dir():
        return f"{model.folder} is not there; shapes/ trains it, or set {variable}"
    return None


def equality(job_type: JobType, library: Side, engine: Side, count: int) -> None:
    """Print how far the same jobs' answers lie apart, computed alone and together."""
    together = SAMPLES[job_type].together
    ours, theirs = (side.ask("answers", count=count, together=1) for side in (engine, library))
    compared = {
        "engine, together and alone": (engine.ask("answers", count=count, together=count), ours),
        "alone, engine and library": (ours, theirs),
    }
    if together > 1:
        compared["library, batched and alone"] = (library.ask("answers", count=count, together=together), theirs)
    for name, (some, others) in compared.items():
        print(f"  {name:28}{difference(job_type, some, others)}", flush=True)


def difference(job_type: JobType, some: Sequence[Any], others: Sequence[Any]) -> str:
    """In words: the largest between vectors or pixels, the number of equal texts."""
    if job_type is JobType.EMBEDDING:
        return f"{len(some)} vectors differ by {np.abs(np.array(some) - np.array(others)).max():.1e} at most"
    if job_type is JobType.IMAGE_GEN:
        one, other = (np.array([pixels(file) for file in files]) for files in (some, others))
        apart = np.abs(one - other)
        share = apart.astype(bool).mean()
        return f"{len(some)} pictures differ by {apart.max()} of 255 at most, in {share:.2%} of their values"
    return f"{sum(map(str.__eq__, some, others))} of {len(some)} texts are equal"


def pixels(file: str) -> np.ndarray[Any, np.dtype[np.int16]]:
    """The pixels of a PNG in Base64, wide enough to be subtracted."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(file))), dtype=np.int16)


def ways(
    job_type: JobType, made: Rig, library: Side, engine: Side, options: argparse.Namespace
) -> dict[str, Callable[[], float]]:
    """Each way to compute the type's jobs for one turn, giving jobs per second."""
    sample, turn = SAMPLES[job_type], {"seconds": options.seconds, "jobs": options.jobs}
    bodies = [{"type": job_type, "params": job} for job in sample.jobs()]

    def connect() -> Callable[[int], object]:
        client = Client(made.port)
        return lambda number: client.post("/api/v1/jobs/sync?timeout=600", bodies[number % JOBS])

    closed_loop(connect, 4, seconds=0)
    found: dict[str, Callable[[], float]] = {ALONE: partial(library.ask, "rate", together=1, **turn)}
    if sample.together > 1:
        found[BATCHED] = partial(library.ask, "rate", together=sample.together, **turn)
    for clients in CLIENTS:
        found[f"engine, {clients} at once"] = partial(engine.ask, "rate", together=clients, **turn)
        found[f"platform, {clients} at once"] = partial(closed_loop, connect, clients, **turn)
    return found


ALONE, BATCHED = "library, one at a time", "library, batched"


def speed(ways: Mapping[str, Callable[[], float]], rounds: int) -> None:
    """Print jobs per second of each way, and ratios: each the median of those within a round."""
    figures: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            figures[name].append(way())

    def ratio(name: str, other: str) -> str:
        if name == other or other not in figures:
            return "-"
        return f"{median(a / b for a, b in zip(figures[name], figures[other], strict=True)):.2f}"

    print(f"  {f'medians of {rounds} rounds':28}{'jobs/s':>9}{'x library':>11}{'x batched':>11}{'x engine':>10}")
    for name, rates in figures.items():
        bare = name.replace("platform", "engine")
        ratios = f"{ratio(name, ALONE):>11}{ratio(name, BATCHED):>11}{ratio(name, bare):>10}"
        print(f"  {name:28}{median(rates):9.2f}{ratios}")
    if BATCHED not in figures:
        print("  - : the library takes one job at a time")


def cancels(engine: Side, count: int) -> None:
    """Print how long cancels of jobs that ran alone took, beside a step."""
    said = engine.ask("cancels", count=count)
    waits = sorted(wait * 1000 for wait in said["waits"])
    p50, p99 = waits[len(waits) // 2], waits[int(len(waits) * 0.99)]
    print(f"  {count} cancels: p50 {p50:.1f} ms, p99 {p99:.1f} ms; {said['too_late']} more came too late to be heard")
    step, longest, whole = (said[name] * 1000 for name in ("step", "longest", "job"))
    print(f"  steps of {step:.1f} ms (median), at most {longest:.1f} ms without a report, in a job of {whole:.0f} ms")


def memory(job_type: JobType, jobs: int) -> None:
    """Print the resident memory of a process that holds the engine and nothing else."""
    with Side("engine", job_type) as fresh:
        torch, libraries, loaded = fresh.loaded["resident"]
        warm, half, end = fresh.ask("memory", warm=WARM_JOBS, jobs=jobs)
    print(f"  resident MiB: torch {torch}, with the engine's libraries {libraries}, loaded {loaded},")
    grown = f"{end - warm:+d} since, {end - half:+d} in the second half"
    print(f"    after {WARM_JOBS} tiny jobs {warm}, after {jobs} more {end} ({grown})", flush=True)


if __name__ == "__main__":
    main()
