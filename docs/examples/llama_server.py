"""llama.cpp's llama-server: a process for each GGUF file and GPU."""

from collections.abc import Sequence
from pathlib import Path

from marshmallow import RAISE, Schema, fields, validate

from gpu_admin.contract import BadRequest, Wanted
from gpu_admin.process_runner import Models, ModelSettings, ProcessRunner, ServerSettings


class LlamaModelSettings(ModelSettings):
    """What the operator states of one model."""

    #: The GGUF file.
    path = fields.String(required=True)


class LlamaSettings(ServerSettings):
    """The section of gpu_admin.yaml."""

    supported_models = Models(LlamaModelSettings)
    program = fields.String(load_default="llama-server")
    base_port = fields.Integer(load_default=8300, strict=True, validate=validate.Range(min=1, max=65_535))


class LlamaConfig(Schema):
    """A request's `config`."""

    class Meta:
        unknown = RAISE

    ctx_size = fields.Integer(strict=True, validate=validate.Range(min=0, max=1_048_576))


class Runner(ProcessRunner):
    """Starts and stops llama-server, which answers GET /health with 503 while it loads and 200 once it serves."""

    name = "llama"
    settings_schema = LlamaSettings
    config_schema = LlamaConfig
    ready_path = "/health"

    def command(self, wanted: Wanted, port: int) -> Sequence[str]:
        """All layers on the one GPU that the server sees, under the model's name here."""
        return [
            *(self.settings["program"], "--model", self.stated(wanted)["path"], "--alias", wanted.model_name),
            *("--host", self.settings["listen"], "--port", str(port), "--n-gpu-layers", "all"),
            *("--ctx-size", str(wanted.config.get("ctx_size", 0))),
        ]

    def check(self, wanted: Wanted) -> None:
        """Look for the file, too."""
        path = Path(self.stated(wanted)["path"])
        if not path.is_file():
            raise BadRequest(f"{self.name}.supported_models.{wanted.model_name}.path: there is no file {path}.")
        super().check(wanted)
