"""`python -m bench.console URL`: what the console costs a browser that comes for the first time, and again.

Needs a running API without keys (python -m local.up), and Debian's chromium.
"""

import shutil
import statistics
import sys

from playwright.sync_api import Browser, sync_playwright

ROUNDS = 5
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
#: Milliseconds until the snapshot is drawn, requests but those for data, and bytes on the wire with their headers.
MEASURE = """() => {
  const files = performance.getEntriesByType("resource").filter(({ name }) => !name.includes("/api/"));
  const page = performance.getEntriesByType("navigation")[0];
  const size = [page, ...files].reduce((sum, { transferSize }) => sum + transferSize, 0);
  return [performance.now(), files.length + 1, size];
}"""


def main() -> None:
    """Print the medians."""
    url = sys.argv[1]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        rounds = [_round(browser, url) for _ in range(ROUNDS)]
        browser.close()
    for what, visits in zip(("first visit", "again"), zip(*rounds, strict=True), strict=True):
        ms, files, size = (statistics.median(figures) for figures in zip(*visits, strict=True))
        print(f"{what:12} {ms:6.0f} ms until the first figures are drawn, {files:.0f} files, {size / 1000:.1f} kB")


def _round(browser: Browser, url: str) -> list[list[float]]:
    """Milliseconds, files and bytes of the first visit of a fresh profile, and of the next."""
    context = browser.new_context()
    page = context.new_page()
    told: list[list[float]] = []
    for _ in range(2):
        page.goto(f"{url}/console")
        page.wait_for_selector(".map")
        told.append(page.evaluate(MEASURE))
        page.goto("about:blank")
    context.close()
    return told


if __name__ == "__main__":
    main()
