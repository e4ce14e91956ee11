"""A person at a terminal: a program on a pseudo-terminal, what it shows, and the keys that are pressed."""

import os
import pty
import select
import sys
import time

from processes import ENVIRONMENT, ROOT, free_port


class Terminal:
    """`python program …`, or under torchrun, in a new session with a terminal of its own."""

    def __init__(self, program: str, *arguments, home, ranks: int = 1):
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
        command += [os.path.join(ROOT, program), *map(str, arguments)]
        self.shown, self.at = "", 0  # all that was shown, and how much of it `see` has found
        self.pid, self.keyboard = pty.fork()
        if self.pid == 0:
            os.environ.update({**ENVIRONMENT, "HOME": str(home), "TERM": "xterm"})
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
