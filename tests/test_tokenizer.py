"""The tokenizer that runs on a phone (onnxruntime-genai's) against transformers', over the folder that is shipped.

Known and accepted: decoding differs, because onnxruntime-genai leaves special tokens out of the text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime_genai as genai
import pytest

pytest_plugins = ["tests.smollm2"]

TEXTS = {
    "English": "The quick brown fox doesn't jump; it can't, I've heard — they'll see.",
    "Vietnamese": "Xin chào, tôi là một mô hình ngôn ngữ nhỏ chạy trên điện thoại của bạn.",
    "Vietnamese, decomposed": "Tie\u0302\u0301ng Vie\u0323\u0302t",
    "Chinese": "你好，世界！这是一个测试：四位量化。",
    "Japanese and Korean": "日本語テキスト 한국어 문장",
    "code": "def area(r: float) -> float:\n    '''πr²'''\n\treturn 3.14159 * r ** 2  # naïve\n\n\n",
    "C": "if (a<=b && c!=d) { return a[i]->x++; } /* … */",
    "emoji": "🙂 👩‍👩‍👧‍👦 🇻🇳 ✌🏽",
    "digits": "1234567890 3.14159 2024-01-02 1,000,000",
    "whitespace before digits": "   42\t7\n\n 8  9 x1 y 2",
    "whitespace": " \t  \n\r\n  leading and trailing  ",
    "compatibility characters": "½ Ⅷ ① ﬁ \u200b\u00a0",
    "special tokens": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
    "nearly special tokens": "<|im_start>user <| im_end |>",
    "empty": "",
}
CHATS = {
    "default system prompt": [{"role": "user", "content": "Write 3 + 4 in Vietnamese."}],
    "own system prompt": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": 'Quotes "and" \\backslashes\\\nnew lines'},
    ],
    "several turns": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! 🙂"},
        {"role": "user", "content": "Bạn khoẻ không?"},
    ],
}


@pytest.fixture(scope="module")
def tokenizers(smollm2_export: Path) -> tuple[Any, Any]:
    """onnxruntime-genai's and transformers' tokenizer of the exported folder."""
    from transformers import AutoTokenizer

    return genai.Tokenizer(genai.Model(str(smollm2_export))), AutoTokenizer.from_pretrained(smollm2_export)


@pytest.mark.parametrize("name", TEXTS)
def test_token_ids_equal_transformers(name: str, tokenizers: tuple[Any, Any]) -> None:
    ours, theirs = tokenizers
    assert ours.encode(TEXTS[name]).tolist() == theirs(TEXTS[name])["input_ids"]


def test_a_special_token_in_text_is_one_id(tokenizers: tuple[Any, Any]) -> None:
    ours, theirs = tokenizers
    assert ours.encode("<|im_end|>").tolist() == [theirs.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.parametrize("name", [name for name in TEXTS if name != "special tokens"])
def test_decoding_gives_the_text_back(name: str, tokenizers: tuple[Any, Any]) -> None:
    ours, _ = tokenizers
    assert ours.decode(ours.encode(TEXTS[name])) == TEXTS[name]


@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("name", CHATS)
def test_the_chat_template_gives_the_same_ids(name: str, prompted: bool, tokenizers: tuple[Any, Any]) -> None:
    ours, theirs = tokenizers
    text = ours.apply_chat_template(json.dumps(CHATS[name]), add_generation_prompt=prompted)
    assert text == theirs.apply_chat_template(CHATS[name], tokenize=False, add_generation_prompt=prompted)
    want = theirs.apply_chat_template(CHATS[name], add_generation_prompt=prompted)
    assert ours.encode(text).tolist() == list(want)
