"""
The debug toolbar's panel in a real browser, on a real cluster, and the picture of the docs.

To create the picture again: PICTURES=1 pytest tests/real/test_panel.py
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By

from .browser import chrome
from .conftest import NODES, PostgreSQL, empty_tables
from .layouts.waiting import eventually, missing
from .sample import ROOT, free_port, is_listening

pytestmark = pytest.mark.real

# One process, because the toolbar stores requests in memory.
COMMAND = ("gunicorn", "--worker-class", "gthread", "--workers", "1", "--threads", "4")
PICTURE = ROOT / "docs" / "_static" / "panel.png"
LARGEST = 150_000


@pytest.fixture
def url(pg: PostgreSQL, tmp_path: Path) -> Iterator[str]:
    databases = {
        "default" if node == "primary" else node: {
            **pg.cluster.database(node, "site"),
            "CONN_MAX_AGE": None,
        }
        for node in NODES.values()
    }
    port, log = free_port(), tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", *COMMAND),
                *("--bind", f"127.0.0.1:{port}", "tests.real.panel_site:wsgi"),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "DJANGO_SETTINGS_MODULE": "tests.real.panel_settings",
                "SERVED_DATABASES": json.dumps(databases),
            },
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        assert eventually(lambda: is_listening(port) or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)
        empty_tables("pg")


class Window:
    """A browser that opens the toolbar's panel."""

    def __init__(self, chromium: str, driver: str, profile: Path, url: str) -> None:
        self.driver = chrome(chromium, driver, profile)
        self.url = url

    @property
    def root(self) -> Any:
        """Return the toolbar's shadow root; older versions are part of the page."""
        hosts = self.driver.find_elements(By.ID, "djDebugRoot")
        return hosts[0].shadow_root if hosts else self.driver

    def find(self, selector: str) -> str:
        return str(self.root.find_element(By.CSS_SELECTOR, selector).text)

    def click(self, selector: str) -> None:
        self.root.find_element(By.CSS_SELECTOR, selector).click()

    def open(self) -> str:
        """Load the page, open the panel, and return its text."""
        self.driver.get(self.url)
        return self.panel()

    def add(self, title: str) -> str:
        self.driver.get(self.url)
        self.driver.find_element(By.NAME, "title").send_keys(title)
        self.driver.find_element(By.CSS_SELECTOR, "form button").click()
        assert eventually(lambda: title in self.driver.page_source)
        return self.panel()

    def panel(self) -> str:
        self.click("a.PinningPanel")
        text = ""

        def is_there() -> bool:
            nonlocal text
            try:
                text = self.find("#PinningPanel .djDebugPanelContent")
            except WebDriverException:
                return False
            return "SERVERS" in text.upper()

        assert eventually(is_there), text
        return text

    def rows(self) -> list[list[str]]:
        """Return the table of reads: server, reason, statement."""
        table = self.root.find_element(By.CSS_SELECTOR, "#PinningPanel table")
        return [
            [cell.text for cell in row.find_elements(By.TAG_NAME, "td")]
            for row in table.find_elements(By.CSS_SELECTOR, "tbody tr")
        ]

    def reads(self) -> list[tuple[str, str]]:
        return [(row[0].splitlines()[0], row[1].splitlines()[0]) for row in self.rows()]

    def html(self, selector: str) -> str:
        found = self.root.find_element(By.CSS_SELECTOR, selector).get_attribute("outerHTML")
        return found or ""

    def emulate(self, width: int) -> None:
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 600},
        )

    def picture(self, width: int = 1280, height: int = 1000) -> bytes:
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        made = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip})
        return base64.b64decode(made["data"])

    def complaints(self) -> list[str]:
        log = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [e["message"] for e in log if "favicon" not in e["message"]]


@pytest.fixture
def window(url: str, tmp_path: Path) -> Iterator[Window]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        missing("chromium and chromedriver are not installed")
    profile = tmp_path / "profile"
    profile.mkdir()
    found = Window(chromium, driver, profile, url)
    try:
        yield found
    finally:
        found.driver.quit()


def test_panel_in_a_browser(pg: PostgreSQL, window: Window, tmp_path: Path) -> None:
    window.open()
    (first, why), (counted, asked_for) = window.reads()
    assert (first, counted) in {("replica1", "replica1"), ("replica2", "replica2")}
    assert (why, asked_for) == ("round_robin", "use_replica")

    pg.pause()
    text = window.add("A book that only the primary has")
    assert window.reads()[0] == ("default", "wrote")
    assert "outgoing" in text

    window.open()
    assert window.reads()[0] == ("default", "not_caught_up")
    assert window.reads()[1][1] == "use_replica"
    made = window.picture(height=680)
    assert len(made) < LARGEST
    if "PICTURES" in os.environ or not PICTURE.exists():
        PICTURE.write_bytes(made)
    window.emulate(390)
    (tmp_path / "narrow.png").write_bytes(window.picture(390, 1200))
    window.emulate(1280)
    for _ in range(3):
        if 'data-theme="dark"' not in window.html("#djDebug"):
            window.click("#djToggleThemeButton")
    (tmp_path / "dark.png").write_bytes(window.picture(height=680))

    pg.resume()
    window.open()
    found = window.reads()[0]
    assert found[0] in ("replica1", "replica2")
    assert found[1] == "caught_up"
    assert window.complaints() == []


def test_panel_of_an_earlier_request_in_the_history(window: Window) -> None:
    """An earlier request is loaded from the toolbar's store."""
    window.open()
    before = window.rows()
    window.driver.get(f"{window.url}/?later")
    window.panel()
    assert window.rows() != before
    window.click("#PinningPanel .djDebugClose")
    window.click("a.HistoryPanel")

    def switched() -> bool:
        # The list of requests may be re-created during the check.
        try:
            window.click("#djdtHistoryRequests > tr:last-child .switchHistory")
            return "djdt-highlighted" in window.html("#djdtHistoryRequests > tr:last-child")
        except WebDriverException:
            return False

    assert eventually(switched)
    window.click("#HistoryPanel .djDebugClose")

    def shows_the_earlier() -> bool:
        window.panel()
        if window.rows() == before:
            return True
        window.click("#PinningPanel .djDebugClose")
        return False

    assert eventually(shows_the_earlier)
