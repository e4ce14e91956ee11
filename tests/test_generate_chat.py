"""The chat of generate.py: over a pipe, in a pseudo-terminal, and on several ranks."""

import argparse
import json
import os
import re
import shutil
import signal
import sys
import termios
import time

import pytest
from helpers import answers
from PIL import Image
from processes import run
from terminal import ENVIRONMENT, Terminal

import generate
from parallel import Place
from runtime import chat, requests
from runtime.terminal import Keyboard, stream

PASTE = "\x1b[200~{}\x1b[201~"
ENDLESS = ("--temperature", 90, "--seed", 0)  # tokens at random, and with this seed a thousand without </s>


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """What the session was asked, request by request."""
    asked, read = [], requests.RequestReader.read

    def record(self, spec, *more):
        asked.append(spec)
        return read(self, spec, *more)

    monkeypatch.setattr(requests.RequestReader, "read", record)
    return asked


def lines(*typed: str) -> str:
    return "\n".join(typed) + "\n"


def errors(err: str) -> list[str]:
    assert "Traceback" not in err
    return [line for line in err.splitlines() if line.startswith("error")]


# ----------------------------------------------------------------------------------------------- over a pipe


def test_a_conversation(ckpt, program):
    """Commands, history, and the same answers as asked alone."""
    common = ("--ckpt", ckpt, "--dtype", "float32", "--max-new-tokens", "6")
    typed = ["the one", "/clear", "the one", "/system Be brief.", "/effort none", "", "/nonsense", "/clear", "the one"]
    status, out, err = run("generate.py", *common, "--interactive", stdin=lines(*typed, "/exit", "never asked"))
    assert status == 0 and errors(err) == [
        "error: no such command: /nonsense; /help lists them, and after a space it is text"
    ]
    plain = program(*common, "--prompt", "the one")[1]
    system = program(*common, "--prompt", "the one", "--system", "Be brief.")[1]
    assert plain != system
    assert out == plain + plain + system


def test_history_and_mistakes(ckpt, program, asked):
    """History reaches the model; what cannot be answered is said, and the chat goes on."""
    long = "word " * 700
    typed = ["one", long, "two", "/effort high", "three", "/effort absurd", "four", "/effort", "/clear", "five"]
    status, out, err = program("--ckpt", ckpt, "--interactive", "--max-new-tokens", 2, stdin=lines(*typed))
    assert status == 0  # at the end of the input
    roles = [[m["role"] for m in spec["messages"]] for spec in asked]
    pair = ["user", "assistant"]
    assert roles[:2] == [["user"], [*pair, "user"]] and roles[2] == [*pair, "user"]
    assert roles[3] == [*pair, *pair, "user"]
    assert asked[-1]["messages"] == [{"role": "user", "content": "five"}]
    said = errors(err)
    assert len(said) == 2 and "context" in said[0] and "knows none, high" in said[1]
    assert asked[3]["reasoning_effort"] == asked[4]["reasoning_effort"] == "high"
    assert asked[-1]["reasoning_effort"] is None


def test_settings(ckpt, program, asked):
    typed = ["/set temperature 0.5", "/set top-p 0.9", "/set max-new-tokens 3", "/set seed 7", "a", "/set seed", "a"]
    wrong = ["/set", "/set temperature hot", "/set top-p 3", "/set colour red"]
    status, _, err = program("--ckpt", ckpt, "--interactive", "--max-new-tokens", 2, stdin=lines(*typed, *wrong, "b"))
    chosen = [{name: spec.get(name) for name in requests.NUMBERS} for spec in asked]
    assert chosen[0] == {"max_new_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 7}
    assert chosen[1] == chosen[2] == {**chosen[0], "seed": None}
    said = errors(err)
    assert status == 0 and len(said) == 3 and "hot" in said[0] and "top-p" in said[1] and "colour" in said[2]
    assert "\nmax-new-tokens 3, temperature 0.5, top-p 0.9\n" in err and "\nseed by default\n" in err


def test_cut_and_empty_answers(ckpt, program, asked):
    """They say so, and the next message is answered all the same."""
    typed = ["/set max-new-tokens 0", "one", "/set max-new-tokens 2", "two", "/set max-new-tokens", "three", "four"]
    status, _, err = program("--ckpt", ckpt, "--interactive", "--max-context", 60, *ENDLESS, stdin=lines(*typed))
    assert status == 0 and "no answer, 0 tokens" in err and "cut off by max-new-tokens (/set), 2 tokens" in err
    assert "cut off where the context ends (/undo and /clear make room)" in err and "context 60 of 60" in err
    assert [m["content"] for m in asked[1]["messages"]] == ["one", "two"]
    assert len(errors(err)) == 1 and "60" in errors(err)[0]  # the fourth: nothing more fits


def test_undo_and_retry(ckpt, program, asked):
    typed = ["/undo", "/retry", "one", "two", "/retry", "/undo", "three"]
    status, _, err = program("--ckpt", ckpt, "--interactive", "--max-new-tokens", 2, stdin=lines(*typed))
    assert status == 0 and errors(err) == 2 * ["error: nothing was said yet"]
    said = [[m["content"] for m in spec["messages"] if m["role"] == "user"] for spec in asked]
    assert said == [["one"], ["one", "two"], ["one", "two"], ["one", "three"]]
    assert asked[2]["messages"] == asked[1]["messages"] and asked[2]["seed"] != asked[1].get("seed")


def test_help(ckpt, program, asked):
    """Every command with what it does, at 80 columns; what begins with a word of the library is a message."""
    status, _, err = program("--ckpt", ckpt, "--interactive", "--max-new-tokens", 1, stdin=lines("/help", "EOF", "?"))
    names = "image effort system tools set show retry undo clear tool save load help exit".split()
    assert status == 0 and not errors(err) and max(map(len, err.splitlines())) <= 80
    assert all(re.search(f"^/{name} .* {{2,}}[a-z]", err, flags=re.M) for name in names), err
    assert [spec["messages"][-1]["content"] for spec in asked] == ["EOF", "?"]


def test_blocks(ckpt, program, asked):
    typed = ['"""', "/clear", "", "  x", '"""', '"""one"""', '"""a', 'b"""', " /clear"]
    status, _, err = program("--ckpt", ckpt, "--interactive", "--max-new-tokens", 1, stdin=lines(*typed))
    assert status == 0 and not errors(err)
    said = [spec["messages"][-1]["content"] for spec in asked]
    assert said == ["/clear\n\n  x", "one", "a\nb", " /clear"]


CALLS = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": "cut {"}]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "what is"}, {"type": "image_url", "image_url": "a b.png"}]},
]


def save(path, **spec) -> str:
    path.write_text(json.dumps({"messages": CHAT, **spec}) + "\n")
    return str(path)


@pytest.fixture
def seeing(tmp_path) -> str:
    """The small checkpoint of the repository, and a picture whose name has a space."""
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a b.png")
    return generate.TINY


def test_tools(seeing, program, asked, tmp_path):
    """Calls are answered one after the other; a message leaves out those that are not."""
    answer = {"role": "assistant", "content": "", "tool_calls": CALLS}
    path = save(tmp_path / "c.jsonl", answer=answer)
    typed = ["/tool 3", f"/load {path}", "/tool 4", "/tool 5", f"/load {path}", "never mind"]
    status, _, err = program("--interactive", "--ckpt", seeing, "--max-new-tokens", 1, stdin=lines(*typed))
    assert status == 0 and errors(err) == ["error: no tool call waits for a result"]
    first, second = (spec["messages"] for spec in asked if spec["where"] == "this turn")
    assert [m["role"] for m in first] == ["system", "user", "assistant", "tool", "tool"]
    assert [m["content"] for m in first[-2:]] == ["4", "5"] and "are left out" in err
    assert [m["role"] for m in second] == ["system", "user", "user"]


def test_other_peoples_files(seeing, program, asked, tmp_path):
    """What clients leave out is no stumbling block, and what is no conversation is refused."""
    calls = [{"id": "abc", "function": {"name": "f", "arguments": "{}"}}]
    messages = [
        *CHAT,
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "3", "tool_call_id": "abc"},
    ]
    wrong = ({"content": ["b"]}, {"content": "b", "tool_calls": 7}, {"content": {}}, {"role": "user", "content": "b"})
    good = save(tmp_path / "good.jsonl", messages=messages, answer={"role": "assistant", "tool_calls": calls})
    bad = [
        save(tmp_path / f"{i}.jsonl", **more) for i, more in enumerate(({"messages": []}, {"raw": "x"}, {"seed": "x"}))
    ]
    bad += [save(tmp_path / f"a{i}.jsonl", answer={"role": "assistant", **more}) for i, more in enumerate(wrong)]
    typed = [f"/load {good}", "/tool 4", f"/load {save(tmp_path / 'odd.jsonl', answer={})}", "/retry", "/load"]
    typed += [f"/load {path}" for path in bad]
    status, _, err = program("--interactive", "--ckpt", seeing, "--max-new-tokens", 1, stdin=lines(*typed))
    assert status == 0 and len(errors(err)) == 8, err
    assert all(path in said for path, said in zip(bad, errors(err)[1:])), err
    first, second = (spec["messages"] for spec in asked if spec["where"] == "this turn")
    assert [m["role"] for m in first[2:]] == ["assistant", "tool", "assistant", "tool"]
    assert first[-1]["tool_call_id"] == "abc" and [m["role"] for m in second] == ["system", "user"]


def test_what_has_no_utf8_form(seeing, program, tmp_path):
    """A lone surrogate in a file of somebody else's is saved as it was read: as its escape in JSON."""
    odd = [{"id": "abc", "type": "\ud800", "function": {"name": "f", "arguments": "{}"}}]
    path = save(tmp_path / "odd.jsonl", answer={"role": "assistant", "content": "", "tool_calls": odd})
    typed = [f"/load {path}", f"/save {tmp_path}/again.jsonl"]
    status, _, err = program("--interactive", "--ckpt", seeing, stdin=lines(*typed))
    assert status == 0 and not errors(err), err
    assert json.loads((tmp_path / "again.jsonl").read_text())["answer"]["tool_calls"] == odd


def test_files(seeing, program, asked, tmp_path, monkeypatch):
    """What /save writes, --requests answers, and /load reads again; nothing is overwritten."""
    monkeypatch.chdir(tmp_path)
    common = ("--ckpt", seeing, "--max-new-tokens", 4, "--dtype", "float32")
    typed = ["/save x.jsonl", "/system Be brief.", "/image a b.png", "what?", "/save chat.jsonl", "/save chat.jsonl"]
    more = ["/clear", "/system", "/load chat.jsonl", "/retry", "/load none.jsonl"]
    status, out, err = program("--interactive", *common, "--seed", 5, stdin=lines(*typed, *more))
    said = errors(err)
    assert status == 0 and len(said) == 3 and "once something was said" in said[0] and "File exists" in said[1]
    assert "none.jsonl" in said[2] and os.listdir(tmp_path).count("x.jsonl") == 0
    spec = json.loads((tmp_path / "chat.jsonl").read_text())
    assert spec["messages"][1]["content"][0]["image_url"]["url"] == str(tmp_path / "a b.png")
    assert (spec["seed"], spec["max_new_tokens"]) == (5, 4) and spec["answer"]["content"] == out.splitlines()[0]
    assert asked[-1]["messages"] == asked[0]["messages"] and out.splitlines()[0] == out.splitlines()[1]
    (answer,) = answers(program(*common, "--requests", tmp_path / "chat.jsonl", "--json"))
    assert answer["text"] == spec["answer"]["content"]


def test_names_that_no_file_has(seeing, program, tmp_path):
    typed = ["one", "/save a\0b", "/save ~a\0b", "/load ~a\0b", "/image ~a\0b", f"/save {tmp_path}/x.jsonl"]
    status, _, err = program("--interactive", "--ckpt", seeing, "--max-new-tokens", 1, stdin=lines(*typed))
    assert status == 0 and len(errors(err)) == 4 and (tmp_path / "x.jsonl").exists(), err
    assert err.count("zero byte") == 4 and ", 1 token, " in err


TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in "fg"]


def test_tools_from_a_file(seeing, program, asked, tmp_path, monkeypatch):
    """For the question, and for the chat, where another file or none may follow. Mistakes are one line."""
    monkeypatch.chdir(tmp_path)
    for name, tools in (("one", TOOLS[:1]), ("two", TOOLS), ("no", {}), ("bad", [{"type": "function"}])):
        (tmp_path / f"{name}.json").write_text(json.dumps(tools))
    common = ("--ckpt", seeing, "--max-new-tokens", 1)
    assert program(*common, "what?", "--tools", "two.json")[0] == 0
    typed = [
        "what?",
        "/tools two.json",
        "what?",
        "/tools no.json",
        "/tools bad.json",
        "/tools none.json",
        "/tools",
        "what?",
    ]
    status, _, err = program(*common, "--interactive", "--tools", "one.json", stdin=lines(*typed))
    assert status == 0 and [spec["tools"] for spec in asked] == [TOOLS, TOOLS[:1], TOOLS, None]
    said = errors(err)
    assert len(said) == 3 and all(f"{name}.json" in line for name, line in zip(("no", "bad", "none"), said))
    assert "\ntools: f, g\n" in err and "\ntools: none\n" in err and err.startswith("tools: f\n")
    for more in (["what?"], ["--interactive"], ["--raw", "what?"], ["--requests", "x.jsonl"]):
        name = "no.json" if more[0] in ("what?", "--interactive") else "one.json"
        status, _, err = program(*common, *more, "--tools", name)
        assert status == 2 and err.count("\n") == 1 and ("list" in err or "--tools" in err)


def test_what_load_brings_and_clear_forgets(seeing, program, asked, tmp_path):
    """/load says what it changes; /clear takes that back, and leaves what was set before and after; /show shows all."""
    path = save(tmp_path / "c.jsonl", tools=TOOLS, temperature=0.5, reasoning_effort="high", stop="x")
    picture = tmp_path / "a b.png"
    typed = ["/set seed 3", "/system Mine.", f"/load {path}", f"/image {picture}", "/set top-p 0.5", "/set", "/show"]
    typed += ["/retry", f"/save {tmp_path}/d.jsonl", "/clear", "/show", "x", f"/load {tmp_path}/d.jsonl", "/bye"]
    status, _, err = program("--interactive", "--ckpt", seeing, "--max-new-tokens", 1, stdin=lines(*typed, "never"))
    assert status == 0 and not errors(err), err
    changes = ["tools: f, g", "temperature 0.5", "reasoning effort high", "stop x", "system prompt: Be brief."]
    said = err[err.index(f"\n{path}:") + 1 :].splitlines()
    assert said[0] == f"{path}: 1 message; /retry answers the last"
    assert sorted(said[1:7]) == sorted([*changes, "seed by default"])
    at = said.index("max-new-tokens 1, temperature 0.5, top-p 0.5")
    shown, after = said[at + 1 : at + 12], err[err.index("forgotten") :].splitlines()
    assert {*changes, f"picture for the next message: {picture}"} <= set(shown), shown
    assert "user: what is" in shown and f"[picture {tmp_path}/a b.png]" in shown
    assert {"system prompt: Mine.", "tools: none", "seed 3", "top-p 0.5"} <= set(after) and "user: what is" not in after
    retried, x = (spec for spec in asked if spec["where"] == "this turn")
    assert (retried["tools"], retried["temperature"]) == (TOOLS, 0.5)
    assert x["messages"][0]["content"] == "Mine." and x["tools"] is None and x["temperature"] is None
    assert (x["seed"], x["top_p"]) == (3, 0.5) and "stop" not in x
    assert json.loads((tmp_path / "d.jsonl").read_text())["tools"] == TOOLS


def test_other_names(ckpt, program):
    for typed in ("/quit", "/bye", "/exit now", "/exit\tnow"):
        status, out, err = program("--ckpt", ckpt, "--interactive", stdin=lines("/?", typed, "never asked"))
        assert status == 0 and not errors(err) and out == "" and "\n/undo " in err


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_long_prompt_is_interrupted(chunks, ckpt, program, asked, monkeypatch):
    """Ctrl-C ends it at the next chunk; the chat goes on as if its part that is in the cache were none."""
    common = ("--ckpt", ckpt, "--interactive", "--dtype", "float32", "--max-new-tokens", 4)
    long, run, ran = "word" + " word" * 40, generate.Engine.prefill_chunk, []
    monkeypatch.setattr(generate, "CPU_CHUNK", 24)
    plain = program(*common, stdin=lines('"""' + long, "", 'and?"""'))[1]

    def prefill_chunk(*arguments):
        ran.append(1)
        return run(*arguments)

    monkeypatch.setattr(generate.Engine, "prefill_chunk", prefill_chunk)
    asked.clear()
    monkeypatch.setattr(Keyboard, "stop", lambda self: len(asked) == 1 and len(ran) == chunks)
    status, out, err = program(*common, stdin=lines(long, "and?"))
    assert status == 0 and not errors(err) and "stopped, no answer, 0 tokens" in err
    assert out == "\n" + plain and len(ran) > chunks


def test_pictures(seeing, program, asked, tmp_path, monkeypatch):
    """A picture is looked at when it is named, however a shell or a file manager writes its name."""
    shutil.copy(tmp_path / "a b.png", tmp_path / "c.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [
        str(tmp_path / "a b.png"),
        f"'{tmp_path}/a b.png'",
        f'"{tmp_path}/a b.png"',
        f"{tmp_path}/a\\ b.png",
        "~/c.png",
    ]
    typed = [f"/image {name}" for name in names] + [
        "what?",
        "/image none.png",
        "and now?",
        "/image ~/c.png",
        "/image",
        "x",
    ]
    status, _, err = program("--interactive", "--ckpt", seeing, "--max-new-tokens", 1, stdin=lines(*typed))
    assert status == 0 and len(errors(err)) == 1 and "none.png" in errors(err)[0]
    urls = [[chat.image_url(part) for part in m["content"]] for m in asked[0]["messages"]]
    assert urls == [[*4 * [str(tmp_path / "a b.png")], str(tmp_path / "c.png"), None]]
    assert err.count("60 × 40 pixels, 6 tokens") == 6
    assert [type(m["content"]) for m in asked[-1]["messages"]] == [list, str, str, str, str]


def test_a_picture_on_the_command_line(seeing, program, asked, tmp_path):
    path = tmp_path / "a b.png"
    status, _, err = program("--ckpt", seeing, "--interactive", "--image", path, stdin="what?\n")
    assert status == 0 and chat.image_url(asked[0]["messages"][0]["content"][0]) == str(path)
    name = os.path.relpath(path)  # shown as it was given
    assert program("--ckpt", seeing, "--interactive", "--image", name)[2].startswith(f"{name}: 60 × 40 pixels")
    status, out, err = program("--ckpt", seeing, "--interactive", "--image", "none.png", stdin="what?\n")
    assert status == 2 and err.count("\n") == 1 and "none.png" in err


# --------------------------------------------------------------------------------------------- in a terminal


def test_nothing_ends_a_chat(ckpt, tmp_path, monkeypatch):
    """Neither what stands in the history file, nor a name that the locale cannot write, to save under or to recall."""
    for name, value in (("LC_ALL", "C"), ("PYTHONUTF8", "0"), ("PYTHONCOERCECLOCALE", "0")):
        monkeypatch.setenv(name, value)
    (tmp_path / ".mistral_history").write_bytes(b'"first"\n7\n{"a": \n["b"]\n"\xff"\n"\\u00e9\\u0000"\n' + b"[" * 10**5)
    chat = Terminal("generate.py", "--ckpt", ckpt, "--max-new-tokens", 1, home=tmp_path)
    chat.say("\x1b[A")
    chat.see("1 token,")
    chat.say(f"/save {tmp_path}/\u00e9.jsonl")
    chat.see("locale")
    chat.say(f"/save {tmp_path}/e.jsonl")
    chat.see("2 messages")
    chat.say("/exit")
    assert chat.end() == 0, chat.shown
    assert json.loads((tmp_path / "e.jsonl").read_text())["messages"] == [{"role": "user", "content": "first"}]


@pytest.mark.parametrize("ranks", [1, 2])
def test_in_a_terminal(ranks, ckpt, tmp_path):
    """Editing, a pasted block, Ctrl-C in an answer and at a prompt, alone and under torchrun."""
    chat = Terminal("generate.py", "--ckpt", ckpt, "--dtype", "float32", *ENDLESS, home=tmp_path, ranks=ranks)
    chat.say("/set max-new-tokens 2")
    chat.say("tha\x1b[D\x7fo")  # left, backspace: "toa"
    chat.see("2 tokens")
    assert "\x1b[?2004h" in chat.shown  # asks the terminal to put brackets around what is pasted
    chat.say(PASTE.format("first line\nsecond line"))
    chat.see("2 tokens")
    chat.say("/set max-new-tokens")
    chat.say("go on")
    time.sleep(0.1)
    chat.press("\x03")
    chat.see("stopped, ")
    chat.say("\x03", end="")
    chat.see("Ctrl-C again ends the chat")
    chat.say(f"/save {tmp_path}/chat.jsonl")
    chat.say("\x03", end="")
    chat.say("/set max-new-tokens 1")  # one press is forgotten
    chat.say("\x03", end="")
    chat.say("\x03", end="")
    assert chat.end() == 0, chat.shown
    spec = json.loads((tmp_path / "chat.jsonl").read_text())
    said = [message["content"] for message in spec["messages"] if message["role"] == "user"]
    assert said == ["toa", "first line\nsecond line", "go on"]
    assert [len(spec["messages"]), spec["answer"]["role"]] == [5, "assistant"] and spec["answer"]["content"]
    history = [json.loads(line) for line in (tmp_path / ".mistral_history").read_text().splitlines()]
    assert history[1:3] == ["toa", "first line\nsecond line"]
    again = Terminal("generate.py", "--ckpt", ckpt, "--max-new-tokens", 1, home=tmp_path)  # history over sessions
    again.say("\x1b[A")
    again.see("1 token" if history[-1][0] != "/" else "max-new-tokens 1")
    again.say("\x04", end="")
    again.end()


def test_the_line_is_empty_again(ckpt, tmp_path):
    """After a turn that fails, and after /undo. Up recalls the turn, to be mended; and Tab completes."""
    (tmp_path / "a b.jsonl").mkdir()
    chat = Terminal(
        "generate.py", "--ckpt", ckpt, "--max-context", 40, "--max-new-tokens", 1, "--temperature", 0, home=tmp_path
    )
    chat.say("/efort high")
    chat.see("no such command: /efort")
    chat.say("hello")
    chat.see("1 token, ")
    chat.say("\x1b[A\x1b[A\x01\x1b[C\x1b[C\x1b[Cf")  # twice up, and an f after the first three characters
    chat.see("reasoning effort high")
    chat.say('"""' + "long " * 30)
    chat.see("... ")
    chat.press('end"""\r')
    chat.see("more than the context of 40; shorten it (in a chat: /undo, /clear)")
    chat.say("/un\t")
    chat.see("Up recalls it: hello")
    chat.say("/sav\t~/a\tx")
    chat.see("once something was said")
    chat.say("\x1b[A\x1b[A\x1b[A")  # /save, what was taken back, /undo
    chat.see("nothing was said yet")
    chat.say("\x1b[A\x1b[A\x1b[A")  # the same one later: what was taken back
    chat.see("1 token, ")
    chat.say("/save ~/a\tx")
    chat.see("2 messages")
    chat.say("/exit now")
    assert chat.end() == 0, chat.shown
    (question,) = json.loads((tmp_path / "a b.jsonl" / "x").read_text())["messages"]
    assert question["content"] == "hello"


def test_a_history_that_is_a_pipe(ckpt, tmp_path):
    """Neither its reading nor its writing waits for somebody at the other end."""
    os.mkfifo(tmp_path / ".mistral_history")
    chat = Terminal("generate.py", "--ckpt", ckpt, "--max-new-tokens", 1, home=tmp_path)
    chat.say("hello")
    chat.see("1 token, ", 20)
    chat.say("/exit")
    assert chat.end() == 0


COLOUR = re.compile(r"\x1b\[[\d;]*m")


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb"), ("NO_COLOR", "")])
def test_a_terminal_without_escape_codes(name, value, ckpt, tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, name, value)
    chat = Terminal("generate.py", "--ckpt", ckpt, "--max-new-tokens", 1, home=tmp_path)
    chat.say("hello")
    chat.say("/system a\x16\x1b[2Jb")  # Ctrl-V quotes the escape
    chat.see("system prompt: a\\x1b[2Jb")
    chat.say("/exit")
    assert chat.end() == 0
    assert bool(COLOUR.search(chat.shown)) == (not value) and ("\x1b" in chat.shown) == (value != "dumb")


def test_control_characters(ckpt, program, monkeypatch, capsys):
    """Of an answer: escapes in a terminal; into a pipe and in JSON as they are."""
    text = "a\tb\n\x1b]0;x\x07\r\x7f\x9b2Jé\u200d"
    session = argparse.Namespace(place=Place())

    def answer(specs, show, stop):
        show(0, "reasoning", text)
        show(0, "text", text)
        return [{"tool_calls": [{"x": text}]}]

    session.answer = answer
    for terminal in (True, False):
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(getattr(sys, name), "isatty", lambda terminal=terminal: terminal)
        stream(session, {})
        out, err = capsys.readouterr()
        shown = r"\x1b]0;x\x07\r\x7f\x9b2Jé" + "\u200d" if terminal else text[4:]
        assert out.startswith(f"a\tb\n{shown}\n") and f"a\tb\n{shown}" in err
        assert ("\x7f" in out) == (not terminal)


def test_the_terminal_is_given_back(ckpt, tmp_path):
    """Also when a rank dies, which ends the others at once: the shell's Ctrl-C has to work again."""
    chat = Terminal("generate.py", "--ckpt", ckpt, home=tmp_path, ranks=2)
    before = termios.tcgetattr(chat.keyboard)[6][termios.VINTR]
    chat.see("\n> ")
    assert before == b"\x03" and termios.tcgetattr(chat.keyboard)[6][termios.VINTR] == b"\x00"
    with open(f"/proc/{chat.pid}/task/{chat.pid}/children") as file:
        ranks = [int(pid) for pid in file.read().split()]
    os.kill(ranks[1], signal.SIGKILL)
    chat.see("error: ")  # rank 0's: that the other was killed, or that torchrun stopped it, whichever it heard first
    while chat.listen():
        pass
    assert termios.tcgetattr(chat.keyboard)[6][termios.VINTR] == before
    assert chat.end() == 1


def test_a_signal_ends_the_answer_alone(ckpt, tmp_path):
    """Launchers other than torchrun send SIGINT to the ranks."""
    chat = Terminal("generate.py", "--ckpt", ckpt, *ENDLESS, home=tmp_path)
    chat.say("go on")
    time.sleep(0.3)
    os.kill(chat.pid, signal.SIGINT)
    chat.see("stopped")
    chat.see("\n> ")
    time.sleep(0.5)
    os.kill(chat.pid, signal.SIGINT)
    chat.see("Ctrl-C again")
    chat.say("/exit")
    assert chat.end() == 0
