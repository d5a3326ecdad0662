"""Headless Chromium on the Space's page, as a visitor uses it: by clicks and keys."""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ENTER, ESCAPE, SPACE, DOWN, TAB = "\ue007\ue00c \ue015\ue004"
NAMED_ROLES = (
    *("button", "checkbox", "combobox", "image", "link", "listbox", "option", "searchbox"),
    *("slider", "spinbutton", "switch", "tab", "textbox"),
)
# Opaque colors suffice here: the page has no text on images or half-transparent boxes.
CONTRAST = """
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const light = color => color.slice(0, 3).map(v => v / 255)
  .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const ground = element => {
  for (let at = element; at; at = at.parentElement) {
    const color = rgb(getComputedStyle(at).backgroundColor);
    if (color.length === 3 || color[3] === 1) return color;
  }
  return [255, 255, 255];
};
const contrast = (one, other) => {
  const [a, b] = [light(one), light(other)];
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
};
"""
FAINT = """
const faint = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].filter(node => node.nodeType === 3);
  const text = own.map(node => node.data.trim()).join("");
  if (!text || !element.checkVisibility({visibilityProperty: true})) continue;
  if (element.closest("script, style, svg")) continue;
  const found = contrast(rgb(getComputedStyle(element).color), ground(element));
  if (found < 4.5) faint.push(text.slice(0, 40) + " " + found.toFixed(1));
}
return faint;
"""
EDGES = """
return [...document.querySelectorAll("button, input[type=text]")].filter(element =>
  element.checkVisibility() && Math.max(
    contrast(rgb(getComputedStyle(element).borderTopColor), ground(element.parentElement)),
    contrast(ground(element), ground(element.parentElement))) < 3
).map(element => element.outerHTML);
"""
# Whatever the server tries to reach beyond this machine is an error that the log shows.
GUARDED_SERVE = """
import socket, sys
real = socket.socket.connect
def connect(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
        print("REACHED OUT", address, file=sys.stderr, flush=True)
        raise OSError(f"no network in tests: {address}")
    return real(self, address)
socket.socket.connect = connect
from ccf_llm_hf.cli.main import main
sys.exit(main(["serve", *sys.argv[1:]]))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(checkpoint: Path, log: Path, *options: str) -> Iterator[str]:
    """URL of `ccf-llm serve` in a process that can reach this machine only."""
    port = free_port()
    command = [sys.executable, "-c", GUARDED_SERVE, str(checkpoint), "--port", str(port), *options]
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            wait_for_port(port, process, log)
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.terminate()
            process.wait(timeout=30)


def wait_for_port(
    port: int, process: "subprocess.Popen[bytes]", log: Path, limit: float = 240
) -> None:
    end = time.monotonic() + limit
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"ccf-llm serve did not start:\n{log.read_text()}")


class Visitor:
    """A Chromium window on one page."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.resize(width, height)
        self.cdp("Network.enable")
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.cdp("Emulation.setEmulatedMedia", features=scheme)
        self.driver.get("about:blank")  # what the page before leaves in the logs is not this one's
        self.driver.get_log("performance")
        self.driver.get_log("browser")
        self.driver.get(url)
        self.wait("return document.querySelector('#rank-0') !== null")

    def cdp(self, command: str, **parameters: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, parameters)

    def resize(self, width: int, height: int = 900) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.cdp("Emulation.setDeviceMetricsOverride", **metrics)

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str, *arguments: Any, limit: float = 60) -> Any:
        """Value of a script once it is true."""
        end = time.monotonic() + limit
        while not (value := self.js(script, *arguments)):
            assert time.monotonic() < end, f"never came true: {script} {arguments}"
            time.sleep(0.05)
        return value

    def find(self, css: str) -> Any:
        return self.driver.find_element("css selector", css)

    def type(self, text: str) -> None:
        """Keys to whatever has the focus; `\\ue007` is Enter (selenium's `Keys`)."""
        self.driver.switch_to.active_element.send_keys(text)

    def pick(self, title: str, person: int = 0) -> None:
        """Search for a title and click it."""
        field = self.find(f"#search-{person}")
        field.click()
        field.send_keys(title)
        option = f"[...document.querySelectorAll('#found-{person} [role=option]')]"
        match = f"{option}.find(o => o.textContent === arguments[0])"
        self.wait(f"return Boolean({match})", title)
        self.js(f"return {match}", title).click()
        self.wait(
            "return document.querySelector(arguments[0]).textContent.includes(arguments[1])",
            f"#liked-{person}",
            title,
        )

    def status(self, person: int = 0) -> str:
        return str(self.js(f"return document.querySelector('#status-{person}').innerText"))

    def ranking(self, person: int = 0) -> list[tuple[str, str]]:
        """Title and probability of each place, once all stages of the list are there."""
        self.wait("return !document.querySelector('[aria-busy]')")
        script = (
            f"return [...document.querySelectorAll('#results-{person} li')].map(place => ["
            "  place.querySelector('.ccf-title').textContent,"
            "  place.querySelector('.ccf-probability').firstChild.textContent])"
        )
        return [(title, probability) for title, probability in self.js(script)]

    def tab_to(self, part: str, most: int = 20) -> None:
        """Press Tab until the focus is on the element of an id."""
        for _ in range(most):
            if self.js("return document.activeElement.id === arguments[0]", part):
                return
            self.type(TAB)
        raise AssertionError(f"Tab never reached {part}")

    def wait_for_status(self, text: str, person: int = 0, limit: float = 60) -> None:
        """Wait until the list that the status speaks of is there, reasons included."""
        script = (
            f"return document.querySelector('#status-{person}').innerText.includes(arguments[0])"
            "  && !document.querySelector('[aria-busy]')"
        )
        self.wait(script, text, limit=limit)

    def focused(self) -> str:
        """Name, or else the text, of what has the focus; empty where it is the page's body."""
        script = (
            "const now = document.activeElement;"
            "return now === document.body ? '' : now.ariaLabel || now.id || now.textContent"
        )
        return str(self.js(script))

    def axe(self) -> list[str]:
        """What axe-core holds against the page: rule and elements."""
        import axe_core_python

        source = Path(axe_core_python.__file__).with_name("axe.min.js")
        self.js(source.read_text(encoding="utf-8"))
        found = self.driver.execute_async_script("axe.run().then(arguments[0])")
        assert found["passes"]
        return [f"{one['id']}: {[n['html'] for n in one['nodes']]}" for one in found["violations"]]

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return int(self.js("return document.documentElement.scrollWidth - window.innerWidth"))

    def hosts(self) -> set[str]:
        """Hosts that the browser sent requests to since `open`."""
        found = set()
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.add(urlsplit(message["params"]["request"]["url"]))
        return {url.netloc.split(":")[0] for url in found if url.scheme not in ("data", "blob")}

    def complaints(self) -> list[str]:
        """What the browser's console holds against the page."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def names(self) -> list[tuple[str, str]]:
        """Role and name of every node that the accessibility tree shows."""
        return [
            (node["role"]["value"], str(node.get("name", {}).get("value", "")).strip())
            for node in self.cdp("Accessibility.getFullAXTree")["nodes"]
            if not node["ignored"]
        ]

    def nameless(self) -> list[str]:
        """Roles of controls and images that have no name."""
        return [role for role, name in self.names() if role in NAMED_ROLES and not name]

    def faint(self) -> list[str]:
        """Texts whose contrast with the background is below 4.5 to 1 (WCAG AA)."""
        self.wait("return document.getAnimations().length === 0")
        return list(self.js(CONTRAST + FAINT))

    def dim_edges(self) -> list[str]:
        """Controls that stand out from what is around them by less than 3 to 1."""
        return list(self.js(CONTRAST + EDGES))

    def screenshot(self, path: Path) -> None:
        """The whole page, not only what the window shows."""
        image = self.cdp("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(image["data"]))


def missing() -> str:
    """Why no browser can be started, or an empty string."""
    try:
        import axe_core_python  # noqa: F401
        import rapidfuzz  # noqa: F401
        import selenium  # noqa: F401
        import starlette  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed: pip install -e '.[dev,app]'"
    for programs in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",)):
        if not any(map(shutil.which, programs)):
            return f"{programs[0]} is not installed (Debian: chromium, chromium-driver)"
    return ""


@contextmanager
def visitor() -> Iterator[Visitor]:
    """A headless Chromium that can reach this machine only."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    options.binary_location = browser or shutil.which("google-chrome") or ""
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--hide-scrollbars",
        "--no-first-run",
        "--no-proxy-server",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield Visitor(driver)
    finally:
        driver.quit()
