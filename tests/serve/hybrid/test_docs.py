"""The programs of docs/hybrid.md run as they stand."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.serve.hybrid.policy import Situation
from tests.conftest import ROOT
from tests.serve.hybrid.engines import manager
from tests.serve.hybrid.provider import Script, answer, event, provider


def programs() -> list[str]:
    """The page's Python blocks."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/hybrid.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_decision(capsys: pytest.CaptureFixture[str]) -> None:
    exec(programs()[0], {})
    assert capsys.readouterr().out == "private device None\n"


def test_asking(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(programs()[1], names)

    async def asked(tags: list[str], **changes: Any) -> str:
        async with manager(tmp_path, service, **changes) as own:
            return await names["ask"](own, "what is the weather", tags, Situation())

    with provider(answer("sunny"), Script([event("sun")]), answer("leaked")) as service:
        assert asyncio.run(asked([])).startswith("sunny [cloud:big, because: mode prefer_cloud (7 tokens")
        assert asyncio.run(asked([])).startswith("from the device [tiny/q4, because: ")
        assert "lets nobody answer: private, mode only_cloud" in asyncio.run(asked(["health"], mode="only_cloud"))
