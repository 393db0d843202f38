"""What a host is told: the file, the environment over it, and refusals that name the setting."""

import pytest
import yaml

from gpu_admin.host import open_host
from gpu_admin.runners.comfyui import ComfySettings
from gpu_admin.runners.triton.settings import Part
from gpu_admin.runners.vllm import VllmSettings
from gpu_admin.settings import ROOT, RUNNERS, Section, Settings, SettingsError, Top
from tests.gpu_admin.seed_host import RUNNER

ONE = {"models": {"MAM": 1}}


def told(tmp_path, text="", **environ):
    file = tmp_path / "gpu_admin.yaml"
    file.write_text(text)
    return Settings.from_environ({"GPU_ADMIN_CONFIG": str(file), **environ})


def supported(settings):
    return [
        (runner, model.name, model.instances_per_gpu) for runner, model in open_host(settings).instances.supported()
    ]


def test_told_nothing_it_listens_on_this_host_alone_with_the_seeds_models(tmp_path):
    settings = told(tmp_path)

    assert (settings.host, settings.port, settings.allow_anonymous) == ("127.0.0.1", 6004, False)
    assert settings.data_dir == ROOT / "var" / "gpu_admin"
    assert supported(settings) == [("triton", "MAM", 8), ("triton", "FastFitAll", 1)]
    assert supported(told(tmp_path, GPU_ADMIN_TRITON_SUPPORTED_MODELS="[]")) == []


def test_the_environment_wins_over_the_file(tmp_path):
    settings = told(
        tmp_path,
        "port: 7000\ntriton: {http_port: 8100, supported_models: [MAM]}",
        GPU_ADMIN_PORT="7001",
        GPU_ADMIN_TRITON_HTTP_PORT="8200",
        GPU_ADMIN_COMFYUI_SUPPORTED_MODELS="[chane_face]",
        GPU_DATA_DIR="/srv/gpu",
    )

    assert (settings.port, str(settings.data_dir)) == (7001, "/srv/gpu/gpu_admin")
    assert settings.runners["triton"].values == {"http_port": 8200, "supported_models": ["MAM"]}
    assert settings.runners["comfyui"].values == {"supported_models": ["chane_face"]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prt: 1", "prt .*GPU_ADMIN_PRT.*Did you mean port"),
        ("port: 70000", "port .*GPU_ADMIN_PORT"),
        ("port: {}", "port"),
        ("tritonn: {supported_models: [MAM]}", "tritonn.*Did you mean triton"),
        ("own: {class: nonsense}", "own"),
        ("[1, 2]", "must be a mapping"),
        ("port: [", "cannot be read"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(tmp_path, text, words):
    with pytest.raises(SettingsError, match=words):
        told(tmp_path, text)


@pytest.mark.parametrize(
    ("runners", "words"),
    [
        ({"own": Section("no_such_module:Runner", {"a": 1})}, "own: no_such_module:Runner cannot be imported"),
        ({"own": Section("tests.gpu_admin.seed_host:Other", {"a": 1})}, "own: .*no Other"),
        ({"triton": Section(RUNNER, {"models": {"MAM": 1, "../x": 1}})}, "triton: '../x' is no model name"),
        ({"own": Section(RUNNER, {"models": {"MAM": 1}})}, "own: .* is named triton"),
        (
            {"triton": Section(RUNNER, ONE), "sleepers": Section("tests.gpu_admin.sleepers:Runner", ONE)},
            "MAM is a supported model of triton and of sleepers",
        ),
        ({"triton": Section("gpu_admin.runners.triton:Runner", {"suported_models": ["MAM"]})}, "supported_models"),
        ({"comfyui": Section("gpu_admin.runners.comfyui:Runner", {"suported_models": []})}, "supported_models"),
        ({"vllm": Section("gpu_admin.runners.vllm:Runner", {"suported_models": []})}, "supported_models"),
    ],
    ids=["module", "class", "model", "name", "twice", "triton", "comfyui", "vllm"],
)
def test_a_runner_that_cannot_be_used_is_named_at_the_start(tmp_path, runners, words):
    with pytest.raises(SettingsError, match=words):
        open_host(Settings(tmp_path, runners))


def test_the_example_has_every_key_with_its_default():
    example = yaml.safe_load((ROOT / "gpu_admin.example.yaml").read_text())
    schemas = {"triton": Part(), "comfyui": ComfySettings(), "vllm": VllmSettings()}

    assert schemas.keys() == RUNNERS.keys()
    for name, schema in schemas.items():
        section = example.pop(name)
        assert section.keys() == schema.fields.keys()
        loaded, default = schema.load(section), schema.load({})
        assert list(loaded.pop("supported_models")) == list(default.pop("supported_models"))
        # An address loads as one; its default is a text.
        assert {**loaded, "listen": str(loaded["listen"])} == default
    assert Top().load(example) == Top().load({})
    assert example.keys() == Top().fields.keys()
