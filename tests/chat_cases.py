"""Texts, tokenizer files of every version, and random conversations, for the tests of tokenizer.py and chat.py and for
the script that writes their golden files."""

import base64
import io
import json
import os
import random
import shutil

from PIL import Image

TEKKEN_VERSIONS = ("v3", "v7", "v11", "v13", "v15")

SPECIAL_TOKENS = {14: "[PREFIX]", 15: "[MIDDLE]", 16: "[SUFFIX]", 32: "[ARGS]", 33: "[CALL_ID]", 34: "[THINK]"}
SPECIAL_TOKENS |= {17: "[SYSTEM_PROMPT]", 18: "[/SYSTEM_PROMPT]", 19: "[TOOL_CONTENT]", 35: "[/THINK]"}
SPECIAL_TOKENS |= {36: "[MODEL_SETTINGS]", 37: "[/MODEL_SETTINGS]"}
SPECIAL_TOKENS |= enumerate(["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"])
SPECIAL_TOKENS |= {7: "[TOOL_RESULTS]", 8: "[/TOOL_RESULTS]", 9: "[TOOL_CALLS]", 10: "[IMG]", 11: "<pad>"}
SPECIAL_TOKENS |= {12: "[IMG_BREAK]", 13: "[IMG_END]"}

MODEL_SETTINGS = {
    "reasoning_effort": {"type": "enum", "accepts_none": True, "default": "none", "values": ["none", "high"]}
}

TEXTS = [
    "The quick brown fox doesn't jump over 1,234.56 lazy dogs, does it?",
    "Île-de-France: où est passé l'été? Œuvre, naïveté, ça va.",
    "Straße, Größe, ÄÖÜ und ſ; der Fuß. ǅ ǈ ǋ",
    "Съешь же ещё этих мягких французских булок",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "הספר מונח על השולחן, שָׁלוֹם",
    "السلام عليكم ورحمة الله ١٢٣",
    "नमस्ते दुनिया, कैसे हैं आप? १२३",
    "বাংলা ভাষা আমার মাতৃভাষা",
    "தமிழ் மொழி செம்மொழி ஆகும்",
    "తెలుగు భాష ఎంతో మధురం",
    "ಕನ್ನಡ ನಾಡು ನುಡಿ",
    "മലയാളം സംസാരിക്കുന്നു",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "ພາສາລາວ ແລະ ຂະແໜງ",
    "မြန်မာဘာသာစကား",
    "ភាសាខ្មែរ ស្រស់ស្អាត",
    "ქართული ენა უძველესია",
    "Հայերեն լեզուն",
    "አማርኛ ቋንቋ ነው።",
    "北京是中国的首都，历史悠久。",
    "日本語の文章です。カタカナとｶﾀｶﾅ。",
    "한국어 문장입니다. 각각",
    "བོད་སྐད་ ᠮᠣᠩᠭᠣᠯ ᏣᎳᎩ ᚠᚢᚦ 𐍈 𓀀 𞤀𞤣 𑄌 𝔘𝕟𝕚 ㊀ ½ Ⅷ ٣",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 👍🏽 🇫🇷 ☃\ufe0f done",
    "def f(x):\n\treturn {'a': [x ** 2 for _ in range(10)]}  # ok\r\n\r\n",
    "<a href=\"https://example.org/?q=1&b=%20\">x</a> //// --- === \\n /path/to\n/file",
    "a\x00b\x01c\x1bd\x7fe\x1c\x1d\x1e\x1ff\x85g\u200bh\u2028i\u2029j\ufeffk\x0b\x0cl",
    "   leading,   inner     and trailing   ",
    "\n\n\n \n\t \n  x  \t\t\n",
    "<s>[INST] hi [/INST]</s>[TOOL_CALLS][ARGS]<unk>[IMG][THINK]x[/THINK]<SPECIAL_20>▁▁<0x0A>",
    "[SYSTEM_PROMPT]no[/SYSTEM_PROMPT][AVAILABLE_TOOLS][MODEL_SETTINGS]<pad>",
    "x" * 300 + "ABCdefGHI" * 20,
    "\ud800 lone \ud83d\ude42 surrogates \udfff",
    "\U0001e900\U00011f04\U0002ebf0\U00010d50\U0001e4f0 new in Unicode 15 and 16 \u0897\ua7cb\U00031350",
    "e\u0301 \u0301x A\u030a ǅa aǅ ʰa aʰ",
    "",
    " ",
]  # fmt: skip

JSON_TEXTS = [
    '{"city": "Zürich",  "n": 1.0, "deep": {"a": [1, 2.50, null, true]}}',
    '{"z": 1, "a": "ünï 🙂 \\u00e9", "big": 123456789012345678901234567890}',
    "[1, 2,3]",
    '"just text"',
    "{}",
    "",
    "not { json",
    "NaN",
    "0",
]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather in a city — now",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
            "strict": True,
        },
    },
    {"function": {"name": "no-params_1"}, "type": "function"},
    {"type": "function", "function": {"parameters": {"type": "object"}, "description": None, "name": "x"}},
]


def write_tekken(source: str, directory: str, version: str, image: bool = True) -> str:
    """Writes `directory`/tekken.json: the vocabulary of the Tekken file `source` as a tokenizer of `version`."""
    with open(source, encoding="utf-8") as file:
        data = json.load(file)
    config = data["config"]
    config["version"] = version
    data.pop("image", None)
    size = config["default_vocab_size"] - config["default_num_special_tokens"]
    data["vocab"] = data["vocab"][: size + 5]
    if image:
        data["image"] = {"image_patch_size": 14, "max_image_size": 1540, "spatial_merge_size": 2}
    if version in ("v11", "v13", "v15"):
        names = [SPECIAL_TOKENS.get(rank, f"<SPECIAL_{rank}>") for rank in range(38)]
        data["special_tokens"] = [{"rank": r, "token_str": name, "is_control": True} for r, name in enumerate(names)]
    if version == "v15":
        data["model_settings_builder"] = MODEL_SETTINGS
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, "tekken.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file)
    return path


def copy_spm(source: str, directory: str, name: str) -> str:
    os.makedirs(directory, exist_ok=True)
    return shutil.copy(source, os.path.join(directory, name))


def png(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.new("P", (width, height), 1).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def grid_of(image: dict):
    """The (rows, columns) of [IMG] tokens of a data: URL, for a tokenizer's image section."""

    def grid(url: str) -> tuple[int, int]:
        width, height = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size
        ratio = max(width, height) / image["max_image_size"]
        if ratio > 1:
            width, height = max(round(width / ratio), 1), max(round(height / ratio), 1)
        token = image["image_patch_size"] * image["spatial_merge_size"]
        return (height - 1) // token + 1, (width - 1) // token + 1

    return grid


def random_chat(rng: random.Random, version: str, images: bool, training: bool, texts: list[str] = TEXTS) -> dict:
    """Arguments for encode_chat (without the callable): a conversation that mistral-common accepts for `version`."""
    number = int(version[1:])

    def text(empty: bool = True) -> str:
        found = "".join(rng.choice(texts) for _ in range(rng.choice([1, 1, 1, 2])))
        return found if found or empty else "ok"

    def content(kinds: list[str], empty: bool = True):
        if rng.random() < 0.5:
            return text(empty)
        parts = []
        for kind in rng.choices(kinds, k=rng.randint(1, 4)):
            if kind == "text":
                parts.append({"type": "text", "text": text(empty)})
            elif kind == "thinking":
                parts.append({"type": "thinking", "thinking": text()})
            else:
                url = png(rng.randint(1, 150), rng.randint(1, 90))
                parts.append({"type": "image_url", "image_url": {"url": url} if rng.random() < 0.7 else url})
        return parts

    def system() -> dict:
        return {"role": "system", "content": content(["text", "thinking"] if number == 13 else ["text"])}

    def user() -> dict:
        return {"role": "user", "content": content(["text", "image"] if images else ["text"])}

    def call_ids(count: int) -> list[str]:
        if number >= 13 and rng.random() < 0.5:
            return [f"call_{rng.randrange(10**6)}-{i}" for i in range(count)]
        return ["".join(rng.choices("abcXYZ0123456789", k=9)) for _ in range(count)]

    def call(call_id: str) -> dict:
        arguments = rng.choice([*JSON_TEXTS, {"city": "Zürich", "n": [1, {"b": 2.5}]}, {}, None])
        return {"id": call_id, "function": {"name": rng.choice(["get_weather", "x", "a-b_9"]), "arguments": arguments}}

    def answer() -> list[dict]:
        """Assistant messages, perhaps with tool calls and results before them."""
        out = []
        while rng.random() < 0.4:
            ids = call_ids(rng.randint(1, 3))
            message = {"role": "assistant", "tool_calls": [call(i) for i in ids]}
            if number >= 7 and rng.random() < 0.5:
                message["content"] = content(["text", "thinking"] if number >= 13 else ["text"])
            elif rng.random() < 0.5:
                message["content"] = rng.choice([None, ""])
            out.append(message)
            rng.shuffle(ids)
            for call_id in ids:
                result = {"role": "tool", "tool_call_id": call_id}
                if rng.random() < 0.5:
                    result["content"] = rng.choice(JSON_TEXTS)
                else:
                    result["content"] = content(["text", "image"] if images and number >= 15 else ["text"])
                if rng.random() < 0.3:
                    result["name"] = "get_weather"
                out.append(result)
        for _ in range(rng.choice([1, 1, 1, 2])):
            message = {"role": "assistant", "content": content(["text"], empty=False)}
            if number >= 13 and rng.random() < 0.4:
                if rng.random() < 0.7:
                    message["content"] = [{"type": "thinking", "thinking": text()}, {"type": "text", "text": text()}]
                else:
                    message[rng.choice(["reasoning", "reasoning_content"])] = text()
            out.append(message)
        return out

    messages = [system() for _ in range(rng.choice([0, 1, 1, 2]))]
    if rng.random() < 0.1:
        messages.append({"role": "assistant", "content": text(empty=False)})
    turns = rng.randint(1, 4)
    for turn in range(turns):
        messages += [user() for _ in range(rng.choice([1, 1, 1, 2]))]
        if rng.random() < 0.15:
            messages += [system(), user()]
        if turn < turns - 1 or training:
            messages += answer()
    if not training:
        end = rng.random()
        if end < 0.25:
            messages += answer()
            while messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
                messages.pop()
        elif end < 0.4:
            messages.append({"role": "assistant", "content": text(empty=False), "prefix": True})
    return {
        "messages": messages,
        "tools": rng.choice([None, [], TOOLS, TOOLS[:1]]),
        "reasoning_effort": rng.choice([None, "none", "high"]) if version == "v15" else None,
        "training": training,
    }


def oracle(tokenizer, chat: dict) -> list[int]:
    """The ids by mistral-common: `tokenizer` is a MistralTokenizer (made in finetuning mode for training chats)."""
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    request = ChatCompletionRequest.from_openai(
        messages=json.loads(json.dumps(chat["messages"])),
        tools=chat["tools"],
        continue_final_message=chat["messages"][-1].get("prefix", False),
        reasoning_effort=chat["reasoning_effort"],
    )
    return tokenizer.encode_chat_completion(request).tokens
