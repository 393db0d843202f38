"""What a worker is told: the environment over config.yaml over the default, and every mistake named with its place."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.catalogue import JobType
from tasks import listing, settings
from tasks.options import BY_PATH, MASK, OPTIONS, SettingsError, WorkerSettings, mask_url
from tasks.settings import ROOT, load_worker

#: As the user gave it.
SEED = """
# Worker基本信息
name: "My-GPU-Worker"         # Worker名称
region: "asia-east"           # 区域: asia-east, asia-south, europe-west, america-north
country: "China"              # 国家
city: "Shanghai"              # 城市

# 服务器连接
server:
  url: "http://your-server:8000"   # 调度服务器地址
  timeout: 30                       # 请求超时时间(秒)
  verify_ssl: true                  # 是否验证SSL证书

# GPU配置
gpu:
  enable_cpu_offload: true    # 启用CPU内存卸载 (显存不足时自动使用)
  max_memory_gb: null         # 最大显存限制 (null=自动)
  device_id: 0                # 使用的GPU编号

# 支持的任务类型
supported_types:
  - llm
  - image_gen
  - vision
  # - whisper
  # - embedding

# 引擎配置 (各任务类型的模型)
engines:
  llm:
    model_id: "Qwen/Qwen2.5-7B-Instruct"
  image_gen:
    model_id: "Zhihu-ai/Z-Image-Turbo"
  vision:
    model_id: "THUDM/glm-4v-9b"

# 轮询配置
heartbeat_interval: 30        # 心跳间隔(秒)
poll_interval: 2              # 任务轮询间隔(秒)

# 直连模式 (可选，提升性能)
direct:
  enabled: false              # 是否启用直连
  host: "0.0.0.0"
  port: 8080
  public_url: null            # 公网可访问的URL

# 负载控制
load_control:
  acceptance_rate: 1.0        # 接受任务的比例 (0-1)
  max_concurrent_jobs: 1      # 最大并发任务数
  working_hours_start: null   # 工作时间开始 (0-23)
  working_hours_end: null     # 工作时间结束 (0-23)
"""
#: A value of each option that is not its default.
OTHER = {
    "name": ("gpu 7", "gpu 7"),
    "region": ("europe-west", "europe-west"),
    "country": ("Deutschland", "Deutschland"),
    "city": ("北京", "北京"),
    "server.url": ("https://api.example.com/", "https://api.example.com"),
    "server.api_key": ("gpi_1", "gpi_1"),
    "server.timeout": ("2.5", 2.5),
    "server.verify_ssl": ("no", False),
    "server.broker_url": ("amqp://u:p@b//", "amqp://u:p@b//"),
    "server.store_url": ("redis://:p@s/1", "redis://:p@s/1"),
    "gpu.enable_cpu_offload": ("false", False),
    "gpu.max_memory_gb": ("20.5", 20.5),
    "gpu.device_id": ("1", 1),
    "gpu.dtype": ("float16", "float16"),
    "supported_types": ("vision,llm", (JobType.VISION, JobType.LLM)),
    "server.allow_plaintext": ("yes", True),
    "trust_remote_code": (f"org/model@{'a' * 40}", (f"org/model@{'a' * 40}",)),
    **{option.path: ("echo", "echo") for option in OPTIONS if option.target.startswith("models.")},
    "heartbeat_interval": ("10", 10.0),
    "poll_interval": ("0.5", 0.5),
    "direct.enabled": ("true", True),
    "direct.host": ("127.0.0.1", "127.0.0.1"),
    "direct.port": ("9000", 9000),
    "direct.public_url": ("https://gpu7.example.com", "https://gpu7.example.com"),
    "load_control.acceptance_rate": ("0.5", 0.5),
    "load_control.max_concurrent_jobs": ("3", 3),
    "load_control.working_hours_start": ("09", 9),
    "load_control.working_hours_end": ("22", 22),
    "load_control.timezone": ("Asia/Shanghai", "Asia/Shanghai"),
    "load_control.drain_grace_seconds": ("5", 5.0),
}


@pytest.fixture
def configured(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Writes a config.yaml; the environment that names it."""

    def write(text: str) -> dict[str, str]:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return {"GPU_CONFIG": str(path)}

    return write


def value_of(worker: WorkerSettings, path: str) -> object:
    """What the settings hold for an option."""
    value: object = worker
    for name in BY_PATH[path].target.split("."):
        value = value.get(JobType(name)) if isinstance(value, dict) else getattr(value, name)
    return value


def nested(path: str, text: str) -> str:
    """One key of config.yaml with its value."""
    *sections, name = path.split(".")
    lines = [f"{'  ' * depth}{section}:" for depth, section in enumerate(sections)]
    return "\n".join([*lines, f"{'  ' * len(sections)}{name}: {text}"])


def test_the_seeds_file_is_read_as_it_is_written(configured):
    worker = load_worker(configured(SEED))

    assert (worker.name, worker.region, worker.city) == ("My-GPU-Worker", "asia-east", "Shanghai")
    assert (worker.server_url, worker.server_timeout_s, worker.verify_ssl) == ("http://your-server:8000", 30.0, True)
    assert worker.supported_types == (JobType.LLM, JobType.IMAGE_GEN, JobType.VISION)
    assert worker.models[JobType.VISION] == "THUDM/glm-4v-9b"
    assert (worker.device_id, worker.max_memory_gib, worker.max_concurrent_jobs) == (0, None, 1)
    assert (worker.direct.port, worker.direct.public_url, worker.working_hours_start) == (8080, None, None)


@pytest.mark.parametrize("path", [option.path for option in OPTIONS])
def test_each_option_has_a_key_and_a_variable_and_the_variable_wins(configured, path):
    option, (text, value) = BY_PATH[path], OTHER[path]
    # The hours come in pairs.
    pair = {"GPU_WORKING_HOURS_START": "1", "GPU_WORKING_HOURS_END": "2"} if "working" in path else {}
    pair.pop(option.variable, None)
    file = {**configured(nested(path, f'"{text}"')), **pair}

    assert value_of(load_worker({**pair, option.variable: text}), path) == value
    assert value_of(load_worker(file), path) == value
    assert value_of(load_worker({**file, option.variable: " "}), path) == value
    assert value != option.default
    if not pair:
        assert value_of(load_worker({**file, option.variable: "null"}), path) == option.default


def test_without_anything_the_defaults_hold(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    assert load_worker({"GPU_CONFIG": ""}) == WorkerSettings()


def test_the_file_is_found_in_the_working_folder(monkeypatch, tmp_path):
    (tmp_path / "config.yaml").write_text("city: Jezero")
    monkeypatch.chdir(tmp_path)

    assert load_worker({}).city == "Jezero"
    assert load_worker({"GPU_CITY": "Gale"}).city == "Gale"
    with pytest.raises(SettingsError, match="GPU_CONFIG: there is no file"):
        load_worker({"GPU_CONFIG": str(tmp_path / "other.yaml")})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpu:\n  devise_id: 1", r":2: unknown key gpu.devise_id. Did you mean device_id"),
        ("sever:\n  url: x", r":1: unknown key sever. Did you mean server"),
        ("name: a\nacceptance_rate: 1", r":2: unknown key acceptance_rate. Did you mean load_control.acceptance_rate"),
        ("engines:\n  lm: {model_id: x}", r":2: unknown key engines.lm. Did you mean llm"),
        ("engines:\n  llm:\n    revision: x", r":3: unknown key engines.llm.revision. There are model_id"),
        ("<<: {}", r":1: unknown key <<"),
        ("load_control:\n  acceptance_rate: 3", r":2: load_control.acceptance_rate must be at most 1, not 3"),
        ("poll_interval: .inf", r":1: poll_interval must be a number from 0.1 to 60, not '.inf'"),
        ("direct: {port: 80.5}", r":1: direct.port must be a whole number"),
        ("direct:\n  enabled: maybe", r":2: direct.enabled must be true or false"),
        ("supported_types:\n  - lm", r":1: supported_types: 'lm' is no job type; .* Did you mean llm"),
        ("gpu: {dtype: float61}", r"one of auto, bfloat16, float16, float32, not 'float61'. Did you mean float16"),
        ("server: {url: your-server}", r"server.url must be a URL such as http://"),
        ("server: {url: 'ftp://x'}", r"server.url must be a URL such as http://"),
        ("load_control: {timezone: Asia/Shangai}", r"Did you mean Asia/Shanghai"),
        ("load_control:\n  working_hours_start: 9", r":2: .*needs load_control.working_hours_end"),
        ("name: a\nname: b", r":2: name stands there twice"),
        ("name: [a]", r":1: name must be one value"),
        ("gpu: 1", r":1: gpu must hold keys: enable_cpu_offload,"),
        ("- llm", r":1: the file must hold keys"),
        ("name: 'a", r":1: this is not YAML"),
        ('name: "a\\nb"', r":1: name must be one line"),
        ("name: !!python/object:os.system x\ncty: y", r":2: unknown key cty. Did you mean city"),
    ],
    ids=range(23),
)
def test_a_mistake_in_the_file_is_named_with_its_line_and_its_rule(configured, text, said):
    with pytest.raises(SettingsError, match=said):
        load_worker(configured(text))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ('{"worker_brokr": "x"}', "unknown keys"),
        ('{"worker_store": 1}', "worker_store of mars must be a URL"),
        ('{"latitude": "x"}', "latitude of mars must be a number"),
        ('{"countries": "CN"}', "countries of mars must be a list"),
    ],
    ids=["key", "url", "number", "list"],
)
def test_a_mistake_in_a_region_is_named(entry, said):
    with pytest.raises(SettingsError, match=f"REGIONS: .*{said}"):
        settings.load_regions({"REGIONS": f'{{"mars": {entry}}}'})


def test_a_wrong_value_never_shows_a_password(configured):
    with pytest.raises(SettingsError) as refused:
        load_worker({"GPU_STORE_URL": "//user:canary@host"})

    assert "GPU_STORE_URL" in str(refused.value)
    assert "canary" not in str(refused.value)
    assert mask_url("redis://:canary@h:6379/0?password=canary&db=1") == f"redis://:{MASK}@h:6379/0?password={MASK}&db=1"


def test_a_misspelled_variable_is_noticed_and_others_are_not():
    found = settings.misspelled({"GPU_LLM_MODLE": "x", "GPU_MAX_ALLOC_PERCENT": "1", "GPU_DATA_DIR": "x", "HOME": "/"})

    assert found == {"GPU_LLM_MODLE": "GPU_LLM_MODEL"}


@pytest.mark.parametrize(
    ("told", "served"),
    [
        ({}, (JobType.LLM,)),
        ({"GPU_WHISPER_MODEL": "echo"}, (JobType.WHISPER,)),
        ({"GPU_WHISPER_MODEL": "echo", "GPU_SUPPORTED_TYPES": "vision, llm,vision"}, (JobType.VISION, JobType.LLM)),
    ],
    ids=["nothing", "a model", "types"],
)
def test_the_types_without_queues_are_those_named_else_those_with_a_model_else_llm(told, served):
    assert load_worker(told).served_types == served


def test_the_settings_are_printed_with_who_said_them_and_without_secrets(tmp_path):
    (tmp_path / "config.yaml").write_text("city: Jezero\nserver:\n  store_url: redis://:canary@h/1\n")
    (tmp_path / ".env").write_text("GPU_COUNTRY=Mars\n")
    environ = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "GPU_NAME": "rover",
        "GPU_API_KEY": "canary",
        "GPU_BROKER_URL": "redis://u:canary@h/0",
        "GPU_CITTY": "x",
    }

    done = subprocess.run(
        [sys.executable, "-m", "tasks.settings"], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
    )

    lines = {line.split()[0]: re.split(r"\s{2,}", line)[1:] for line in done.stdout.splitlines()}
    assert list(lines) == [option.path for option in OPTIONS]
    assert lines["name"] == ["rover", "environment variable GPU_NAME"]
    assert lines["country"] == ["Mars", "GPU_COUNTRY in .env"]
    assert lines["city"] == ["Jezero", "config.yaml:1"]
    assert lines["region"] == ["asia-east", "default"]
    assert lines["server.store_url"] == [f"redis://:{MASK}@h/1", "config.yaml:3"]
    assert "canary" not in done.stdout + done.stderr
    assert "did you mean GPU_CITY?" in done.stderr


def test_the_example_files_name_everything_and_are_right_as_they_stand(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    example = (ROOT / "config.example.yaml").read_text(encoding="utf-8")
    dotenv = (ROOT / ".env.example").read_text(encoding="utf-8")
    variables = {option.variable for option in OPTIONS}
    everything = dict(re.findall(r"^#(GPU_\w+)=(.*)$", dotenv, re.MULTILINE))
    (tmp_path / "config.yaml").write_text(example, encoding="utf-8")

    assert load_worker({}) == WorkerSettings(region="asia-east", supported_types=(JobType.LLM,))
    # A key that is null says nothing, so they are looked for by their variables and their names.
    assert variables - set(re.findall(r"GPU_\w+", example)) == set()
    assert {option.path.rpartition(".")[2] for option in OPTIONS} - set(re.findall(r"(\w+):", example)) == set()
    assert (variables | set(settings.OTHER_VARIABLES)) - set(everything) == set()
    assert load_worker({**everything, "GPU_CONFIG": ""}).timezone == "Asia/Shanghai"


def test_the_documented_table_is_that_of_the_options():
    documented = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")

    assert "\n".join(listing.markdown()) in documented, "run: python -m tasks.settings --markdown"
