"use strict";
// Sorting and filtering of tables; all is readable without it.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  for (const [column, head] of [...table.tHead.rows[0].cells].entries()) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const ascending = head.getAttribute("aria-sort") === "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const key = row => {
        const cell = row.cells[column];
        return "sort" in cell.dataset
          ? (cell.dataset.sort === "" ? null : Number(cell.dataset.sort))
          : cell.textContent.trim().toLowerCase();
      };
      const order = (a, b) => typeof a === "number" ? a - b : a < b ? -1 : a > b ? 1 : 0;
      const rows = [...body.rows].map(row => [key(row), row]);
      rows.sort(([a], [b]) => a === null || b === null
        ? (a === null) - (b === null) // what is missing comes last
        : ascending ? order(a, b) : order(b, a));
      body.append(...rows.map(([, row]) => row));
    });
  }
}
for (const filter of document.querySelectorAll(".filter")) {
  filter.hidden = false;
  const table = document.getElementById(filter.dataset.table);
  const text = filter.querySelector("input");
  const status = filter.querySelector("select");
  const count = filter.querySelector("output");
  const apply = () => {
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      const wanted = row.textContent.toLowerCase().includes(text.value.trim().toLowerCase());
      const of = !status || !status.value || row.dataset.status === status.value;
      row.hidden = !(wanted && of);
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${table.tBodies[0].rows.length}`;
  };
  text.addEventListener("input", apply);
  if (status) status.addEventListener("change", apply);
  apply();
}
const opened = new Set();
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details:not([open])")) { part.open = true; opened.add(part); }
});
addEventListener("afterprint", () => {
  for (const part of opened) part.open = false;
  opened.clear();
});
