"""A real browser for the tests: Chromium, driven by Selenium."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from tests.real.sample import eventually

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


def chrome(chromium: str, driver: str, profile: Path) -> webdriver.Chrome:
    """Start a browser with its own profile, which keeps its console messages."""
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    return webdriver.Chrome(options=options, service=service)


class Window:
    """A browser with its own profile, and the actions of the tests."""

    def __init__(self, chromium: str, driver: str, profile: Path, url: str) -> None:
        # The console messages are checked at the end.
        self.driver = chrome(chromium, driver, profile)
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


@contextmanager
def windows(profiles: Path, url: str) -> Iterator[NewWindow]:
    """Return a function that opens a site in a new browser; skip the test without Chromium."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        missing = "chromium and chromedriver are not installed"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    with ExitStack() as stack:

        def window() -> Window:
            profile = profiles / f"profile{len(os.listdir(profiles))}"
            profile.mkdir()
            new = Window(chromium, driver, profile, url)
            stack.callback(new.driver.quit)
            return new

        yield window
