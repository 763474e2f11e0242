"""How the HTML report looks, by day and by night, on a telephone and on paper."""

from __future__ import annotations

# Pictures keep a white card in dark mode: their labels are dark.
CSS = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1b1f24; --faint: #59636e; --line: #d5dae0; --card: #f4f6f8;
  --better: #00618f; --worse: #a34700;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --ink: #e7eaee; --faint: #a3adb8; --line: #363d45; --card: #1e2329;
    --better: #6cc5f2; --worse: #f2a15f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 2rem 0 .5rem; }
header p, .note, figcaption, summary { color: var(--faint); }
header p { margin: .25rem 0 0; overflow-wrap: anywhere; }
.note, figcaption, summary { font-size: .9rem; max-width: 48rem; }
.summary { background: var(--card); border-radius: .5rem; padding: .25rem 1rem; }
.scroll { overflow-x: auto; }
figure { margin: 0; }
figure .scroll { background: #ffffff; border: 1px solid var(--line); border-radius: .5rem; }
figure.plot .scroll { max-width: 46rem; }
figure.grid .scroll { width: fit-content; max-width: 100%; }
img { display: block; height: auto; }
figure.plot img { width: 100%; min-width: 30rem; }
figcaption { margin-top: .4rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 1rem 0 .4rem; }
th, td { padding: .35rem .8rem .35rem 0; text-align: left; border-bottom: 1px solid var(--line); }
th, table.numbers td { white-space: nowrap; }
td { vertical-align: top; }
td.better { color: var(--better); font-weight: 600; }
td.worse { color: var(--worse); font-weight: 600; }
details { margin-top: .75rem; }
dt { font-weight: 600; }
dd { margin: 0; overflow-wrap: anywhere; }
dl.settings {
  display: grid; gap: .6rem 1.5rem; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr));
}
[hidden] { display: none !important; }
th button { all: unset; cursor: pointer; }
th button:focus-visible, td button:focus-visible { outline: 2px solid var(--better); outline-offset: 2px; }
th[aria-sort] button::after { content: " \\2191"; }
th[aria-sort="descending"] button::after { content: " \\2193"; }
.controls { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; margin-bottom: .5rem; }
.controls fieldset { border: 0; padding: 0; margin: 0; display: flex; flex-wrap: wrap; gap: .25rem .9rem; }
.controls legend { float: left; color: var(--faint); }
.controls input[type=search] { font: inherit; padding: .25rem .5rem; min-width: 12rem; }
table.pictures th[scope=row] { white-space: normal; font-weight: 400; max-width: 15rem; min-width: 8rem; }
table.pictures td { padding: .25rem .4rem .25rem 0; }
td button { border: 0; padding: 0; background: none; cursor: zoom-in; display: block; }
td img { width: 9rem; }
table.exact img, dialog.exact img { image-rendering: pixelated; }
dialog { border: 0; padding: 1rem; background: var(--page); color: var(--ink); max-width: 96vw; }
dialog::backdrop { background: rgb(0 0 0 / .7); }
dialog img { width: min(80vw, 75vh); image-rendering: inherit; }
figure.intervals .scroll { background: none; border: 0; }
figure.intervals svg { width: 100%; min-width: 34rem; max-width: 52rem; font: 13px system-ui, sans-serif; }
.intervals text { fill: var(--ink); }
.intervals .head { font-weight: 600; }
.intervals path { stroke: var(--faint); stroke-width: 2; fill: none; }
.intervals .zero { stroke: var(--line); stroke-width: 1; }
.intervals .better * { stroke: var(--better); } .intervals .better circle { fill: var(--better); }
.intervals .worse * { stroke: var(--worse); } .intervals .worse rect { fill: var(--page); stroke-width: 2; }
.intervals g text { stroke: none !important; }
@media (max-width: 40rem) { td img { width: 6rem; } table.pictures th[scope=row] { min-width: 6rem; } }
@media print {
  figure, tr { break-inside: avoid; }
  .controls, dialog { display: none; }
  .scroll { overflow: visible; }
}
"""
