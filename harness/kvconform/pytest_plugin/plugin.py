"""pytest options of the suite: ``--kv-backend`` and the others. The suite is ``kvconform.pytest_plugin.suite``."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvconform", "conformance of KV caches")
    group.addoption("--kv-backend", action="append", default=[], help="backend to judge; repeatable")
    group.addoption("--kv-device", default="cpu", help="cpu or cuda")
    group.addoption("--kv-dtype", action="append", default=[], help="float32 (default), bfloat16, float16; repeatable")
    group.addoption("--kv-effort", default="smoke", help="smoke, pr or nightly")
    group.addoption("--kv-seed", type=int, default=0, help="seed of the whole run")
    group.addoption("--kv-known-failures", default="", help="known failures, a TOML file")
    group.addoption("--kv-out", default="results", help="folder of counterexamples")
