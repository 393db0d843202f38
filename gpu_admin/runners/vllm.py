"""vLLM: `vllm serve` for each instance, on one GPU or, with tensor parallelism, on a set of them.

Source: vLLM, vllm/entrypoints/cli/serve.py, vllm/entrypoints/openai/cli_args.py, vllm/engine/arg_utils.py.
"""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from marshmallow import RAISE, Schema, fields, post_load, validate

from gpu_admin.contract import BadRequest, Wanted
from gpu_admin.probe import Probe
from gpu_admin.process_runner import Models, ModelSettings, ProcessRunner, ServerSettings

_DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")


def _share(**rules: Any) -> fields.Float:
    # vLLM keeps what is left for others and for what it does not count; all of it never works.
    return fields.Float(validate=validate.Range(min=0.05, max=0.98), **rules)


class VllmModelSettings(ModelSettings):
    """What the operator states of one model."""

    #: An id of the model hub, or a folder; None for the name itself.
    model = fields.String(load_default=None, allow_none=True)


class VllmSettings(ServerSettings):
    """The section `vllm`."""

    supported_models = Models(VllmModelSettings)
    program = fields.String(load_default="vllm", validate=validate.Length(min=1))
    #: The part of each GPU's memory that vLLM takes at its start, for weights and cache.
    gpu_memory_utilization = _share(load_default=0.9)
    base_port = fields.Integer(load_default=8100, strict=True, validate=validate.Range(min=1, max=65_535))
    #: It may have to download the weights.
    start_timeout_seconds = fields.Float(load_default=1800, validate=validate.Range(min=0, min_inclusive=False))


class VllmConfig(Schema):
    """A request's `config`."""

    class Meta:
        unknown = RAISE

    #: The GPUs that the model is split over.
    gpu_ids = fields.List(fields.Integer(strict=True, validate=validate.Range(min=0)), validate=validate.Length(min=1))
    max_model_len = fields.Integer(strict=True, validate=validate.Range(min=1, max=16 * 1024 * 1024))
    dtype = fields.String(validate=validate.OneOf(_DTYPES))
    gpu_memory_utilization = _share()

    @post_load
    def _in_order(self, data: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        # The same set is the same order, however it was written.
        return {**data, "gpu_ids": sorted(data["gpu_ids"])} if "gpu_ids" in data else data


class Runner(ProcessRunner):
    """Starts and stops vLLM."""

    name = "vllm"
    settings_schema = VllmSettings
    config_schema = VllmConfig
    own_options = ("--host", "--port", "--model", "--served-model-name", "--tensor-parallel-size", "-tp", "--uds")

    def command(self, wanted: Wanted, port: int) -> Sequence[str]:
        """`vllm serve`, under the model's name here."""
        config = wanted.config
        share = config.get("gpu_memory_utilization", self.settings["gpu_memory_utilization"])
        options = ["--gpu-memory-utilization", f"{share:g}"]
        if "max_model_len" in config:
            options += ["--max-model-len", str(config["max_model_len"])]
        if "dtype" in config:
            options += ["--dtype", config["dtype"]]
        return [
            *(self.settings["program"], "serve", self.stated(wanted)["model"] or wanted.model_name),
            *("--host", self.settings["listen"], "--port", str(port), "--served-model-name", wanted.model_name),
            *("--tensor-parallel-size", str(len(wanted.gpu_ids))),
            *options,
        ]

    def gpu_ids(self, gpu_id: int, config: Mapping[str, Any]) -> tuple[int, ...]:
        """`gpu_ids` of the request's config, which must name its gpu_id as well."""
        asked = config.get("gpu_ids", [gpu_id])
        if gpu_id not in asked:
            raise BadRequest(f"config.gpu_ids: must name gpu_id {gpu_id} as well.")
        if len(set(asked)) < len(asked):
            raise BadRequest("config.gpu_ids: must name each GPU once.")
        return (gpu_id, *(each for each in asked if each != gpu_id))

    def is_ready(self, wanted: Wanted, probe: Probe) -> bool:
        """GET /health says that its engine lives, and /v1/models names the model."""
        health = probe.get("/health")
        if health is None or health.status != HTTPStatus.OK:
            return False
        models = probe.get("/v1/models")
        if models is None:
            return False
        if models.status == HTTPStatus.UNAUTHORIZED:
            # The operator gave it an API key, which guards /v1 alone.
            return True
        said = models.json()
        listed = said.get("data") if isinstance(said, Mapping) else None
        return isinstance(listed, list) and any(
            isinstance(each, Mapping) and each.get("id") == wanted.model_name for each in listed
        )
