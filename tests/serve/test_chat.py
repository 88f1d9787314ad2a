"""chat: a bundle that verifies is asked; only answers go to stdout; every mistake is one paragraph."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.bundle import keys
from pipeline.errors import EvaluationError
from pipeline.files import read_json, write_json
from pipeline.serve.chat import Conversation
from tests.bundle.conftest import Maker
from tests.conftest import ROOT
from tests.serve.conftest import CONTEXT, Talking, changed


def ask(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """`python -m pipeline chat ARGUMENTS` in this process; its status."""
    monkeypatch.setattr(sys, "argv", ["pipeline", "chat", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return int(done.value.code or 0)


def told(conversation: Conversation, text: str, most: int = 8) -> str:
    return conversation.answer(text, lambda piece: None, most).text


# --- a conversation --------------------------------------------------------------------------------------------------


def test_what_was_said_is_remembered_and_not_computed_again(model_folder: Path) -> None:
    kept = Conversation(model_folder, system="Be brief.")
    pieces: list[str] = []
    first = kept.answer("Good morning.", pieces.append, 8)
    assert "".join(pieces) == first.text
    assert first.written == 8
    second = kept.answer("And then?", pieces.append, 8)
    anew = Conversation(model_folder, system="Be brief.")
    anew.messages = kept.messages[:-2]
    again = anew.answer("And then?", pieces.append, 8)
    assert again.text == second.text
    assert second.read < again.read
    assert kept.messages == anew.messages
    assert [message["role"] for message in kept.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_a_full_context_is_said_and_forgotten(model_folder: Path, tmp_path: Path) -> None:
    endless = changed(model_folder, tmp_path / "m", search={"min_length": CONTEXT})
    conversation = Conversation(endless, system="Be brief.")
    whole = conversation.answer("Good morning.", lambda piece: None)
    assert whole.cut == f"the context of {CONTEXT} tokens is full"
    evening = "Good evening. " * 8
    again = conversation.answer(evening, lambda piece: None, 4)
    assert (
        again.cut
        == f"the context of {CONTEXT} tokens was full: the conversation before it is forgotten; cut at 4 tokens"
    )
    assert [message["content"] for message in conversation.messages[:2]] == ["Be brief.", evening]
    with pytest.raises(EvaluationError, match=rf"a message of [\d,]+ tokens leaves no room .* context of {CONTEXT}"):
        told(conversation, "word " * CONTEXT)
    assert len(conversation.messages) == 3  # what could not be asked changes nothing


def test_a_stop_ends_the_answer_and_is_not_part_of_it(model_folder: Path, tmp_path: Path) -> None:
    plain = Conversation(model_folder)
    text = told(plain, "Good morning.")
    ids = [int(token) for token in plain._model._generator.get_sequence(0)][-8:]
    place = next(place for place in range(1, 8) if ids[place] not in ids[:place])
    stopped = Conversation(changed(model_folder, tmp_path / "m", model={"eos_token_id": [ids[place]]}))
    answer = stopped.answer("Good morning.", lambda piece: None, 8)
    assert (answer.written, answer.cut) == (place + 1, "")
    assert text.startswith(answer.text)
    assert answer.text != text


def test_sampling_is_that_of_the_config_and_repeats_with_a_seed(model_folder: Path, tmp_path: Path) -> None:
    hot = {"do_sample": True, "temperature": 5.0, "top_k": 300, "top_p": 1.0}
    folder = changed(model_folder, tmp_path / "m", search=hot)
    one, same, other = (told(Conversation(folder, seed=seed), "Good morning.") for seed in (1, 1, 2))
    assert one == same != other
    greedy = told(Conversation(folder, greedy=True), "Good morning.")
    assert greedy == told(Conversation(model_folder), "Good morning.") != one


def test_a_whole_prompt_is_read_where_chunks_would_be_wrong(model_folder: Path, tmp_path: Path) -> None:
    conversation = Conversation(changed(model_folder, tmp_path / "m", search={"chunk_size": 0}))
    counts = [conversation.answer("Hello.", lambda piece: None, 4).read for _ in range(2)]
    assert counts[1] > counts[0]


def test_without_a_chat_template_the_text_goes_on(model_folder: Path, tmp_path: Path) -> None:
    folder = changed(model_folder, tmp_path / "m")
    settings = read_json(folder / "tokenizer_config.json")
    del settings["chat_template"]
    write_json(folder / "tokenizer_config.json", settings)
    conversation = Conversation(folder)
    assert not conversation.has_template
    assert told(conversation, "The capital")
    with pytest.raises(EvaluationError, match="an empty prompt cannot be continued"):
        told(Conversation(folder), "")
    with pytest.raises(EvaluationError, match="takes no system message: leave out --system"):
        Conversation(folder, system="Be brief.")


def test_a_template_that_refuses_is_no_traceback(model_folder: Path, tmp_path: Path) -> None:
    folder = changed(model_folder, tmp_path / "m")
    settings = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", settings | {"chat_template": "{{ raise_exception('no') }}"})
    with pytest.raises(EvaluationError, match="cannot render the chat template with these messages"):
        Conversation(folder)


def test_control_c_ends_the_answer_and_the_conversation_goes_on(model_folder: Path) -> None:
    conversation, pieces = Conversation(model_folder), []

    def interrupt(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    answer = conversation.answer("Good morning.", interrupt, 8)
    assert (answer.cut, answer.text) == ("stopped", "".join(pieces))
    assert conversation.messages[-1]["content"] == answer.text
    assert told(conversation, "And then?")


# --- the command -----------------------------------------------------------------------------------------------------


def test_one_answer_alone_is_on_stdout(
    talking: Talking, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    question = ("--prompt", "Good morning.", "--max-tokens", 8)
    assert ask(monkeypatch, talking.bundle, "--public-key", talking.public_key, *question) == 0
    out, err = capsys.readouterr()
    assert out == told(Conversation(talking.bundle / "content"), "Good morning.") + "\n"
    assert "OK, demo release 7, signed by" in err
    assert "answer: 8 tokens at " in err


def test_lines_are_answered_until_the_end_of_the_input(
    talking: Talking, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["Good morning.", "", "word " * CONTEXT, "And then?"])

    def typed(prompt: str) -> str:
        assert prompt == ""
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", typed)
    assert ask(monkeypatch, talking.bundle / "content", "--unverified", "--max-tokens", 8) == 0
    out, err = capsys.readouterr()
    conversation = Conversation(talking.bundle / "content")
    assert out == "".join(f"{told(conversation, text)}\n" for text in ("Good morning.", "And then?"))
    assert err.count("[prompt: ") == 2
    assert "leaves no room for an answer" in err


def test_the_keys_that_signed_here_are_trusted(
    talking: Talking, maker: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    question = (talking.bundle, "--prompt", "Hi.", "--max-tokens", 2)
    assert ask(monkeypatch, *question) == 1
    assert "artifacts/keys holds none that signed here. Give --public-key KEY" in capsys.readouterr().err
    keys.export_public_key(maker.key, tmp_path / "artifacts/keys/mine.pem")
    assert ask(monkeypatch, *question) == 0


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("nothing there", "is no folder of a bundle: it has no content/. "),
        ("the content", "is a model's folder, not a bundle's"),
        ("a byte", "extended: content/tokenizer.json: expected"),
        ("another key", "does not verify under"),
        ("no key", "cannot be read: No such file"),
        ("no genai_config", "onnxruntime-genai cannot load it"),
        ("a broken graph", "its graph cannot be read"),
        ("a broken graph without digests", "onnxruntime-genai cannot load it"),
        ("no stops", "is not complete: its model lacks 'eos_token_id'"),
    ],
)
def test_every_mistake_is_one_paragraph(
    spoil: str, words: str, talking: Talking, stranger: Maker,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, arguments = talking.bundle, ["--public-key", talking.public_key]
    content = folder / "content"
    if spoil == "nothing there":
        folder = folder / "nowhere"
    elif spoil == "the content":
        folder = content
    elif spoil == "a byte":
        (content / "tokenizer.json").write_text((content / "tokenizer.json").read_text() + " ")
    elif spoil == "another key":
        keys.export_public_key(stranger.key, talking.public_key)
    elif spoil == "no key":
        talking.public_key.unlink()
    else:
        folder, arguments = content, ["--unverified"]
        if spoil == "no genai_config":
            (content / "genai_config.json").unlink()
        elif spoil.startswith("a broken graph"):
            for digests in content.glob("*.blake3") if spoil.endswith("digests") else ():
                digests.unlink()
            (content / "model.onnx").write_bytes(b"nothing")
        else:
            config = read_json(content / "genai_config.json")
            del config["model"]["eos_token_id"]
            write_json(content / "genai_config.json", config)
    assert ask(monkeypatch, folder, *arguments, "--prompt", "Hi.") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.strip().count("\n") == 0
    assert words in err


def test_control_c_in_a_real_process(model_folder: Path) -> None:
    """The first ends the answer, the second, at the prompt, the program; neither shows a traceback."""
    command = [sys.executable, "-m", "pipeline", "chat", str(model_folder), "--unverified"]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"Good morning.\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        speeds = process.stderr.readline()  # the answer is over, however it ended
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert speeds.startswith(b"[prompt: ")
    assert b"Traceback" not in err
