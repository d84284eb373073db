"""The sample site in a real browser: its script, its switch and its controls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By

from tests.real.browser import NewWindow, windows
from tests.real.sample import REPLICAS, Site, eventually, open_folder

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with open_folder() as folder, Site(folder) as site:
        yield site.ready()


@pytest.fixture
def new_window(site: Site, tmp_path: Path) -> Iterator[NewWindow]:
    with windows(tmp_path, site.url) as window:
        yield window


@pytest.fixture(autouse=True)
def replicas_in_order(site: Site) -> Iterator[None]:
    yield
    for alias in REPLICAS:
        site.control(alias, "delay", seconds="0")
    site.resume()


def test_demo_walkthrough(new_window: NewWindow) -> None:
    ada = new_window()
    assert ada.answered_by() <= set(REPLICAS)
    assert ada.text("#pin-badge") == "not pinned"
    ada.sign_in("ada")
    for alias in REPLICAS:
        assert ada.shows_lag(alias, "caught up")
        ada.toggle(alias, "Pause")

    ada.post("Visible to me only")
    assert ada.sees("Visible to me only")
    assert ada.answered_by() == {"primary"}
    assert ada.text("#pin-badge") == "pinned"
    assert "s more" in ada.text("#pin-left")
    assert not ada.find("#missing").is_displayed()
    assert ada.shows_lag("replica1", "behind")

    visitor = new_window()
    assert not visitor.sees("Visible to me only")

    ada.click_and_leave("#pinning")
    assert not ada.sees("Visible to me only")
    assert ada.text("#pin-badge") == "pinning off"
    assert ada.find("#missing").is_displayed()
    ada.click_and_leave("#pinning")
    assert ada.sees("Visible to me only")

    for alias in REPLICAS:
        ada.toggle(alias, "Resume")
        assert ada.shows_lag(alias, "caught up")
    visitor.open("/")
    assert visitor.sees("Visible to me only")
    assert [*ada.complaints(), *visitor.complaints()] == []


def test_user_in_two_windows_and_a_task(new_window: NewWindow) -> None:
    one, other = new_window(), new_window()
    for window in (one, other):
        window.sign_in("ada")
    for alias in REPLICAS:
        assert one.shows_lag(alias, "caught up")
        one.toggle(alias, "Pause")
    one.find("#id_text").send_keys("Count this one too")
    one.click_and_leave("main button[name=count]")
    # Reload the page until the task has finished.
    assert eventually(lambda: "counted" in one.driver.page_source)
    mine = len(
        [by for by in one.driver.find_elements(By.CSS_SELECTOR, ".by b") if by.text == "ada"]
    )
    assert one.text(".count") == (
        f"A task in the background counted {mine} messages of yours, on primary."
    )
    other.open("/")
    assert other.sees("Count this one too")
    assert other.answered_by() == {"primary"}
    assert [*one.complaints(), *other.complaints()] == []


def test_slider_delays_a_replica(site: Site, new_window: NewWindow) -> None:
    window = new_window()
    slider = "[data-alias=replica1] .delay"
    assert eventually(lambda: window.find(slider).is_enabled())
    window.driver.execute_script(
        "const slider = document.querySelector(arguments[0]);"
        "slider.value = 4;"
        "slider.dispatchEvent(new Event('input')); slider.dispatchEvent(new Event('change'));",
        slider,
    )
    assert window.text("[data-alias=replica1] .seconds") == "4 s"
    assert eventually(lambda: site.status()["replica1"]["delay"] == 4)


def test_polling_changes_nothing(new_window: NewWindow) -> None:
    """The requests of the panel set no cookie and end no pin."""
    ada = new_window()
    ada.sign_in("ada")
    ada.post("And then I only look")
    before = ada.cookies()
    asked = "return performance.getEntriesByName(arguments[0]).length"
    status = f"{ada.url}/panel/status/"
    assert eventually(lambda: ada.driver.execute_script(asked, status) >= 3)
    assert ada.cookies() == before


def test_narrow_screen_needs_no_horizontal_scrolling(new_window: NewWindow) -> None:
    window = new_window()
    window.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True},
    )
    for path in ("/", "/sign-in/"):
        window.open(path)
        width = "return document.documentElement.scrollWidth"
        assert window.driver.execute_script(width) <= 390
