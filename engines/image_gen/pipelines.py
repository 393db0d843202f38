"""Reading a text-to-image pipeline of diffusers and putting it where it fits, or saying in one sentence why not."""

import inspect
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, assert_never

import diffusers
import torch
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from safetensors import SafetensorError, safe_open

from engines.catalogue import DRAWINGS, Drawing, Model
from engines.contract import Device, EngineLoadError
from engines.loading import hub_options, locate, pick_dtype
from engines.memory import Need, does_not_fit, free_bytes
from engines.text.checkpoint import reason

#: What save_pretrained writes.
PARTS = "model_index.json and a folder for each component, with weights as *.safetensors"

#: What a pipeline is called with; the older ones of diffusers have no callback.
ARGUMENTS = {
    "prompt",
    "width",
    "height",
    "num_inference_steps",
    "guidance_scale",
    "generator",
    "output_type",
    "callback_on_step_end",
}

#: Trained in bfloat16: their activations leave the range of float16.
NO_FLOAT16 = ("FluxPipeline", "ZImagePipeline")

#: Weights of one precision: repositories also hold others beside them, as model.fp16.safetensors.
WEIGHTS = re.compile(r"[^.]+\.safetensors")

#: Decoding is the greediest moment of a picture: tensors of the decoder's last but one width, one value for each pixel,
#: that are alive together. Measured with torch's profiler on the autoencoder of SDXL and FLUX: 3.8.
DECODED_TENSORS = 4
#: That width in the autoencoders of SDXL, SD3, FLUX and Z-Image; for one whose configuration does not say.
DECODER_WIDTHS = (128, 256)


class Place(StrEnum):
    """Where the weights are while pictures are drawn."""

    #: On the device, all of them.
    DEVICE = "device"
    #: In host memory; each component is brought to the device when its turn comes.
    COMPONENTS = "components"
    #: In host memory; each layer is brought to the device when its turn comes, many times a picture.
    LAYERS = "layers"


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a pipeline takes, in bytes."""

    #: Weights, by component.
    components: Mapping[str, int]
    #: Activations of a picture.
    per_pixel: int
    #: Of the picture that must fit beside the weights, in pixels.
    side: int

    def need(self, weights: int) -> Need:
        """So many bytes of weights, and one picture."""
        return Need(weights, self.per_pixel * self.side**2, f"a picture of {self.side} x {self.side}")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A pipeline that is ready to draw."""

    #: The diffusers pipeline.
    pipeline: Any
    drawing: Drawing
    dtype: torch.dtype
    place: Place
    sizes: Sizes


def load(model: Model, device: Device) -> Loaded:
    """The model's pipeline, placed, in the device's dtype. Downloads what is needed and not there.

    Raises EngineLoadError.
    """
    # Its warnings quote the part of a prompt that was cut off.
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    source = locate(model)
    try:
        folder = Path(source)
        if not folder.is_dir():
            folder = Path(diffusers.DiffusionPipeline.download(source, use_safetensors=True, **hub_options(model)))
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        kind = _kind(model, index)
        drawing = model.drawing or _drawing(model, folder, kind)
        dtype = _pick_dtype(model, kind, device)
        sizes = Sizes(component_bytes(folder, index, dtype), _bytes_per_pixel(folder, dtype), drawing.side)
        free = free_bytes(device, torch.device(device.name).index or 0)
        place = choose_place(model.id, sizes, device, free, free_bytes(Device("cpu")))
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=model.trusted
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise EngineLoadError(reason(model, source, error, PARTS)) from error
    pipeline.set_progress_bar_config(disable=True)
    put(pipeline, place, device.name)
    return Loaded(pipeline, drawing, dtype, place, sizes)


def component_bytes(folder: Path, index: Mapping[str, Any], dtype: torch.dtype) -> dict[str, int]:
    """What the weights of each component take in that dtype, by the headers of their files.

    index: model_index.json, which names the components.
    """
    names = [name for name, made_by in index.items() if isinstance(made_by, list) and made_by[0] is not None]
    files = {name: [file for file in (folder / name).glob("*") if WEIGHTS.fullmatch(file.name)] for name in names}
    return {name: sum(_bytes_in(file, dtype) for file in there) for name, there in files.items() if there}


def choose_place(name: str, sizes: Sizes, device: Device, free: int, host: int) -> Place:
    """The fastest place for a pipeline of those sizes.

    free, host: bytes free on the device and in host memory.
    Raises EngineLoadError with the arithmetic if there is none.
    """
    whole = sizes.need(sum(sizes.components.values()))
    if whole.bytes <= free:
        return Place.DEVICE
    rooms = {device.name: free}
    if device.name != "cpu" and device.offload:
        if whole.weights_bytes * 1.1 <= host:
            largest = sizes.need(max(sizes.components.values()))
            return Place.COMPONENTS if largest.bytes <= free else Place.LAYERS
        rooms["the host"] = host
    raise EngineLoadError(does_not_fit(name, whole, device, rooms, spreads=False))


def put(pipeline: Any, place: Place, device: str) -> None:
    """Put a freshly read pipeline there, and let it decode one picture at a time."""
    match place:
        case Place.DEVICE:
            pipeline.to(device)
        case Place.COMPONENTS:
            pipeline.enable_model_cpu_offload(device=device)
        case Place.LAYERS:
            # A stream brings the next layer while one computes; without low_cpu_mem_usage it pins all weights at once.
            pipeline.enable_group_offload(
                onload_device=torch.device(device),
                offload_type="leaf_level",
                use_stream=device != "cpu",
                low_cpu_mem_usage=device != "cpu",
                # It is small, and SDXL's changes its dtype to decode, which the copies in host memory would not follow.
                exclude_modules="vae",
            )
        case _:
            assert_never(place)
    if hasattr(pipeline.vae, "use_slicing"):
        pipeline.vae.enable_slicing()
    if place is not Place.DEVICE:
        tile(pipeline)


def tile(pipeline: Any) -> bool:
    """Let it decode large pictures piece by piece from now on; false if it did already, or cannot."""
    if getattr(pipeline.vae, "use_tiling", True):
        return False
    pipeline.vae.enable_tiling()
    return True


def _kind(model: Model, index: Mapping[str, Any]) -> str:
    """The name of the pipeline's class, which draws from texts as the engine calls it. Raises EngineLoadError."""
    kind = index.get("_class_name")
    if not isinstance(kind, str):
        raise EngineLoadError(f"{model.id} needs code of its own repository, which is not run: choose another model.")
    text_to_image = {known.__name__: known for known in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}
    if kind not in text_to_image:
        raise EngineLoadError(
            f"{model.id} is a {kind}, which draws no pictures from texts in diffusers {diffusers.__version__}. Choose "
            f"a model of one of these: {', '.join(sorted({known for known, _ in DRAWINGS}))}."
        )
    if missing := ARGUMENTS - set(inspect.signature(text_to_image[kind].__call__).parameters):
        raise EngineLoadError(f"{model.id} is a {kind}, which takes no {', '.join(sorted(missing))}: choose another.")
    return kind


def _drawing(model: Model, folder: Path, kind: str) -> Drawing:
    """How a pipeline without a catalogue row of its own draws. Raises EngineLoadError."""
    guided = bool(_configuration(folder / "transformer").get("guidance_embeds"))
    if drawing := DRAWINGS.get((kind, guided)):
        return drawing
    raise EngineLoadError(
        f"How {model.id}, a {kind}, draws best is not known. Give it a row in engines/catalogue.py with its drawing."
    )


def _pick_dtype(model: Model, kind: str, device: Device) -> torch.dtype:
    name = pick_dtype(device)
    if name == "float16" and kind in NO_FLOAT16:
        if device.dtype == "float16":
            raise EngineLoadError(f"{model.id} overflows in float16. Set dtype to auto, bfloat16 or float32.")
        name = "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _bytes_per_pixel(folder: Path, dtype: torch.dtype) -> int:
    autoencoder = _configuration(folder / "vae")
    width = max(autoencoder.get("block_out_channels", DECODER_WIDTHS)[:2])
    upcast = dtype is torch.float16 and autoencoder.get("force_upcast", True)
    return int(DECODED_TENSORS * width * (torch.float32 if upcast else dtype).itemsize)


def _configuration(folder: Path) -> dict[str, Any]:
    """A component's config.json; empty where there is none."""
    file = folder / "config.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def _bytes_in(file: Path, dtype: torch.dtype) -> int:
    with safe_open(file, framework="pt") as weights:
        numbers = sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    return int(numbers * dtype.itemsize)
