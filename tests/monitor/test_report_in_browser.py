"""The report in a real browser, where a Chromium is found: it opens the page, and is asked what became of it and what
its console was told. Nothing but the browser is needed. MEGACORE_BROWSER names one that is not on the PATH."""

import json
import os
import re
import select
import shutil
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from megacore.monitor.report.page import page
from megacore.monitor.report.reading import read_run
from tests.monitor.test_report import HOSTILE, full_run, metrics, write

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
SAYS = '"use strict";console.log("the console is read");undefined.x;'


def browser() -> str:
    """Its path, or the test is skipped."""
    found = os.environ.get("MEGACORE_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        pytest.skip(f"no browser is here: none of {', '.join(NAMES)} is on the PATH, and MEGACORE_BROWSER names none")
    return found


class Browser:
    """Chromium, spoken to through its own pipes (--remote-debugging-pipe): JSON, each message ended by a zero byte."""

    def __init__(self, folder: Path) -> None:
        theirs, self.send_to = os.pipe()
        self.read_from, their_end = os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --remote-debugging-pipe --no-first-run"
        command = f'exec "$0" "$@" 3<&{theirs} 4>&{their_end}'
        words = [browser(), *flags.split(), f"--user-data-dir={folder / 'profile'}", "--window-size=1300,900"]
        self.process = subprocess.Popen(
            ["bash", "-c", command, *words], pass_fds=(theirs, their_end), stderr=subprocess.DEVNULL
        )
        os.close(theirs)
        os.close(their_end)
        self.number, self.rest, self.complaints = 0, b"", []
        self.told: list[str] = []
        self.session: dict[str, str] = {}

    def message(self) -> dict[str, Any]:
        """The next one."""
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.read_from], [], [], 60)
            more = os.read(self.read_from, 1 << 20) if ready else b""
            assert more, "the browser says nothing"
            self.rest += more
        first, _, self.rest = self.rest.partition(b"\0")
        found = json.loads(first)
        method, said = found.get("method", ""), found.get("params", {})
        self.told.append(method)
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(json.dumps(said))
        return found

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Its answer."""
        self.number += 1
        asked = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.send_to, json.dumps(asked).encode() + b"\0")
        while (found := self.message()).get("id") != self.number:
            pass
        assert "error" not in found, found
        return dict(found["result"])

    def open(self, path: Path) -> str:
        """What a page is once its script has run."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")
        self.told = []
        self.ask("Page.navigate", url=path.as_uri())
        while "Page.loadEventFired" not in self.told:
            self.message()
        asked = {"expression": "document.documentElement.outerHTML", "returnByValue": True}
        return str(self.ask("Runtime.evaluate", **asked)["result"]["value"])

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        os.close(self.send_to)
        os.close(self.read_from)


def opened(html: str, folder: Path) -> tuple[str, list[str]]:
    """What the page is once its script has run, and what the console was told."""
    path = folder / "page.html"
    path.write_text(html, encoding="utf-8")
    with closing(Browser(folder)) as found:
        return found.open(path), found.complaints


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "hostile", "one", "empty"])
def test_a_browser_draws_the_curves_and_has_nothing_to_complain_of(tmp_path: Path, kind: str) -> None:
    out = full_run(tmp_path / "run", **({"text": HOSTILE, "error": HOSTILE} if kind == "hostile" else {}))
    if kind in ("one", "empty"):
        (out / "metrics.jsonl").unlink()
        write(out / "metrics.jsonl", *metrics(range(1, 2 if kind == "one" else 1)))
    shown, complaints = opened(page(read_run(out)), tmp_path)
    assert complaints == []
    charts = shown.split('<div id="charts">')[-1]
    assert charts.count('class="chart') == (0 if kind == "empty" else 8)
    assert not re.search(r'(?:d|cx|cy|x1|y1)="[^"]*(?:NaN|undefined|Infinity)', charts)
    if kind in ("full", "hostile"):
        lines = re.findall(r'<path[^>]* d="(M[^"]+)"', charts)
        assert len(lines) >= 9 and all(line.count("L") == 39 for line in lines), "40 steps each"
    if kind == "one":
        assert charts.count("<circle") == 10, "power has three lines"


@pytest.mark.slow
def test_the_console_would_have_told(tmp_path: Path) -> None:
    """Of an error in the page's script, and of a script that is none of its own."""
    html = page(read_run(full_run(tmp_path / "run")))
    _, complaints = opened(html.replace("</body>", "<script>alert(1)</script></body>"), tmp_path)
    assert any("Content Security Policy" in line for line in complaints)
    _, complaints = opened(f"<!doctype html><script>{SAYS}</script>", tmp_path)
    assert any("the console is read" in line for line in complaints) and any("TypeError" in line for line in complaints)
