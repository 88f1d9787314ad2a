"""A cloud that is slow, fails, breaks off, garbles or lies: no answer is lost, nothing private sent, all is noted."""

from __future__ import annotations

import asyncio
import logging
import random
import subprocess
import sys
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, EvaluationError, PipelineError
from pipeline.serve.engine import Busy, Piece, Settings, standing
from pipeline.serve.hybrid.ledger import Attempt, Ledger
from pipeline.serve.hybrid.manager import Manager, NoAnswer, Refused
from pipeline.serve.hybrid.policy import Situation
from tests.serve.hybrid.engines import LOCAL, USER, Device, collected, config, manager
from tests.serve.hybrid.provider import DONE, KEY, Provider, Script, answer, event, provider

LOCALLY = "".join(LOCAL)


async def _asked(own: Manager, **options: Any) -> tuple[list[Piece], list[Attempt]]:
    async with own:
        pieces = await collected(own, **options)
        rows = own._means.ledger.rows()
    return pieces, rows


def ask(own: Manager, **options: Any) -> tuple[list[Piece], list[Attempt]]:
    """The pieces of one answer, and the ledger's rows after it."""
    return asyncio.run(_asked(own, **options))


def stands(pieces: Sequence[Piece]) -> str:
    """The text that a client who knows origins is left with."""
    return "".join(piece.text for piece in standing(pieces))


def test_the_cloud_answers_and_says_so(tmp_path: Path) -> None:
    with provider(answer("from ", "the ", "cloud", said=(8, 4))) as service:
        settings = Settings(max_tokens=20, temperature=0.5, stop=("x",))
        pieces, rows = ask(manager(tmp_path, service), settings=settings)
    (request,), last = service.requests, pieces[-1]
    assert {key: request[key] for key in ("model", "messages", "max_tokens", "temperature", "stop", "stream")} == {
        "model": "big", "messages": USER, "max_tokens": 20, "temperature": 0.5, "stop": ["x"], "stream": True,
    }  # fmt: skip
    assert service.headers[0]["authorization"] == f"Bearer {KEY}"
    assert "".join(piece.text for piece in pieces) == "from the cloud"
    assert (last.finish_reason, last.usage and last.usage.completion) == ("stop", 4)
    assert last.origin and last.origin.who == "cloud:big" and last.origin.why.startswith("mode prefer_cloud (7 tokens")
    assert last.origin.cost == pytest.approx((8 * 1 + 4 * 10) / 1e6)
    assert last.origin.seconds >= last.origin.latency > 0
    (row,) = rows
    assert (row.outcome, row.usage, row.prompt_tokens, row.own_prompt_tokens) == ("answered", "reported", 8, 7)
    assert (row.cost, row.provider, row.rule, row.level) == (last.origin.cost, "test", "prefer_cloud", "LOW")


BEFORE = {
    "HTTP 429": (Script(status=429, headers={"Retry-After": "0.02"}), 2),
    "HTTP 500": (Script(status=500), 2),
    "HTTP 401": (Script(status=401), 1),
    "HTTP 302": (Script(status=302, headers={"Location": "http://127.0.0.1:9/elsewhere"}), 1),
    "no first token in time": (Script([event(""), 1.0]), 2),
    "stream cut": (Script([event("")]), 2),
    "malformed event": (Script([b"data: {not json\n\n"]), 2),
    "error event": (Script([b'data: {"error": {"message": "overloaded"}}\n\n']), 2),
    "empty answer": (Script([event(finish="stop"), DONE]), 1),
}


@pytest.mark.parametrize("outcome", BEFORE)
def test_a_cloud_that_fails_before_its_first_token_is_asked_once_more_then_the_device(
    outcome: str, tmp_path: Path
) -> None:
    script, requests = BEFORE[outcome]
    quick = {"first_token": 0.3, "whole": 5.0, "pause": 0.01}
    with provider(script) as service:
        pieces, rows = ask(manager(tmp_path, service, attempts=quick))
    assert "".join(piece.text for piece in pieces) == LOCALLY
    assert len(service.requests) == requests
    assert [row.outcome for row in rows] == [outcome] * requests + ["answered"]
    assert [row.number for row in rows] == [*range(1, requests + 2)] and len({row.request for row in rows}) == 1
    origin = pieces[-1].origin
    assert origin and origin.who == "tiny/q4"
    assert f"the cloud failed ({', then '.join([outcome] * requests)})" in origin.why
    billed = 0 if outcome.startswith("HTTP") else requests * 7
    assert origin.cost == pytest.approx(billed / 1e6) == pytest.approx(sum(row.cost for row in rows))


def test_nobody_listens(tmp_path: Path) -> None:
    pieces, rows = ask(manager(tmp_path))
    assert "".join(piece.text for piece in pieces) == LOCALLY
    assert [(row.outcome, row.cost) for row in rows] == [("no connection", 0), ("no connection", 0), ("answered", 0)]


def test_a_retry_may_succeed_and_a_long_pause_is_no_retry(tmp_path: Path) -> None:
    with provider(Script(status=503), answer("again")) as service:
        pieces, rows = ask(manager(tmp_path, service))
    assert pieces[0].text == "again" and [row.outcome for row in rows] == ["HTTP 503", "answered"]
    assert rows[1].usage == "estimated" and rows[1].completion_tokens == 1
    with provider(Script(status=429, headers={"Retry-After": "60"})) as service:
        ask(manager(tmp_path, service))
    assert len(service.requests) == 1


BEGUN = (event("The capital "), event("is "))
MIDDLE = {
    "stream cut": Script(BEGUN),
    "malformed event": Script([*BEGUN, b"data: [1, 2]\n\n", DONE]),
    "error event": Script([*BEGUN, b'data: {"error": {"message": "overloaded"}}\n\n']),
    "too slow": Script([*BEGUN, 2.0, event("Paris"), DONE]),
}


@pytest.mark.parametrize("outcome", MIDDLE)
def test_a_cloud_that_breaks_off_is_not_asked_again_and_the_device_answers_anew(outcome: str, tmp_path: Path) -> None:
    with provider(MIDDLE[outcome]) as service:
        pieces, rows = ask(manager(tmp_path, service, attempts={"first_token": 0.8, "whole": 1.0}))
    assert len(service.requests) == 1
    shown = "".join(piece.text for piece in pieces)
    assert shown == f"The capital is \n\n[the cloud failed ({outcome}); the device answers anew]\n\n{LOCALLY}"
    assert stands(pieces) == LOCALLY
    assert pieces[0].origin and pieces[0].origin.who == "cloud:big"
    assert pieces[-1].origin and pieces[-1].origin.who == "tiny/q4"
    assert sum(piece.finish_reason is not None for piece in pieces) == 1
    assert [(row.outcome, row.usage, row.completion_tokens) for row in rows] == [
        (outcome, "estimated", 3), ("answered", "counted", 4),
    ]  # fmt: skip
    assert rows[0].cost == pytest.approx((7 * 1 + 3 * 10) / 1e6)


def test_an_answer_that_is_whole_stands_whatever_follows(tmp_path: Path) -> None:
    for tail in ([b"data: {not json\n\n"], [], [5.0]):
        with provider(Script([event("whole"), event(finish="length"), *tail])) as service:
            pieces, rows = ask(manager(tmp_path, service))
        assert stands(pieces) == "whole" and pieces[-1].finish_reason == "length"
        assert (rows[-1].outcome, rows[-1].usage) == ("answered", "estimated")


@pytest.mark.parametrize("said", [(7, 4000), (7000, 3), (0, 10**6)])
def test_usage_far_from_our_own_count_is_disputed(said: tuple[int, int], tmp_path: Path) -> None:
    with provider(answer("from ", "the ", "cloud", said=said)) as service:
        _, (row,) = ask(manager(tmp_path, service))
    assert (row.usage, row.prompt_tokens, row.completion_tokens) == ("disputed", *said)
    assert (row.own_prompt_tokens, row.own_completion_tokens) == (7, 3)
    assert row.cost == pytest.approx((said[0] + 10 * said[1]) / 1e6), "what will be billed"


@pytest.mark.parametrize("mode", ["only_device", "prefer_device", "prefer_cloud", "only_cloud"])
@pytest.mark.parametrize("tag", ["health", "helth"])
def test_nothing_private_reaches_the_cloud(
    mode: str, tag: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = [{"role": "user", "content": "my diagnosis " * 400}]
    doubtful, caplog_level = Device(logprobs=(-9.0, -9.0, -9.0)), logging.DEBUG
    cascade = {"tokens": 2, "threshold": -1.0}
    hot = Situation(heat="critical", battery=0.01)
    with provider(answer("leaked")) as service, caplog.at_level(caplog_level):
        own = manager(tmp_path, service, doubtful, mode=mode, cascade=cascade)
        if mode == "only_cloud":
            with pytest.raises(Refused, match=r"private, mode only_cloud .*Nothing was sent"):
                ask(own, messages=secret, tags=["weather", tag], situation=hot)
        else:
            pieces, _ = ask(own, messages=secret, tags=["weather", tag], situation=hot)
            assert stands(pieces) == LOCALLY
        with pytest.raises(Refused):
            ask(
                manager(tmp_path, service, mode=mode),
                messages=secret,
                tags=[tag],
                situation=Situation(device_ready=False),
            )
    assert service.requests == []
    assert "diagnosis" not in caplog.text


def test_neither_prompts_nor_keys_are_written_down(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    message = [{"role": "user", "content": "an unusual sentence"}]
    echo = Script([b'data: {"error": {"message": "an unusual sentence for sk-secret-of-the-test"}}\n\n'])
    with provider(Script(status=401), echo, answer("fine")) as service, caplog.at_level(logging.DEBUG):
        with pytest.raises(NoAnswer) as caught:
            ask(manager(tmp_path, service, mode="only_cloud"), messages=message)
        pieces, _ = ask(manager(tmp_path, service), messages=message)
    files = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"unusual" not in files and KEY.encode() not in files and len(files) > 0
    said = [
        str(caught.value),
        *(piece.origin.why for piece in pieces if piece.origin),
        repr(manager(tmp_path, service)),
    ]
    assert not [text for text in said if KEY in text or "unusual" in text]
    assert KEY not in caplog.text


def test_who_goes_away_closes_the_cloud_s_stream(tmp_path: Path) -> None:
    async def leave(own: Manager) -> list[Attempt]:
        async with own:
            async with aclosing(own.stream(USER, Settings())) as pieces:
                await anext(pieces)
            return own._means.ledger.rows()

    with provider(Script([event("The "), *([0.02, event("long ")] * 250)])) as service:
        (row,) = asyncio.run(leave(manager(tmp_path, service)))
        assert service.closed.wait(10)
    assert (row.outcome, row.usage, row.completion_tokens) == ("cancelled", "estimated", 1)


def test_many_at_once_lose_nothing(tmp_path: Path) -> None:
    """Each of 200 requests gets the answer to its own question, whatever its attempts met."""
    scripts = [*(script for script, _ in BEFORE.values()), *MIDDLE.values()]
    chance = random.Random(1)

    def choose(request: Any) -> Script:
        number = request["messages"][0]["content"].split()[1]
        return answer("cloud ", number) if chance.random() < 0.5 else chance.choice(scripts)

    async def one(own: Manager, number: int) -> tuple[str, Piece]:
        pieces = await collected(own, [{"role": "user", "content": f"number {number}"}])
        return stands(pieces), pieces[-1]

    async def all_of_them(service: Provider) -> tuple[list[tuple[str, Piece]], list[Attempt]]:
        quick = {"first_token": 0.5, "whole": 1.0, "pause": 0.01}
        async with manager(tmp_path, service, attempts=quick) as own:
            waiting = asyncio.Semaphore(16)

            async def next_one(number: int) -> tuple[str, Piece]:
                async with waiting:
                    return await one(own, number)

            return await asyncio.gather(*map(next_one, range(200))), own._means.ledger.rows()

    with provider(choose=choose) as service:
        answers, rows = asyncio.run(all_of_them(service))
    for number, (text, last) in enumerate(answers):
        assert last.origin and text == (f"cloud {number}" if last.origin.who == "cloud:big" else LOCALLY)
    assert sum(row.outcome == "answered" for row in rows) == len({row.request for row in rows}) == 200
    assert len(service.requests) <= sum(row.place == "cloud" for row in rows), "some may end before they arrive"


CASCADE = {"tokens": 2, "threshold": -1.0}


def test_a_doubtful_beginning_goes_to_the_cloud_and_comes_back_where_that_fails(tmp_path: Path) -> None:
    doubtful = Device(logprobs=(-3.0, -0.5, -0.1))
    with provider(answer("sure")) as service:
        pieces, rows = ask(manager(tmp_path, service, doubtful, mode="prefer_device", cascade=CASCADE))
    assert "".join(piece.text for piece in pieces) == "sure"
    assert pieces[-1].origin and "the device was in doubt (-1.75 nats per token)" in pieces[-1].origin.why
    assert [row.outcome for row in rows] == ["in doubt", "answered"] and rows[0].completion_tokens == 2
    with provider(Script(status=500)) as service:
        pieces, rows = ask(manager(tmp_path / "b", service, doubtful, mode="prefer_device", cascade=CASCADE))
    assert "".join(piece.text for piece in pieces) == LOCALLY
    assert [row.outcome for row in rows] == ["in doubt", "HTTP 500", "HTTP 500", "answered"]


def test_a_sure_beginning_stays_and_shows_no_logprobs_unasked(tmp_path: Path) -> None:
    for tokens in (2, 50):
        with provider(answer("never")) as service:
            own = manager(tmp_path, service, mode="prefer_device", cascade={"tokens": tokens, "threshold": -1.0})
            pieces, _ = ask(own)
        assert [piece.text for piece in pieces] == [*LOCAL, ""] and not service.requests
        assert {piece.logprob for piece in pieces} == {None}


def test_a_busy_or_failing_device(tmp_path: Path) -> None:
    with provider(answer("free")) as service:
        pieces, _ = ask(manager(tmp_path, service, Device(busy=1), mode="prefer_device"))
        assert stands(pieces) == "free"
        broken = Device(error=EvaluationError("too long"))
        assert stands(ask(manager(tmp_path, service, broken, mode="prefer_device"))[0]) == "free"
    with provider(Script(status=500)) as service:
        pieces, _ = ask(manager(tmp_path, service, Device(busy=3)))
        assert stands(pieces) == LOCALLY, "the last resort waits for its turn"
        with pytest.raises(EvaluationError, match="too long"):
            ask(manager(tmp_path, service, broken, mode="prefer_device"))
    with pytest.raises(Busy):
        ask(manager(tmp_path, device=Device(busy=1), mode="only_device"))


def test_the_key_comes_from_the_environment_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="has no TEST_KEY"):
        Manager(Device(), config(tmp_path), {})
    Manager(Device(), config(tmp_path, mode="only_device"), {})
    monkeypatch.setenv("OPENAI_API_KEY", "of-another")
    monkeypatch.setenv("OPENAI_ORG_ID", "org")
    with provider(answer("keyless")) as service:
        row = config(tmp_path, service).providers["test"].model_dump(mode="json") | {"key": None}
        ask(manager(tmp_path, service, providers={"test": row}))
    assert "of-another" not in str(service.headers) and "org" not in service.headers[0].values()


def test_a_row_outlives_its_process(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from pipeline.serve.hybrid.ledger import *\n"
        "row = Attempt('r', 1, 'cloud', 'test', 'big', 'prefer_cloud', 'high', 'HIGH', 700, 'estimated', 700, .5)\n"
        "with Ledger(Path(sys.argv[1])).attempt(row): os._exit(9)"
    )
    path = tmp_path / "ledger.sqlite"
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 9
    (row,) = Ledger(path).rows()
    assert (row.outcome, row.cost, row.seconds) == ("begun", 0.5, None)


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_text("no database" * 100)
    with pytest.raises(PipelineError, match="cannot be used as a ledger"):
        Ledger(path)
