"""A person at a terminal: a program on a pseudo-terminal, what it shows, and the keys that are pressed.

    python examples/terminal.py

chats with the small model about its picture, and prints what the terminal showed: README's recording.
"""

import os
import pty
import re
import select
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PICTURE = "examples/tiny/picture.png"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TERM": "xterm"}
LINES = (  # what is typed
    "Which shape is topmost?",
    "And what is below it?",
    "/effort high",
    "How many circles are there, plus two?",
    "/exit",
)


class Terminal:
    """`python program …`, or under torchrun, in a new session with a terminal of its own."""

    def __init__(self, program: str, *arguments, home, ranks: int = 1):
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [os.path.join(ROOT, program), *map(str, arguments)]
        self.shown, self.at = "", 0  # all that was shown, and how much of it `see` has found
        self.pid, self.keyboard = pty.fork()
        if self.pid == 0:
            os.environ.update({**ENVIRONMENT, "HOME": str(home)})
            os.execv(sys.executable, command)

    def see(self, words: str, seconds: float = 60) -> str:
        """Wait until `words` are shown; returns what was shown since the last time, with them."""
        deadline = time.monotonic() + seconds
        while words not in self.shown[self.at :]:
            assert time.monotonic() < deadline and self.listen(), f"no {words!r} in {self.shown[self.at :]!r}"
        before, self.at = self.at, self.shown.index(words, self.at) + len(words)
        return self.shown[before : self.at]

    def listen(self) -> bool:
        """Take what is shown within a second; False at the end."""
        if not select.select([self.keyboard], [], [], 1)[0]:
            return True
        try:
            new = os.read(self.keyboard, 65536)
        except OSError:  # Linux's way of saying that nobody holds the other end
            new = b""
        self.shown += new.decode(errors="replace")
        return bool(new)

    def press(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())

    def say(self, line: str, end: str = "\r") -> None:
        """At the next prompt."""
        self.see("\n> ")
        self.press(f"{line}{end}")

    def end(self, seconds: float = 60) -> int:
        """The exit status, once nothing more is shown."""
        deadline = time.monotonic() + seconds
        while self.listen():
            assert time.monotonic() < deadline, f"it goes on after {self.shown[self.at :]!r}"
        os.close(self.keyboard)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def record() -> str:
    """The session as text, without colours and the terminal's other signs."""
    arguments = ("--image", PICTURE, "--draft", "examples/tiny/draft", "--temperature", "0")
    with tempfile.TemporaryDirectory() as home:
        terminal = Terminal("generate.py", *arguments, home=home)
        for line in LINES:
            terminal.say(line)
        if terminal.end() != 0:
            raise SystemExit(terminal.shown)
    shown = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", terminal.shown).split("\r\n")
    kept = [line.split("\r")[-1].rstrip() for line in shown]
    return "\n".join(["$ " + " ".join(("python generate.py", *arguments)), *kept]).strip() + "\n"


if __name__ == "__main__":
    os.chdir(ROOT)
    print(record(), end="")
