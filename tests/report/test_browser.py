"""The page in a real browser, opened from a file: drawn, without errors, without a network."""

import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from made_run import components, make_run, sweep, write_plan
from matplotlib import image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from dtm_fast.compression import Int8, Prune
from dtm_fast.report import write_report

pytestmark = pytest.mark.browser

ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
CELLS = "return [...document.getElementById('heat-map-{}').calcdata[{}][0].z].flat()"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.fail(
            "no chromium: apt-get install -y chromium chromium-driver (make test does)", pytrace=False
        )
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished int8 run with a plan, and the beginning of a prune sweep."""
    paths = [component["path"] for component in components()]
    hostile = "</script><script>window.injected = 1</script><img src=x onerror='window.injected = 2'>"
    with make_run(tmp_path_factory.mktemp("browser") / "run", model=hostile) as directory:
        sweep(directory, paths, Int8())
        sweep(directory, paths[:5], Prune(0.5))
        write_plan(directory, paths, sizes=(3, 6, 9), chosen=6, min_fdt=30.0)
        return write_report(directory)[0]


def _open(browser: webdriver.Chrome, report: Path, width: int) -> None:
    size = {"width": width, "height": 1200, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(report.as_uri())


def test_the_figures_are_drawn(browser: webdriver.Chrome, report: Path) -> None:
    _open(browser, report, 1280)
    for place, measured in ((0, 12), (1, 5)):
        cells = browser.execute_script(CELLS.format(place, 1))
        assert len(cells) == 12
        assert sum(isinstance(cell, (int, float)) for cell in cells) == measured
    # Plotly draws a trace's cells as one picture in the SVG; only the second sweep has blank ones.
    for identity, pictures in (("heat-map-0", 1), ("heat-map-1", 2)):
        assert len(browser.find_elements(By.CSS_SELECTOR, f"#{identity} svg .hm image")) == pictures
        names = browser.find_elements(By.CSS_SELECTOR, f"#{identity} svg .ytick text")
        names.sort(key=lambda name: name.location["y"])
        assert [name.text for name in names] == ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"]
    for identity in ("curve-fdt", "curve-sdt", "curve-dppl"):
        assert browser.find_elements(By.CSS_SELECTOR, f"#{identity} svg .scatterlayer .js-line")
    picture = browser.find_element(By.ID, "heat-map-0").screenshot_as_png
    pixels = (image.imread(BytesIO(picture))[..., :3] * 255).round().astype(int).reshape(-1, 3)
    # Both ends of viridis: the most harmful component and the harmless one.
    for colour in ((68, 1, 84), (253, 231, 37)):
        assert (np.abs(pixels - colour).max(axis=1) <= 2).sum() > 100, colour


def test_nothing_was_fetched_and_nothing_went_wrong(browser: webdriver.Chrome, report: Path) -> None:
    browser.get_log("browser")
    _open(browser, report, 1280)
    entries = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [entry for entry in entries if not entry.startswith(("file:", "data:", "blob:"))] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert browser.execute_script("return window.injected") is None
    assert browser.find_element(By.TAG_NAME, "h1").text.startswith("</script><script>")


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(browser: webdriver.Chrome, report: Path, width: int) -> None:
    _open(browser, report, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    places = browser.execute_script(
        "return [...document.querySelectorAll('.figure')].map(f => "
        "[f.parentElement.clientWidth, f.querySelector('svg').clientWidth])"
    )
    assert len(places) == 5
    for room, drawn in places:
        assert drawn <= room


def test_the_table_opens(browser: webdriver.Chrome, report: Path) -> None:
    _open(browser, report, 1280)
    browser.find_element(By.CSS_SELECTOR, "summary").click()
    rows = browser.find_elements(By.CSS_SELECTOR, "details[open] tbody tr")
    assert len(rows) == 12
    assert rows[0].text.split()[:2] == ["1", "model.layers.0.self_attn.q_proj"]
