"""What people do with the console, in a real browser against a running platform."""

import re
from pathlib import Path

import pytest
from flask import Flask
from playwright.sync_api import Browser, Page, expect

from app.keys import Scope
from engines.catalogue import JobType
from tests.console.conftest import served
from tests.rig import Platform

STATIC = Path(__file__).resolve().parents[2] / "app/console/static"
PAGES = ["overview", "jobs", "playground", "keys"]


def heading(page: Page) -> str:
    """The page's title once the page is there."""
    page.wait_for_selector("main h1")
    return page.inner_text("main h1")


def test_a_submitted_job_appears_on_the_overview_and_in_the_list_without_a_reload(page, site, platform: Platform):
    page.goto(f"{site}/console")
    running = page.locator(".figure", has_text="Running").locator("dd")
    expect(running).to_have_text("0")
    expect(page.locator("#live-words")).to_have_text("Live")

    row = platform.submit("sleep 60")

    expect(running).to_have_text("1")
    expect(page.get_by_role("row", name=re.compile("asia-east Language 0 1"))).to_be_visible()
    expect(page.get_by_role("row", name=re.compile("ready.*Language"))).to_be_visible()
    page.get_by_role("link", name="Jobs").click()
    expect(page.locator(f"a[href$='{row.id}']")).to_be_visible()
    late = platform.submit("hello")
    expect(page.get_by_role("row", name=re.compile(f"{late.id[:8]} completed"))).to_be_visible()
    platform.dispatch.cancel(row)


def test_a_job_is_cancelled_with_the_keyboard_alone(page, site, platform: Platform):
    row = platform.submit("sleep 60")
    page.goto(f"{site}/console#/jobs?status=running")
    button = page.get_by_role("button", name=f"Cancel job {row.id[:8]}")
    expect(button).to_be_visible()

    for _ in range(40):
        page.keyboard.press("Tab")
        if button.evaluate("node => node === document.activeElement"):
            break
    page.keyboard.press("Enter")

    expect(button).to_have_count(0)
    assert platform.status(row) == "cancelled"


def test_a_jobs_page_shows_it_live_and_runs_a_failed_one_again(page, site, platform: Platform):
    # The job must not end while the page is fetched.
    page.goto(f"{site}/console")
    slow = platform.submit("sleep 3")
    page.goto(f"{site}/console#/jobs/{slow.id}")
    expect(page.locator("progress")).to_be_visible()
    expect(page.locator(".head .badge")).to_have_text("completed")
    expect(page.locator(".answer")).to_have_text("sleep 3")
    failed = platform.ended(platform.submit("fail"))
    page.goto(f"{site}/console#/jobs/{failed.id}")

    page.get_by_role("button", name="Run again").click()

    expect(page.locator(".facts a", has_text=failed.id[:8])).to_be_visible()
    expect(page.locator(".head .badge")).to_have_text("failed")


def test_an_address_that_is_chosen_before_it_is_known_who_asks_is_shown_then(page, site):
    asked = []
    page.route("**/console/session", lambda route: asked.append(route))
    with page.expect_request("**/console/session"):
        page.goto(f"{site}/console")
    page.evaluate("new Promise(done => { addEventListener('hashchange', done); location.hash = '#/keys' })")
    asked[0].continue_()

    expect(page.locator("main h1")).to_have_text("Keys")


def test_what_the_network_lost_is_read_again(page, site, platform: Platform):
    row = platform.ended(platform.submit("hello"))
    lost = []

    def lose_once(route):
        if lost:
            route.continue_()
        else:
            lost.append(route.request.url)
            route.abort("internetdisconnected")

    page.route(f"**/jobs/{row.id}", lose_once)
    page.goto(f"{site}/console#/jobs/{row.id}")

    expect(page.locator(".answer")).to_have_text("hello")
    assert len(lost) == 1
    # The browser notes what was lost.
    page.wrong.clear()


def test_a_result_is_shown_as_what_it_is(page, site, platform: Platform):
    row = platform.ended(platform.submit("one text", job_type=JobType.EMBEDDING))

    page.goto(f"{site}/console#/jobs/{row.id}")

    expect(page.get_by_role("table", name="Result")).to_be_visible()
    page.get_by_text("The whole answer as JSON").click()
    expect(page.locator("details pre")).to_contain_text('"embeddings"')


def test_language_and_theme_are_chosen_and_kept(page, site):
    page.goto(f"{site}/console")
    page.get_by_role("button", name="中文").click()
    expect(page.get_by_role("link", name="总览")).to_be_visible()
    assert heading(page) == "总览"
    assert page.get_attribute("html", "lang") == "zh-CN"
    ground = "getComputedStyle(document.body).backgroundColor"
    page.locator("#theme").click()
    light = page.evaluate(ground)
    page.locator("#theme").click()

    page.reload()

    assert heading(page) == "总览"
    assert page.get_attribute("html", "data-theme") == "dark"
    assert page.evaluate(ground) != light


def test_the_reader_of_chinese_is_greeted_in_chinese(browser: Browser, site):
    context = browser.new_context(locale="zh-CN")
    page = context.new_page()

    page.goto(f"{site}/console")

    assert heading(page) == "总览"
    context.close()


@pytest.mark.parametrize("name", PAGES)
def test_no_page_scrolls_sideways_on_a_phone_or_breaks_a_rule_of_accessibility(
    page, site, platform: Platform, check_phone, name
):
    page.goto(f"{site}/console#/{name}")
    heading(page)
    expect(page.locator("#live")).to_have_class(re.compile(r"\bon\b"))

    check_phone(page)


def test_where_a_key_is_needed_it_is_asked_for_once_and_kept_in_this_tab(page, make_app):
    app: Flask = make_app()
    keys = app.extensions["keys"]
    text, worker = keys.create("console", [Scope.ADMIN]), keys.create("gpu", [Scope.WORKER])
    # The browser notes every 401 and 403.
    refused = re.compile("status of 40[13]")

    with served(app) as url:
        page.goto(f"{url}/console")
        page.get_by_label("API key").fill("gpi_00000000_" + "x" * 43)
        page.keyboard.press("Enter")
        expect(page.get_by_text("unknown, expired or revoked")).to_be_visible()
        page.get_by_label("API key").fill(text)
        page.keyboard.press("Enter")
        expect(page.locator("#live-words")).to_have_text("Live")
        page.reload()
        assert heading(page) == "Overview"
        page.goto(f"{url}/console#/keys")
        page.get_by_role("button", name="Create a key").click()
        page.get_by_label("Name").fill("search")
        page.get_by_role("dialog").get_by_role("button", name="Create a key").click()
        made = page.locator(".secret").inner_text()
        page.get_by_role("button", name="Close").click()
        assert keys.check(made).name == "search"
        page.get_by_role("button", name="Revoke: search").click()
        page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
        expect(page.get_by_role("row", name=re.compile("search.*revoked"))).to_be_visible()
        page.get_by_role("button", name="Sign out").click()
        page.get_by_label("API key").fill(worker)
        page.keyboard.press("Enter")
        expect(page.get_by_text("Your key may not see this")).to_be_visible()
        # The server waits for idle connections.
        page.context.close()

    page.wrong[:] = [said for said in page.wrong if not refused.search(said)]  # type: ignore[attr-defined]


def test_both_languages_have_words_for_everything():
    words = {
        language: dict(
            re.findall(r'^  "([^"]+)": "(.*)",$', (STATIC / f"words/{language}.js").read_text(), re.MULTILINE)
        )
        for language in ("en", "zh")
    }
    used = {key for path in STATIC.rglob("*.js") for key in re.findall(r'\bt\("([^"]+)"', path.read_text())}

    assert words["en"].keys() == words["zh"].keys()
    assert used <= words["en"].keys()
    for key, text in words["en"].items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", words["zh"][key])), key
