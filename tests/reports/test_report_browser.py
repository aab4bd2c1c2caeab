"""The report in a browser: it requests nothing, runs no script from its data, and works without JavaScript."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_data as given
from report_data import HOSTILE
from speed_data import latency

from kvconform.bench.record import Excluded
from kvconform.judging.verdict import Outcome
from kvconform.results.guarantees import Guarantee
from kvconform.results.results import Results
from kvconform.run.cross_backend import Pair
from kvconform_reports.html import render
from kvconform_specs import SUITE_VERSION
from kvconform_specs.clauses import ALL

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]  # started once

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SECTIONS = (
    "verdict",
    "matrix",
    "failures",
    "known",
    "unjudged",
    "guarantees",
    "error",
    "pairs",
    "speed",
    "mutation",
    "runtime-info",
    "environment",
)
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 800}


def _needs(module: str) -> Any:
    """The module, or a skip with the reason; in CI a missing module is a failure."""
    if os.environ.get("CI"):
        try:
            return __import__(module, fromlist=["*"])
        except ImportError as error:
            pytest.fail(f"never skipped in CI: {error}", pytrace=False)
    return pytest.importorskip(module)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = _needs("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        if os.environ.get("CI"):
            pytest.fail("never skipped in CI: no chromium on the PATH", pytrace=False)
        pytest.skip("no chromium on the PATH")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four backends, and one whose every text is hostile."""
    name = " ".join(HOSTILE)
    tree = {name: {name: [name]}}
    verdicts = [
        given.other("definition.attention", name, Outcome.FAIL, name, counterexample=name),
        given.other(name, name, Outcome.UNSUPPORTED, name),
        given.other("errors.unchanged", name, Outcome.KNOWN_FAILURE, name, counterexample=name),
        given.other("determinism.repeatable", name, Outcome.REFUTED, name, counterexample=name),
    ]
    hostile = given.results(
        name,
        verdicts,
        device=name,
        runtime_info={name: tree},
        environment=tree,
        claims=tree,
        stale=[name],
        known_failures=[given.row(name, clause="errors.unchanged", config=name)],
        guarantees={name: Guarantee(level=name, refuted=name, sentence=name, counterexample=name)},
    )
    speed = latency(("eager", "onnx", name))
    speed.excluded = [*speed.excluded, Excluded(name, name, name)]
    path = tmp_path_factory.mktemp("report") / "report.html"
    pairs = [*given.pairs(), Pair("attention-gqa", name, "eager", 0.5, 1e-7, 9)]
    audit = given.audit(name)
    audit.audited[2].sentence = name  # it survives
    judged = [*given.four(), hostile, given.black_box("mine", name)]
    judged[0].suite = SUITE_VERSION  # which has a power table
    path.write_text(render(judged, pairs, speed, audit=audit), encoding="utf-8")
    return path


class Visit:
    """An open report, and its requests, messages, errors and dialogs."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**({"viewport": WIDE} | options))
        self.page = self.context.new_page()
        self.console: list[str] = []
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.dialogs: list[str] = []
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", self._dismiss)
        self.page.goto(path.as_uri(), wait_until="load")

    def _dismiss(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize("scripts", [True, False])
def test_the_report_asks_for_itself_alone_and_complains_of_nothing(browser: Any, report: Path, scripts: bool) -> None:
    with Visit(browser, report, java_script_enabled=scripts) as visit:
        visit.page.wait_for_timeout(300)
        asked = [url for url in visit.requests if not url.startswith("data:")]
        assert asked == [report.as_uri()]
        assert visit.console == []
        assert visit.errors == []
        assert visit.dialogs == []


def test_a_violation_of_the_policy_would_be_seen(browser: Any, report: Path, tmp_path: Path) -> None:
    """The listeners above work: a script that the policy does not allow is refused with a message."""
    spoilt = tmp_path / "spoilt.html"
    source = report.read_text(encoding="utf-8").replace("</main>", "<script>alert(1)</script></main>")
    spoilt.write_text(source, encoding="utf-8")
    with Visit(browser, spoilt) as visit:
        assert any("Content Security Policy" in message for message in visit.console)
        assert visit.dialogs == []


@pytest.mark.parametrize("scripts", [True, False])
def test_hostile_names_are_visible_as_text(browser: Any, report: Path, scripts: bool) -> None:
    with Visit(browser, report, java_script_enabled=scripts) as visit:
        for section in SECTIONS:
            shown = visit.page.locator(f"#{section}").inner_text()
            for name in HOSTILE:
                assert name in shown, section
        assert visit.page.locator("img").count() == 0


def test_the_report_works_without_scripts(browser: Any, report: Path) -> None:
    with Visit(browser, report, java_script_enabled=False) as visit:
        rows = visit.page.locator("#matrix tbody tr:not(.chapter):visible")
        visit.page.locator("#show-all").check()
        every = rows.count()
        assert every == visit.page.locator("#matrix tbody tr:not(.chapter)").count() > len(ALL)
        visit.page.locator("#show-broken").check()
        assert 0 < rows.count() < every
        assert rows.count() == visit.page.locator("#matrix tr.b").count()
        cell = visit.page.locator("#matrix tr.b td details").first
        assert not cell.locator("a").first.is_visible()
        cell.locator("summary").click()
        assert cell.locator("a").first.is_visible()
        assert visit.page.locator("#failures button:visible").count() == 0


def test_chapters_that_are_not_broken_are_folded_and_open_on_a_click(browser: Any, report: Path) -> None:
    with Visit(browser, report, java_script_enabled=False) as visit:
        for chapter, open_at_first in (("equivalence", True), ("paging", False)):
            row = visit.page.locator("#matrix tr:not(.chapter)", has_text=f"{chapter}.").first
            assert row.is_visible() is open_at_first
            visit.page.locator("#matrix .chapter label", has_text=chapter).click()
            assert row.is_visible() is not open_at_first


def test_a_link_to_a_clause_opens_its_chapter_and_its_text(browser: Any, report: Path) -> None:
    with Visit(browser, report, java_script_enabled=False) as visit:
        text = visit.page.locator("#matrix [id='determinism.repeatable']")
        assert not text.is_visible()
        visit.page.locator("#guarantees a", has_text="determinism.repeatable").click()
        text.wait_for(state="visible")


@pytest.mark.slow
def test_what_is_folded_is_printed(browser: Any, report: Path) -> None:
    with Visit(browser, report) as visit:
        folded = visit.page.locator("#guarantees td p, #power table, #speed details table, .runtime_info dl")
        shown = [folded.nth(i).is_visible() for i in range(folded.count())]
        assert not all(shown)
        visit.page.emulate_media(media="print")
        assert visit.page.locator("#matrix tr:visible").count() == visit.page.locator("#matrix tr").count()
        visit.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert all(folded.nth(i).is_visible() for i in range(folded.count()))
        visit.page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert [folded.nth(i).is_visible() for i in range(folded.count())] == shown


def test_the_copy_buttons_appear_with_scripts_and_answer(browser: Any, report: Path) -> None:
    with Visit(browser, report) as visit:
        buttons = visit.page.locator("#failures button:visible")
        assert buttons.count() == 5
        buttons.first.click()
        copied, selected = (visit.page.locator("button", has_text=word) for word in ("Copied", "Selected"))
        copied.or_(selected).wait_for()
        assert visit.errors == []


ROWS = "#matrix tbody tr:not(.chapter):visible"


def test_a_search_shows_the_rows_and_failures_with_all_its_words(browser: Any, report: Path) -> None:
    with Visit(browser, report) as visit:
        assert visit.page.locator("#found").inner_text() == ""
        visit.page.locator("#search").fill("Determinism repeatable")
        names = visit.page.locator(f"{ROWS} th code").all_inner_texts()
        assert names == ["determinism.repeatable"]
        assert visit.page.locator("#matrix tr.chapter:visible").count() == 1
        assert visit.page.locator("#failures article:visible").count() == 0
        assert visit.page.locator("#found").inner_text().startswith("2 of ")  # and a known failure or a reason
        visit.page.locator("#search").fill("equivalence.chunks")
        assert visit.page.locator("#failures article:visible").count() >= 1
        visit.page.locator("#search").fill("no such words")
        assert visit.page.locator(ROWS).count() == 0
        visit.page.locator("#search").fill("")
        every = visit.page.locator("#matrix tbody tr:not(.chapter)").count()
        assert visit.page.locator(ROWS).count() == every
        assert visit.errors == []


def test_what_is_shown_is_in_the_address_and_comes_back_with_it(browser: Any, report: Path) -> None:
    with Visit(browser, report) as visit:
        visit.page.locator("#show-broken").check()
        assert visit.page.url == f"{report.as_uri()}#show=broken"
        visit.page.locator("#search").fill("equivalence & more?")
        assert visit.page.url == f"{report.as_uri()}#show=broken&q=equivalence+%26+more%3F"
        visit.page.locator("#search").fill("equivalence")
        address, shown = visit.page.url, visit.page.locator(f"{ROWS} th code").all_inner_texts()
        assert shown
        assert all(name.startswith("equivalence") for name in shown)
    with Visit(browser, report) as visit:
        visit.page.goto(address)
        visit.page.reload()
        assert visit.page.locator("#show-broken").is_checked()
        assert visit.page.locator("#search").input_value() == "equivalence"
        assert visit.page.locator(f"{ROWS} th code").all_inner_texts() == shown
        visit.page.goto(f"{report.as_uri()}#failure-1")  # the address of something on the page changes nothing
        assert visit.page.locator(f"{ROWS} th code").all_inner_texts() == shown


def _colours(visit: Visit) -> tuple[str, str]:
    read = "getComputedStyle(document.body)"
    return visit.page.evaluate(f"{read}.backgroundColor"), visit.page.evaluate(f"{read}.color")


def test_dark_mode_differs_and_print_is_light(browser: Any, report: Path) -> None:
    with Visit(browser, report, color_scheme="light") as light, Visit(browser, report, color_scheme="dark") as dark:
        assert _colours(light)[0] != _colours(dark)[0]
        assert _colours(light)[1] != _colours(dark)[1]
        dark.page.emulate_media(media="print")
        assert _colours(dark)[1] == _colours(light)[1]


@pytest.mark.parametrize("viewport", [WIDE, NARROW])
def test_only_tables_and_charts_scroll_sideways(browser: Any, report: Path, viewport: dict[str, int]) -> None:
    with Visit(browser, report, viewport=viewport) as visit:
        wide = visit.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= viewport["width"]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW])
def test_axe_finds_no_violation(browser: Any, report: Path, scheme: str, viewport: dict[str, int]) -> None:
    axe = _needs("axe_playwright_python.sync_playwright").Axe()
    with Visit(browser, report, color_scheme=scheme, viewport=viewport, bypass_csp=True) as visit:
        visit.page.locator("#show-all").check()  # with everything open
        visit.page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        found = axe.run(visit.page).response
        said = [f"{v['id']}: {v['help']}: {v['nodes'][0]['html'][:200]}" for v in found["violations"]]
        assert said == []
        assert len(found["passes"]) > 20


def test_a_report_of_nothing_has_no_violation_either(browser: Any, tmp_path: Path) -> None:
    axe, path = _needs("axe_playwright_python.sync_playwright").Axe(), tmp_path / "empty.html"
    nothing: list[Results] = []
    path.write_text(render(nothing, [], None), encoding="utf-8")
    with Visit(browser, path, bypass_csp=True) as visit:
        assert [v["id"] for v in axe.run(visit.page).response["violations"]] == []
