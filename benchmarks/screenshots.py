"""Takes pictures of a report, in light and dark colours, wide and narrow.

Run `python benchmarks/screenshots.py RUN [FOLDER]`. It needs selenium, and Debian's packages
chromium and chromium-driver. `make pictures` trains the demo and writes its pictures to
docs/images.
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--allow-file-access-from-files=false"),
)
WIDE, NARROW = (1280, 900), (412, 850)  # pixels


def why_no_browser() -> str | None:
    """A sentence that says what is missing to open a page, or None."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if not missing:
        return None
    return f"{' and '.join(missing)} not found; run: apt-get install chromium chromium-driver"


@contextlib.contextmanager
def browser(size: tuple[int, int] = WIDE, *, dark: bool = False):
    """A selenium driver of a headless Chromium, which logs its console and its requests.

    Its profile is empty.
    """
    from selenium import webdriver

    os.environ["SE_OFFLINE"] = "true"  # selenium downloads no driver
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size={},{}".format(*size)):
            options.add_argument(flag)
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        driver = webdriver.Chrome(options=options, service=service)
        try:
            set_size(driver, *size)
            set_scheme(driver, dark=dark)
            yield driver
        finally:
            driver.quit()


def set_size(driver, width: int, height: int) -> None:
    """Sets the size of the page's window in pixels."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def set_scheme(driver, *, dark: bool) -> None:
    """Sets the page's prefers-color-scheme."""
    features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    # The page has drawn the change after two frames.
    driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def take(driver, selector: str, file: Path, most: int = 1600) -> None:
    """Saves a picture of an element, at most `most` pixels high.

    It has 256 colours, which keeps the file small.
    """
    import base64

    from PIL import Image

    height = driver.execute_script("return Math.ceil(document.documentElement.scrollHeight)")
    width = driver.execute_script("return innerWidth")
    # With the whole page in view, no sticky element covers the middle of the picture.
    set_size(driver, width, height)
    box = driver.execute_script(BOX, selector)
    clip = {**box, "height": min(box["height"], most), "scale": 1}
    options = {"clip": clip, "captureBeyondViewport": True}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", options)
    picture = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    method, dither = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE
    picture.quantize(256, method=method, dither=dither).save(file, optimize=True)


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    if len(argv) not in (1, 2):
        print(__doc__.strip(), file=sys.stderr)
        return 2
    if reason := why_no_browser():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    page = Path(argv[0], "report.html").resolve()
    folder = Path(argv[1] if len(argv) == 2 else "docs/images")
    folder.mkdir(parents=True, exist_ok=True)
    for size, suffix, parts in (
        (WIDE, "", ("summary", "curves", "conflicts", "evaluation", "recipe")),
        (NARROW, "_narrow", ("conflicts",)),
    ):
        with browser(size) as driver:
            driver.get(page.as_uri())
            driver.execute_script(FOCUS)
            for dark in (False, True) if size == WIDE else (False,):
                set_scheme(driver, dark=dark)
                for part in parts:
                    file = folder / f"{part}_{'dark' if dark else 'light'}{suffix}.png"
                    take(driver, f"#{part}", file, 600 if part == "recipe" else 1600)
    print(f"Pictures: {folder}")
    return 0


BOX = """const b = document.querySelector(arguments[0]).getBoundingClientRect();
return {x: 0, y: Math.max(0, b.y + scrollY - 12), width: innerWidth, height: b.height + 24}"""
# Shows the details of a token: of the last protected one, or of the first token.
FOCUS = """const protectedTokens = document.querySelectorAll('.tokens .protected');
(protectedTokens[protectedTokens.length - 1] || document.querySelector('.tokens .token')).focus()"""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
