"""The report in a real browser, where one is installed: what is clicked, searched, sorted, printed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report_inputs import make_images, make_results

import evenkeel.reports as reports

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")

# Runs after the page's own script and leaves what it saw in the page.
ASKED = """<pre id="seen"></pre><script>
addEventListener("load", async () => {
  const key = (target, name) =>
    target.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true, cancelable: true}));
  const seen = {}, rows = () => all("table.pictures tbody tr").filter(r => !r.hidden).length;
  seen.broken = all("img").filter(i => i.getAttribute("src") && !(i.complete && i.naturalWidth)).length;
  seen.wider = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const arms = all("table.sortable")[0], names = () => all("tbody th", arms).map(h => h.textContent);
  const button = arms.querySelector("thead th:nth-child(3) button");
  button.click(); seen.up = names(); button.click(); seen.down = names();
  seen.sort = arms.querySelector("thead th:nth-child(3)").getAttribute("aria-sort");
  const search = document.querySelector("input[type=search]");
  const type = text => { search.value = text; search.dispatchEvent(new Event("input")); };
  type("KITE"); seen.found = rows(); seen.count = document.querySelector("output").textContent;
  type(""); seen.all = rows();
  const box = document.querySelectorAll("input[type=checkbox]")[1];
  box.click(); seen.hidden = all("table.pictures tr").filter(r => r.cells[2].hidden).length; box.click();
  const dialog = document.querySelector("dialog"), said = () => dialog.querySelector("p").textContent;
  const first = document.querySelector("table.pictures td button");
  first.click(); seen.open = dialog.open; seen.said = [said()];
  for (const name of ["ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowLeft"]) {
    key(dialog, name); seen.said.push(said());
  }
  dialog.close(); seen.closed = !dialog.open;
  await new Promise(done => setTimeout(done, 50));
  seen.focus = document.activeElement === first;
  seen.reached = all("button, input, summary").every(e => e.tabIndex >= 0);
  document.querySelector("#seen").textContent = JSON.stringify(seen);
});
</script></body>"""


def browser(page: Path, *options: str) -> tuple[str, str]:
    """What it prints, and what it logs, the page's console included."""
    profile = page.parent / "profile"
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
    ]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=5000", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    results = make_results()
    results["calibration"] = None
    path = reports.write_report(folder / "r.html", results, make_images(), ["a boat", "a red kite"])
    return Path(path)


@pytest.mark.parametrize("width", [1200, 500])
def test_everything_works_wide_and_narrow(page: Path, width: int) -> None:
    asked = page.with_name(f"asked-{width}.html")
    asked.write_text(page.read_text(encoding="utf-8").replace("</body>", ASKED), encoding="utf-8")
    text, log = browser(asked, f"--window-size={width},900", "--dump-dom")
    assert "CONSOLE" not in log, log
    seen: dict[str, Any] = json.loads(re.findall(r'<pre id="seen">(.*?)</pre>', text, re.DOTALL)[0])
    assert seen["broken"] == 0 and seen["wider"] <= 0
    assert seen["up"] == ["full-precision", "q-drift", "quantized"] == seen["down"][::-1]
    assert seen["sort"] == "descending"
    assert (seen["found"], seen["count"], seen["all"]) == (1, "1 of 2", 2)
    assert seen["hidden"] == 3 and seen["open"] and seen["closed"] and seen["focus"]
    assert seen["said"] == [
        "full-precision: a boat",
        "quantized: a boat",
        "quantized: a red kite",
        "full-precision: a red kite",
        "full-precision: a boat",
        "full-precision: a boat",
    ]
    assert seen["reached"]


def test_it_prints(page: Path) -> None:
    pdf = page.with_name("r.pdf")
    browser(page, f"--print-to-pdf={pdf}")
    assert pdf.read_bytes().startswith(b"%PDF") and os.path.getsize(pdf) > 10_000


def test_a_script_in_a_name_is_not_run(page: Path) -> None:
    results = make_results() | {"calibration": None}
    attack = "<img src=x onerror=document.title=1>"
    path = reports.write_report(page.with_name("a.html"), results, make_images(), [attack, "b"])
    text, _ = browser(Path(path), "--dump-dom")
    assert "<title>evenkeel" in text
