"""A headless Chromium for tests, driven over its DevTools protocol with the standard library alone."""

import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PROGRAM = next(filter(None, map(shutil.which, PROGRAMS)), None)  # None: not installed
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions", "--hide-scrollbars")
# Chromium reads commands from file descriptor 3 and writes to 4 (--remote-debugging-pipe).
LAUNCHER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
TIMEOUT = 60.0


class Browser:
    """One page. `events` are the protocol's messages so far: requests, log entries, exceptions."""

    def __init__(self, profile: Path):
        reads, self.writer = high_pipe()
        self.reader, writes = high_pipe()
        arguments = [PROGRAM, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        launch = [sys.executable, "-c", LAUNCHER, str(reads), str(writes), *arguments]
        self.process = subprocess.Popen(launch, pass_fds=(reads, writes), stderr=subprocess.DEVNULL)
        os.close(reads)
        os.close(writes)
        self.buffer, self.number, self.session, self.events = b"", 0, None, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        """End the browser and its children."""
        self.session = None
        self.send("Browser.close")
        self.process.wait(TIMEOUT)
        os.close(self.writer)
        os.close(self.reader)

    def send(self, method: str, **params) -> dict:
        """One command of the protocol; its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def receive(self) -> dict:
        """The next message, up to its NUL byte."""
        while b"\0" not in self.buffer:
            assert select.select([self.reader], [], [], TIMEOUT)[0], "Chromium does not answer"
            chunk = os.read(self.reader, 1 << 16)
            assert chunk, "Chromium has ended"
            self.buffer += chunk
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def resize(self, width: int, height: int, dark: bool = False, still: bool = True) -> None:
        """The window, the colour scheme, and whether the reader prefers reduced motion."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        features = {"prefers-color-scheme": "dark" if dark else "light"}
        features["prefers-reduced-motion"] = "reduce" if still else "no-preference"
        named = [{"name": name, "value": value} for name, value in features.items()]
        self.send("Emulation.setEmulatedMedia", features=named)

    def open(self, url: str) -> None:
        """Load a page and wait until it is complete."""
        self.send("Page.navigate", url="about:blank")  # else a new fragment alone would load nothing
        self.events.clear()
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, expression: str):
        """The value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + TIMEOUT
        while not self.run(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)

    def press(self, key: str, ctrl: bool = False) -> None:
        """A key, such as " " or "ArrowRight"."""
        text = {"text": key} if len(key) == 1 and not ctrl else {}
        code = {"code": "Space" if key == " " else key, "modifiers": 2 * ctrl}
        codes = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35}
        code["windowsVirtualKeyCode"] = codes.get(key, 0)  # without one, text fields do not move
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **code, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    def insert(self, text: str) -> None:
        """Text at once, as if it were pasted or came from an input method."""
        self.send("Input.insertText", text=text)

    def point(self, selector: str, click: bool = False) -> None:
        """Move the mouse onto an element, and click on it if asked to."""
        self.run(f"document.querySelector('{selector}').scrollIntoView({{block: 'center'}})")
        box = self.run(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
                       f"(document.querySelector('{selector}').getBoundingClientRect())")  # fmt: skip
        where = {"x": box[0], "y": box[1]}
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **where)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)


def high_pipe() -> tuple[int, int]:
    """A pipe (reads, writes) whose descriptors are none that the launcher overwrites."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high
