"""Take a screenshot of the page with an image: python examples/screenshot.py URL IMAGE OUT.png [KIND SEVERITY]

Needs Selenium (pip install selenium) and Debian's packages chromium and chromium-driver, or Chrome and its driver.
"""

import os
import shutil
import sys
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait


def browser(width: int = 1180, height: int = 1000) -> webdriver.Chrome:
    """Start a headless browser.

    Raises:
        LookupError: the browser or its driver is not installed.
    """
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        raise LookupError("no browser with a driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.add_argument("--headless=new")
    options.add_argument("--disable-gpu")
    options.add_argument("--disable-dev-shm-usage")
    options.add_argument("--force-color-profile=srgb")
    options.add_argument("--hide-scrollbars")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # required for root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    chrome.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )
    return chrome


def take(url: str, image: str, out: str, kind: str = "blur", severity: str = "4") -> None:
    """Choose an image on the page, corrupt it, and write the whole page as a PNG file."""
    page = browser()
    try:
        wait = WebDriverWait(page, 20)
        page.get(f"{url.rstrip('/')}/ui")
        wait.until(lambda page: page.find_element(By.ID, "main").is_displayed())
        page.find_element(By.ID, "file").send_keys(str(Path(image).resolve()))
        wait.until(lambda page: page.find_element(By.ID, "rising").is_displayed())
        Select(page.find_element(By.ID, "kind")).select_by_value(kind)
        page.find_element(By.ID, "severity").send_keys(Keys.ARROW_RIGHT * int(severity))
        wait.until(lambda page: kind in page.find_element(By.ID, "h-rising").text)
        wait.until(lambda page: "stale" not in page.find_element(By.ID, "answer").get_attribute("class"))
        page.execute_script("document.activeElement.blur()")
        height = page.execute_script("return document.documentElement.scrollHeight")
        page.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": 1180, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        page.save_screenshot(out)
    finally:
        page.quit()


if __name__ == "__main__":
    take(*sys.argv[1:])
