"""The sample site in a real browser: its script, its switch and its controls."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from tests.real.sample import REPLICAS, Site, eventually, open_folder

pytestmark = pytest.mark.real

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
)

NewWindow = Callable[[], "Window"]


class Window:
    """A browser with its own profile, and the actions of the tests."""

    def __init__(self, chromium: str, driver: str, profile: Path, url: str) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        # The console messages are checked at the end.
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(executable_path=driver)
        self.driver = webdriver.Chrome(options=options, service=service)
        self.url = url
        self.open("/")

    def open(self, path: str) -> None:
        self.driver.get(self.url + path)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def sees(self, text: str) -> bool:
        return text in self.text("#content")

    def click(self, selector: str) -> None:
        element = self.find(selector)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def click_and_leave(self, selector: str) -> None:
        """Click an element that loads another page, and wait for that page."""
        self.driver.execute_script("window.left = false")
        self.click(selector)
        loaded = "return window.left === undefined && document.readyState === 'complete'"
        assert eventually(lambda: self.driver.execute_script(loaded))

    def sign_in(self, name: str) -> None:
        self.open("/sign-in/")
        self.find("#id_username").send_keys(name)
        self.find("#id_password").send_keys(name)
        self.click_and_leave("main button")
        assert name in self.text("header")

    def post(self, text: str) -> None:
        self.find("#id_text").send_keys(text)
        self.click_and_leave("main button")

    def answered_by(self) -> set[str]:
        badges = self.driver.find_elements(By.CSS_SELECTOR, ".answers .db")
        return {badge.text for badge in badges}

    def shows_lag(self, alias: str, words: str) -> bool:
        """Return whether the panel shows this lag of the replica in time."""
        return eventually(lambda: words in self.text(f"[data-alias={alias}] .lag"))

    def toggle(self, alias: str, label: str) -> None:
        """Click the replica's button once it has this label, and wait until it changes."""
        button = f"[data-alias={alias}] .toggle"
        assert eventually(lambda: self.text(button) == label and self.find(button).is_enabled())
        self.click(button)
        assert eventually(lambda: self.text(button) != label)

    def cookies(self) -> dict[str, str]:
        return {cookie["name"]: cookie["value"] for cookie in self.driver.get_cookies()}

    def complaints(self) -> list[str]:
        log = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in log]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with open_folder() as folder, Site(folder) as site:
        yield site.ready()


@pytest.fixture
def new_window(site: Site, tmp_path: Path) -> Iterator[NewWindow]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        missing = "chromium and chromedriver are not installed"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    with ExitStack() as stack:

        def window() -> Window:
            profile = tmp_path / f"profile{len(os.listdir(tmp_path))}"
            profile.mkdir()
            new = Window(chromium, driver, profile, site.url)
            stack.callback(new.driver.quit)
            return new

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
