"""Where a model stops and how it is sampled: every key that generation_config.json may have, and the entry over it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import onnxruntime_genai as genai
import pytest

from pipeline.config.models import ModelConfig
from pipeline.door import generation as module
from pipeline.door.generation import KEYS, read_generation
from pipeline.errors import CheckpointError, ConfigError
from pipeline.files import read_json, write_json
from pipeline.graph.genai import Generation, genai_config
from tests import tiny
from tests.artifact.exported import export

VOCAB = 320


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.make_model(tmp_path / "checkpoint")


def generation(folder: Path, values: dict[str, Any] | None = None, **entry: Any) -> Generation:
    if values is not None:
        write_json(folder / "generation_config.json", values)
    return read_generation(folder, ModelConfig.model_validate(tiny.model_entry(folder) | entry), VOCAB)


def test_a_checkpoint_that_says_nothing_samples_greedily(folder: Path) -> None:
    found = generation(folder)
    assert (found.stops, found.bos, found.pad, found.notes) == ((2,), 1, 2, ())
    assert found.search == {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}


def test_every_key_that_the_runtime_has_is_carried_over(folder: Path) -> None:
    carried = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "repetition_penalty": 1.05,
        "no_repeat_ngram_size": 3,
        "min_length": 4,
        "length_penalty": 1.2,
        "early_stopping": True,
        "diversity_penalty": 0.5,
    }
    assert generation(folder, carried).search == carried
    assert set(carried) == set(module._TABLE["carried"])


def test_the_runtime_honours_what_is_carried_over(folder: Path) -> None:
    """A model of random weights repeats itself; with a penalty from its own files it does not."""
    made = export(folder, 64)
    texts = []
    for values in ({}, {"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}):
        found = generation(folder, values)
        settings = genai_config(made.architecture, found, "model.onnx", 64)
        write_json(made.folder / "genai_config.json", settings)
        model = genai.Model(str(made.folder))
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=15)
        generator = genai.Generator(model, params)
        generator.append_tokens([5, 6, 7])
        while not generator.is_done():
            generator.generate_next_token()
        texts.append(generator.get_sequence(0)[3:].tolist())
    assert len(set(texts[0])) < len(texts[0])
    assert all(len(set(text)) == len(text) for text in texts[1:])


@pytest.mark.parametrize(
    "values",
    [
        {"do_sample": False, "temperature": None, "top_p": None, "top_k": None},  # as transformers writes it
        {"num_beams": 1, "early_stopping": "never", "typical_p": 1.0, "min_p": None, "bad_words_ids": []},
        {"max_new_tokens": 2048, "max_length": 20, "use_cache": True, "cache_implementation": "static"},
        {"pad_token_id": -1},
        {"pad_token_id": [2]},
        {"pad_token_id": [2, 1]},
        {"bos_token_id": None, "eos_token_id": None},
        {"eos_token_id": -1},
    ],
)
def test_legitimate_spellings(folder: Path, values: dict[str, Any]) -> None:
    plain = generation(folder)
    found = generation(folder, values)
    assert (found.stops, found.bos, found.pad, found.notes) == (plain.stops, plain.bos, plain.pad, ())
    assert found.search == plain.search


def test_top_k_that_means_all(folder: Path) -> None:
    """0 is "all" to transformers; onnxruntime-genai takes it for greedy, and more than the vocabulary for an error."""
    assert [generation(folder, {"top_k": k}).search["top_k"] for k in (0, 1, VOCAB, VOCAB + 1)] == [
        VOCAB,
        1,
        VOCAB,
        VOCAB,
    ]


def test_older_configs_hold_the_settings_themselves(folder: Path) -> None:
    """Without generation_config.json transformers takes them from config.json; with one it does not."""
    write_json(
        folder / "config.json", read_json(folder / "config.json") | {"repetition_penalty": 1.2, "do_sample": True}
    )
    assert generation(folder).search["repetition_penalty"] == 1.2
    assert "repetition_penalty" not in generation(folder, {"top_k": 5}).search


def test_stops_are_the_union_of_what_all_files_say(folder: Path) -> None:
    write_json(folder / "config.json", read_json(folder / "config.json") | {"eos_token_id": 7})
    tokenizer = read_json(folder / "tokenizer_config.json")
    write_json(
        folder / "tokenizer_config.json",
        tokenizer | {"eos_token": {"__type": "AddedToken", "content": "<|endoftext|>"}},
    )
    # 9: the generation's; 7: config.json's; 0: the tokenizer's; 2: what the template writes behind a reply; 11: ours
    assert generation(folder, {"eos_token_id": [9]}, extra_stop_ids=[11]).stops == (9, 7, 0, 2, 11)
    assert generation(folder, {}, generation={"eos_token_id": 5}).stops == (5, 0, 2)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"eos_token_id": {"a": 1}}, "eos_token_id is {'a': 1}, not a token id"),
        ({"eos_token_id": [1, -2]}, "eos_token_id is -2, not a token id"),
        ({"eos_token_id": True}, "eos_token_id is True, not a token id"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', not a token id"),
        ({"eos_token_id": 320}, "eos_token_id is 320, beyond the 320 ids"),
        ({"pad_token_id": "x"}, "pad_token_id is 'x', not a token id"),
        ({"temperature": "hot"}, "temperature is 'hot'; a number from 0 to 1,000"),
        ({"temperature": -0.5}, "temperature is -0.5; a number from 0 to 1,000"),
        ({"top_p": float("nan")}, "top_p is nan; a number"),
        ({"top_p": 0.0}, "top_p is 0.0; a number"),
        ({"top_p": 1.5}, "top_p is 1.5; a number"),
        ({"top_k": -1}, "top_k is -1; an integer"),
        ({"top_k": 50.5}, "top_k is 50.5; an integer"),
        ({"top_k": True}, "top_k is True; an integer"),
        ({"do_sample": "yes"}, "do_sample is 'yes'; a boolean"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; a number"),
        ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0; a number"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1; an integer"),
        ({"num_beams": 4}, "num_beams is 4, which onnxruntime-genai cannot do"),
        ({"min_p": 0.1}, "min_p is 0.1, which onnxruntime-genai cannot do"),
        ({"suppress_tokens": [5]}, "suppress_tokens is [5], which onnxruntime-genai cannot do"),
        ({"stop_strings": ["###"]}, "stop_strings is ['###'], which"),
        ({"forced_eos_token_id": 2}, "forced_eos_token_id is 2, which"),
    ],
)
def test_what_cannot_be_honoured_is_refused_and_the_remedy_works(
    folder: Path, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
        generation(folder, values)
    message = str(caught.value)
    assert str(folder / "generation_config.json") in message and "\n" not in message
    remedy = re.search(r"Set `generation: \{(\w+): null\}`", message)
    assert remedy and generation(folder, values, generation={remedy[1]: None}).stops == (2,)


def test_ids_outside_the_vocabulary_that_end_nothing_are_left_out(folder: Path) -> None:
    found = generation(folder, {"pad_token_id": 320, "bos_token_id": 999})
    assert (found.pad, found.bos) == (2, 2)
    assert found.notes == (
        "left out bos_token_id 999: the vocabulary has 320 ids",
        "left out pad_token_id 320: the vocabulary has 320 ids",
    )


def test_unknown_keys_are_listed_once(folder: Path) -> None:
    assert generation(folder, {"sizzle": 1, "fizz": None, "top_k": 5}).notes == (
        "generation_config.json has keys that are unknown here and change nothing: sizzle",
    )


def test_a_model_that_never_stops_is_refused_and_the_remedy_works(folder: Path) -> None:
    config = {key: value for key, value in read_json(folder / "config.json").items() if key != "eos_token_id"}
    write_json(folder / "config.json", config)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(CheckpointError, match="would never stop"):
        generation(folder)
    assert generation(folder, extra_stop_ids=[7]).stops == (7,)
    with pytest.raises(CheckpointError, match=r"extra_stop_ids of the model's entry has 320.* Correct it there"):
        generation(folder, extra_stop_ids=[320])


def test_a_misspelt_key_of_the_entry_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'temperature'"):
        generation(folder, generation={"temperatur": 0.5})


def test_every_key_that_transformers_has_is_known() -> None:
    from transformers import GenerationConfig

    assert set(GenerationConfig().to_dict()) <= KEYS


def test_the_runtime_knows_every_key_that_is_carried_over(folder: Path) -> None:
    """Else a key of a later onnxruntime-genai would be refused here, or one that it dropped be carried over."""
    made = export(folder, 64)
    for key in (*module._TABLE["carried"], "min_p"):
        settings = genai_config(made.architecture, generation(folder), "model.onnx", 64)
        settings["search"][key] = {"boolean": True}.get(module._TABLE["carried"].get(key, [""])[0], 1)
        write_json(made.folder / "genai_config.json", settings)
        if key == "min_p":
            with pytest.raises(Exception, match="Unknown value"):
                genai.Config(str(made.folder))
        else:
            genai.Config(str(made.folder))
