"""Trying each type of job in a real browser, against workers that need no weights."""

import io
import os
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from app.keys import Scope
from tests.console.conftest import served
from tests.rig import Platform

PICTURE = io.BytesIO()
Image.new("RGB", (8, 8), "teal").save(PICTURE, "PNG")
SENTENCES = ["a cat sleeps", "a cat sleeps", "the price of steel"]


@pytest.fixture
def playground(page: Page, site: str, platform: Platform):
    """Opens the page of a type."""

    def open_type(name: str) -> Page:
        page.goto(f"{site}/console#/playground/{name}")
        expect(page.locator(".tabs a[aria-current]")).to_be_visible()
        return page

    return open_type


def test_a_chat_streams_with_its_history_and_says_how_fast(playground, platform: Platform):
    page = playground("llm")
    page.get_by_label("System prompt").fill("Answer briefly.")
    page.get_by_label("Message").fill("one two three")
    page.keyboard.press("Enter")
    answer = page.locator(".turn.assistant").first
    expect(answer.locator(".said")).to_have_text("one two three")
    expect(answer.locator(".meta")).to_contain_text(re.compile(r"first token after .*3 tokens"))

    page.get_by_label("Message").fill("and four")
    page.get_by_role("button", name="Send").click()

    expect(page.locator(".turn.assistant .meta").nth(1)).to_contain_text("2 tokens")
    expect(page.locator(".turn.assistant .said").nth(1)).to_have_text("and four")
    page.locator(".turn.assistant .meta a").nth(1).click()
    expect(page.locator(".head .badge")).to_have_text("completed")
    job = page.url.rpartition("/")[2]
    row = platform.dispatch.look(job)
    assert row is not None
    assert [turn["role"] for turn in platform.dispatch.again(row).params["messages"]] == [
        *["system", "user", "assistant", "user"]
    ]
    page.go_back()
    expect(page.locator(".turn.user")).to_have_count(2)


def test_an_answer_goes_on_while_the_reader_looks_at_its_job_and_can_be_stopped_afterwards(
    playground, platform: Platform
):
    page = playground("llm")
    page.get_by_label("Message").fill("sleep 60")
    page.keyboard.press("Enter")
    page.locator(".turn.assistant .meta a").click()
    expect(page.locator(".head .badge")).to_have_text("running")
    job = page.url.rpartition("/")[2]

    page.go_back()

    expect(page.locator(".turn.user")).to_have_count(1)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".turn.assistant")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    row = platform.dispatch.look(job)
    assert row is not None
    assert row.status == "cancelled"


def test_stop_cancels_the_job_and_a_refusal_stands_beside_its_field(playground, platform: Platform):
    page = playground("llm")
    page.get_by_label("Message").fill("sleep 60")
    page.keyboard.press("Enter")
    link = page.locator(".turn.assistant .meta a")
    expect(link).to_be_visible()

    page.get_by_role("button", name="Stop").click()

    expect(page.locator(".turn.assistant")).to_contain_text("stopped")
    row = platform.dispatch.look(link.get_attribute("href").rpartition("/")[2])
    assert row.status == "cancelled"
    page.get_by_label("Temperature").fill("3")
    page.get_by_label("Message").fill("hello")
    page.keyboard.press("Enter")
    temperature = page.get_by_label("Temperature")
    expect(temperature).to_have_attribute("aria-invalid", "true")
    expect(page.locator(f"#{temperature.get_attribute('aria-describedby')}")).to_contain_text("2")
    expect(page.get_by_label("Message")).to_have_value("hello")
    # The browser notes a 422.
    page.wrong.clear()


def test_a_picture_appears_and_its_seed_can_be_used_again(playground):
    page = playground("image_gen")
    page.get_by_label("Prompt").fill("a lighthouse")
    for label, value in {"Width": "64", "Height": "64", "Seed": "7"}.items():
        page.get_by_label(label, exact=True).fill(value)

    page.get_by_role("button", name="Draw").click()

    expect(page.locator("img.picture")).to_have_js_property("naturalWidth", 64)
    expect(page.get_by_role("link", name="Download")).to_have_attribute("download", "picture-7.png")
    expect(page.get_by_role("button", name="Use seed 7 again")).to_be_visible()


def test_an_uploaded_picture_is_asked_about_and_the_same_request_works_with_curl(playground, tmp_path: Path):
    page = playground("vision")
    (tmp_path / "my picture.png").write_bytes(PICTURE.getvalue())
    page.get_by_label("Picture").set_input_files(tmp_path / "my picture.png")
    expect(page.get_by_alt_text("Chosen file: my picture.png")).to_be_visible()
    page.get_by_label("Question").fill("what's there?")

    page.get_by_role("button", name="Ask").click()

    expect(page.locator(".run .answer")).to_have_text("what's there?")
    page.get_by_text("As curl").click()
    expect(page.locator("details pre")).to_contain_text("curl ")
    told = page.locator("details pre").inner_text().replace("curl ", "curl -s --noproxy '*' ")
    environ = {**os.environ, "GPU_API_KEY": ""}
    heard = subprocess.run(told, shell=True, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=30)
    assert '"response":"what\'s there?"' in heard.stdout, (told, heard)


def test_speech_is_recorded_and_written_down_with_its_times(playground):
    page = playground("whisper")
    page.context.grant_permissions(["microphone"])
    page.get_by_role("button", name="Record").click()
    page.get_by_role("button", name="End the recording").click()
    expect(page.locator("audio")).to_be_visible()
    page.get_by_label("Names and words to expect").fill("good morning")

    page.get_by_role("button", name="Write it down").click()

    expect(
        page.get_by_role("table", name="Segments").get_by_role("row", name="0:00.0 0:01.0 good morning")
    ).to_be_visible()


def test_sentences_are_compared_in_a_table(playground):
    page = playground("embedding")
    page.get_by_role("button", name="Add a sentence").click()
    for number, text in enumerate(SENTENCES, 1):
        page.get_by_label(f"Sentence {number}", exact=True).fill(text)

    page.get_by_role("button", name="Compare").click()

    table = page.get_by_role("table", name="Cosine of each pair")
    expect(table.get_by_role("rowheader")).to_have_count(3)
    cells = [float(text) for text in table.locator("tbody td").all_inner_texts()]
    matrix = [cells[at : at + 3] for at in (0, 3, 6)]
    assert [matrix[at][at] for at in range(3)] == [1, 1, 1]
    assert matrix[0][1] == matrix[1][0] == 1
    assert matrix[0][2] == matrix[2][1] < 1
    expect(page.get_by_text("Closest are 1 and 2: 1.000.")).to_be_visible()


def test_a_key_of_scope_infer_is_enough_and_another_is_told_so(page, make_app):
    app = make_app()
    keys = app.extensions["keys"]
    infer, read = (keys.create(scope, [scope]) for scope in (Scope.INFER, Scope.READ))

    with served(app) as url:
        page.goto(f"{url}/console#/playground/llm")
        for key, words in {infer: "Message", read: "scope infer"}.items():
            page.get_by_label("API key").fill(key)
            page.keyboard.press("Enter")
            expect(page.locator(".play")).to_contain_text(words)
            page.get_by_role("button", name="Sign out").click()
        # The server waits for idle connections.
        page.context.close()
    page.wrong[:] = [said for said in page.wrong if "401" not in said]


# The chat is looked at in both themes with the other pages (test_console.py).
@pytest.mark.parametrize("name", ["image_gen", "vision", "whisper", "embedding"])
def test_no_type_scrolls_sideways_on_a_phone_or_breaks_a_rule_of_accessibility(playground, check_phone, name):
    page = playground(name)
    for fold in page.locator("summary").all():
        fold.click()

    check_phone(page, ["dark"])
