"""A real headless Chromium: screenshots, console messages and the width of the laid-out page."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--enable-logging=stderr", "--v=0",
    "--blink-settings=preferredColorScheme={scheme}",
)  # fmt: skip


def _run(scratch: Path, dark: bool, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM
    profile = scratch / "profile"
    scheme = "0" if dark else "1"
    try:
        return subprocess.run(
            [
                CHROMIUM, *(f.format(scheme=scheme) for f in _FLAGS),
                f"--user-data-dir={profile}", *arguments,
            ],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
    finally:
        shutil.rmtree(profile, ignore_errors=True)


def complaints(log: str) -> list[str]:
    """Console messages and refused loads in Chromium's log."""
    return [line for line in log.splitlines() if "CONSOLE" in line or "Content Security" in line]


def screenshot(
    page: Path, png: Path, scratch: Path, width: int, height: int, dark: bool
) -> list[str]:
    """Picture of `page`; gives the console's complaints.

    Chromium's window has a least width, so that a narrow page is shown in a frame of its own.
    """
    holder = scratch / "frame.html"
    holder.write_text(
        '<meta charset="utf-8"><style>body{margin:0}iframe{border:0;display:block}</style>'
        f'<iframe src="{page.as_uri()}" width="{width}" height="{height}"></iframe>'
    )
    done = _run(
        scratch, dark, f"--window-size={max(width, 500)},{height}", f"--screenshot={png}",
        "--virtual-time-budget=3000", holder.as_uri(),
    )  # fmt: skip
    return complaints(done.stderr)


def layout(page: Path, scratch: Path, width: int, dark: bool = False) -> dict[str, object]:
    """Sizes and colours of `page` as laid out in a frame `width` pixels wide.

    A wrapper's script reads them from the outside: the page itself lets none run.
    """
    holder = scratch / "measure.html"
    holder.write_text(
        '<meta charset="utf-8"><style>*{margin:0;border:0}</style>'
        f'<iframe id="f" src="{page.as_uri()}" width="{width}" height="800"></iframe>'
        '<pre id="o"></pre>'
        "<script>f.onload=()=>{const d=f.contentDocument,w=f.contentWindow,e=d.documentElement,"
        "s=(q,p)=>d.querySelector(q)?w.getComputedStyle(d.querySelector(q))[p]:null;"
        "o.textContent=btoa(unescape(encodeURIComponent(JSON.stringify({"
        "width:e.scrollWidth,view:w.innerWidth,height:e.scrollHeight,scripts:d.scripts.length,"
        "hacked:!!w.hacked||!!window.hacked,paper:s('html','backgroundColor'),"
        "card:s('pre','backgroundColor'),leafy:s('tr.chosen td','backgroundColor'),"
        "ink:s('html','color'),soft:s('.soft','color'),state:s('.state','color'),"
        "better:s('td.better','color'),worse:s('td.worse','color'),"
        "axis:s('svg .axis','fill'),limit:s('svg .limit','fill'),font:s('svg text','fontSize'),"
        "labels:[...d.querySelectorAll('svg.plot')].map(v=>[...v.querySelectorAll('text')].map("
        "t=>{const b=t.getBoundingClientRect(),a=v.getBoundingClientRect();"
        "return [b.left-a.left,b.top-a.top,b.right-a.left,b.bottom-a.top,a.width,a.height,"
        "t.textContent]})),"
        "names:[...d.querySelectorAll('td.name')].map(c=>c.textContent),"
        "cells:d.querySelectorAll('.strip .cell').length,images:d.images.length,"
        "boxes:[...d.querySelectorAll('.box')].map(b=>[b.clientWidth,b.scrollWidth]),"
        "style:d.styleSheets.length}))));}</script>"
    )
    done = _run(
        scratch, dark, "--allow-file-access-from-files", f"--window-size={max(width, 500)},900",
        "--virtual-time-budget=3000", "--dump-dom", holder.as_uri(),
    )  # fmt: skip
    match = re.search(r'<pre id="o">([^<]+)</pre>', done.stdout)
    assert match, done.stderr
    found: dict[str, object] = json.loads(base64.b64decode(match[1]))
    return found | {"complaints": complaints(done.stderr)}
