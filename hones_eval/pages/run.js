"use strict";
(() => {
  document.documentElement.classList.remove("no-script");
  const valueOf = (cell) => {
    const value = cell.dataset.value ?? cell.textContent.trim();
    return cell.dataset.value === undefined ? value : Number(value);
  };
  const compare = (first, second) => (typeof first === "number" && typeof second === "number"
    ? first - second
    : String(first).localeCompare(String(second), undefined, { numeric: true }));
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        const down = before === "ascending" || (before === null && head.classList.contains("n"));
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const keyed = [...body.rows].map((row, place) => [valueOf(row.cells[column]), place, row]);
        keyed.sort((first, second) => (down ? -1 : 1) * compare(first[0], second[0]) || first[1] - second[1]);
        body.append(...keyed.map((entry) => entry[2]));
      });
    });
  }
  const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  for (const button of document.querySelectorAll("button[data-download]")) {
    button.addEventListener("click", () => {
      const table = document.querySelector(`table[data-name="${button.dataset.download}"]`);
      const lines = [...table.rows].map((row) => [...row.cells]
        .map((cell) => quoted(cell.dataset.value ?? cell.textContent.trim())).join(","));
      const link = document.createElement("a");
      link.href = `data:text/csv;charset=utf-8,${encodeURIComponent(`${lines.join("\n")}\n`)}`;
      link.download = `${button.dataset.download}.csv`;
      link.click();
    });
  }
})();
