"""The script of a page: a click on a title sorts a table, and a field above long tables filters their rows.

Groups of rows are sorted inside, and then by their first rows; what is missing is last in both directions.
"""

SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const groups = [...table.tBodies], titles = table.tHead ? [...table.tHead.rows[0].cells] : [];
  const rowsOf = (body) => [...body.rows].filter((row) => !row.classList.contains("group"));
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    if (text === "–") return null;
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
      const order = (first, second) => {
        const a = value(first, column), b = value(second, column);
        return a === null || b === null ? (a === null) - (b === null) : (up ? 1 : -1) * compare(a, b);
      };
      for (const body of groups) body.append(...rowsOf(body).sort(order));
      table.append(...groups.filter((body) => rowsOf(body).length).sort((a, b) => order(rowsOf(a)[0], rowsOf(b)[0])));
    });
  });
  const all = groups.flatMap(rowsOf);
  if (all.length > 12) {
    const label = document.createElement("label"), input = document.createElement("input");
    const count = document.createElement("output");
    label.className = "filter";
    input.type = "search";
    label.append("show rows with", input, count);
    table.closest("figure").prepend(label);
    input.addEventListener("input", () => {
      const wanted = input.value.toLowerCase();
      for (const body of groups) {
        const title = body.querySelector(".group")?.textContent ?? "";
        for (const row of rowsOf(body)) row.hidden = !(title + row.textContent).toLowerCase().includes(wanted);
        body.hidden = rowsOf(body).every((row) => row.hidden);
      }
      count.textContent = wanted ? `${all.filter((row) => !row.hidden).length} of ${all.length}` : "";
    });
    addEventListener("hashchange", () => {  // what a link leads to is shown, whatever the field says
      const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
      if (input.value && table.contains(target)) {
        input.value = "";
        input.dispatchEvent(new Event("input"));
        target.scrollIntoView();
      }
    });
  }
}
"""
"""JavaScript that needs nothing else."""
