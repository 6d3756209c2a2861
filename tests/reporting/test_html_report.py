"""report.html: what it holds, what it escapes, and how it behaves in a real browser."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

import normswap
from normswap import CheckpointError, MissingExtraError
from normswap.reporting.benchmark_charts import Speed
from normswap.reporting.html_report import read_benchmark, render_page

from .page import HOSTILE, benchmark, convert, hostile, record_of

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PHONE, SMALL_PHONE, DESKTOP = 375, 320, 1200
# WCAG 2.1, success criterion 1.4.3: text of normal size.
CONTRAST = 4.5


@pytest.fixture(scope="module")
def record():
    return record_of(convert(calibration=normswap.CalibrationOptions(method="reconstruct")))


@pytest.fixture(scope="module")
def result():
    """A conversion that is quickly done."""
    return convert(calibration=normswap.CalibrationOptions(method="channel"))


class Elements(HTMLParser):
    """Counts start tags, and collects attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += f" {data}"


def test_the_page_holds_the_numbers(record):
    text = " ".join(Elements(render_page(record)).text.split())
    for stage in record["report"]["stages"]:
        assert f"{stage['name']} {stage['top1']:.2f} {stage['top5']:.2f} {stage['agreement']:.2f}" in text
    for fit in record["report"]["fits"]:
        assert f"{fit['r2']:.4f} {fit['r2_patch']:.4f} {fit['r2_prefix']:.4f} {fit['r2_original']:.4f}" in text
    for site in record["report"]["plan"]:
        assert site["path"] in text
        assert site["reason"] in text
    for version in record["report"]["versions"].values():
        assert version in text
    assert record["report"]["evaluation_data"] in text
    assert "normswap convert" in text
    assert "2026-01-01 00:00 UTC" in text
    assert "Not measured. This measures it: normswap benchmark" in text


def test_the_page_is_one_file(record):
    page = render_page(record, benchmark())
    elements = Elements(page)
    assert not {"script", "iframe", "object", "embed", "form"} & set(elements.tags)
    for name, value in elements.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value.startswith("data:"), value
    assert "url(" not in page
    assert "@import" not in page
    assert len(page) < 300_000


def test_text_of_others_is_escaped_everywhere(record):
    """The hostile record makes exactly the elements of the harmless one with as many texts."""
    bad = hostile(record) | {"format": 1, "thumbnails": record["thumbnails"]}
    page = render_page(bad, hostile(benchmark()))
    harmless = json.loads(json.dumps(bad).replace(json.dumps(HOSTILE)[1:-1], "x"))
    expected = render_page(
        harmless, json.loads(json.dumps(hostile(benchmark())).replace(json.dumps(HOSTILE)[1:-1], "x"))
    )
    shortened = {"title"}  # a name that is too long for a chart has its full text as a title
    tags = [[tag for tag in Elements(text).tags if tag not in shortened] for text in (page, expected)]
    assert tags[0] == tags[1]
    assert "</script><script>window.hacked=1" in Elements(page).text
    assert not re.search("[\x00\u202e\ud800-\udfff]", page)
    page.encode()


@pytest.mark.parametrize(
    "thumbnail", ["javascript:alert(1)", "https://example.org/a.png", "data:text/html,<b>", None, 3]
)
def test_only_pictures_are_shown_as_pictures(record, thumbnail):
    page = render_page(record | {"thumbnails": [thumbnail] * len(record["thumbnails"])})
    assert "<img" not in page
    assert "picture not kept" in page


def test_a_page_without_most_things(record):
    """Of a folder of an earlier version, of a method that solves nothing, without labels, without classes."""
    report = {
        key: value for key, value in record["report"].items() if key not in ("worst", "bound", "bounded", "views")
    }
    for fit in (report := json.loads(json.dumps(report)))["fits"]:
        del fit["r2_patch"], fit["r2_prefix"], fit["bound"]
    early = {"format": 1, "edits": {}, "report": report | {"layers": [], "stream": []}, "command": None}
    page = render_page(early)
    assert "None were kept." in page
    assert "called from Python" in page
    assert "prefix tokens" not in page
    headless = record_of(convert("headless", calibration=normswap.CalibrationOptions(method="channel")))
    page = render_page(headless)
    assert "Cosine similarity of the output" in page
    assert "cosine" in page
    unlabelled = json.loads(json.dumps(record))
    for stage in unlabelled["report"]["stages"]:
        stage |= {"top1": None, "top5": None}
    assert "the answer stays the same for" in render_page(unlabelled)
    assert "Top-1 agreement with the original, %" in render_page(unlabelled)
    nothing = json.loads(json.dumps(record))
    nothing["report"]["stages"] = []
    assert "Not measured." in render_page(nothing)


def test_an_infinite_kl_is_said(record):
    bad = json.loads(json.dumps(record))
    bad["report"]["stages"][-1] |= {"kl": None, "worst_kl": None}
    bad["report"]["worst"][0] |= {"kl": None, "converted": []}
    text = " ".join(Elements(render_page(bad)).text.split())
    assert "infinite" in text
    assert "KL infinite" in text
    assert "not finite" in text


@pytest.mark.parametrize("key", ["stages", "fits", "plan", "sites", "versions", "evaluation_data"])
def test_a_record_that_is_none_is_refused(record, key):
    report = {k: v for k, v in record["report"].items() if k != key}
    with pytest.raises(CheckpointError, match=f"out/normswap.json: no page can be made of it.*{key}"):
        render_page(record | {"report": report}, source="out/normswap.json")


def test_speed_says_what_the_spread_allows():
    speed = Speed.of(benchmark())
    assert [case.name for case in speed.cases] == ["eager, batch 1", "eager, batch 64"]
    first, second = speed.cases
    assert first.finding == "fused gives 1.250 times the original's images/s, quartiles 1.230 to 1.270"
    assert second.finding.endswith("no difference that could be told from the spread")
    assert first.rows[0] == ["original", "500.0", "454.5 to 526.3", "2.00", "-", "-"]
    assert ("device", "cpu") in speed.about


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"results": []}', '{"results": [{}]}', '{"results": 3}', "\xff"])
def test_a_benchmark_that_is_none_is_refused(tmp_path, text):
    file = tmp_path / "speed.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=re.escape(str(file))):
        read_benchmark(file)


def test_without_jinja_the_folder_comes_without_the_page(result, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result.save(tmp_path / "out")
    assert not (tmp_path / "out" / "report.html").exists()
    assert "report.html" not in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(MissingExtraError, match=r"normswap\[report\]"):
        result.save(tmp_path / "other", normswap.SaveOptions(page=True))
    assert not (tmp_path / "other").exists()


def test_the_folder_holds_the_page_that_its_record_gives(result, tmp_path):
    result.save(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "normswap.json").read_text())
    assert (tmp_path / "out" / "report.html").read_text() == render_page(record)
    assert "report.html shows them with pictures" in (tmp_path / "out" / "README.md").read_text()
    assert len(record["thumbnails"]) == len(record["report"]["worst"]) == 8
    result.save(tmp_path / "bare", normswap.SaveOptions(page=False))
    assert not (tmp_path / "bare" / "report.html").exists()
    assert normswap.load(tmp_path / "bare") is not None


def test_a_page_that_cannot_be_made_does_not_cost_the_model(result, tmp_path, monkeypatch):
    def broken(record):
        raise CheckpointError("no page")

    monkeypatch.setattr("normswap.outputs.save.render_page", broken)
    with pytest.warns(UserWarning, match=r"report.html was not written: CheckpointError: no page"):
        result.save(tmp_path / "out")
    assert normswap.load(tmp_path / "out") is not None
    assert not (tmp_path / "out" / "report.html").exists()
    assert "report.html" not in (tmp_path / "out" / "README.md").read_text()


# In a real browser


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt install chromium chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


class Shown:
    """A page in the browser."""

    def __init__(self, driver, url):
        self.driver, self.url = driver, url
        self.show(DESKTOP)
        for kind in ("browser", "performance"):
            driver.get_log(kind)  # what came before is not ours
        driver.get(url)

    def show(self, width, scheme="light", media="screen"):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 700}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [feature]})

    def ask(self, script):
        return self.driver.execute_script(f"return {script}")

    def count(self, selector):
        return self.ask(f"document.querySelectorAll({json.dumps(selector)}).length")

    def colour(self, selector, name):
        """Return red, green and blue of a computed colour, 0 to 255; the page's where it is transparent."""
        value = self.ask(f"getComputedStyle(document.querySelector({json.dumps(selector)})).{name}")
        numbers = [float(v) for v in re.findall(r"[\d.]+", value)]
        return numbers[:3] if len(numbers) == 3 or numbers[3] else self.colour("body", name)

    def logs(self):
        """Return the console's messages and every address that was asked for, but for data in the page itself."""
        messages = [entry["message"] for entry in self.driver.get_log("browser")]
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return messages, [url for url in sent if not url.startswith("data:")]


@pytest.fixture(scope="module")
def written(record, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    hostile_record = hostile(record) | {"format": 1, "thumbnails": record["thumbnails"]}
    pages = {
        "plain": render_page(record, benchmark()),
        "hostile": render_page(hostile_record, hostile(benchmark())),
        "noisy": "<title>t</title><img src='http://127.0.0.1:9/x.png'><script>console.error('loud')</script>",
    }
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text)
    return {name: (folder / f"{name}.html").as_uri() for name in pages}


@pytest.mark.parametrize("name", ["plain", "hostile"])
def test_the_browser_asks_for_nothing_and_complains_of_nothing(browser, written, name):
    shown = Shown(browser, written[name])
    assert shown.logs() == ([], [written[name]])
    assert shown.ask("window.hacked === undefined")
    assert shown.ask("[...document.images].every(i => i.complete && i.naturalWidth > 0)")


def test_a_request_and_a_complaint_would_be_seen(browser, written):
    messages, sent = Shown(browser, written["noisy"]).logs()
    assert any("loud" in message for message in messages)
    assert "http://127.0.0.1:9/x.png" in sent


def test_the_charts_have_a_mark_for_every_number(browser, written, record):
    shown, report = Shown(browser, written["plain"]), record["report"]
    assert shown.count("#stages .mark") == len(report["stages"]) == 4
    assert shown.count("#fit-chart .mark.patch") == shown.count("#fit-chart .mark.prefix") == len(report["fits"]) == 5
    assert shown.count("#stream-chart .mark") == 4 * len(report["stream"]) == 16
    assert shown.count("#stream-chart .mark.before") == 2 * len(report["stream"])
    assert shown.count("#speed .mark") == 5
    assert shown.count("#speed .whisker") == 15
    assert shown.count(".gallery > li img") == len(report["worst"]) == 8
    assert shown.count("#plan tbody tr") == shown.count("#plan td .verdict") == len(report["plan"])
    assert shown.count("svg[role=img] > title") == shown.count("svg[role=img] > desc") == 5


@pytest.mark.parametrize("width", [SMALL_PHONE, PHONE, DESKTOP])
@pytest.mark.parametrize("name", ["plain", "hostile"])
def test_nothing_sticks_out_sideways(browser, written, name, width):
    shown = Shown(browser, written[name])
    shown.show(width)
    shown.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
    wide = f"[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > {width} + 1)"
    sticking = shown.ask(f"{wide}.filter(e => !e.closest('.scroll, svg')).map(e => e.tagName + '.' + e.className)")
    assert sticking == []
    assert shown.ask("innerWidth") == width  # a phone would zoom out to show what sticks out
    assert shown.ask("document.documentElement.scrollWidth") <= width
    # Letters in the charts stay legible: SVG text scales with the picture.
    scale = shown.ask("document.querySelector('#stages svg').getBoundingClientRect().width / 420")
    assert scale * 11.5 >= 7.5


def luminance(colour):
    """Return the relative luminance of a colour as WCAG 2.1 defines it."""
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_have_contrast(browser, written, scheme):
    shown = Shown(browser, written["plain"])
    shown.show(DESKTOP, scheme)
    page = shown.colour("body", "backgroundColor")
    assert (luminance(page) > 0.5) == (scheme == "light")
    card = shown.colour(".tiles div", "backgroundColor")
    for selector in ("body", ".note", "figcaption", "summary", "thead th"):
        assert contrast(shown.colour(selector, "color"), page) >= CONTRAST, selector
    for selector in (".tiles dt", ".answers .same", ".answers b"):
        assert contrast(shown.colour(selector, "color"), card) >= CONTRAST, selector
    for selector in ("svg .name", "svg .tick", "svg .value"):
        assert contrast(shown.colour(selector, "fill"), page) >= CONTRAST, selector
    for selector in ("#stages .mark.total", "#fit-chart .mark.patch", "#fit-chart .mark.prefix"):
        assert contrast(shown.colour(selector, "fill"), page) >= 3, selector  # criterion 1.4.11, of graphics


def test_print_is_light_and_opens_what_is_folded(browser, written):
    shown = Shown(browser, written["plain"])
    visible = "[...document.querySelectorAll('details table')].map(t => t.checkVisibility())"
    shown.show(DESKTOP, "dark")
    assert not any(shown.ask(visible))
    shown.show(DESKTOP, "dark", "print")
    assert luminance(shown.colour("body", "backgroundColor")) > 0.9
    assert luminance(shown.colour("body", "color")) < 0.1
    assert all(shown.ask(visible))
