"""A Chromium without a window, for tests. It is driven by its own protocol (DevTools) over the websocket
client that JupyterLab's server comes with, so that nothing but a browser has to be installed."""

import json
import os
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--headless=new", "--no-first-run", "--disable-dev-shm-usage", "--mute-audio", "--disable-gpu")
FLAGS += ("--autoplay-policy=no-user-gesture-required", "--remote-debugging-port=0")
PATIENCE = 180  # seconds; a busy machine with two cores


def find_browser():
    "Path of an installed Chromium or Chrome, or None."
    return next(filter(None, map(shutil.which, NAMES)), None)


def wait_for(ask, what, seconds=PATIENCE):
    "The first answer of `ask` that is true."
    end = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.2)
    return answer


@contextmanager
def running(command, log, **options):
    "A program as long as the block lasts."
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **options)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def chromium(folder):
    "A browser whose files are in `folder`: a function that opens a new page."
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and not os.geteuid() else []
    command = [find_browser(), *FLAGS, *root, f"--user-data-dir={folder / 'profile'}", "about:blank"]
    with running(command, folder / "browser.log", env=os.environ | {"HOME": str(folder)}):
        port = folder / "profile" / "DevToolsActivePort"
        number = wait_for(lambda: port.is_file() and port.read_text().split("\n")[0], "the browser", 60)
        yield lambda *args: Page(number, *args)


class Page:
    "A page of the browser; what it complains of is in `complaints`."

    def __init__(self, port, url, width=1280, height=900):
        from websocket import create_connection

        new = urllib.request.Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
        with urllib.request.urlopen(new) as answer:
            address = json.load(answer)["webSocketDebuggerUrl"]
        self.socket = create_connection(address, timeout=PATIENCE, suppress_origin=True)
        self.count, self.complaints = 0, []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.bringToFront")  # clocks of a page behind another one are slow
        self.call("Page.navigate", url=url)
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")

    def call(self, method, **params):
        "What the browser answers; its other messages are read for complaints."
        self.count += 1
        self.socket.send(json.dumps(dict(id=self.count, method=method, params=params)))
        while (said := json.loads(self.socket.recv())).get("id") != self.count:
            self._hear(said.get("method"), said.get("params", {}))
        assert "error" not in said, (method, said)
        return said["result"]

    def _hear(self, method, what):
        if method == "Runtime.exceptionThrown":
            details = what["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and what["type"] == "error":
            self.complaints.append(" ".join(str(part.get("value")) for part in what["args"]))
        elif method == "Log.entryAdded" and what["entry"]["level"] == "error":
            self.complaints.append(f"{what['entry']['text']} {what['entry'].get('url', '')}")

    def run(self, code):
        "The value of a JavaScript expression, as if a user had asked; a promise is waited for."
        options = dict(awaitPromise=True, returnByValue=True, userGesture=True)
        done = self.call("Runtime.evaluate", expression=code, **options)
        assert "exceptionDetails" not in done, (code, done)
        return done["result"].get("value")

    def wait(self, code, seconds=PATIENCE):
        "The first value of an expression that is true."
        return wait_for(lambda: self.run(code), code, seconds)

    def click(self, selector):
        self.wait(f"!!document.querySelector({selector!r})")
        self.run(f"document.querySelector({selector!r}).click()")

    def type(self, selector, text):
        "Put a text in the place of what a field has."
        self.run(f"(field => {{ field.focus(); field.select(); }})(document.querySelector({selector!r}))")
        self.call("Input.insertText", text=text)

    def press(self, key):
        "Press and release a key where the focus is."
        letter = dict(text=key) if len(key) == 1 else {}
        code = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40}.get(key) or ord(key.upper())
        for kind in ("keyDown", "keyUp"):
            more = letter if kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **more)

    def text(self, selector):
        "What is written in an element; nothing if it is not there."
        return self.run(f"(document.querySelector({selector!r}) || {{}}).textContent || ''")

    def says(self, selector, words):
        "Wait for these words in an element."
        wait_for(lambda: words in self.text(selector), f"{words!r} in {selector}")

    def plays(self, selector="audio"):
        "Whether each player decodes and advances; a list of (seconds, where it is, whether all is well)."
        return self.run(
            f"""(async () => {{
              const found = [];
              for (const sound of document.querySelectorAll({selector!r})) {{
                sound.preload = "auto"; await sound.play();
                for (let i = 0; i < 50 && sound.currentTime < 0.1; i++)
                  await new Promise(done => setTimeout(done, 100));
                found.push([sound.duration, sound.currentTime,
                  sound.duration > 0.2 && sound.currentTime >= 0.1 && !sound.error]);
                sound.pause();
              }}
              return found;
            }})()"""
        )

    def overflows(self):
        "Beginnings of the elements that reach beyond the right edge, if the page can be scrolled there."
        return self.run(
            """(() => { const width = document.documentElement.clientWidth;
              if (document.documentElement.scrollWidth <= width) return [];
              const beyond = part => part.getBoundingClientRect().right > width + 1;
              const parts = [...document.body.querySelectorAll("*")].filter(beyond);
              return parts.map(part => part.outerHTML.slice(0, 80));
            })()"""
        )
