"""Drive a headless browser over a pair of pipes: render a page as users see it, and record its requests."""

import base64
import json
import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--remote-debugging-pipe", "--hide-scrollbars"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
# The browser reads from descriptor 3 and writes to 4, whatever the pipes' numbers are in this process.
LAUNCH = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3])
os.dup2(read, 3), os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser():
    """Return the path of an installed browser, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page in a browser with a fresh profile."""

    def __init__(self, program, profile):
        theirs, self.write = os.pipe()
        self.read, back = os.pipe()
        command = [sys.executable, "-c", LAUNCH, str(theirs), str(back), program, *FLAGS]
        self.process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs, back),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(back)
        self.buffer, self.count, self.session, self.events = b"", 0, None, []
        targets = self("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        """Call a protocol method and wait for its result; keep the events received meanwhile."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self._next_message()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next_message(self):
        while b"\0" not in self.buffer:
            more = os.read(self.read, 1 << 16)
            assert more, f"the browser exited: {self.process.wait()}"
            self.buffer += more
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path, width, scheme="light"):
        """Load a file in a window of this width, and wait until it is complete."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self("Emulation.setDeviceMetricsOverride", **metrics)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next_message())

    def value(self, expression):
        """Evaluate an expression in the page."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    @property
    def requests(self):
        """URLs requested since the page was opened, without those that the page's policy blocked."""
        events = [(event.get("method"), event.get("params", {})) for event in self.events]
        blocked = {
            params["requestId"]
            for method, params in events
            if method == "Network.loadingFailed" and "blockedReason" in params
        }
        sent = [params for method, params in events if method == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent if params["requestId"] not in blocked]

    @property
    def complaints(self):
        """Messages in the browser's log."""
        return [e["params"]["entry"]["text"] for e in self.events if e.get("method") == "Log.entryAdded"]

    def screenshot(self, width, height):
        """Return the top of the page as the bytes of a PNG."""
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        return base64.b64decode(self("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"])

    def close(self):
        self.session = None
        self("Browser.close")
        self.process.wait(10)
        os.close(self.read)
        os.close(self.write)
