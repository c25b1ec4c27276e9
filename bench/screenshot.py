"""The picture of a report for the README: its first screen, light, 1280 pixels wide.

    python bench/screenshot.py ARTIFACT docs/images/report.png [--height 1150]

needs Chromium (on Debian `apt-get install chromium`) and Pillow.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

WIDTH = 1280
LARGEST = 300_000


def screenshot(page: Path, picture: Path, height: int) -> int:
    """Write `picture`, `WIDTH` x `height` pixels; bytes of the file."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if chromium is None:
        raise SystemExit("no chromium; on Debian: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        taken = Path(folder) / "page.png"
        # Headless Chromium prefers the light scheme unless told otherwise.
        subprocess.run(
            [
                chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--disable-background-networking", "--disable-component-update",
                "--disable-sync", "--hide-scrollbars", f"--user-data-dir={folder}/profile",
                f"--window-size={WIDTH},{height}", f"--screenshot={taken}", page.as_uri(),
            ],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        image = Image.open(taken).convert("RGB").crop((0, 0, WIDTH, height))
    # A page has few colours: a palette of 256 shows no difference and takes a third of the bytes.
    image.quantize(256, dither=Image.Dither.NONE).save(picture, optimize=True)
    return picture.stat().st_size


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--height", type=int, default=1150)
    asked = parser.parse_args()
    page = asked.artifact / "report.html"
    if not page.is_file():
        raise SystemExit(f"no {page}; `penjing report {asked.artifact}` writes it")
    size = screenshot(page.resolve(), asked.picture, asked.height)
    print(f"{asked.picture}: {size} bytes")
    return 0 if size < LARGEST else 1


if __name__ == "__main__":
    sys.exit(main())
