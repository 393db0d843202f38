"""What the Triton runner is told: section `triton` of gpu_admin.yaml. The defaults are those of the seed's
TRITON_RUNNER_CONFIG."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from marshmallow import ValidationError, fields, validate, validates_schema

from gpu_admin.contract import MODEL_NAME, BadRequest, SupportedModel
from gpu_admin.settings import Strict, read_section

#: Copies of one model on one GPU.
MOST_COPIES = 64
#: The entry of model_gpu_configs for every model that has none, or not that key.
DEFAULT = "default"
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 (named to be recognised)

Kind = Literal["gpu", "cpu"]


class DeviceList(fields.Field[Any]):
    """GPUs as `docker run --gpus` takes them: all, a number of them, or device=0,1; nothing or null is none.

    Loads as the GPUs' numbers, or None for all of them.
    """

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> tuple[int, ...] | None:
        text = str(value).strip().strip("\"'")
        if text == "all":
            return None
        if not text:
            return ()
        if re.fullmatch(r"[1-9]\d?", text):
            return tuple(range(int(text)))
        if re.fullmatch(r"device=\d{1,3}(,\d{1,3})*", text):
            return tuple(sorted({int(number) for number in text.removeprefix("device=").split(",")}))
        raise ValidationError('Must be all, a number of GPUs, device= and their numbers as in "device=0,1", or null.')


class ModelPart(Strict):
    """One entry of model_gpu_configs."""

    instances_per_gpu = fields.Integer(strict=True, validate=validate.Range(min=1, max=MOST_COPIES))
    memory_gib = fields.Float(allow_none=True, validate=validate.Range(min=0, min_inclusive=False))
    kind = fields.String(validate=validate.OneOf(("gpu", "cpu")))


class Part(Strict):
    """Section `triton`."""

    image_name = fields.String(
        load_default="nvcr.io/nvidia/tritonserver:25.04-py3", validate=validate.Regexp(r"^[^\s-]\S*$")
    )
    container_name = fields.String(
        load_default="triton_server", validate=validate.Regexp(r"^[a-zA-Z0-9][a-zA-Z0-9_.-]+$")
    )
    model_repository_host_path = fields.String(load_default="/mnt/sdb_data/triton_inference_server/model_repository")
    runtime_host_path = fields.String(load_default="/mnt/sdb_data/triton_inference_server/runtime", allow_none=True)
    http_port = fields.Integer(load_default=8000, strict=True, validate=validate.Range(min=1, max=65_535))
    grpc_port = fields.Integer(load_default=8001, strict=True, validate=validate.Range(min=1, max=65_535))
    metrics_port = fields.Integer(load_default=8002, strict=True, validate=validate.Range(min=1, max=65_535))
    shm_size = fields.String(load_default="2g", validate=validate.Regexp(r"^\d+[bkmgBKMG]?$"))
    #: Absent is all of them.
    gpus = DeviceList(load_default=None, allow_none=True)
    api_timeout_seconds = fields.Float(load_default=120.0, validate=validate.Range(min=1, max=86_400))
    model_gpu_configs = fields.Dict(
        keys=fields.String(),
        values=fields.Nested(ModelPart),
        load_default={
            "MAM": {"instances_per_gpu": 8},
            "FastFitAll": {"instances_per_gpu": 1},
            DEFAULT: {"instances_per_gpu": 1},
        },
    )
    supported_models = fields.List(
        fields.String(validate=validate.Regexp(MODEL_NAME)), load_default=("MAM", "FastFitAll"), allow_none=True
    )
    load_timeout_seconds = fields.Float(load_default=None, allow_none=True, validate=validate.Range(min=1, max=86_400))
    network_mode = fields.String(load_default="bridge", validate=validate.Length(min=1))
    listen = fields.IP(load_default="127.0.0.1")
    docker_url = fields.String(load_default=None, allow_none=True, validate=validate.Length(min=1))

    @validates_schema
    def _ports_differ(self, data: Mapping[str, Any], **kwargs: Any) -> None:
        if len({data[name] for name in PORTS}) < len(PORTS):
            raise ValidationError({"http_port": [f"{', '.join(PORTS)} must differ from each other."]})


#: The settings that name a port.
PORTS = ("http_port", "grpc_port", "metrics_port")


@dataclass(frozen=True, slots=True)
class Model:
    """How one model is run."""

    instances_per_gpu: int = 1
    #: Memory that it takes on each GPU.
    memory_gib: float | None = None
    #: cpu: its copies run on the processor, as many as for that GPU; for hosts without one, and for tests.
    kind: Kind = "gpu"


@dataclass(frozen=True, slots=True)
class TritonSettings:
    """What the Triton runner was told."""

    image_name: str
    container_name: str
    #: Where the models lie on this host; the container has it as /models.
    model_repository: Path
    #: The container has it as /runtime; None for nothing there.
    runtime: Path | None
    #: The same inside the container and outside: http_port, grpc_port and metrics_port.
    ports: Mapping[str, int]
    shm_size: str
    #: The host's GPUs that the container gets: None for all.
    gpus: tuple[int, ...] | None
    #: For everything that is asked of Docker and Triton, and for Triton to come up.
    api_timeout_s: float
    #: For a model to load.
    load_timeout_s: float
    #: host: the container has the host's network; else its ports are published.
    network_mode: str
    #: The address of this host where its ports answer. Triton asks nobody for a key: 127.0.0.1 keeps it to this host.
    listen: str
    #: Where Docker is; None for DOCKER_HOST or the usual socket.
    docker_url: str | None
    models: Mapping[str, Model]
    #: How a model is run of which the settings do not know any more.
    default: Model

    @classmethod
    def from_section(cls, section: Mapping[str, Any]) -> "TritonSettings":
        """Settings from the section's values. Raises SettingsError."""
        values = read_section(Part(), "triton", _given(section))
        parts = {name: dict(part) for name, part in values["model_gpu_configs"].items()}
        default = parts.get(DEFAULT, {})
        listen = values["listen"]
        return cls(
            image_name=values["image_name"],
            container_name=values["container_name"],
            model_repository=Path(values["model_repository_host_path"]).expanduser().absolute(),
            runtime=Path(values["runtime_host_path"]).expanduser().absolute() if values["runtime_host_path"] else None,
            ports={name: values[name] for name in PORTS},
            shm_size=values["shm_size"],
            gpus=values["gpus"],
            api_timeout_s=values["api_timeout_seconds"],
            load_timeout_s=values["load_timeout_seconds"] or values["api_timeout_seconds"],
            network_mode=values["network_mode"],
            listen=str(listen),
            docker_url=values["docker_url"],
            models={name: Model(**{**default, **parts.get(name, {})}) for name in values["supported_models"] or ()},
            default=Model(**default),
        )

    @property
    def port(self) -> int:
        """Where Triton's HTTP API answers."""
        return self.ports["http_port"]

    @property
    def address(self) -> str:
        """Where this host reaches the container's ports, as it stands in a URL."""
        if self.listen in EVERYWHERE:
            return "127.0.0.1" if self.listen == EVERYWHERE[0] else "[::1]"
        return f"[{self.listen}]" if ":" in self.listen else self.listen

    @property
    def supported(self) -> dict[str, SupportedModel]:
        """The models by name."""
        return {
            name: SupportedModel(name, model.memory_gib, model.instances_per_gpu) for name, model in self.models.items()
        }

    def model(self, name: str) -> Model:
        """How that model is run; an order may be older than the settings."""
        return self.models.get(name, self.default)

    def device(self, gpu_id: int) -> int:
        """The number that one of the host's GPUs has inside the container, which counts those that it has.

        Raises BadRequest for a GPU that it does not have.
        """
        if self.gpus is None:
            return gpu_id
        if gpu_id not in self.gpus:
            has = f"GPUs {', '.join(map(str, self.gpus))} only" if self.gpus else "no GPU"
            raise BadRequest(f"gpu_id: the Triton container has {has} (setting triton.gpus), and not GPU {gpu_id}.")
        return self.gpus.index(gpu_id)


def _given(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section with `gpus: null` as no GPU, which marshmallow would take for its default."""
    return {key: "" if key == "gpus" and value is None else value for key, value in section.items()}
