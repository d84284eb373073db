"""The status page in Chromium, on the sample site's cluster; makes the docs' picture.

To create the picture again: PICTURES=1 pytest tests/real/test_status_page.py
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .browser import NewWindow, Window
from .sample import ROOT, Site, eventually, open_folder
from .test_sample_browser import new_window

__all__ = ["new_window"]

pytestmark = pytest.mark.real

PICTURE = ROOT / "docs" / "_static" / "status.png"
MOST_BYTES = 150_000
STATUS = "/pinning/"
# Finds elements that overflow.
TOO_WIDE = (
    "return [...document.querySelectorAll('tbody th, tbody td')]"
    ".filter((cell) => cell.scrollWidth > cell.clientWidth + 1).map((cell) => cell.innerText)"
)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with open_folder() as folder, Site(folder) as site:
        yield site.ready()


@pytest.fixture(autouse=True)
def replicas_in_order(site: Site) -> Iterator[None]:
    yield
    site.resume()


@pytest.fixture
def admin(site: Site, new_window: NewWindow) -> Window:
    """A staff user on the status page, while other users read the site."""
    window = new_window()
    window.sign_in("admin")
    for _ in range(4):
        site.browser().get("/")
    window.open(STATUS)
    return window


def emulate(window: Window, width: int, scheme: str = "light", height: int = 900) -> None:
    window.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    window.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )


def picture(window: Window, scale: float = 1.0) -> bytes:
    """Return a screenshot of the whole page."""
    size = "const page = document.documentElement; return [page.scrollWidth, page.scrollHeight]"
    width, height = window.driver.execute_script(size)
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": scale}
    made = window.driver.execute_cdp_cmd(
        "Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True}
    )
    return base64.b64decode(made["data"])


def polls(window: Window) -> int:
    asked = "return performance.getEntriesByName(arguments[0]).length"
    return int(window.driver.execute_script(asked, f"{window.url}{STATUS}data/"))


def cells(window: Window, table: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((row) => row.innerText)"
    rows: list[str] = window.driver.execute_script(script, f"#{table}-table tbody tr")
    return rows


def test_page_shows_events(site: Site, admin: Window, tmp_path: Path) -> None:
    assert eventually(lambda: polls(admin) >= 2)
    assert admin.text("#summary") == "default: 2 of 2 replicas are in rotation."
    assert any("round robin" in row for row in cells(admin, "by-reason"))
    assert site.control("replica1", "pause").status == 200
    ada = site.browser()
    ada.sign_in("ada")

    def is_behind() -> bool:
        ada.post_form("/", text="On the primary, and soon elsewhere")
        site.browser().get("/")
        lag = re.search(r"replica1: ([\d.]+) s", admin.text("#lag-legend"))
        return lag is not None and float(lag[1]) > 4

    assert eventually(is_behind)
    for width in (1280, 360):
        for scheme in ("light", "dark"):
            emulate(admin, width, scheme)
            (tmp_path / f"status-{width}-{scheme}.png").write_bytes(picture(admin))
            wide = "return document.documentElement.scrollWidth"
            assert admin.driver.execute_script(wide) <= width
            assert admin.driver.execute_script(TOO_WIDE) == []
    emulate(admin, 1100)
    made = picture(admin, 0.8)
    assert len(made) < MOST_BYTES
    if "PICTURES" in os.environ or not PICTURE.exists():
        PICTURE.write_bytes(made)
    assert admin.complaints() == []


def test_polling_changes_nothing(admin: Window, site: Site) -> None:
    before = admin.cookies()
    reads = "return [...document.querySelectorAll('#by-server-table td')].map((e) => e.innerText)"
    assert eventually(lambda: polls(admin) >= 1)
    first: Any = admin.driver.execute_script(reads)
    asked = polls(admin)
    assert eventually(lambda: polls(admin) >= asked + 3)
    assert admin.cookies() == before
    assert admin.driver.execute_script(reads) == first


def test_keyboard_navigation(admin: Window) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    focused = "return document.activeElement.id || document.activeElement.className"
    ActionChains(admin.driver).send_keys(Keys.TAB).perform()
    assert admin.driver.execute_script(focused) == "skip"
    ActionChains(admin.driver).send_keys(Keys.ENTER).perform()
    assert admin.driver.execute_script(focused) == "servers"
    admin.driver.execute_script("document.getElementById('pause').focus()")
    ActionChains(admin.driver).send_keys(Keys.SPACE).perform()
    assert admin.find("#pause").get_attribute("aria-pressed") == "true"
    before = polls(admin)
    assert not eventually(lambda: polls(admin) > before + 1, 5)


def test_page_requires_staff(site: Site) -> None:
    visitor = site.browser()
    assert "/admin/login/" in visitor.get(STATUS).url
    visitor.sign_in("ada")
    assert "/admin/login/" in visitor.get(STATUS).url
    assert "/admin/login/" in visitor.get(f"{STATUS}data/").url
    assert visitor.get(f"{STATUS}data/", {"Pinning-Status": "forged"}).status == 403
