"""ComfyUI: a process of an operator's checkout for each instance. A model is a named instance, with its own settings.

Source: ComfyUI, main.py, comfy/cli_args.py and server.py.
"""

import sys
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, validate, validates_schema

from gpu_admin.contract import BadRequest, Wanted
from gpu_admin.probe import Probe
from gpu_admin.process_runner import Models, ModelSettings, ProcessRunner, ServerSettings

#: ComfyUI takes one of these: how it shares weights between the GPU's memory and the host's.
_MEMORY_MODES = ("gpu_only", "highvram", "normalvram", "lowvram", "novram", "cpu")
_FOLDERS = ("custom_nodes", "input", "models", "output", "temp", "user")


class ComfyModelSettings(ModelSettings):
    """What the operator states of one instance."""

    #: Its models, custom nodes, input and user data, made where they are missing; None for those of the checkout.
    base_directory = fields.String(load_default=None, allow_none=True)
    #: Where its pictures go; None for a folder of this instance alone.
    output_directory = fields.String(load_default=None, allow_none=True)


class ComfySettings(ServerSettings):
    """The section `comfyui`."""

    supported_models = Models(ComfyModelSettings)
    #: The checkout: the folder of main.py.
    directory = fields.String(load_default=None, allow_none=True)
    #: Its interpreter; None for the one of the checkout's venv, else this service's.
    python = fields.String(load_default=None, allow_none=True)
    base_port = fields.Integer(load_default=8188, strict=True, validate=validate.Range(min=1, max=65_535))
    start_timeout_seconds = fields.Float(load_default=300, validate=validate.Range(min=0, min_inclusive=False))


class ComfyConfig(Schema):
    """A request's `config`: at most one memory mode, and how much of the GPU's memory is left to others."""

    class Meta:
        unknown = RAISE

    gpu_only = fields.Boolean()
    highvram = fields.Boolean()
    normalvram = fields.Boolean()
    lowvram = fields.Boolean()
    novram = fields.Boolean()
    cpu = fields.Boolean()
    reserve_vram_gib = fields.Float(validate=validate.Range(min=0, max=1024))

    @validates_schema
    def _one_mode(self, data: Mapping[str, Any], **kwargs: Any) -> None:
        modes = [mode for mode in _MEMORY_MODES if data.get(mode)]
        if len(modes) > 1:
            raise ValidationError(f"only one of {', '.join(modes)} can be true.", modes[1])


class Runner(ProcessRunner):
    """Starts and stops ComfyUI."""

    name = "comfyui"
    settings_schema = ComfySettings
    config_schema = ComfyConfig
    program_setting = "python"
    own_options = (
        *("--listen", "--port", "--auto-launch", "--cuda-device"),
        *("--base-directory", "--output-directory", "--temp-directory"),
    )

    def command(self, wanted: Wanted, port: int) -> Sequence[str]:
        """`main.py` with pictures and temporary files of its own.

        Instances that share them overwrite each other's pictures, whose numbers they count by the files that are there,
        and each that starts empties the folder of temporary files.
        """
        stated = self.stated(wanted)
        own = self.instance_folder(wanted)
        base = ["--base-directory", stated["base_directory"]] if stated["base_directory"] else []
        options = [f"--{mode.replace('_', '-')}" for mode in _MEMORY_MODES if wanted.config.get(mode)]
        if "reserve_vram_gib" in wanted.config:
            options += ["--reserve-vram", f"{wanted.config['reserve_vram_gib']:g}"]
        return [
            *(self._python(), "main.py"),
            *("--listen", self.settings["listen"], "--port", str(port), "--disable-auto-launch"),
            *base,
            *("--output-directory", str(self._output(wanted)), "--temp-directory", str(own)),
            *options,
        ]

    def folder(self, wanted: Wanted) -> Path | None:
        """The checkout."""
        return Path(self.settings["directory"]) if self.settings["directory"] else None

    def check(self, wanted: Wanted) -> None:
        """Look for the checkout, too."""
        folder = self.folder(wanted)
        if folder is None:
            raise BadRequest("comfyui.directory: set it to the folder of ComfyUI's main.py.")
        if folder.is_dir() and not (folder / "main.py").is_file():
            raise BadRequest(f"comfyui.directory: {folder} is no ComfyUI: it has no main.py.")
        super().check(wanted)

    def prepare(self, wanted: Wanted) -> None:
        """Make its folders: ComfyUI ends at once where its base directory lacks one."""
        self.instance_folder(wanted).mkdir(parents=True, exist_ok=True)
        self._output(wanted).mkdir(parents=True, exist_ok=True)
        if base := self.stated(wanted)["base_directory"]:
            for name in _FOLDERS:
                (Path(base) / name).mkdir(parents=True, exist_ok=True)

    def is_ready(self, wanted: Wanted, probe: Probe) -> bool:
        """GET /system_stats answers, with the command line that we gave it."""
        answer = probe.get("/system_stats")
        if answer is None or answer.status != HTTPStatus.OK:
            return False
        said = answer.json()
        system = said.get("system") if isinstance(said, Mapping) else None
        # Versions before 0.2 do not tell their command line.
        argv = system.get("argv") if isinstance(system, Mapping) else None
        return system is not None and (argv is None or str(self._output(wanted)) in argv)

    def _output(self, wanted: Wanted) -> Path:
        stated = self.stated(wanted)["output_directory"]
        return Path(stated) if stated else self.instance_folder(wanted) / "output"

    def _python(self) -> str:
        if self.settings["python"]:
            return str(self.settings["python"])
        directory = Path(self.settings["directory"] or ".").absolute()
        own = (directory / venv / "bin" / "python" for venv in ("venv", ".venv"))
        return str(next((path for path in own if path.is_file()), sys.executable))
