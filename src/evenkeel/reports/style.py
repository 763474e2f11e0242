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
@media print { figure, tr { break-inside: avoid; } }
"""
