"""The page at /ui: what it is sent with, and what it does in a real browser in front of a real server."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ensembler.serve import Runtime
from ensembler.serve.http import page
from ensembler.serve.runtime.manifest import EXAMPLES, PROBE, read_bundle
from ensembler.storage import artefact
from tests._runs import TINY
from tests._service import Server, free_port, in_process, make_calibrated, tiny_images

TOKEN = "correct-horse"
HOSTILE = "<img src=x onerror=document.title=1>"


def make_shown(path: Path) -> Path:
    """A calibrated bundle with a probe, whose first class is named as no honest one would be."""
    plain = make_calibrated(path.with_name(f"{path.name}-calibrated"))
    manifest = read_bundle(plain)
    manifest.classes[0] = HOSTILE
    with artefact.write(path, manifest.model_dump(exclude={"files"})) as folder:
        for file in manifest.files:
            shutil.copy(plain / file, folder)
        np.save(folder / EXAMPLES, tiny_images(3))
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shown(tmp_path_factory.mktemp("ui") / "bundle")


def parts(tag: str) -> list[str]:
    return re.findall(f"<{tag}>(.*?)</{tag}>", page.html(), re.DOTALL)


def test_the_policy_lets_only_the_pages_own_script_and_style_run(bundle: Path) -> None:
    with in_process(bundle) as client:
        answer = client.get("/ui")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (content,) = parts(tag)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert "unsafe" not in answer.headers["content-security-policy"]


def test_the_page_holds_all_that_it_needs_and_keeps_nothing() -> None:
    text = page.html()
    assert set(re.findall(r"https?://[^\s'\"%)]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.findall(r"<(?:link|script|img|iframe)[^>]+(?:src|href)=[\"'](?!data:)", text)
    (script,) = parts("script")
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "eval(", "localStorage", "sessionStorage", "cookie"):
        assert word not in script
    assert " style=" not in text.replace(parts("style")[0], "")


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance."""
    digits = colour if len(colour) == 6 else "".join(digit * 2 for digit in colour)
    channels = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast_is_enough(scheme: int) -> None:
    blocks = re.findall(r":root \{(.*?)\}", parts("style")[0], re.DOTALL)
    colours = dict(re.findall(r"--(\w+): #([0-9a-f]+)", blocks[scheme]))

    def contrast(one: str, other: str) -> float:
        lighter, darker = sorted((luminance(colours[one]), luminance(colours[other])), reverse=True)
        return (lighter + 0.05) / (darker + 0.05)

    assert luminance("000") == 0 and luminance("ffffff") == pytest.approx(1)
    for text, paper in itertools.product(("ink", "soft", "mean", "spread"), ("paper", "panel")):
        assert contrast(text, paper) >= 4.5, (text, paper)
    assert contrast("on", "mean") >= 4.5
    assert contrast("ink", "wash") >= 4.5
    assert contrast("line", "paper") >= 3 and contrast("line", "panel") >= 3


def test_examples_are_the_bundles(bundle: Path, tmp_path: Path) -> None:
    found = page.examples(bundle, read_bundle(bundle))["examples"]
    pixels = [np.frombuffer(base64.b64decode(one["pixels"]), np.uint8).reshape(TINY) for one in found]
    np.testing.assert_array_equal(pixels[:3], tiny_images(3))
    with np.load(bundle / PROBE) as probe:
        np.testing.assert_array_equal(pixels[3:], probe["images"][:1])
    assert [one["name"] for one in found[1:]] == ["test image 2", "test image 3", "a random pattern, of no class"]
    plain = make_calibrated(tmp_path / "plain")
    assert page.examples(plain, read_bundle(plain))["examples"] == found[3:]


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = [sys.executable, "-m", "ensembler.cli", "serve", str(bundle)]
    server = Server(command, tmp_path_factory.mktemp("server"), free_port(), ENSEMBLER_TOKEN=TOKEN)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop(signal.SIGTERM)


def test_the_page_needs_no_token_and_the_bundles_images_do(server: Server) -> None:
    answer = server.get("/ui")
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"] == page.headers()["Content-Security-Policy"]
    assert server.get("/examples").status_code == 401
    allowed = server.get("/examples", headers={"Authorization": f"Bearer {TOKEN}"})
    assert len(allowed.json()["examples"]) == 4


class Page:
    """The page in a browser, unlocked."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        self.url = url
        driver.get(f"{url}/ui")
        self.wait(self["unlock"].is_displayed)

    def __getitem__(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def wait(self, holds: Any) -> None:
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, 120, poll_frequency=0.05).until(lambda _: holds())

    def unlock(self) -> None:
        self["token"].send_keys(TOKEN + "\n")
        self.wait(lambda: self["main"].is_displayed() and len(self.all("#examples button")) == 4)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def settle(self) -> None:
        """Wait for the answer to what was last chosen."""
        self.wait(lambda: self["rising"].is_displayed() and "stale" not in self["answer"].get_attribute("class"))

    def choose(self, file: Path) -> None:
        self["file"].send_keys(str(file))
        self.wait(self["views"].is_displayed)
        self.settle()

    def pixels(self) -> np.ndarray:
        """(1, H, W, 3): what is shown as what the networks see."""
        data = self.driver.execute_script(
            "const c = document.getElementById('seen');"
            "return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)"
        )
        return np.array(data, np.uint8).reshape(1, TINY[0], TINY[1], 4)[..., :3]

    def press(self, name: str, *keys: str) -> None:
        self[name].send_keys(*keys)
        self.settle()

    def text(self, selector: str) -> str:
        return str(self.driver.execute_script("return document.querySelector(arguments[0]).textContent", selector))


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    pytest.importorskip("selenium", reason="the page is tested with Selenium, which is not installed")
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from screenshot import browser

    try:
        driver = browser()
    except LookupError as error:
        pytest.skip(str(error))
    finally:
        sys.path.pop(0)
    yield driver
    driver.quit()


@pytest.fixture
def shown(driver: Any, server: Server) -> Page:
    """Unlocked, with an image of another size and ratio chosen."""
    found = Page(driver, server.url)
    found.unlock()
    found.choose(picture(server.log.parent))
    return found


def picture(folder: Path) -> Path:
    coarse = Image.fromarray(tiny_images(7)[0]).resize((61, 37), Image.Resampling.BICUBIC)
    coarse.save(folder / "picture.png")
    return folder / "picture.png"


def test_the_token_is_asked_for_refused_and_never_stored(driver: Any, server: Server) -> None:
    found = Page(driver, server.url)
    assert not found["main"].is_displayed()
    found["token"].send_keys("another\n")
    found.wait(lambda: found["message"].text == "The service refuses this token.")
    found.unlock()
    assert not found["unlock"].is_displayed() and found["message"].text == ""
    stored = "return [localStorage.length, sessionStorage.length, document.cookie.length, location.href]"
    assert driver.execute_script(stored) == [0, 0, 0, f"{server.url}/ui"]
    assert TOKEN not in driver.page_source


def test_an_image_is_seen_as_pillow_resizes_it_and_answered_as_the_runtime_answers(shown: Page, bundle: Path) -> None:
    expected_pixels = np.asarray(Image.open(picture(bundle.parent)).resize((TINY[1], TINY[0]), Image.BILINEAR))
    pixels = shown.pixels()
    assert np.abs(pixels[0].astype(int) - expected_pixels).max() <= 1
    assert "61 × 37" in shown["from"].text
    runtime = Runtime.load(bundle)
    known = runtime.predict(pixels)
    assert shown["name"].text == known.labels[0]
    order = np.argsort(-known.probabilities[0])
    rows = shown.all("#classes tbody tr")
    assert len(rows) == 5
    for index, row in zip(order, rows, strict=True):
        assert runtime.manifest.classes[index] in row.find_element("css selector", "th").text
        mean, spread = (cell.text for cell in row.find_elements("css selector", "td")[1:])
        assert float(mean) == pytest.approx(known.probabilities[0, index], abs=0.0006)
        ends = known.members[:, 0, index].min(), known.members[:, 0, index].max()
        assert [float(end) for end in spread.split(" to ")] == pytest.approx(ends, abs=0.0006)
        dots = row.find_elements("css selector", ".dot")
        places = [float(dot.get_attribute("style").split("left: ")[1].split("%")[0]) / 100 for dot in dots]
        assert places == pytest.approx(known.members[:, 0, index].tolist(), abs=1e-4)
    assert known.mutual_information is not None and known.disagreement is not None
    values = (known.predictive_entropy, known.expected_entropy, known.mutual_information, known.disagreement)
    for value, cell in zip(values, shown.all("#measures .value"), strict=True):
        assert float(cell.text) == pytest.approx(float(value[0]), abs=0.0006)
    ranges = [cell.text for cell in shown.all("#measures td .note")]
    assert ranges == [f"of 0 to {np.log(5):.3f} nats"] * 2 + [f"of 0 to {np.log(3):.3f} nats", "of 0 to 1"]
    assert "3 of 3 members asked" in shown["facts"].text and " ms" in shown["facts"].text


def test_a_class_name_is_text(shown: Page, driver: Any) -> None:
    assert any(HOSTILE in cell.text for cell in shown.all("#classes th[scope=row]"))
    assert not shown.all("#answer img")
    assert driver.title.startswith("How sure is it?")


def test_abstention_and_sets_are_the_services(shown: Page, server: Server) -> None:
    for button in shown.all("#examples button"):
        button.click()
        shown.settle()
        file = io.BytesIO()
        Image.fromarray(shown.pixels()[0]).save(file, "PNG")
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "image/png"}
        (one,) = server.post("/predictive-uncertainty", content=file.getvalue(), headers=headers).json()["predictions"]
        verdict = shown["verdict"].text
        assert ("It abstains" in verdict) == one["abstain"] and ("It answers" in verdict) != one["abstain"]
        tagged = [row.find_element("css selector", "th") for row in shown.all("#classes tbody tr")]
        names = {cell.text.splitlines()[0] for cell in tagged if cell.find_elements("css selector", ".tag")}
        assert {name.removesuffix(" in the set").removesuffix("in the set") for name in names} == set(
            one["prediction_set"]
        )
        assert button.get_attribute("aria-pressed") == "true"


def test_the_slider_corrupts_the_image_and_the_chart_shows_every_severity(shown: Page, bundle: Path) -> None:
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select

    clean = shown.pixels()
    Select(shown["kind"]).select_by_value("brightness")
    shown.press("severity", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert shown.text("#level") == "2"
    bright = shown.pixels()
    np.testing.assert_array_equal(bright, np.minimum(255, np.floor(clean + 255 * 0.2 + 0.5)).astype(np.uint8))
    shown.wait(lambda: "brightness" in shown["h-rising"].text)
    runtime = Runtime.load(bundle)
    assert len(shown.all("#chart circle")) == len(shown.all("#chart rect")) == 6
    rows = shown.all("#numbers tbody tr")
    for severity, pixels in ((0, clean), (2, bright)):
        known = runtime.predict(pixels)
        assert known.mutual_information is not None
        cells = [cell.get_attribute("textContent") for cell in rows[severity].find_elements("css selector", "td")]
        assert cells[0] == known.labels[0]
        assert float(cells[1].removeprefix("< ")) == pytest.approx(known.predictive_entropy[0], abs=0.0011)
        assert float(cells[2].removeprefix("< ")) == pytest.approx(known.mutual_information[0], abs=0.0011)
    assert shown.text("#measures .value") == cells[1]
    shown.press("severity", Keys.END)
    seen = {}
    for kind in ("noise", "blur", "contrast", "pixelate"):
        Select(shown["kind"]).select_by_value(kind)
        shown.wait(lambda kind=kind: kind in shown["h-rising"].text)
        seen[kind] = shown.pixels()
    for one, other in itertools.combinations([clean, *seen.values()], 2):
        assert not np.array_equal(one, other)
    assert np.std(seen["contrast"]) < 0.6 * np.std(clean)
    assert np.std(seen["blur"]) < np.std(clean)
    assert "not CIFAR-10-C" in shown["corruption"].text and "not CIFAR-10-C" in shown["rising"].text


def test_fewer_members_are_marked(shown: Page) -> None:
    from selenium.webdriver.support.select import Select

    for button, mode in itertools.product(shown.all("#examples button"), ("exact", "full")):
        Select(shown["mode"]).select_by_value(mode)
        button.click()
        shown.settle()
        asked = int(shown["facts"].text.split(" of ")[0])
        assert asked == 3 or mode == "exact"
        assert ("were not asked" in shown["verdict"].text) == (asked < 3)
        assert ("validation" in shown["measures"].text) == (mode == "full")


def test_what_is_no_image_is_told(shown: Page, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("hello")
    shown["file"].send_keys(str(tmp_path / "notes.png"))
    shown.wait(lambda: "notes.png is not an image" in shown["message"].text)
    shown.choose(picture(tmp_path))
    shown.wait(lambda: shown["message"].text == "")


def test_of_several_files_the_first_is_shown_and_that_is_said(shown: Page, driver: Any, tmp_path: Path) -> None:
    content = base64.b64encode(picture(tmp_path).read_bytes()).decode()
    drop = (
        "const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0)), held = new DataTransfer();"
        "for (let n = 0; n < arguments[1]; n++) held.items.add(new File([bytes], `${n}.png`, { type: 'image/png' }));"
        "dispatchEvent(new DragEvent('drop', { dataTransfer: held, cancelable: true }));"
    )
    assert "files" not in shown["from"].text
    driver.execute_script(drop, content, 3)
    shown.wait(lambda: shown["from"].text.endswith(", the first of 3 files"))
    driver.execute_script(drop, content, 1)
    shown.wait(lambda: "files" not in shown["from"].text)
    shown.settle()


def test_no_answer_is_passed_off_as_another_images(shown: Page, driver: Any) -> None:
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*predictive-uncertainty*"]})
    one, other = shown.all("#examples button")[:2]
    try:
        one.click()
        shown.wait(lambda: "does not answer" in shown["message"].text)
        assert "stale" in shown["answer"].get_attribute("class")
    finally:
        driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
    other.click()
    shown.settle()
    assert shown["message"].text == ""


def test_the_keyboard_reaches_everything_and_shows_where_it_is(shown: Page, driver: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    driver.execute_script("document.activeElement.blur()")
    reached = []
    for _ in range(12):
        ActionChains(driver).send_keys(Keys.TAB).perform()
        outline = (
            "const e = document.activeElement, s = e.matches('.hide') ? e.nextElementSibling : e;"
            "return [e.id || e.getAttribute('aria-label') || e.tagName, getComputedStyle(s).outlineStyle,"
            " parseFloat(getComputedStyle(s).outlineWidth)]"
        )
        name, style, width = driver.execute_script(outline)
        if name == "BODY":
            break
        reached.append(name)
        assert style == "solid" and width >= 2, name
    wanted = ["file", "test image 1", "kind", "severity", "mode", "SUMMARY"]
    assert [name for name in reached if name in wanted] == wanted
    unnamed = (
        "return [...document.querySelectorAll('button, input, select')].filter((e) => e.checkVisibility()"
        " && !(e.labels && e.labels.length) && !e.getAttribute('aria-label') && !e.textContent.trim()).length"
    )
    assert driver.execute_script(unnamed) == 0
    assert shown["verdict"].get_attribute("role") == "status"


@pytest.mark.parametrize("width", [360, 1180])
def test_nothing_is_cut_off_on_a_phone(shown: Page, driver: Any, width: int) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 400}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        shown.wait(lambda: driver.execute_script("return innerWidth") == width)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        small = (
            "return [...document.querySelectorAll('button, select, label.button, input[type=range]')]"
            ".filter((e) => e.checkVisibility() && e.getBoundingClientRect().height < 24).length"  # WCAG 2.2, 2.5.8
        )
        assert driver.execute_script(small) == 0
    finally:
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size | {"width": 1180, "mobile": False})


def test_the_browser_had_nothing_to_complain_of(shown: Page, driver: Any, server: Server) -> None:
    complaints = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert [message for message in complaints if not re.search("401|ERR_BLOCKED", message)] == []
    addresses = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    assert all(name.startswith(server.url) for name in driver.execute_script(addresses))
    assert "Traceback" not in server.log.read_text()
