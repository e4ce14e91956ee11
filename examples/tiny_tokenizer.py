"""A small Tekken tokenizer, learned from some text: byte-level BPE (Sennrich et al., arXiv:1508.07909)."""

import base64
import json
import os
import sys
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from runtime.tokenizer import PATTERN, words

SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]
SPECIAL += ["[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"]
SPECIAL += ["[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]
SPECIAL += [f"<SPECIAL_{rank}>" for rank in range(20, 32)]
SPECIAL += ["[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"]
NUM_SPECIAL = 64  # the rest stay unnamed


def learn_merges(texts: list[str], most: int, at_least: int = 3) -> list[bytes]:
    """Up to `most` tokens that BPE learns beyond the bytes: always the commonest pair, if not rarer than `at_least`."""
    counts = Counter(word for text in texts for word in words(text))
    found = [([bytes([byte]) for byte in word.encode()], count) for word, count in counts.items()]
    merges = []
    while len(merges) < most:
        pairs = Counter()
        for pieces, count in found:
            for pair in zip(pieces, pieces[1:]):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < at_least:
            break
        token = best[0] + best[1]
        if token not in merges:
            merges.append(token)
        for pieces, _ in found:
            for i in range(len(pieces) - 1, 0, -1):
                if i < len(pieces) and (pieces[i - 1], pieces[i]) == best:
                    pieces[i - 1 : i + 1] = [token]
    return merges


def write_tekken(path: str, texts: list[str], vocab_size: int = 768) -> None:
    """Write a `tekken.json` of format v15 with `vocab_size` ids; what the text does not fill are tokens never used."""
    size = vocab_size - NUM_SPECIAL
    vocab = [bytes([byte]) for byte in range(256)] + learn_merges(texts, size - 256)
    vocab += [b"\x00" + str(i).encode() for i in range(size - len(vocab))]
    data = {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": size,
            "default_vocab_size": vocab_size,
            "default_num_special_tokens": NUM_SPECIAL,
            "version": "v15",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for rank, token in enumerate(vocab)
        ],
        "special_tokens": [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(SPECIAL)],
        "image": {"image_patch_size": 14, "max_image_size": 140, "spatial_merge_size": 2},
        "model_settings_builder": {
            "reasoning_effort": {"type": "enum", "accepts_none": True, "default": "none", "values": ["none", "high"]}
        },
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file, separators=(",", ":"))
