"""serve: the stock client is answered; what is not honoured is refused by name; nobody stops the line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from pipeline.errors import BundleError, ConfigError, ResourceError
from pipeline.serve import local
from pipeline.serve.bundles import Refused
from pipeline.serve.chat import Conversation
from pipeline.serve.engine import Message, Origin, Piece, Settings, Usage
from pipeline.serve.guard import TOKEN, Door
from pipeline.serve.local import Ending, search_options
from pipeline.serve.model import Chats
from pipeline.serve.server import listen, sources
from tests.bundle.conftest import Maker, maker  # noqa: F401
from tests.conftest import ROOT
from tests.serve.conftest import (
    CONTEXT,
    SAID,
    Played,
    Served,
    Talking,
    changed,
    serving,
    serving_folders,
    until,
)

HELLO = [{"role": "user", "content": "Good morning."}]


@pytest.fixture(scope="module")
def served(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The tiny model, and one whose answers end at the context only; one request may wait."""
    endless = changed(model_folder, tmp_path_factory.mktemp("endless") / "m", search={"min_length": CONTEXT})
    with serving_folders(queue=1, plain=model_folder, endless=endless) as found:
        yield found


def client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def post(url: str, **body: Any) -> requests.Response:
    """A chat, streamed responses unread."""
    given = {"model": "plain", "messages": HELLO, "max_tokens": 8} | body
    return requests.post(f"{url}/v1/chat/completions", json=given, stream=body.get("stream", False), timeout=120)


def events(response: requests.Response) -> list[dict[str, Any]]:
    """The bodies of a stream that ends as it should."""
    *bodies, end = [line.removeprefix(b"data: ") for line in response.iter_lines() if line]
    assert end == b"[DONE]"
    return [json.loads(body) for body in bodies]


def text_of(response: requests.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def figure(url: str, name: str) -> float:
    """A figure of /metrics, by its name and labels; 0 where it is not yet."""
    lines = requests.get(f"{url}/metrics", timeout=60).text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)


# --- answers ---------------------------------------------------------------------------------------------------------


def test_the_stock_client_gets_what_chat_says(served: Served, model_folder: Path) -> None:
    asked: dict[str, Any] = {"model": "plain", "messages": HELLO, "max_tokens": 8, "temperature": 0, "logprobs": True}
    with client(served.url) as stock:
        assert [model.id for model in stock.models.list()] == ["plain", "endless"]
        assert stock.models.retrieve("plain").id == "plain"
        whole = stock.chat.completions.create(**asked)
        pieces = list(stock.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    said = Conversation(model_folder).answer("Good morning.", lambda piece: None, 8)
    assert whole.choices[0].message.content == said.text
    assert whole.usage and (whole.usage.completion_tokens, whole.usage.prompt_tokens) == (8, said.read)
    *streamed, last = pieces
    assert "".join(piece.choices[0].delta.content or "" for piece in streamed) == said.text
    assert [piece.choices[0].finish_reason for piece in streamed] == [None] * 7 + ["length"]
    assert last.usage == whole.usage and not last.choices
    logprobs = whole.choices[0].logprobs
    assert logprobs and logprobs.content and len(logprobs.content) == 8
    assert all(-20 < token.logprob < 0 for token in logprobs.content)


def test_log_probabilities_are_those_of_the_graph(served: Served, model_folder: Path) -> None:
    import numpy as np

    from pipeline.runtime.session import OnnxDecoder

    body = post(served.url, temperature=0, logprobs=True, return_token_ids=True).json()["choices"][0]
    prompt, ids = Chats(model_folder).encode(HELLO), body["token_ids"]
    logits, _ = OnnxDecoder(model_folder / "model.onnx").run([*prompt, *ids])
    rows = logits[len(prompt) - 1 : -1].astype(np.float64)
    wanted = rows[np.arange(8), ids] - np.log(np.exp(rows).sum(axis=1))
    assert np.allclose([token["logprob"] for token in body["logprobs"]["content"]], wanted, atol=1e-4)


def test_a_seed_repeats_an_answer_and_another_does_not(served: Served) -> None:
    one, same, other = (text_of(post(served.url, temperature=2, seed=seed)) for seed in (1, 1, 2))
    assert one == same != other


def test_a_stop_ends_the_answer_wherever_its_tokens_are_cut(served: Served) -> None:
    plain = text_of(post(served.url, temperature=0, max_tokens=24))
    stop = plain[3:6]
    for stream in (False, True):
        response = post(served.url, temperature=0, max_tokens=24, stop=["never", stop], stream=stream)
        found = events(response) if stream else [response.json()]
        choices = [body["choices"][0] for body in found]
        told = "".join((choice.get("delta") or choice["message"])["content"] for choice in choices)
        assert told == plain[: plain.index(stop)]
        assert choices[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("stops", "pieces", "said"),
    [
        ([], ["a", "b"], ["a", "b", ""]),
        (["bc"], ["ab", "d"], ["a", "bd", ""]),
        (["bc"], ["ab", "b", "cd"], ["a", "b", ""]),
        (["bcd", "c"], ["abc"], ["ab"]),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""]),
        (["xyz"], ["axy"], ["a", "xy"]),
    ],
)
def test_what_may_become_a_stop_is_held_back(stops: list[str], pieces: list[str], said: list[str]) -> None:
    ending, shown = Ending(stops), []
    for piece in pieces:
        text, met = ending.add(piece)
        shown.append(text)
        if met:
            break
    else:
        shown.append(ending.held)
    assert shown == said


def test_what_is_not_asked_is_left_to_the_configuration() -> None:
    assert search_options(Settings(), 300) == {}
    assert search_options(Settings(temperature=0.0, top_p=0.5, seed=1), 300) == {"do_sample": False}
    hot = {"do_sample": True, "temperature": 0.7, "top_k": 300}
    assert search_options(Settings(temperature=0.7), 300) == hot
    assert search_options(Settings(temperature=0.7, top_p=0.9, seed=3), 300) == hot | {"top_p": 0.9, "random_seed": 3}


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"n": 2}, "unsupported_parameter", "n"),
        ({"presence_penalty": 0.5}, "unsupported_parameter", "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"top_logprobs": 3}, "unsupported_parameter", "top_logprobs"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"temperature": "0.5"}, "invalid_value", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"seed": -1}, "invalid_value", "seed"),
        ({"stop": ["a", ""]}, "invalid_value", "stop.1"),
        ({"stop": list("abcde")}, "invalid_value", "stop"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "tool", "content": "4"}]}, "invalid_value", "messages.0.role"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "invalid_value", "messages.0.content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "invalid_value", "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_value", "messages.0.content"),
        ({"stream_options": {"more": True}}, "unsupported_parameter", "stream_options.more"),
        ({"messages": [{"role": "user", "content": "word " * CONTEXT}]}, "context_length_exceeded", "messages"),
        ({"max_tokens": CONTEXT}, "context_length_exceeded", "messages"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(change: dict[str, Any], code: str, param: str, served: Served) -> None:
    response = post(served.url, **change)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)
    assert error["message"]


def test_what_asks_for_nothing_is_taken(served: Served) -> None:
    neutral = {"n": 1, "tools": None, "logit_bias": {}, "presence_penalty": 0, "user": "me", "stop": None, "seed": None}
    parts = [{"role": "user", "content": [{"type": "text", "text": "Good "}, {"type": "text", "text": "morning."}]}]
    plain = text_of(post(served.url, temperature=0))
    assert (
        text_of(post(served.url, temperature=0, messages=parts, response_format={"type": "text"}, **neutral)) == plain
    )
    limited = post(served.url, max_tokens=None, max_completion_tokens=2).json()
    assert limited["usage"]["completion_tokens"] == 2


def test_other_mistakes_are_errors_of_the_same_shape(served: Served) -> None:
    with client(served.url) as stock, pytest.raises(openai.NotFoundError, match="served are plain, endless"):
        stock.chat.completions.create(model="q5", messages=HELLO)  # type: ignore[arg-type]
    where = f"{served.url}/v1/chat/completions"
    found = [
        requests.post(where, data=b"{", headers={"content-type": "application/json"}, timeout=60),
        requests.post(
            where, data=json.dumps({"model": "plain", "messages": HELLO}), timeout=60
        ),  # any page may send it
        requests.get(f"{served.url}/v1/embeddings", timeout=60),
        requests.get(where, timeout=60),
    ]
    assert [response.status_code for response in found] == [400, 400, 404, 405]
    assert all(response.json()["error"]["type"] == "invalid_request_error" for response in found)


# --- the line --------------------------------------------------------------------------------------------------------


def test_a_stream_is_whole_characters(played: Played) -> None:
    played.puppet.let(1000)
    count = len(played.puppet._ids)
    assert count > len(SAID)  # characters are cut between tokens
    pieces = [
        body["choices"][0]["delta"]["content"] for body in events(post(played.url, max_tokens=count, stream=True))
    ]
    assert "".join(pieces) == SAID
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_full_line_answers_429_and_goes_on(played: Played) -> None:
    url, line = played.url, played.line
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(post, url)
        until(lambda: played.puppet.asked == 1)
        other = pool.submit(post, url)
        until(lambda: line.waiting == 1)
        with client(url) as stock, pytest.raises(openai.RateLimitError) as refused:
            stock.chat.completions.create(model="plain", messages=HELLO)  # type: ignore[arg-type]
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert figure(url, "pipeline_waiting") == 1
        played.puppet.let(16)
        assert text_of(one.result()) == text_of(other.result())
    assert figure(url, 'pipeline_requests_total{model="plain",status="429"}') == 1
    assert figure(url, 'pipeline_completion_tokens_total{model="plain"}') == 16
    assert figure(url, "pipeline_waiting") == 0


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_within_a_token_when_its_client_goes(stream: bool, played: Played) -> None:
    url, puppet = played.url, played.puppet
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as raw:
        body = json.dumps({"model": "plain", "messages": HELLO, "stream": stream}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        puppet.let(3)
        until(lambda: puppet.asked == 4)
        waiting = threading.Thread(target=lambda: post(url, max_tokens=1))
        waiting.start()
        until(lambda: played.line.waiting == 1)
    until(lambda: played.line._places == 1)  # that of the one behind, while the last token is being written
    assert puppet.asked == 4
    puppet.let(2)  # that token, and the other's only one
    waiting.join()
    assert puppet.asked == 5
    until(lambda: figure(url, 'pipeline_requests_total{model="plain",status="499"}') == 1)


def test_who_leaves_the_line_frees_a_place(played: Played) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, played.url)
        until(lambda: played.puppet.asked == 1)
        with pytest.raises(requests.Timeout):
            requests.post(
                f"{played.url}/v1/chat/completions", json={"model": "plain", "messages": HELLO}, timeout=(60, 0.2)
            )
        until(lambda: played.line.waiting == 0)
        second = pool.submit(post, played.url)
        played.puppet.let(16)
        assert text_of(first.result()) == text_of(second.result())


def test_a_reader_who_stands_still_holds_nobody_up(played: Played) -> None:
    played.puppet.let(1)
    with post(played.url, max_tokens=8, stream=True):
        played.puppet.let(15)
        assert text_of(post(played.url))


def test_an_engine_that_fails_answers_500_and_the_server_goes_on(played: Played) -> None:
    played.puppet.let(8)
    played.puppet.broken = True
    for stream in (False, True):
        response = post(played.url, stream=stream)
        assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_error")
    played.puppet.broken = False
    assert text_of(post(played.url))


# --- any engine ------------------------------------------------------------------------------------------------------


class Chooser:
    """An engine that is cut off in the middle and says who answered anew, or fails."""

    model, fails, tags = "chooser", False, ()

    def count(self, messages: Sequence[Message]) -> int:
        return 3

    async def stream(
        self, messages: Sequence[Message], settings: Settings, tags: Sequence[str] = ()
    ) -> AsyncIterator[Piece]:
        self.tags = tuple(tags)
        yield Piece("Good ", origin=Origin("cloud:x", "prefer cloud"))
        if self.fails:
            raise RuntimeError("secret detail")
        yield Piece(origin=Origin("local", "the cloud was cut off", 0.1))
        yield Piece("Good day")
        yield Piece("", None, None, "stop", Usage(3, 2), Origin("local", "the cloud was cut off", 0.1, 0.2, 3, 2, 0.01))


def test_an_engine_that_chooses_says_who_answered() -> None:
    chooser = Chooser()
    with serving({"chooser": chooser}) as url:  # type: ignore[dict-item]
        response = post(url, model="chooser", x_tags=["private"])
        whole = response.json()
        assert json.loads(response.headers["x-origin"]) == whole["x_origin"]
        assert whole["choices"][0]["message"]["content"] == "Good day"
        assert (whole["x_origin"]["who"], whole["x_origin"]["cost"]) == ("local", 0.01)
        assert chooser.tags == ("private",)
        stream = post(url, model="chooser", stream=True)
        assert json.loads(stream.headers["x-origin"])["who"] == "cloud:x"
        assert [body.get("x_origin", {}).get("who") for body in events(stream)] == ["cloud:x", "local", None, "local"]
        chooser.fails = True
        with client(url) as stock, pytest.raises(openai.APIError, match="the server failed; its log says how"):
            list(stock.chat.completions.create(model="chooser", messages=HELLO, stream=True))  # type: ignore[call-overload]
        assert "secret" not in post(url, model="chooser").text


# --- bundles ---------------------------------------------------------------------------------------------------------


def test_a_bundle_is_verified_before_it_listens_and_before_it_is_loaded(
    talking: Talking, capsys: pytest.CaptureFixture[str]
) -> None:
    found = sources([talking.bundle], [talking.public_key], unverified=False)
    assert list(found) == ["demo/q4"]
    assert "OK, demo release 7, signed by" in capsys.readouterr().err
    shelf = local.Shelf(found)
    path = talking.bundle / "content/genai_config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(BundleError, match="does not verify"):
        shelf.model("demo/q4")
    assert shelf.loaded == 0
    with pytest.raises(BundleError, match="does not verify"):
        sources([talking.bundle], [talking.public_key], unverified=False)
    with pytest.raises(ConfigError, match="serve one of them"):
        sources([talking.bundle, talking.bundle], [], unverified=True)


def test_models_make_room_for_each_other(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_folders(one=model_folder, other=model_folder) as found:
        free = [10**12]
        monkeypatch.setattr(local, "available_memory", lambda: free[0])
        for name in ("one", "other"):
            assert text_of(post(found.url, model=name))
        assert found.shelf.loaded == 2
        monkeypatch.setattr(local, "available_memory", lambda: 0 if found.shelf.loaded else free[0])
        found.shelf._loaded.pop("one")
        assert text_of(post(found.url, model="one"))
        assert list(found.shelf._loaded) == ["one"]
        free[0] = 0
        refused = post(found.url, model="other")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "out_of_resources")


# --- the door --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost"}, 200),
        ({"host": "[::1]:80"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "127.0.0.1", "origin": "http://127.0.0.1"}, 200),
        ({"host": "127.0.0.1", "origin": "http://evil.example"}, 403),
        ({"host": "127.0.0.1", "origin": "null"}, 403),
        ({"content-length": "x"}, 400),
    ],
)
def test_on_loopback_only_this_machine_asks(headers: dict[str, str], status: int, served: Served) -> None:
    response = requests.get(f"{served.url}/v1/models", headers=headers, timeout=60)
    assert response.status_code == status
    assert not [name for name in response.headers if name.lower().startswith("access-control")]


def test_elsewhere_the_token_opens(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=f"{TOKEN} is not set"):
        Door.at("0.0.0.0")
    monkeypatch.setenv(TOKEN, "short")
    with pytest.raises(ConfigError, match="has 5 characters, and 16 are the least"):
        Door.at("127.0.0.1")
    secret = "a secret of enough characters"
    monkeypatch.setenv(TOKEN, secret)
    with serving({"chooser": Chooser()}, Door.at("0.0.0.0")) as url:  # type: ignore[dict-item]
        for path, status in {"/": 200, "/page.js": 200, "/health": 200, "/v1/models": 401, "/metrics": 401}.items():
            assert requests.get(f"{url}{path}", headers={"host": "a.example"}, timeout=60).status_code == status
        with client(url, "wrong") as stock, pytest.raises(openai.AuthenticationError, match=TOKEN):
            stock.models.list()
        with client(url, secret) as stock:
            assert [model.id for model in stock.models.list()] == ["chooser"]
    assert secret not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize("stated", [True, False])
def test_a_request_has_a_size(stated: bool) -> None:
    body = json.dumps({"model": "chooser", "messages": [{"role": "user", "content": "a" * 5000}]}).encode()
    with serving({"chooser": Chooser()}, Door("127.0.0.1", None, body_bytes=4096)) as url:  # type: ignore[dict-item]
        response = requests.post(
            f"{url}/v1/chat/completions", data=body if stated else iter([body]), timeout=60,
            headers={"content-type": "application/json"},
        )  # fmt: skip
        assert response.status_code == 413
        assert "4,096 bytes" in response.json()["error"]["message"]


# --- the command -----------------------------------------------------------------------------------------------------


@contextmanager
def command(*arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process of its own, which is ended where a test fails."""
    environment = {name: value for name, value in os.environ.items() if name != TOKEN}
    words = [sys.executable, "-m", "pipeline", "serve", *map(str, arguments)]
    with subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_and_ends_an_answer_before_itself(stop: signal.Signals, talking: Talking) -> None:
    with command(talking.bundle, "--public-key", talking.public_key, "--port", 0) as process:
        assert process.stderr
        lines = [process.stderr.readline().decode() for _ in range(2)]
        assert "OK, demo release 7" in lines[0]
        url = next(word for word in lines[1].split() if word.startswith("http://127.0.0.1:"))
        stream = post(url, model="demo/q4", max_tokens=64, stream=True)
        process.send_signal(stop)
        assert events(stream)[-1]["choices"][0]["finish_reason"]
        _, said = process.communicate(timeout=120)
    assert process.returncode in {0, -stop}
    assert said == b""


def test_a_refusal_beside_a_bundle_is_left_out_and_alone_is_an_error(
    talking: Talking,
    maker: Maker,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refusal = maker.refusal(tmp_path / "refusal")
    for order in ([refusal, talking.bundle], [talking.bundle, refusal]):
        assert list(sources(order, [talking.public_key], unverified=False)) == ["demo/q4"]
        assert f"left out: {refusal} holds no model: " in capsys.readouterr().err
    with pytest.raises(Refused, match="--unverified artifacts/demo/variants/q4"):
        sources([refusal], [talking.public_key], unverified=False)
    (refusal / "content/more").touch()
    with pytest.raises(BundleError, match="does not verify"):
        sources([refusal, talking.bundle], [talking.public_key], unverified=False)


def test_a_port_that_is_taken_is_said() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(ResourceError, match="Try another --port"):
        listen("127.0.0.1", taken.getsockname()[1])


def test_a_bundle_that_does_not_verify_is_not_served(talking: Talking) -> None:
    (talking.bundle / "content/more").write_text("more")
    with command(talking.bundle, "--public-key", talking.public_key, "--port", 0) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said.startswith(b"error: ") and b"does not verify" in said
