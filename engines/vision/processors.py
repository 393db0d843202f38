"""What turns pictures and texts into a vision model's inputs: loading it, and joining what it made of several."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import AutoProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available


def load(source: str, **options: Any) -> Any:
    """The processor of a folder or hub id. options: of from_pretrained().

    Raises OSError or ValueError if there is none that reads pictures, and whatever else from_pretrained() raises.
    """
    if not is_torchvision_available():
        _leave_out_videos()
    processor = AutoProcessor.from_pretrained(source, **options)
    # AutoProcessor falls back to a bare tokenizer.
    if not hasattr(processor, "image_processor"):
        raise ValueError("It has no image processor (preprocessor_config.json).")
    return processor


@cache
def _leave_out_videos() -> None:
    """Let processors that could also read videos load without torchvision, for pictures alone.

    transformers 5.23 needs torchvision only to name the class of a video processor, and fails there for Qwen2-VL,
    GLM-4V and InternVL ("type object 'VIDEO_PROCESSOR_MAPPING' has no attribute '_extra_content'"). So that part is
    taken off the list of a processor's parts. Constructors pass their parts by position, the video processor last:
    without it in the list, the None that is passed for it is dropped.
    """
    # The plain function: bound to ProcessorMixin it would answer for that class, whichever is asked.
    all_parts = ProcessorMixin.get_attributes.__func__
    ProcessorMixin.get_attributes = classmethod(lambda cls: [part for part in all_parts(cls) if part != VIDEO])
    ProcessorMixin.video_processor = None


VIDEO = "video_processor"


def collate(
    prepared: Sequence[Mapping[str, torch.Tensor]], grown: Sequence[Sequence[int]], pad_token: int
) -> dict[str, torch.Tensor]:
    """One batch of several prompts, with the tokens that were generated behind each so far.

    prepared: what the processor made of each prompt alone; input_ids has shape (1, tokens). What belongs to tokens is
    padded on the left, where generation needs it; what belongs to pictures is laid behind each other along the first
    dimension, and padded with zeros at the end of the others, as the processors do themselves.
    """
    lengths = [inputs["input_ids"].shape[1] for inputs in prepared]
    longest = max(length + len(tokens) for length, tokens in zip(lengths, grown, strict=True))
    batch: dict[str, torch.Tensor] = {}
    for name in prepared[0]:
        tensors = [inputs[name] for inputs in prepared]
        if all(tensor.shape[:2] == (1, length) for tensor, length in zip(tensors, lengths, strict=True)):
            filler = pad_token if name == "input_ids" else 0
            tensors = [_grow(name, tensor, tokens) for tensor, tokens in zip(tensors, grown, strict=True)]
            batch[name] = torch.cat([_pad_left(tensor, longest, filler) for tensor in tensors])
        else:
            shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
            batch[name] = torch.cat([_pad_end(tensor, shape) for tensor in tensors])
    return batch


def _grow(name: str, tensor: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    # Of all other kinds, 0 stands for text.
    values = {"input_ids": tokens, "attention_mask": [1] * len(tokens)}.get(name, [0] * len(tokens))
    tail = torch.tensor(values, dtype=tensor.dtype).view(1, -1, *(1 for _ in tensor.shape[2:]))
    return torch.cat([tensor, tail.expand(1, -1, *tensor.shape[2:])], dim=1)


def _pad_left(tensor: torch.Tensor, length: int, filler: int) -> torch.Tensor:
    return pad(tensor, [*(0 for _ in tensor.shape[2:] for _ in "ab"), length - tensor.shape[1], 0], value=filler)


def _pad_end(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    missing = [want - have for want, have in zip(shape, tensor.shape[1:], strict=True)]
    return pad(tensor, [amount for want in reversed(missing) for amount in (0, want)])
