"""Speech to text with openai-whisper's models.

A pass computes one window of 30 s of each of a few clips; between two passes other jobs get their turn, so a short
clip need not wait for an hour of somebody else's. The windows are encoded together, and decoded together where they
are told the same: language, task, and what was said before, which is nothing at the begin of a clip.
"""

import base64
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from whisper import DecodingOptions, Whisper
from whisper.audio import N_FRAMES, pad_or_trim
from whisper.decoding import DecodingResult, decode, detect_language
from whisper.tokenizer import LANGUAGES, Tokenizer, get_tokenizer

from engines.catalogue import Model
from engines.contract import Device, InvalidInput, Progress, Report, Text
from engines.grouped import Grouped, Step
from engines.loading import pick_dtype
from engines.request import Request
from engines.thread import EngineThread, Way
from engines.whisper import sound, speech_network
from engines.whisper.sound import Samples, Sound
from engines.whisper.transcript import TEMPERATURES, Transcript, needs_another, spectrogram
from engines.whisper.words import prepare, words_of

logger = logging.getLogger(__name__)

#: Clips computed together. On two cores four windows took 0.73 of the time that they take one by one.
SLOTS = {"cpu": 4, "cuda": 8}
#: Above temperature 0 Whisper samples from torch's one generator: seeded for each window, a clip gives the same text
#: again, whatever is computed beside it.
SEED = 0


class Clip(Request):
    """One job: a clip, and what has been written down of it."""

    advice = "Choose a smaller model."

    def __init__(
        self,
        heard: Sound,
        language: str | None,
        task: str,
        report: Report,
        *,
        prompt: str | None = None,
        temperature: float = 0.0,
        word_timestamps: bool = False,
    ) -> None:
        """prompt: what was said before. temperature: the first that is tried."""
        super().__init__(report)
        self.duration = heard.duration
        #: Until the spectrogram is computed.
        self.samples: Samples | None = heard.samples
        #: None until it is detected.
        self.language = language
        self.task = task
        self.prompt = prompt
        self.temperatures = (temperature, *(higher for higher in TEMPERATURES if higher > temperature))
        #: The words so far, if they are asked for.
        self.words: list[dict[str, Any]] | None = [] if word_timestamps else None
        #: From the first pass on.
        self.transcript: Transcript | None = None

    @property
    def size(self) -> str:
        """What of it takes memory, for people."""
        return "A window of 30 s"

    def tell(self, event: Progress | Text) -> None:
        """Report how far this clip is; a pass over several is at another second in each."""
        done = self.transcript.seconds if self.transcript else 0
        super().tell(Progress(done, max(1, round(self.duration)), "second"))


class Engine:
    """A Whisper model that writes down up to `slots` clips at once."""

    def __init__(self, model: Model, device: Device) -> None:
        self.slots = SLOTS["cpu"]
        self._model = model
        self._device = device
        self._network: Whisper
        self._thread: EngineThread[Clip] = EngineThread(model.id, device, self._load)

    def run(self, params: Mapping[str, Any], report: Report) -> dict[str, Any]:
        """A WhisperResult for WhisperParams."""
        language, task = params["language"], params["task"]
        self._check_language(language)
        # Here and not in the engine thread, which computes other clips meanwhile.
        heard = sound.decode(base64.b64decode(params["audio_base64"]), lambda: report(Progress(0, None, "second")))
        if params["word_timestamps"]:
            prepare()
        clip = Clip(
            heard,
            language,
            task,
            report,
            prompt=params["prompt"],
            temperature=params["temperature"],
            word_timestamps=params["word_timestamps"],
        )
        del heard
        self._thread.submit(clip)
        assert clip.result is not None
        result = {**clip.result, "task": task, "duration": round(clip.duration, 3), "model": self._model.id}
        if task == "translate" and not self._translates:
            result["warnings"] = [
                f"{self._model.id} was not trained to translate: the text may be in the language that was spoken."
            ]
        return result

    @property
    def batch(self) -> int:
        """How many jobs are being computed together now."""
        return self._thread.batch

    def close(self) -> None:
        """Free the device. Jobs that still run end with EngineBroken."""
        self._thread.close()

    @property
    def _translates(self) -> bool:
        """Turbo and the distilled ones have fewer decoder layers, and have seen no translations."""
        dims = self._network.dims
        return bool(self._network.is_multilingual and dims.n_text_layer >= dims.n_audio_layer)

    def _check_language(self, language: str | None) -> None:
        known = list(LANGUAGES)[: self._network.num_languages] if self._network.is_multilingual else ["en"]
        if language is not None and language not in known:
            kind = f"{len(known)} languages" if len(known) > 1 else "English only"
            raise InvalidInput(
                f"language: {self._model.id} knows {kind}, and {language!r} is not among them. Leave it out or choose "
                "another model.",
                code="language_unsupported",
            )

    # From here on: the engine thread.

    def _load(self, between_steps: Callable[[], bool]) -> Way[Clip]:
        device = self._device
        try:
            self._network = speech_network.load(self._model, device, self._in_half(device))
        except speech_network.DoesNotFit as error:
            if device.name == "cpu" or not device.offload:
                raise
            logger.warning("%s is computed on the CPU: %s", self._model.id, error.message)
            device = Device("cpu", "float32")
            self._network = speech_network.load(self._model, device, half=False)
        self.slots = SLOTS[torch.device(device.name).type]
        speech = Speech(self._network, self._in_half(device), self.slots)
        speech.warm_up()
        logger.info("%s on %s, %d slots", self._model.id, device.name, self.slots)
        return Grouped(speech, between_steps)

    def _in_half(self, device: Device) -> bool:
        """openai-whisper computes in float16 on a GPU, unless float32 is set, and in float32 on a CPU."""
        return device.name != "cpu" and pick_dtype(device) != "float32"


class Speech:
    """The loaded model as the engine thread uses it."""

    unit = "second"

    def __init__(self, network: Whisper, half: bool, together: int) -> None:
        self._network = network
        self._half = half
        self._together = together

    def warm_up(self) -> None:
        """Compute a window of silence: kernels are chosen, the tokenizer is read."""
        features = self._encode([torch.zeros(self._network.dims.n_mels, N_FRAMES)])
        self._decode(features, "en", "transcribe", [], 0.0, sample_len=1)

    def key(self, request: Clip) -> tuple[()]:
        """Windows of all clips can share a pass."""
        return ()

    def pick(self, alike: Sequence[Clip]) -> Sequence[Clip]:
        """As many as there are slots."""
        return alike[: self._together]

    def compute(self, batch: Sequence[Clip], step: Step) -> None:
        """One window of each clip."""
        with self._steps(step):
            for clip in batch:
                if not clip.ended.is_set() and clip.transcript is None:
                    self._begin(clip, step)
            open_clips = [clip for clip in batch if not self._ended(clip)]
            if open_clips:
                self._next_windows(open_clips)

    def _begin(self, clip: Clip, step: Step) -> None:
        """Compute the spectrogram; detect the language if it was not given."""
        assert clip.samples is not None
        log_mel, frames = spectrogram(clip.samples, self._network.dims.n_mels, lambda: step(0, None))
        if clip.language is None:
            clip.language = "en"
            if self._network.is_multilingual:
                _, (probabilities,) = detect_language(self._network, self._encode([pad_or_trim(log_mel, N_FRAMES)]))
                clip.language = max(probabilities, key=probabilities.__getitem__)
        clip.transcript = Transcript(log_mel, frames, self._tokenizer(clip), clip.prompt)
        clip.samples = None

    def _next_windows(self, clips: Sequence[Clip]) -> None:
        transcripts = [clip.transcript for clip in clips if clip.transcript]
        features = self._encode([transcript.window() for transcript in transcripts])
        alike: dict[tuple[Any, ...], list[int]] = {}
        for index, (clip, transcript) in enumerate(zip(clips, transcripts, strict=True)):
            key = (clip.language, clip.task, tuple(transcript.prompt), clip.temperatures[0])
            alike.setdefault(key, []).append(index)
        for (language, task, prompt, first), indices in alike.items():
            results = self._decode(features[indices], language, task, list(prompt), first)
            for index, result in zip(indices, results, strict=True):
                window = features[index : index + 1]
                for temperature in clips[index].temperatures[1:]:
                    if clips[index].ended.is_set() or not needs_another(result):
                        break
                    (result,) = self._decode(window, language, task, list(prompt), temperature)
                self._take(clips[index], transcripts[index], result)
                self._ended(clips[index])

    def _take(self, clip: Clip, transcript: Transcript, result: DecodingResult) -> None:
        """Write down what a window said, with its words if they are asked for."""
        before, mel, frames = len(transcript.segments), transcript.window(), transcript.frames_left
        transcript.take(result)
        said = transcript.segments[before:]
        if clip.words is not None and said and not clip.ended.is_set():
            window = mel.to(self._network.device, torch.float16 if self._half else torch.float32)
            last_end_s = clip.words[-1]["end"] if clip.words else 0.0
            clip.words += words_of(said, self._network, self._tokenizer(clip), window, frames, last_end_s)

    def _encode(self, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        """windows: each (mels, 3000). Returns shape (windows, 1500, width)."""
        together = torch.stack(list(windows)).to(self._network.device)
        features: torch.Tensor = self._network.encoder(together.half() if self._half else together)
        return features

    def _decode(
        self,
        features: torch.Tensor,
        language: str,
        task: str,
        prompt: list[int],
        temperature: float,
        sample_len: int | None = None,
    ) -> list[DecodingResult]:
        torch.manual_seed(SEED)
        options = DecodingOptions(
            task=task,
            language=language,
            prompt=prompt,
            temperature=temperature,
            sample_len=sample_len,
            fp16=self._half,
        )
        results: list[DecodingResult] = decode(self._network, features, options)
        return results

    def _ended(self, clip: Clip) -> bool:
        """Whether there is nothing to compute of a clip; gives it its result if it was heard to its end."""
        transcript = clip.transcript
        if transcript and transcript.finished:
            clip.finish(
                {
                    "text": transcript.text,
                    "language": clip.language,
                    "segments": transcript.segments,
                    **({} if clip.words is None else {"words": clip.words}),
                }
            )
        return clip.ended.is_set()

    def _tokenizer(self, clip: Clip) -> Tokenizer:
        network = self._network
        return get_tokenizer(
            network.is_multilingual, num_languages=network.num_languages, language=clip.language, task=clip.task
        )

    @contextmanager
    def _steps(self, step: Step) -> Iterator[None]:
        """Call step before every layer of the encoder and every token of the decoder."""
        handles = [
            module.register_forward_pre_hook(lambda *_: step(0, None))
            for module in (*self._network.encoder.blocks, self._network.decoder)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
