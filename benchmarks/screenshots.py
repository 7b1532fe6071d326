"""Pictures of a report's parts, light and dark, wide and narrow: `python benchmarks/screenshots.py
RUN [FOLDER]`.

Needs Debian's chromium and chromium-driver, and selenium. `make pictures` trains the demo and puts
its pictures into docs/images.
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--allow-file-access-from-files=false",
)
WIDE, NARROW = (1280, 900), (412, 850)


def why_no_browser() -> str | None:
    """What is missing to open a page, as a sentence; None if nothing is."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return (
        f"{' and '.join(missing)} not found; run: apt-get install chromium chromium-driver"
        if missing
        else None
    )


@contextlib.contextmanager
def browser(size: tuple[int, int] = WIDE, *, dark: bool = False):
    """A headless Chromium with an empty profile, as a selenium driver that logs its console and its
    requests.
    """
    from selenium import webdriver

    os.environ["SE_OFFLINE"] = "true"  # selenium looks for no driver of its own
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size={},{}".format(*size)):
            options.add_argument(flag)
        driver = webdriver.Chrome(
            options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
        )
        try:
            driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False},
            )
            set_scheme(driver, dark=dark)
            yield driver
        finally:
            driver.quit()


def set_scheme(driver, *, dark: bool) -> None:
    """What the page's prefers-color-scheme says."""
    features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    # the page hears of it
    driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def take(driver, selector: str, file: Path, most: int = 1600) -> None:
    """The element's picture, at most `most` pixels high, with few enough colours for a small
    file.
    """
    import base64

    from PIL import Image

    height = driver.execute_script("return Math.ceil(document.documentElement.scrollHeight)")
    width = driver.execute_script("return innerWidth")
    # all of it in view, so that nothing sticks to the middle
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )
    box = driver.execute_script(
        "const b = document.querySelector(arguments[0]).getBoundingClientRect();return {x: 0, y:"
        " Math.max(0, b.y + scrollY - 12), width: innerWidth, height: b.height + 24}",
        selector,
    )
    clip = {**box, "height": min(box["height"], most), "scale": 1}
    shot = driver.execute_cdp_cmd(
        "Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True}
    )
    picture = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        file, optimize=True
    )


def main(argv: list[str]) -> int:
    if len(argv) not in (1, 2):
        print(__doc__.strip(), file=sys.stderr)
        return 2
    if reason := why_no_browser():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    page = Path(argv[0], "report.html").resolve()
    folder = Path(argv[1] if len(argv) == 2 else "docs/images")
    folder.mkdir(parents=True, exist_ok=True)
    for size, place, parts in (
        (WIDE, "", ("summary", "curves", "conflicts", "evaluation", "recipe")),
        (NARROW, "_narrow", ("conflicts",)),
    ):
        with browser(size) as driver:
            driver.get(page.as_uri())
            driver.execute_script(POINT)
            for dark in (False, True) if size == WIDE else (False,):
                set_scheme(driver, dark=dark)
                for part in parts:
                    take(
                        driver,
                        f"#{part}",
                        folder / f"{part}_{'dark' if dark else 'light'}{place}.png",
                        600 if part == "recipe" else 1600,
                    )
    print(f"Pictures: {folder}")
    return 0


POINT = """const protectedTokens = document.querySelectorAll('.tokens .protected');
(protectedTokens[protectedTokens.length - 1] || document.querySelector('.tokens .token')).focus()"""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
