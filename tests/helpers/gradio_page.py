"""The search page as a browser sees it, by the DevTools protocol."""

import itertools
import json
import os
import select
import shutil
import subprocess
import time

import pytest
from browser import EVIL, FLAGS
from forks import ROOT

CARD = "[...document.querySelectorAll('.card')]"
CARDS = CARD + """.map(card => ({ score: +card.querySelector('.score').textContent, name: card.querySelector('.id').textContent,
  captions: [...card.querySelectorAll('.caption')].map(line => line.textContent), parts: card.querySelector('.parts').textContent,
  images: [...card.querySelectorAll('img')].filter(image => image.naturalWidth).length,
  players: card.querySelectorAll('audio').length }))"""  # fmt: skip
NASTY = EVIL + " ${alert(3)} {{alert(4)}}"  # gradio's templates
APPLE = ROOT / "tests/sample/food/fruit/apple_red.png"


class Browser:
    """Chromium with one page, driven over two pipes by its DevTools protocol: JSON messages, a NUL after each."""

    def __init__(self, folder):
        theirs, self.out = os.pipe()
        self.into, back = os.pipe()
        command = [shutil.which("chromium") or pytest.fail("no chromium found: apt-get install chromium"), *FLAGS]
        command += ["--remote-debugging-pipe", f"--user-data-dir={folder}/profile", "about:blank"]
        shell = ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{back}', "-", *command]
        self.process = subprocess.Popen(shell, pass_fds=(theirs, back), stderr=subprocess.DEVNULL)
        os.close(theirs), os.close(back)
        self.numbers, self.rest, self.events, self.session = itertools.count(1), b"", [], {}
        pages = [one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Network", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        number = next(self.numbers)
        os.write(
            self.out, json.dumps({"id": number, "method": method, "params": params, **self.session}).encode() + b"\0"
        )
        while (message := self._message()).get("id") != number:
            self.events.append(message)
        assert "error" not in message, f"{method}: {message}"
        return message["result"]

    def _message(self):
        while b"\0" not in self.rest:
            assert select.select([self.into], [], [], 30)[0], "chromium says nothing"
            self.rest += os.read(self.into, 1 << 20) or pytest.fail("chromium is gone")
        one, _, self.rest = self.rest.partition(b"\0")
        return json.loads(one)

    def js(self, code):
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, code):
        end = time.monotonic() + 15
        while not self.js(code):
            assert time.monotonic() < end, f"never: {code}\n{self.js('document.body.innerText')}"
            time.sleep(0.03)

    def go(self, address, width=1280):
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url=address)
        self.until("document.readyState == 'complete' && !!document.querySelector('#words input')")

    def place(self, selector):
        return self.js(f"""(() => {{ const found = document.querySelector({json.dumps(selector)});
          found.scrollIntoView({{ block: "center" }}); const box = found.getBoundingClientRect();
          return {{ x: box.x + box.width / 2, y: box.y + box.height / 2 }}; }})()""")

    def click(self, selector, count=1):
        place = self.place(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=count, **place)

    def key(self, key, code):
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def slide(self, slider, end):
        """A slider by the keyboard to its Home or End."""
        self.js(f"document.querySelector('#{slider} [type=range]').focus()")
        self.key(end, {"End": 35, "Home": 36}[end])

    def write(self, words):
        """Over what is in the line."""
        self.click("#words input", 3)
        chosen = "document.activeElement.matches('#words input') && `${getSelection()}` == document.activeElement.value"
        while not self.js(chosen):
            self.click("#words input", 3)  # the page was still moving
        self.call("Input.insertText", text=words)

    def drop(self, path):
        """As a hand drags a file from a folder."""
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, data=data, **self.place("#drop button"))

    def found(self, asked):
        """Cards of what was asked."""
        self.until(f"document.querySelector('#results h2')?.textContent == {json.dumps(asked)}")
        self.until(f"{CARD}.length && [...document.images].every(image => image.complete)")
        return self.js(CARDS)
