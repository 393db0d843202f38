"""The models the platform knows: one row each, found by id or alias."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class JobType(StrEnum):
    """What a client can ask for; also the second half of a queue's name."""

    #: Text generation from a conversation.
    LLM = "llm"
    #: A picture from a text.
    IMAGE_GEN = "image_gen"
    #: Text from a picture.
    VISION = "vision"
    #: Text from speech.
    WHISPER = "whisper"
    #: Vectors from texts.
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class Model:
    """One model that an engine can load."""

    #: Repository on the hub that loads natively, or a local folder.
    id: str
    type: JobType
    #: Where the engine class is, as "module:Class"; imported in workers only.
    engine: str
    #: Device memory that weights, cache and activations take; None where it is not known.
    memory_gib: float | None = None
    #: Other names for it: moved repositories, ids that would need remote code.
    aliases: Sequence[str] = ()
    #: Name of the packaged weights in engines/packaged.py, used when they have been prepared.
    packaged: str | None = None
    #: A local folder that holds the weights; overrides both.
    folder: str | None = None
    #: The hub asks to accept terms first (HF_TOKEN).
    gated: bool = False
    #: It computes here; False for an engine without weights, whose worker need not look for a device.
    on_device: bool = True


class UnknownModel(LookupError):
    """No row has that name; the message names the nearest ones."""


LLM = "engines.llm:Engine"

# Memory: weights in bfloat16 (parameters x 2 bytes) plus room for the cache of a few thousand tokens per slot.
MODELS: Sequence[Model] = (
    Model("Qwen/Qwen2.5-7B-Instruct", JobType.LLM, LLM, 18),
    Model("Qwen/Qwen2.5-14B-Instruct", JobType.LLM, LLM, 32),
    Model("Qwen/Qwen2.5-72B-Instruct", JobType.LLM, LLM, 150),
    Model("meta-llama/Llama-3.1-8B-Instruct", JobType.LLM, LLM, 18, gated=True),
    Model("meta-llama/Llama-3.1-70B-Instruct", JobType.LLM, LLM, 145, gated=True),
    Model("01-ai/Yi-34B-Chat", JobType.LLM, LLM, 72),
    Model("deepseek-ai/DeepSeek-V2-Lite-Chat", JobType.LLM, LLM, 36, aliases=("deepseek-ai/DeepSeek-V2-Lite",)),
    Model("zai-org/glm-4-9b-chat-hf", JobType.LLM, LLM, 21, aliases=("THUDM/glm-4-9b-chat",)),
    Model("HuggingFaceTB/SmolLM2-135M-Instruct", JobType.LLM, LLM, 1, packaged="smollm2-135m-instruct"),
    Model("echo", JobType.LLM, "engines.echo:Engine", on_device=False),
)

#: What a worker loads when nothing else is set: the seed's choice on a GPU, a small one where there is none.
DEFAULT_ON_GPU = {JobType.LLM: "Qwen/Qwen2.5-7B-Instruct"}
DEFAULT_ON_CPU = {JobType.LLM: "HuggingFaceTB/SmolLM2-135M-Instruct"}


def find(job_type: JobType, name: str) -> Model:
    """The row of that type whose id or alias is `name`, letter case aside.

    Raises UnknownModel with the nearest names.
    """
    rows = [row for row in MODELS if row.type is job_type]
    names = {known.casefold(): row for row in rows for known in (row.id, *row.aliases)}
    if row := names.get(name.casefold()):
        return row
    near = difflib.get_close_matches(name.casefold(), names, n=3, cutoff=0.4)
    hint = ", ".join(names[key].id for key in near) or ", ".join(row.id for row in rows)
    raise UnknownModel(f"Unknown {job_type} model {name!r}. Near: {hint}.")
