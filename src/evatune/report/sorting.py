"""The script of a page: a click on a title sorts a table, a field above long tables filters their rows."""

SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], titles = table.tHead ? [...table.tHead.rows[0].cells] : [];
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = /^[-+−]?[\\d.,]+(e[-+]?\\d+)?(?=$|[\\s%])/i.exec(text);
    return number ? parseFloat(number[0].replace("−", "-").replaceAll(",", "")) : text.toLowerCase();
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return a < b ? -1 : a > b ? 1 : 0;
  };
  titles.forEach((title, column) => {
    if (title.tagName !== "TH") return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...title.childNodes);
    title.append(button);
    button.addEventListener("click", () => {
      const up = title.getAttribute("aria-sort") !== "ascending";
      titles.forEach((other) => other.removeAttribute("aria-sort"));
      title.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].sort((a, b) => (up ? 1 : -1) * compare(value(a, column), value(b, column)));
      body.append(...rows);
    });
  });
  if (body.rows.length > 12) {
    const label = document.createElement("label"), input = document.createElement("input");
    label.className = "filter";
    input.type = "search";
    label.append("show rows with", input);
    table.closest("figure").prepend(label);
    input.addEventListener("input", () => {
      const wanted = input.value.toLowerCase();
      for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    });
  }
}
"""
"""JavaScript that needs nothing else."""
