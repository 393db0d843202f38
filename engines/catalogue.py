"""The models the platform knows: one row each, found by id or alias."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path


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
    #: A workflow that a ComfyUI of the host runs.
    COMFYUI = "comfyui"
    #: An inference that a Triton server of the host runs.
    TRITON = "triton"


class Guidance(StrEnum):
    """What a text-to-image model does with guidance_scale."""

    #: Above `free_above` every step is computed twice, with and without the prompt; the negative prompt counts then.
    CLASSIFIER_FREE = "classifier_free"
    #: The number is an input of the network; there is no second pass, and no negative prompt.
    DISTILLED = "distilled"
    #: The number means nothing to it.
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Drawing:
    """How a text-to-image model draws best, and what it can draw."""

    steps: int
    guidance_scale: float
    guidance: Guidance
    #: Width and height where a job names none, in pixels.
    side: int = 1024
    #: Width and height must be multiples of it.
    side_step: int = 16
    least_side: int = 256
    most_side: int = 2048
    #: Classifier-free guidance is on for scales above it.
    free_above: float = 1.0
    #: Tokens of a prompt, where the pipeline must be told (max_sequence_length).
    prompt_tokens: int | None = None
    #: It draws pictures of `side` only; asked for others, the platform resizes and says so.
    one_size: bool = False


class Pooling(StrEnum):
    """How the vectors of a text's tokens become one."""

    #: The first token's.
    CLS = "cls"
    #: Their mean.
    MEAN = "mean"


@dataclass(frozen=True, slots=True)
class Sentence:
    """How an embedding model was trained to read texts; vectors are always of length 1 afterwards."""

    pooling: Pooling
    most_tokens: int
    #: Put before texts of input_type "query" and "passage".
    query_prefix: str = ""
    passage_prefix: str = ""


@dataclass(frozen=True, slots=True)
class Model:
    """One model that an engine can load."""

    #: Repository on the hub that loads natively, or a local folder's name.
    id: str
    type: JobType
    #: Where the engine class is, as "module:Class"; imported in workers only.
    engine: str
    #: Device memory that weights, cache and activations take; None where it is not known.
    memory_gib: float | None = None
    #: Other ids that mean this one, each with the reason it is not loaded itself.
    aliases: Mapping[str, str] = field(default_factory=dict)
    #: Name of the packaged weights in engines/packaged.py, used when they have been prepared.
    packaged: str | None = None
    #: Commit of the repository that is read, in full; None for whatever its main branch has.
    revision: str | None = None
    #: SHA-256 of its pytorch_model.bin, where that is all the weights that its publisher gives at that commit.
    pickled: str | None = None
    #: The operator lets code of its repository run, at that revision.
    trusted: bool = False
    #: A local folder that holds the weights; overrides all of these.
    folder: str | None = None
    #: The server of the host that computes in the engine's place.
    url: str | None = None
    #: The hub asks to accept terms first (HF_TOKEN).
    gated: bool = False
    #: It computes here; False for an engine without weights of its own, whose worker need not look for a device.
    on_device: bool = True
    #: For image_gen: None lets the engine go by the pipeline's class.
    drawing: Drawing | None = None
    #: For embedding: None lets the engine go by the folder's own sentence-transformers files.
    sentence: Sentence | None = None


#: A model at a commit: its id, and all digits of the commit, since shorter names can be made to mean something else.
PINNED = re.compile(r"([^@\s]+)@([0-9a-f]{40})")
#: What stands for no commit, behind an id: whatever is newest.
MAIN = "main"


class UnknownModel(LookupError):
    """No row has that name; the message names the nearest ones."""


LLM = "engines.llm.engine:Engine"
IMAGE_GEN = "engines.image_gen.engine:Engine"
VISION = "engines.vision.engine:Engine"
WHISPER = "engines.whisper.engine:Engine"
EMBEDDING = "engines.embedding.engine:Engine"
COMFYUI = "engines.comfyui.engine:Engine"
TRITON = "engines.triton.engine:Engine"
ECHO = "engines.echo:Engine"

_REMOTE_CODE = "it needs code of its own repository, which is not run"
_SHAPES = Path(__file__).resolve().parent.parent / "shapes" / "weights"

_Z_IMAGE = Drawing(8, 0.0, Guidance.CLASSIFIER_FREE, free_above=0.0, prompt_tokens=512)
_SCHNELL = Drawing(4, 0.0, Guidance.NONE, prompt_tokens=256)
_FLUX_DEV = Drawing(28, 3.5, Guidance.DISTILLED, prompt_tokens=512)
_SDXL = Drawing(30, 6.0, Guidance.CLASSIFIER_FREE, side_step=8)
_SD3 = Drawing(28, 7.0, Guidance.CLASSIFIER_FREE)

#: For pipelines without a row, such as a local folder's: by their diffusers class, and whether their transformer takes
#: guidance as an input (guidance_embeds in its configuration).
DRAWINGS: Mapping[tuple[str, bool], Drawing] = {
    ("ZImagePipeline", False): _Z_IMAGE,
    ("FluxPipeline", False): _SCHNELL,
    ("FluxPipeline", True): _FLUX_DEV,
    ("StableDiffusionXLPipeline", False): _SDXL,
    ("StableDiffusion3Pipeline", False): _SD3,
}

# Memory: weights in bfloat16 (parameters x 2 bytes) plus room for a cache of a few thousand tokens per slot, or for
# the activations of one picture of a megapixel. Sources: the repositories' file sizes; the fit check of engines/memory
# measures for itself.
# Commits: the main branch's, as many published lock files and logs of downloads name it; a row without one had none
# that enough of them agreed on.
MODELS: Sequence[Model] = (
    Model("Qwen/Qwen2.5-7B-Instruct", JobType.LLM, LLM, 18, revision="a09a35458c702b33eeacc393d103063234e8bc28"),
    Model("Qwen/Qwen2.5-14B-Instruct", JobType.LLM, LLM, 32, revision="cf98f3b3bbb457ad9e2bb7baf9a0125b6b88caa8"),
    Model("Qwen/Qwen2.5-72B-Instruct", JobType.LLM, LLM, 150, revision="495f39366efef23836d0cfae4fbe635880d2be31"),
    Model(
        "meta-llama/Llama-3.1-8B-Instruct",
        JobType.LLM,
        LLM,
        18,
        gated=True,
        revision="0e9e39f249a16976918f6564b8830bc894c89659",
    ),
    Model(
        "meta-llama/Llama-3.1-70B-Instruct",
        JobType.LLM,
        LLM,
        145,
        gated=True,
        revision="1605565b47bb9346c5515c34102e054115b4f98b",
    ),
    Model("01-ai/Yi-34B-Chat", JobType.LLM, LLM, 72),
    Model(
        "deepseek-ai/DeepSeek-V2-Lite-Chat",
        JobType.LLM,
        LLM,
        36,
        aliases={"deepseek-ai/DeepSeek-V2-Lite": "that is the base model, which answers no conversations"},
        revision="85864749cd611b4353ce1decdb286193298f64c7",
    ),
    Model(
        "zai-org/glm-4-9b-chat-hf",
        JobType.LLM,
        LLM,
        21,
        aliases={"THUDM/glm-4-9b-chat": _REMOTE_CODE},
        revision="8599336fc6c125203efb2360bfaf4c80eef1d1bf",
    ),
    Model(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        JobType.LLM,
        LLM,
        1,
        packaged="smollm2-135m-instruct",
        revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
    ),
    Model(
        "Tongyi-MAI/Z-Image-Turbo",
        JobType.IMAGE_GEN,
        IMAGE_GEN,
        24,
        aliases={"Zhihu-ai/Z-Image-Turbo": "there is no such repository; Tongyi-MAI publishes it"},
        drawing=_Z_IMAGE,
        revision="f332072aa78be7aecdf3ee76d5c247082da564a6",
    ),
    Model(
        "black-forest-labs/FLUX.1-schnell",
        JobType.IMAGE_GEN,
        IMAGE_GEN,
        40,
        gated=True,
        drawing=_SCHNELL,
        revision="741f7c3ce8b383c54771c7003378a50191e9efe9",
    ),
    Model(
        "black-forest-labs/FLUX.1-dev",
        JobType.IMAGE_GEN,
        IMAGE_GEN,
        40,
        gated=True,
        drawing=_FLUX_DEV,
        revision="3de623fc3c33e44ffbe2bad470d0f45bccf2eb21",
    ),
    Model(
        "stabilityai/stable-diffusion-xl-base-1.0",
        JobType.IMAGE_GEN,
        IMAGE_GEN,
        11,
        drawing=_SDXL,
        revision="462165984030d82259a11f4367a4eed129e94a7b",
    ),
    Model(
        "stabilityai/stable-diffusion-3-medium-diffusers",
        JobType.IMAGE_GEN,
        IMAGE_GEN,
        20,
        aliases={
            "stabilityai/stable-diffusion-3-medium": "that holds single files; this one has the pipeline's layout"
        },
        gated=True,
        drawing=_SD3,
        revision="ea42f8cef0f178587cf766dc8129abd379c90671",
    ),
    Model("zai-org/GLM-4.1V-9B-Thinking", JobType.VISION, VISION, 24, aliases={"THUDM/glm-4v-9b": _REMOTE_CODE}),
    Model("Qwen/Qwen2-VL-7B-Instruct", JobType.VISION, VISION, 20, revision="eed13092ef92e448dd6875b2a00151bd3f7db0ac"),
    Model(
        "OpenGVLab/InternVL3-8B-hf",
        JobType.VISION,
        VISION,
        20,
        aliases={"OpenGVLab/InternVL2-8B": _REMOTE_CODE},
        revision="259a3b64a14623c0ec91a045cb43f7c5af5fa6af",
    ),
    Model(
        "llava-hf/llava-v1.6-34b-hf",
        JobType.VISION,
        VISION,
        72,
        aliases={"liuhaotian/llava-v1.6-34b": "it is no transformers repository; this is its conversion"},
    ),
    Model(
        "openai/whisper-large-v3",
        JobType.WHISPER,
        WHISPER,
        10,
        aliases={"large-v3": "that is its short name"},
        revision="06f233fe06e710322aca913c1bc4249a0d71fce1",
    ),
    Model(
        "openai/whisper-medium",
        JobType.WHISPER,
        WHISPER,
        5,
        aliases={"medium": "that is its short name"},
        revision="abdf7c39ab9d0397620ccaea8974cc764cd0953e",
    ),
    Model(
        "openai/whisper-small",
        JobType.WHISPER,
        WHISPER,
        2,
        aliases={"small": "that is its short name"},
        revision="973afd24965f72e36ca33b3055d56a652f456b4d",
    ),
    Model(
        "openai/whisper-base",
        JobType.WHISPER,
        WHISPER,
        1,
        packaged="whisper-base",
        revision="e37978b90ca9030d5170a5c07aadb050351a65bb",
    ),
    Model(
        "BAAI/bge-large-zh-v1.5",
        JobType.EMBEDDING,
        EMBEDDING,
        2,
        sentence=Sentence(Pooling.CLS, 512, query_prefix="为这个句子生成表示以用于检索相关文章："),
        revision="79e7739b6ab944e86d6171e44d24c997fc1e0116",
        pickled="bf84a56fb045c24e090495195584a3922c3e4204107f0bba8b79c11f67a207f2",
    ),
    Model(
        "BAAI/bge-m3",
        JobType.EMBEDDING,
        EMBEDDING,
        3,
        sentence=Sentence(Pooling.CLS, 8192),
        revision="5617a9f61b028005a4858fdac845db406aefb181",
        pickled="b5e0ce3470abf5ef3831aa1bd5553b486803e83251590ab7ff35a117cf6aad38",
    ),
    Model(
        "intfloat/e5-large-v2",
        JobType.EMBEDDING,
        EMBEDDING,
        2,
        sentence=Sentence(Pooling.MEAN, 512, query_prefix="query: ", passage_prefix="passage: "),
        revision="f169b11e22de13617baa190a028a32f3493550b6",
    ),
    Model(
        "sentence-transformers/all-MiniLM-L6-v2",
        JobType.EMBEDDING,
        EMBEDDING,
        1,
        packaged="all-minilm-l6-v2",
        sentence=Sentence(Pooling.MEAN, 256),
        revision="1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
    ),
    # Our own, for hosts without a hub: they draw and describe one coloured shape (shapes/).
    Model(
        "shapes-picture",
        JobType.IMAGE_GEN,
        IMAGE_GEN,
        1,
        folder=str(_SHAPES / "picture"),
        drawing=Drawing(8, 0.0, Guidance.NONE, side=64, side_step=8, least_side=64, prompt_tokens=64, one_size=True),
    ),
    Model("shapes-vision", JobType.VISION, VISION, 1, folder=str(_SHAPES / "vision")),
    # Servers of the host, at the addresses they listen on by themselves.
    Model("comfyui", JobType.COMFYUI, COMFYUI, url="http://127.0.0.1:8188", on_device=False),
    Model("triton", JobType.TRITON, TRITON, url="http://127.0.0.1:8000", on_device=False),
    *(Model("echo", job_type, ECHO, on_device=False) for job_type in JobType),
)

#: What a worker loads when nothing else is set: the seed's choice on a GPU, a small one where there is none.
DEFAULT_ON_GPU = {
    JobType.LLM: "Qwen/Qwen2.5-7B-Instruct",
    JobType.IMAGE_GEN: "Tongyi-MAI/Z-Image-Turbo",
    JobType.VISION: "zai-org/GLM-4.1V-9B-Thinking",
    JobType.WHISPER: "openai/whisper-large-v3",
    JobType.EMBEDDING: "BAAI/bge-m3",
    JobType.COMFYUI: "comfyui",
    JobType.TRITON: "triton",
}
DEFAULT_ON_CPU = {
    JobType.LLM: "HuggingFaceTB/SmolLM2-135M-Instruct",
    JobType.IMAGE_GEN: "shapes-picture",
    JobType.VISION: "shapes-vision",
    JobType.WHISPER: "openai/whisper-base",
    JobType.EMBEDDING: "sentence-transformers/all-MiniLM-L6-v2",
    JobType.COMFYUI: "comfyui",
    JobType.TRITON: "triton",
}
#: Types that a server of the host computes, named by its URL, and the schemes that their engines speak.
SERVERS: Mapping[JobType, tuple[str, ...]] = {
    JobType.COMFYUI: ("http", "https"),
    JobType.TRITON: ("http", "https", "grpc", "grpcs"),
}


def split(name: str) -> tuple[str, str | None]:
    """A model's name without what stands behind it, and that: a commit, MAIN, or None."""
    if name.endswith(f"@{MAIN}"):
        return name.removesuffix(f"@{MAIN}"), MAIN
    found = PINNED.fullmatch(name)
    return (found[1], found[2]) if found else (name, None)


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


def known(job_type: JobType, model_id: str) -> Model | None:
    """The row of exactly that id; None for a model that the catalogue does not know."""
    return next((row for row in MODELS if row.type is job_type and row.id == model_id), None)


def warning(model: Model, name: str) -> str | None:
    """What to tell whoever asked for a model by another name than its own."""
    reasons = {alias.casefold(): reason for alias, reason in model.aliases.items()}
    reason = reasons.get(name.casefold())
    return f"{name} is answered by {model.id}: {reason}." if reason else None
