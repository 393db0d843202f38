"""GPU hosts in a real browser: a real gpu_admin, with a GPU that is none, behind a real API."""

import os
import subprocess
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from app.gpu_hosts import GpuHost
from gpu_admin.keys import Keys, Scope
from tests.console.conftest import served
from tests.gpu_admin import seed_host
from tests.gpu_admin.nvml import Card, Held, NvmlStub
from tests.gpu_admin.serving import served as admin_served
from tests.rig import free_port

CARDS = [Card("NVIDIA L40S", 46_068), Card("NVIDIA L40S", 46_068, utilization_percent=0, temperature_c=34, power_w=31)]


@pytest.fixture(scope="module")
def holder() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that holds a GPU's memory, as far as NVML says."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def site(make_app, holder, tmp_path_factory) -> Iterator[str]:
    """An API with two hosts, one of which is away."""
    folder, port = tmp_path_factory.mktemp("host"), free_port()
    stub = NvmlStub(folder)
    stub.write(CARDS, [Held(holder.pid, 11_264)])
    key = Keys(folder / "data").create("platform", Scope.ADMIN)
    environ = {**os.environ, **stub.environ, **seed_host.environ(folder, port)}
    hosts = [
        GpuHost("gpu-7", f"http://127.0.0.1:{port}", key),
        GpuHost("gpu-8", f"http://127.0.0.1:{free_port()}", key),
    ]
    app = make_app(gpu_hosts={host.name: host for host in hosts})
    with admin_served(environ, port, folder), served(app) as url:
        yield url


def test_a_host_shows_its_gpus_and_starts_reads_and_stops_a_model(page: Page, site: str):
    page.goto(f"{site}/console#/hosts")
    expect(page.get_by_role("row", name="gpu-8 not reachable")).to_be_visible()
    page.get_by_role("link", name="gpu-7").click()
    expect(page.locator(".gpu")).to_have_count(2)
    expect(page.locator(".gpu").first).to_contain_text("NVIDIA L40S")
    expect(page.locator(".gpu").first).to_contain_text("11 GiB / 45 GiB")

    page.get_by_role("button", name="Start a model").click()
    page.get_by_role("dialog").get_by_label("Model").select_option("FastFitAll")
    page.get_by_role("dialog").get_by_label("GPU").select_option("1")
    page.get_by_role("dialog").get_by_role("button", name="Start a model").click()
    row = page.get_by_role("row", name="FastFitAll triton 1 running")
    expect(row).to_be_visible(timeout=20_000)
    row.get_by_role("button", name="Log").click()
    expect(page.locator("pre.log")).to_contain_text("FastFitAll@1 says 2")
    page.get_by_role("button", name="Close").click()
    row.get_by_role("button", name="Stop").click()
    page.get_by_role("dialog").get_by_role("button", name="Leave it").click()
    expect(row).to_be_visible()
    row.get_by_role("button", name="Stop").click()
    page.get_by_role("dialog").get_by_role("button", name="Stop").click()

    expect(page.get_by_text("No model was started here.")).to_be_visible(timeout=20_000)


def test_a_process_is_ended_after_one_question(page: Page, site: str, holder):
    page.goto(f"{site}/console#/hosts/gpu-7")

    page.get_by_role("button", name=f"process {holder.pid}").click()
    page.get_by_role("dialog").get_by_role("button", name="End").click()

    assert holder.wait(20) != 0


def test_a_host_that_is_away_is_told_and_no_error_of_the_page(page: Page, site: str):
    page.goto(f"{site}/console#/hosts/gpu-8")

    expect(page.get_by_role("alert").get_by_text("cannot be reached")).to_be_visible()
    page.goto("about:blank")
    # The browser notes every 502.
    page.wrong[:] = [said for said in page.wrong if "502" not in said]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "themes"), [("", ["light"]), ("/gpu-7", ["light", "dark"])])
def test_no_page_scrolls_sideways_on_a_phone_or_breaks_a_rule_of_accessibility(page, site, check_phone, name, themes):
    page.goto(f"{site}/console#/hosts{name}")
    expect(page.get_by_text("NVIDIA L40S" if name else "not reachable").first).to_be_visible()

    check_phone(page, themes)
