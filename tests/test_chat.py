"""Chat formats against mistral-common (live), against its recorded ids (golden), and against hand-written rules."""

import importlib.util
import json
import os
import random
import re

import pytest

from chat import encode_chat, parse_answer
from chat_cases import TEKKEN_VERSIONS, TEXTS, copy_spm, grid_of, oracle, png, random_chat, write_tekken
from config import UserError
from tokenizer import load_tokenizer


def data_file(name: str) -> str:
    """A tokenizer file bundled with mistral-common."""
    pytest.importorskip("mistral_common")
    return os.path.join(os.path.dirname(importlib.util.find_spec("mistral_common").origin), "data", name)


@pytest.fixture(scope="module")
def real_tokenizers(tmp_path_factory):
    """name -> path of a full-size tokenizer file, one for each chat format."""
    root = str(tmp_path_factory.mktemp("tokenizers"))
    paths = {
        "tekken-" + version: write_tekken(data_file("tekken_240911.json"), f"{root}/{version}", version)
        for version in TEKKEN_VERSIONS
    }
    for source in ("240323.model.v3", "241114.model.v7", "241114.model.v7m1"):
        name = f"mistral_instruct_tokenizer_{source}"
        paths["spm-" + source[13:]] = copy_spm(data_file(name), f"{root}/{name}", name)
    return paths


@pytest.mark.parametrize("name", [*("tekken-" + v for v in TEKKEN_VERSIONS), "spm-v3", "spm-v7", "spm-v7m1"])
def test_ids_equal_mistral_common(name, real_tokenizers):
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    path = real_tokenizers[name]
    tokenizer = load_tokenizer(os.path.dirname(path))
    theirs = {
        training: MistralTokenizer.from_file(path, ValidationMode.finetuning if training else ValidationMode.test)
        for training in (False, True)
    }
    grid = grid_of(tokenizer.image) if tokenizer.image else None
    # mistral-common does not take lone surrogates with SentencePiece
    texts = [text for text in TEXTS if name.startswith("tekken") or not re.search("[\ud800-\udfff]", text)]
    rng = random.Random(name + os.environ.get("SEED", ""))
    for case in range(int(os.environ.get("CASES", 60))):
        training = case % 3 == 0
        chat = random_chat(rng, tokenizer.version, bool(tokenizer.image), training, texts)
        encoded = encode_chat(tokenizer, **chat, image_grid=grid)
        assert encoded.ids == oracle(theirs[training], chat), json.dumps(chat)
        assert len(encoded.targets) == len(encoded.ids)
