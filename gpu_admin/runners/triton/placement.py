"""Which GPUs a model has copies on: written into Triton's model configuration, and read from it.

There is one instance group for each GPU, named by it (gpu0): so Triton adds and removes the copies of one GPU in place
and leaves the others alone, and so it can be asked who is where, for copies on the processor, too. (The first change
after a Python model's very first load is a whole load beside the old one, without a gap: Python left its compiled files
in the model's folder meanwhile, which to Triton is a new model.)

A model's folder has one of three:
- config.pbtxt.template: PLACEHOLDER in it stands for the whole instance_group field; without one, the field is
  appended. config.pbtxt is written from it before each load.
- config.pbtxt alone: it is never written. The load call carries the same configuration with other instance groups.
- neither: the load call carries the instance groups, and Triton finds out the rest by the model's files.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_admin import whole_file
from gpu_admin.contract import BadRequest

#: What stands for the whole instance_group field in a template.
PLACEHOLDER = "${instance_group}"
TEMPLATE = "config.pbtxt.template"
CONFIG = "config.pbtxt"
#: Nobody writes longer configurations; it bounds what is read of a wrong file.
LONGEST_BYTES = 1_000_000

#: Copies of a model by the host's GPU.
Placement = Mapping[int, int]


def groups_of(placement: Placement, device: Mapping[int, int] | None) -> list[dict[str, Any]]:
    """Triton's instance groups for a placement, as JSON has them.

    device: the numbers that the GPUs have inside the container; None for copies on the processor.
    """
    return [
        {
            "name": f"gpu{gpu_id}",
            "count": count,
            **({"kind": "KIND_CPU"} if device is None else {"kind": "KIND_GPU", "gpus": [device[gpu_id]]}),
        }
        for gpu_id, count in sorted(placement.items())
    ]


def as_text(groups: Sequence[Mapping[str, Any]]) -> str:
    """The instance_group field in the text format of config.pbtxt."""
    lines = []
    for group in groups:
        gpus = f" gpus: [ {', '.join(str(int(gpu)) for gpu in group['gpus'])} ]" if "gpus" in group else ""
        lines.append(f'  {{ name: "{group["name"]}" count: {int(group["count"])} kind: {group["kind"]}{gpus} }}')
    return "instance_group [\n" + ",\n".join(lines) + "\n]\n"


def read_groups(groups: Sequence[Mapping[str, Any]], gpus: Sequence[int] | None) -> dict[int, int]:
    """The placement that instance groups of Triton's stand for; groups that say nothing of a GPU do not count.

    gpus: the host's GPUs that the container has, None for all.
    """
    placement: dict[int, int] = {}
    for group in groups:
        count = int(group.get("count", 1))
        named = re.fullmatch(r"gpu(\d{1,4})", str(group.get("name", "")))
        if named:
            on = [int(named[1])]
        elif group.get("kind") == "KIND_GPU":
            # Loaded by somebody else: known by the numbers that GPUs have in the container.
            on = [g if gpus is None else gpus[g] for g in group.get("gpus", ()) if gpus is None or g < len(gpus)]
        else:
            on = []
        for gpu_id in on:
            placement[gpu_id] = placement.get(gpu_id, 0) + count
    return placement


class ModelFolder:
    """One model in the repository."""

    def __init__(self, repository: Path, name: str) -> None:
        self._repository = repository
        self._name = name
        self._path = repository / name

    def check(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Look whether the model could be placed. Raises BadRequest with what is missing or wrong."""
        self._config_text(groups)

    def place(self, groups: Sequence[Mapping[str, Any]]) -> str | None:
        """Make the next load put the model there: the configuration that the load call has to carry, as JSON.

        None where config.pbtxt was written from the template. Raises BadRequest, and OSError if it cannot be written.
        """
        text = self._config_text(groups)
        if text is not None:
            whole_file.write(self._path / CONFIG, text)
            return None
        config = self._path / CONFIG
        own = _as_json(_read(config), config) if config.is_file() else {}
        return json.dumps({"name": self._name, **own, "instance_group": list(groups)})

    def _config_text(self, groups: Sequence[Mapping[str, Any]]) -> str | None:
        """What config.pbtxt is to be, or None where there is no template."""
        self._stay_inside()
        template = self._path / TEMPLATE
        if not template.is_file():
            if (self._path / CONFIG).is_file():
                _as_json(_read(self._path / CONFIG), self._path / CONFIG)
            return None
        text = _read(template)
        placed = as_text(groups)
        text = text.replace(PLACEHOLDER, placed) if PLACEHOLDER in text else f"{text.rstrip()}\n\n{placed}"
        # What a newer Triton knows is no mistake in a text that goes to it as it is.
        written = _parse(text, template, strict=False)
        if len(written.instance_group) != len(groups):
            raise BadRequest(
                f"{template} has an instance_group of its own. Put {PLACEHOLDER} once in its place: it stands for the "
                "whole field, which is filled with the GPUs that were asked for."
            )
        return text

    def _stay_inside(self) -> None:
        repository = self._repository.resolve()
        if not repository.is_dir():
            raise BadRequest(
                f"The model repository {self._repository} is no folder. Set triton.model_repository_host_path."
            )
        if not self._path.is_dir():
            raise BadRequest(f"model_name: the model repository {self._repository} has no folder {self._name}.")
        for path in (self._path, self._path / TEMPLATE, self._path / CONFIG):
            if not path.resolve().is_relative_to(repository):
                raise BadRequest(f"{path} is a link to outside of the model repository {self._repository}.")


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path} cannot be read: {error}") from error
    if len(text) > LONGEST_BYTES:
        raise BadRequest(f"{path} is longer than {LONGEST_BYTES} characters, and no model configuration.")
    return text


def _parse(text: str, path: Path, *, strict: bool) -> Any:
    # Only a host that places a Triton model pays for the schema.
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig(), allow_unknown_field=not strict)
    except text_format.ParseError as error:
        raise BadRequest(f"{path} is no model configuration of Triton: {error}") from error


def _as_json(text: str, path: Path) -> dict[str, Any]:
    """A config.pbtxt as the load call takes it. Raises BadRequest."""
    from google.protobuf import json_format

    values: dict[str, Any] = json_format.MessageToDict(
        _parse(text, path, strict=True), preserving_proto_field_name=True
    )
    return values
