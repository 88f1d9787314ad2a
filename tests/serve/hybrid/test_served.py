"""The hybrid manager behind the API, asked by the stock client."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from tests.serve.conftest import serving
from tests.serve.hybrid.engines import LOCAL, USER, Device, manager
from tests.serve.hybrid.provider import Script, answer, event, provider

MODEL = "tiny/q4"


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_a_cloud_killed_in_the_middle_yields_the_device_s_answer_with_its_reason(tmp_path: Path) -> None:
    broken = Script([event("The capital "), event("is ")])
    with provider(broken) as service, serving({MODEL: manager(tmp_path, service)}) as url:
        chats = client(url).chat.completions
        chunks = list(chats.create(model=MODEL, messages=USER, stream=True))
        whole = chats.create(model=MODEL, messages=USER)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "The capital is \n\n[the cloud failed (stream cut); the device answers anew]\n\n" + "".join(LOCAL)
    who = [chunk.x_origin["who"] for chunk in chunks if getattr(chunk, "x_origin", None)]
    assert who == ["cloud:big", MODEL, MODEL]
    assert "the cloud failed (stream cut)" in chunks[-1].x_origin["why"]
    assert whole.choices[0].message.content == "".join(LOCAL)


def test_tags_and_situations_reach_the_policy(tmp_path: Path) -> None:
    with provider(answer("leaked")) as service:
        own = manager(tmp_path, service, mode="only_cloud")
        with serving({MODEL: own, "plain": Device()}) as url:
            chats = client(url).chat.completions
            for extra in ({"x_tags": ["health"]}, {"x_situation": {"network": "none"}}):
                with pytest.raises(openai.PermissionDeniedError) as refused:
                    chats.create(model=MODEL, messages=USER, extra_body=extra)
                assert refused.value.code == "refused_by_policy"
            for model, extra in ((MODEL, {"x_situation": {"netwerk": "none"}}), ("plain", {"x_situation": {}})):
                with pytest.raises(openai.BadRequestError, match="x_situation"):
                    chats.create(model=model, messages=USER, extra_body=extra)
    assert service.requests == []


def test_a_cloud_alone_that_fails_is_no_answer(tmp_path: Path) -> None:
    said = r"nobody answered: .*HTTP 500, then HTTP 500"
    with (
        provider(Script(status=500)) as service,
        serving({MODEL: manager(tmp_path, service, mode="only_cloud")}) as url,
        pytest.raises(openai.InternalServerError, match=said),
    ):
        client(url).chat.completions.create(model=MODEL, messages=USER)
