"""Writes the golden files of the tokenizer and chat tests:

    python tests/golden/make_tokenizer_golden.py        (needs mistral-common with opencv)

- tokenizer_tekken.json: the first 1,500 ranks of a Tekken file that mistral-common bundles;
- tokenizer_spm.model: a small SentencePiece model, trained here, with the control tokens of the v7 one;
- tokenizer_golden.json: texts, decoded ids and whole chats, with the ids that mistral-common gives for these files.
"""

import json
import os
import random
import sys
import tempfile

import mistral_common
import sentencepiece
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from chat_cases import TEKKEN_VERSIONS, TEXTS, copy_spm, oracle, random_chat, write_tekken

SHORT = ["Hello, world! ", "naïve 🙂", " 12.5\n", "def f(x):\n\treturn x", "[INST]no[/INST]", "北京", "ok  ", ""]


def cut_tekken(path: str) -> None:
    bundled = os.path.join(os.path.dirname(mistral_common.__file__), "data")
    with open(os.path.join(bundled, "tekken_240911.json"), encoding="utf-8") as file:
        data = json.load(file)
    data["vocab"] = [{**entry, "token_str": None} for entry in data["vocab"][:1510]]  # ten more than are used
    data["config"] |= {"num_vocab_tokens": 1510, "default_vocab_size": 1564, "default_num_special_tokens": 64}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file, separators=(",", ":"))


def train_spm(path: str) -> None:
    bundled = os.path.join(os.path.dirname(mistral_common.__file__), "data")
    real = sentencepiece.SentencePieceProcessor(os.path.join(bundled, "mistral_instruct_tokenizer_241114.model.v7"))
    controls = [real.id_to_piece(id) for id in range(3, 24)]
    texts = TEXTS[:5] * 3  # Latin, Cyrillic and Greek: the other scripts fall back to bytes
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=path.removesuffix(".model"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        control_symbols=controls,
        minloglevel=2,
    )
    os.remove(path.removesuffix(".model") + ".vocab")


def main() -> None:
    tekken, spm = os.path.join(HERE, "tokenizer_tekken.json"), os.path.join(HERE, "tokenizer_spm.model")
    cut_tekken(tekken)
    train_spm(spm)
    golden = {"texts": {}, "decoded": {}, "chats": []}
    with tempfile.TemporaryDirectory() as root:
        paths = {f"tekken-{v}": write_tekken(tekken, f"{root}/{v}", v) for v in TEKKEN_VERSIONS}
        paths |= {f"spm-{v}": copy_spm(spm, f"{root}/spm-{v}", f"tokenizer.model.{v}") for v in ("v3", "v7", "v7m1")}
        for name, path in paths.items():
            rng = random.Random(name)
            tokenizers = [MistralTokenizer.from_file(path, m) for m in (ValidationMode.test, ValidationMode.finetuning)]
            inner = tokenizers[0].instruct_tokenizer.tokenizer
            if name in ("tekken-v3", "spm-v7"):
                texts = [text for text in TEXTS if name == "tekken-v3" or text.isascii() or text.isprintable()]
                golden["texts"][name] = [[text, inner.encode(text, bos=False, eos=False)] for text in texts]
                drawn = [rng.choices(range(inner.n_words), k=rng.randint(0, 25)) for _ in range(30)]
                # bytes of broken and whole UTF-8 next to each other and to special tokens
                byte_ids = [inner.encode(character, bos=False, eos=False)[-2:] for character in "é🙂北\x00ж"]
                for _ in range(30):
                    drawn.append([id for ids in rng.choices([*byte_ids, [1], [rng.randrange(500)]], k=8) for id in ids])
                golden["decoded"][name] = [[ids, inner.decode(ids)] for ids in drawn]
            for training in (False, True, False):
                chat = random_chat(rng, inner.version.value, "v7m1" in name or "spm" not in name, training, SHORT)
                golden["chats"].append([name, chat, oracle(tokenizers[training], chat)])
    with open(os.path.join(HERE, "tokenizer_golden.json"), "w", encoding="utf-8") as file:
        json.dump(golden, file, separators=(",", ":"))


if __name__ == "__main__":
    main()
