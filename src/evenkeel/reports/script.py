"""What the HTML report does when it is clicked, searched and sorted; without it, it is read all the same."""

from __future__ import annotations

# Content is only ever moved, hidden or copied as nodes: no text becomes markup.
SCRIPT = """
"use strict";
const all = (query, root = document) => [...root.querySelectorAll(query)];

// Tables: a click on a heading sorts by it, another one the other way round.
const value = cell => {
  const text = cell.textContent.trim().replace(/\\u2212/g, "-");
  const number = parseFloat(text);
  return Number.isNaN(number) ? text : number;
};
for (const table of all("table.sortable")) {
  all("thead th", table).forEach((heading, column) => {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending";
      all("thead th", table).forEach(other => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const order = (a, b) => {
        const [x, y] = [a, b].map(row => value(row.cells[column]));
        if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
        return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
      };
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort(order));
    });
  });
}

// Pictures: which arms, which prompts.
const pictures = document.querySelector("table.pictures");
if (pictures) {
  const bar = document.querySelector(".controls");
  bar.hidden = false;
  for (const box of all("input[type=checkbox]", bar)) {
    box.addEventListener("change", () => {
      for (const row of pictures.rows) row.cells[Number(box.value)].hidden = !box.checked;
    });
  }
  const search = bar.querySelector("input[type=search]"), count = bar.querySelector("output");
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\\s+/);
    let shown = 0;
    for (const row of pictures.tBodies[0].rows) {
      const text = row.cells[0].textContent.toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${pictures.tBodies[0].rows.length}`;
  });

  // One picture large; arrows go on, Escape closes.
  const dialog = document.querySelector("dialog"), large = dialog.querySelector("img");
  const said = dialog.querySelector("p");
  const visible = () => all("tbody tr:not([hidden]) td:not([hidden]) button", pictures);
  let at = null;
  const show = button => {
    const image = button.querySelector("img");
    at = button;
    large.src = image.src;
    large.alt = said.textContent = image.alt;
    if (!dialog.open) dialog.showModal();
  };
  pictures.addEventListener("click", event => {
    const button = event.target.closest("button");
    if (button) show(button);
  });
  dialog.addEventListener("keydown", event => {
    const each = visible(), wide = each.filter(b => b.closest("tr") === at.closest("tr")).length;
    const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: wide, ArrowUp: -wide}[event.key];
    const next = step && each[each.indexOf(at) + step];
    if (next) { event.preventDefault(); show(next); }
  });
  dialog.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => at.focus());
}
"""
