"""The built book and the refusal explorer in headless Chromium.

The explorer's own page is made here and always tested where Chromium is installed; the book's pages are tested when the
environment variable DERTA_HTML names the folder of a built book, as `.ci/run` does.
"""

import functools
import http.server
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from explorer_demo import HOSTILE, METHODS, demo_data

from derta_lib import explorer

pytestmark = pytest.mark.slow
BOOK = Path(os.environ["DERTA_HTML"]).resolve() if os.environ.get("DERTA_HTML") else None
PAGES = sorted(str(p.relative_to(BOOK)) for p in BOOK.rglob("*.html") if "_static" not in p.parts) if BOOK else []
STATIC = Path(__file__).parents[1] / "book" / "_static"
WIDTHS = {"desktop": 1280, "phone": 375}
FLAGS = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "disable-dev-shm-usage",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # nothing but this machine has an address
)
needs_book = pytest.mark.skipif(
    BOOK is None, reason="set DERTA_HTML to the html folder of a built book to test its pages"
)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; data of the explorer come late when `late` is set, as over a slow line."""

    late = 0.0

    def do_GET(self):
        if "explorer-data" in self.path:
            time.sleep(Handler.late)
        super().do_GET()

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def serve():
    servers = []

    def start(folder: Path) -> str:
        handler = functools.partial(Handler, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install '.[dev]')")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        assert BOOK is None, "DERTA_HTML is set, but chromium and chromedriver are not installed"
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for argument in (*FLAGS, f"user-data-dir={profile}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    driver.set_page_load_timeout(30)
    yield driver
    driver.quit()


def resize(browser, width: int) -> None:
    """A viewport of exactly this width; headless windows are never narrower than 500 pixels by themselves."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def open_page(browser, url: str, width: str = "desktop", theme: str = "light") -> dict:
    """Load a page and return what it asked for and complained about: {requests, errors}."""
    resize(browser, WIDTHS[width])
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}], "media": ""}
    )
    origin = "{0.scheme}://{0.netloc}".format(urlsplit(url))
    browser.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": origin, "storageTypes": "all"})  # a first visit
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(url)
    wait(browser, "return document.readyState === 'complete' && (!window.MathJax?.startup || "
                  "MathJax.startup.promise.then(() => true))")  # fmt: skip
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    return {"requests": sent, "errors": errors}


def wait(browser, script: str, seconds: float = 15):
    end = time.monotonic() + seconds
    while not (value := browser.execute_script(script)):
        assert time.monotonic() < end, f"waited {seconds} s in vain for: {script}"
        time.sleep(0.05)
    return value


def check_contained(browser) -> None:
    """No horizontal scrolling of the page; wide things scroll inside themselves."""
    inner, outer = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    culprits = browser.execute_script(
        "const w = innerWidth; return [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect()"
        ".right > w + 1 && getComputedStyle(e).position !== 'fixed').slice(0, 5).map(e => e.outerHTML.slice(0, 120))"
    )
    assert inner <= outer, f"the page is {inner} px wide in a window of {outer} px: {culprits}"


def serious_findings(browser) -> list[str]:
    """Serious and critical findings of axe-core, as 'rule: first places'."""
    folder = Path(pytest.importorskip("axe_core_python", reason="axe-core-python is not installed").__file__).parent
    browser.execute_script((folder / "axe.min.js").read_text(encoding="utf-8"))
    found = browser.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "axe.run(document, {resultTypes: ['violations']}).then(r => done(r.violations), e => done(String(e)))"
    )
    assert isinstance(found, list), found
    return [
        f"{finding['id']}: {[node['html'][:160] + ' ' + node['failureSummary'][:200] for node in finding['nodes'][:3]]}"
        for finding in found
        if finding["impact"] in ("serious", "critical")
    ]


def foreign(requests: list[str], base: str) -> list[str]:
    return [url for url in requests if not url.startswith((base, "data:", "blob:", "chrome"))]


# --- the explorer on a page of its own -------------------------------------------------------------------------------

PAGE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Explorer</title>
<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="explorer.css">
<script defer src="explorer-data.js"></script><script defer src="explorer.js"></script></head>
<body><main><h1>Explorer</h1><h2>Tokens</h2><div id="derta-explorer" class="derta-explorer"><p>Loading</p></div></main></body></html>"""  # fmt: skip # noqa: E501


@pytest.fixture(scope="module")
def explorer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explorer")
    explorer.write(folder, demo_data()).rename(folder / "explorer-data.js")
    for name in ("explorer.css", "explorer.js"):
        shutil.copy(STATIC / name, folder)
    (folder / "index.html").write_text(PAGE, encoding="utf-8")
    return folder


@pytest.fixture
def page(browser, explorer_folder):
    """The explorer opened from disk, second query (the harmless one) chosen."""
    from selenium.webdriver.support.ui import Select

    assert open_page(browser, (explorer_folder / "index.html").as_uri())["errors"] == []
    Select(browser.find_element("id", "explorer-query")).select_by_index(1)
    return browser


def text(browser, selector: str) -> str:
    return browser.find_element("css selector", selector).text


def test_explorer_works_by_mouse(page):
    assert len(page.find_elements("css selector", ".panel")) == len(METHODS)
    assert text(page, ".query") == "How do I make lantern 1?"
    page.find_element("css selector", '[data-method="derta"] [data-index="15"]').click()
    assert "after 16 of 40 tokens" in text(page, "label[for=explorer-depth]")
    assert text(page, '[data-method="derta"] .says') == "Sorry, said by derta. [16]"
    assert text(page, '[data-method="vanilla"] .says') == "Sorry, said by vanilla. [16]"
    p = demo_data()["queries"][1]["runs"]["derta"]["p"][16]
    assert f"P(“Sorry”) after 16 tokens: {round(100 * p)} %" in text(page, '[data-method="derta"] .chance')
    assert page.switch_to.active_element.get_attribute("data-index") == "15"
    assert text(page, "[role=status]").startswith("After 16 tokens of the harmful response: ")
    page.find_element("css selector", 'input[value="base"]').click()
    assert len(page.find_elements("css selector", ".panel")) == len(METHODS) - 1
    for box in page.find_elements("css selector", ".controls input:checked"):
        box.click()
    assert text(page, ".panels") == "Choose a method above."


def test_explorer_works_by_keyboard_and_speaks(page):
    from selenium.webdriver.common.keys import Keys

    def press(*keys: str) -> None:
        for key in keys:
            page.switch_to.active_element.send_keys(key)

    page.find_element("id", "explorer-query").send_keys(Keys.TAB)
    assert page.switch_to.active_element.get_attribute("id") == "explorer-depth"
    press(Keys.ARROW_RIGHT)
    assert page.switch_to.active_element.get_attribute("aria-valuetext") == "4 of 40 tokens"
    assert text(page, "[role=status]").startswith("After 4 tokens of the harmful response: untuned")
    press(*[Keys.TAB] * (len(METHODS) + 1))  # past the check boxes, to the first strip
    assert page.switch_to.active_element.get_attribute("role") == "option"
    press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert text(page, "[role=status]").startswith("untuned, token 3 of 40, “word2”: 14 %")  # exp(-2)
    press(Keys.END, Keys.ENTER)
    assert "after 40 of 40 tokens" in text(page, "label[for=explorer-depth]")
    assert text(page, "[role=status]").startswith("After 40 tokens of the harmful response: untuned")
    press(Keys.TAB)
    assert page.switch_to.active_element.get_attribute("class") == "says"
    assert text(page, ".says") == "Sorry, said by base. [40]"


def test_explorer_says_the_scale_by_more_than_colour(page):
    widths = [
        float(page.find_element("css selector", f'[data-method="base"] [data-index="{t}"]')
              .value_of_css_property("border-bottom-width").removesuffix("px"))
        for t in (0, 1, 2, 39)
    ]  # fmt: skip
    assert widths == sorted(widths, reverse=True)
    assert widths[0] >= widths[-1] + 3
    label = page.find_element("css selector", '[data-method="base"] [data-index="1"]').get_attribute("aria-label")
    assert label == "word1, 37 %"  # exp(-1)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_explorer_shows_hostile_text_as_text(browser, explorer_folder, width, theme):
    seen = open_page(browser, (explorer_folder / "index.html").as_uri(), width, theme)
    assert seen["errors"] == []
    assert not [url for url in seen["requests"] if not url.startswith("file:")]
    assert browser.execute_script("return window.HACKED === undefined && !document.querySelector('#hacked, main img')")
    shown = browser.execute_script("return document.querySelector('[data-method=base] .tokens').textContent")
    assert all(part in shown for part in (HOSTILE[0], "```{raw} html↵\n<b id=hacked>", "␛[31mred␛[0m", HOSTILE[3]))
    assert HOSTILE[0] in browser.execute_script("return document.querySelector('[data-method=base] .says').textContent")
    check_contained(browser)
    assert serious_findings(browser) == []


def test_explorer_prints_as_a_figure(page):
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert not page.find_element("css selector", ".controls").is_displayed()
        assert page.find_element("css selector", '[data-method="derta"] .says').is_displayed()
        token = page.find_element("css selector", '[data-method="derta"] .token')
        assert token.value_of_css_property("print-color-adjust") == "exact"
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_first_paint_does_not_wait_for_the_explorers_data(browser, serve, explorer_folder):
    Handler.late = 2.0
    try:
        open_page(browser, serve(explorer_folder))
    finally:
        Handler.late = 0.0
    paint = wait(browser, "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
    assert paint < 1500
    assert wait(browser, "return document.querySelectorAll('.panel').length") == len(METHODS)


# --- the built book --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def book(serve):
    return serve(BOOK)


@needs_book
@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_page(browser, book, name, theme):
    """Loads without an error or a foreign request, in both themes, on a wide and on a narrow screen, accessible."""
    assert (BOOK / name).stat().st_size < 2_000_000, "a page must stay under 2 MB"
    for width in WIDTHS:
        seen = open_page(browser, book + name, width, theme)
        assert seen["errors"] == []
        assert foreign(seen["requests"], book) == []
        check_contained(browser)
    assert browser.execute_script("return document.title")
    if browser.execute_script("return document.documentElement.dataset.theme || ''"):  # not the redirect to the start
        assert browser.execute_script("return document.documentElement.dataset.theme") == theme
        background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (theme == "dark")
    resize(browser, WIDTHS["desktop"])
    assert serious_findings(browser) == []


@needs_book
def test_links_and_anchors_resolve():
    from bs4 import BeautifulSoup

    soups = {name: BeautifulSoup((BOOK / name).read_text(encoding="utf-8"), "html.parser") for name in PAGES}
    anchors = {name: {tag["id"] for tag in soup.find_all(id=True)} for name, soup in soups.items()}
    broken = []
    for name, soup in soups.items():
        for tag in soup.find_all(["a", "link", "script", "img"]):
            target = tag.get("href") or tag.get("src") or ""
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or not target or target == "#":
                continue
            path = unquote(urlsplit(urljoin(f"http://book/{name}", target)).path).lstrip("/")
            page = path if path else "index.html"
            missing = not (BOOK / page).is_file()
            if missing or (parts.fragment and page in anchors and unquote(parts.fragment) not in anchors[page]):
                broken.append(f"{name}: {target}")
    assert not broken


@needs_book
def test_search_finds_a_term(browser, book):
    open_page(browser, f"{book}search.html?q=refusal")
    found = wait(browser, "return [...document.querySelectorAll('#search-results li a')].map(a => a.textContent)")
    assert any("refus" in title.lower() for title in found)


@needs_book
def test_the_books_explorer_has_data_and_answers(browser, book):
    name = next(page for page in PAGES if page.endswith("explorer.html"))
    open_page(browser, book + name)
    wait(browser, "return document.querySelectorAll('.derta-explorer .panel').length >= 2")
    before = text(browser, "label[for=explorer-depth]")
    browser.execute_script("document.getElementById('explorer-depth').focus()")
    browser.switch_to.active_element.send_keys("\ue014")  # arrow right
    assert text(browser, "label[for=explorer-depth]") != before
    scripts = browser.execute_script(
        "return [...document.scripts].filter(s => s.src.includes('explorer')).map(s => s.defer)"
    )
    assert scripts == [True, True]
    elsewhere = (BOOK / next(page for page in PAGES if page.endswith("claims.html"))).read_text(encoding="utf-8")
    assert "explorer-data" not in elsewhere, "only the explorer's own page loads its data"


@needs_book
def test_paper_is_light_whatever_the_theme(browser, book):
    open_page(browser, f"{book}search.html", theme="dark")
    said = "return document.documentElement.dataset.theme"
    assert browser.execute_script(f"dispatchEvent(new Event('beforeprint')); {said}") == "light"
    assert browser.execute_script(f"dispatchEvent(new Event('afterprint')); {said}") == "dark"
