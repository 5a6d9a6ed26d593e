"""The page in a real browser, opened from a file: drawn, without errors, without a network."""

import re
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from made_plans import falling, write_beam, write_comparison, write_joint, write_losses, write_rounds
from made_run import components, make_run, sweep, write_plan
from matplotlib import image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

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


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of each search: rounds with trainings, a beam, and a joint search with a comparison."""
    found = {}
    for name, write in (("rounds", write_rounds), ("beam", write_beam), ("joint", write_joint)):
        with make_run(tmp_path_factory.mktemp(name) / "run") as directory:
            write(directory)
            if name == "rounds":
                write_losses(directory, "recovery/round-1", 90, falling(100, 90))
                write_losses(directory, "recovery/round-2", 9, falling(10, 9))
            if name == "joint":
                sweep(directory, [component["path"] for component in components()], Int8())
                write_comparison(directory)
            found[name] = write_report(directory)[0]
    return found


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
    pixels = _pixels(browser, "heat-map-0")
    # Both ends of viridis: the most harmful component and the harmless one.
    for colour in ((68, 1, 84), (253, 231, 37)):
        assert (np.abs(pixels - colour).max(axis=1) <= 2).sum() > 100, colour


def _pixels(browser: webdriver.Chrome, identity: str) -> np.ndarray:
    """The colours of a figure as it is seen, int [pixels, 3]."""
    picture = browser.find_element(By.ID, identity).screenshot_as_png
    return (image.imread(BytesIO(picture))[..., :3] * 255).round().astype(int).reshape(-1, 3)


def _sizes(browser: webdriver.Chrome, selector: str) -> list[tuple[str, float, float]]:
    """Text, width and height of what the selector finds; in one question, for each takes a while."""
    found = browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(e => { const box = e.getBoundingClientRect(); "
        "return [e.textContent, box.width, box.height]; })",
        selector,
    )
    return [(text, width, height) for text, width, height in found]


def _drawn(browser: webdriver.Chrome, identity: str) -> tuple[int, int]:
    """How many lines with a length and how many dots with a size the figure has."""
    lines = _sizes(browser, f"#{identity} svg .scatterlayer .js-line")
    dots = _sizes(browser, f"#{identity} svg .scatterlayer .point")
    assert all(width > 20 for _, width, _ in lines)
    assert all(width > 1 for _, width, _ in dots)
    return len(lines), len(dots)


def test_the_plans_map_is_drawn(browser: webdriver.Chrome, searched: dict[str, Path]) -> None:
    # Whether some cells are blank, and what is written in the others, row by row.
    expected = {
        "rounds": (False, ["20"] * 4 + ["60"] * 4 + ["100"] * 4),
        "beam": (True, []),
        "joint": (True, ["A"] * 4 + ["B"] * 3 + ["C"] * 3),
    }
    for name, (blank, texts) in expected.items():
        _open(browser, searched[name], 1280)
        assert len(browser.find_elements(By.CSS_SELECTOR, "#plan-map svg .hm image")) == 1 + blank
        labels = [each for each in _sizes(browser, "#plan-map svg .heatmap-label text") if each[0]]
        assert sorted(text for text, _, _ in labels) == sorted(texts), name
        assert all(height > 8 for _, _, height in labels)
    # The legend's colours are those of the cells.
    swatches = browser.find_elements(By.CSS_SELECTOR, ".keys .swatch")
    assert [swatch.text for swatch in swatches] == ["A", "B", "C", ""]
    colours = [swatch.value_of_css_property("background-color") for swatch in swatches[:3]]
    pixels = _pixels(browser, "plan-map")
    for colour in colours:
        rgb = [int(part) for part in re.findall(r"\d+", colour)[:3]]
        assert (np.abs(pixels - rgb).max(axis=1) <= 2).sum() > 1000, colour


def test_what_a_cell_says(browser: webdriver.Chrome, searched: dict[str, Path]) -> None:
    _open(browser, searched["joint"], 1280)
    box = browser.find_element(By.CSS_SELECTOR, "#plan-map .nsewdrag").rect
    # The middle of the first of four layers and of three components, in two steps: the first one enters the figure.
    for step in (0, 1):
        at = {"x": box["x"] + box["width"] / 8 + step, "y": box["y"] + box["height"] / 6 + step}
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", **at})
    said = WebDriverWait(browser, 10).until(
        lambda b: b.find_elements(By.CSS_SELECTOR, "#plan-map .hoverlayer .hovertext")
    )
    assert said[0].text.startswith("model.layers.0.self_attn.q_proj")
    for words in ("int8", "11.2 bits a weight", "alone:", "mean FDT 40"):
        assert words in said[0].text, words


def test_the_progress_of_each_search_is_drawn(browser: webdriver.Chrome, searched: dict[str, Path]) -> None:
    expected = {
        # The level, mean FDT and FDT_75 after three rounds, and the plan on two of them.
        "rounds": {"fdt": (3, 3 * 3 + 2), "sdt": (1, 3 + 1), "dppl": (1, 3 + 1)},
        "beam": {"fdt": (2, 2 * 8 + 2), "sdt": (1, 8 + 1), "dppl": (1, 8 + 1)},
        # 14 joint configurations and two of which FDT alone is known; four on the front; the plan.
        "joint": {"fdt": (1, 16 + 4 + 1), "sdt": (1, 14 + 4 + 1), "dppl": (1, 14 + 4 + 1)},
    }
    for name, figures in expected.items():
        _open(browser, searched[name], 1280)
        assert {each: _drawn(browser, f"progress-{each}") for each in figures} == figures, name


def test_baselines_and_trainings_are_drawn(browser: webdriver.Chrome, searched: dict[str, Path]) -> None:
    _open(browser, searched["joint"], 1280)
    assert _drawn(browser, "baselines") == (3, 3 * 2)
    names = _sizes(browser, "#baselines .legendtext")
    assert [name for name, _, _ in names] == ["FDT", "KL", "gradient"]
    _open(browser, searched["rounds"], 1280)
    # Of a hundred steps there are no dots; of ten the last one alone is without the mask.
    assert _drawn(browser, "training-0") == (2, 0)
    assert len(browser.find_elements(By.CSS_SELECTOR, "#training-1 svg .scatterlayer .point")) == 10


def test_nothing_was_fetched_and_nothing_went_wrong(
    browser: webdriver.Chrome, report: Path, searched: dict[str, Path]
) -> None:
    for page in (*searched.values(), report):
        browser.get_log("browser")
        _open(browser, page, 1280)
        entries = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        assert [entry for entry in entries if not entry.startswith(("file:", "data:", "blob:"))] == []
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert browser.execute_script("return window.injected") is None
    assert browser.find_element(By.TAG_NAME, "h1").text.startswith("</script><script>")


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(
    browser: webdriver.Chrome, report: Path, searched: dict[str, Path], width: int
) -> None:
    for page, figures in (
        (report, 6),
        (searched["rounds"], 7),
        (searched["beam"], 5),
        (searched["joint"], 6),
    ):
        _open(browser, page, width)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        places = browser.execute_script(
            "return [...document.querySelectorAll('.figure')].map(f => "
            "[f.parentElement.clientWidth, f.querySelector('svg').clientWidth])"
        )
        assert len(places) == figures
        for room, drawn in places:
            assert drawn <= room


def test_the_table_opens(browser: webdriver.Chrome, report: Path) -> None:
    _open(browser, report, 1280)
    plan, _, alone, _ = browser.find_elements(By.CSS_SELECTOR, "summary")
    plan.click()
    assert len(browser.find_elements(By.CSS_SELECTOR, "details[open] tbody tr")) == 6
    plan.click()
    alone.click()
    rows = browser.find_elements(By.CSS_SELECTOR, "details[open] tbody tr")
    assert len(rows) == 12
    assert rows[0].text.split()[:2] == ["1", "model.layers.0.self_attn.q_proj"]
