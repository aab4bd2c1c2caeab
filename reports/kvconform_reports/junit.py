"""The results as JUnit XML: a suite for each backend, a case for each cell."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence

from kvconform.judging.verdict import Outcome, Verdict
from kvconform.results.results import Results
from kvconform_reports.view.outcomes import labels, standing
from kvconform_reports.view.tables import facts

# All but what XML 1.0 calls a character: no escape makes these legal.
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(results: Sequence[Results]) -> str:
    """A broken cell is a failure, an inconclusive one an error, a cell that was not judged is skipped with its reason.

    A backend that could not run, or stopped on the way, is an error of its own: JUnit takes an empty suite for green.
    So is a stale row of the known failures.
    """
    root = ET.Element("testsuites", name="kvconform")
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for label, result in zip(labels(results), results, strict=True):
        suite = ET.SubElement(root, "testsuite", name=_legal(label), time=f"{result.seconds:.3f}")
        suite.set("timestamp", _legal(result.started.removesuffix("+00:00")))
        stands = standing(result)
        properties = ET.SubElement(suite, "properties")
        for name in ("suite", "device", "effort", "seed"):
            ET.SubElement(properties, "property", name=name, value=_legal(str(getattr(result, name))))
        ET.SubElement(properties, "property", name="verdict", value=_legal(f"{stands.word}: {stands.sentence}"))
        for config, held in result.guarantees.items():
            words = (held.level or "none") + (f"; {held.refuted}: refuted" if held.refuted else "")
            ET.SubElement(properties, "property", name=_legal(f"guarantee.{config}"), value=_legal(words))
        for verdict in (*result.failures, *(one for one in result.verdicts if not one.outcome.broken)):
            _case(suite, label, verdict)
        if result.unavailable:
            case = ET.SubElement(suite, "testcase", classname=_legal(label), name="available", time="0")
            ET.SubElement(case, "error", type="unavailable", message=_legal(result.unavailable))
        for words in result.stale:
            case = ET.SubElement(suite, "testcase", classname=_legal(label), name="known_failures", time="0")
            ET.SubElement(case, "error", type="stale", message=_legal(words))
        for name, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            count = sum(1 for _ in suite.iter(tag))
            suite.set(name, str(count))
            totals[name] += count
    for name, count in totals.items():
        root.set(name, str(count))
    ET.indent(root, " ")
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ET.Element, label: str, verdict: Verdict) -> None:
    case = ET.SubElement(
        suite,
        "testcase",
        classname=_legal(f"{label}.{verdict.clause}"),
        name=_legal(verdict.config),
        time=f"{verdict.seconds:.3f}",
    )
    if verdict.mismatch is not None:
        properties = ET.SubElement(case, "properties")
        for name, value in (("clause", verdict.clause), ("config", verdict.config), *facts(verdict)):
            ET.SubElement(properties, "property", name=name, value=_legal(value))
    kind, message = verdict.outcome.value, _legal(verdict.sentence)
    if verdict.outcome.broken:
        element = ET.SubElement(case, "failure", type=kind, message=message)
        element.text = message + (f"\nsteps: {_legal(verdict.steps)}" if verdict.steps else "")
    elif verdict.outcome is Outcome.INCONCLUSIVE:
        ET.SubElement(case, "error", type=kind, message=message)
    elif verdict.outcome is not Outcome.PASS:
        ET.SubElement(case, "skipped", message=_legal(f"{kind}: {verdict.sentence}"))


def _legal(text: str) -> str:
    return _ILLEGAL.sub("\ufffd", text)
