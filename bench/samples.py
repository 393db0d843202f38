"""How each job type is measured: its jobs, and how many of them its bare library takes at once."""

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import soundfile
from numpy import zeros

from bench.chat import SUBJECTS, params
from bench.rig import ROOT
from engines.catalogue import JobType
from shapes import world

Params = Mapping[str, Any]

SPEECH = ROOT / "local" / "speech.ogg"

#: Different jobs of each type; they come round again.
JOBS = 16


@dataclass(frozen=True, slots=True)
class Sample:
    """What is asked of one job type."""

    #: Params of job n.
    job: Callable[[int], Params]
    #: How many the library takes in one call; 1 where it takes no more.
    together: int
    #: What makes a job as small as it can be, to count memory over many of them.
    tiny: Params = field(default_factory=dict)
    #: What makes a job last long enough to be cancelled.
    long: Params = field(default_factory=dict)
    #: How many tiny ones, and how many rounds, there is time for.
    memory_jobs: int = 500
    rounds: int = 3

    def jobs(self, changes: Params | None = None) -> list[Params]:
        """Params of all jobs, with those changes."""
        return [{**self.job(number), **(changes or {})} for number in range(JOBS)]


def chat(number: int) -> Params:
    """One question, 16 tokens of an answer, greedy."""
    return params(f"{number}. Tell me a long story about {SUBJECTS[number % len(SUBJECTS)]}.", 16)


def picture(number: int) -> Params:
    """A caption of one scene; size and steps as the model draws best."""
    return {"prompt": world.captions(scene(number))[0], "seed": number}


def question(number: int) -> Params:
    """What is on a picture of one scene: about ten words."""
    file = io.BytesIO()
    world.draw(scene(number)).save(file, "PNG")
    return {"image_base64": encoded(file), "question": "What is in this picture?", "max_tokens": 32}


@cache
def clip(number: int) -> Params:
    """The demo's speech, 3.4 s, behind a little silence."""
    speech, rate = soundfile.read(SPEECH, dtype="float32")
    silence, file = zeros(number * rate // 10, dtype="float32"), io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, 1, format="OGG") as ogg:
        ogg.write(silence)
        ogg.write(speech)
    return {"audio_base64": encoded(file), "language": "en"}


def text(number: int) -> Params:
    """One to four sentences."""
    return {"input": " ".join(f"{number}. Somebody wrote about {about}." for about in SUBJECTS[: 1 + number % 4])}


def scene(number: int) -> world.Scene:
    """Scenes that differ in colour, shape and ground."""
    return world.SCENES[number * 37 % len(world.SCENES)]


def encoded(file: io.BytesIO) -> str:
    """A file as Base64."""
    return base64.b64encode(file.getvalue()).decode("ascii")


SAMPLES = {
    JobType.EMBEDDING: Sample(text, 16, long={"input": [" ".join(SUBJECTS * 4)] * 32}),
    JobType.WHISPER: Sample(clip, 1, memory_jobs=30, rounds=2),
    # Some schedulers cannot draw in one step.
    JobType.IMAGE_GEN: Sample(picture, 4, tiny={"steps": 2}),
    JobType.VISION: Sample(question, 4, tiny={"max_tokens": 2}, long={"question": "Describe this image in detail."}),
    JobType.LLM: Sample(
        chat,
        16,
        tiny={
            "messages": [{"role": "system", "content": "."}, {"role": "user", "content": "Hello."}],
            "max_tokens": 2,
        },
        long={"max_tokens": 24},
        rounds=2,
    ),
}
