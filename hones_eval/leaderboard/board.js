"use strict";
(() => {
  document.documentElement.classList.remove("no-script");

  const table = document.querySelector("table.sortable");
  if (table) {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const search = document.querySelector("#search");
    const selects = [...document.querySelectorAll("select[data-filter]")];
    const count = document.querySelector("#count");

    const texts = new Map();
    const textOf = (row) => {
      if (!texts.has(row)) texts.set(row, row.textContent.toLowerCase());
      return texts.get(row);
    };
    const filter = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let seen = 0;
      for (const row of rows) {
        const kept = selects.every((one) => !one.value || row.dataset[one.dataset.filter] === one.value)
          && words.every((word) => textOf(row).includes(word));
        row.hidden = !kept;
        seen += kept;
      }
      const all = `${rows.length} row${rows.length === 1 ? "" : "s"}`;
      count.textContent = seen === rows.length ? all : `${seen} of ${all}`;
    };
    search.addEventListener("input", filter);
    selects.forEach((one) => one.addEventListener("change", filter));
    filter();

    const valueOf = (row, column) => {
      const cell = row.cells[column];
      const value = cell.dataset.value ?? cell.textContent.trim();
      if (value === "") return null;
      return cell.dataset.value === undefined || Number.isNaN(Number(value)) ? value : Number(value);
    };
    const compare = (one, other) => {
      if (one === null || other === null) return (one === null) - (other === null);
      if (typeof one === "number" && typeof other === "number") return one - other;
      return String(one).localeCompare(String(other), undefined, { numeric: true });
    };
    const heads = [...table.tHead.rows[0].cells];
    const chosen = document.querySelector("#sort"); // where the heads are not shown, on narrow screens
    const sort = (column, down) => {
      heads.forEach((one) => one.removeAttribute("aria-sort"));
      heads[column]?.setAttribute("aria-sort", down ? "descending" : "ascending");
      chosen.value = column === undefined ? "" : `${column} ${down ? "down" : "up"}`;
      const keyed = rows.map((row, place) => [column === undefined ? 0 : valueOf(row, column), place, row]);
      keyed.sort((one, other) => {
        const missing = (one[0] === null) - (other[0] === null);
        return missing || (down ? -1 : 1) * compare(one[0], other[0]) || one[1] - other[1];
      });
      body.append(...keyed.map((one) => one[2]));
    };
    chosen.append(new Option("smallest p first", ""));
    heads.forEach((head, column) => {
      const name = head.textContent.trim();
      chosen.append(new Option(`${name} ↑`, `${column} up`), new Option(`${name} ↓`, `${column} down`));
      head.querySelector("button").addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        sort(column, before === "ascending" || (before === null && head.classList.contains("n")));
      });
    });
    chosen.addEventListener("change", () => {
      const [column, way] = chosen.value.split(" ");
      sort(column === "" ? undefined : Number(column), way === "down");
    });
  }

  const source = document.querySelector("#flip-data");
  if (source) {
    const { flips, images, size } = JSON.parse(source.textContent);
    const list = document.querySelector("#flips");
    for (const shown of list.querySelectorAll("img")) images[shown.dataset.example] = shown.src;
    const status = document.querySelector("#flip-status");
    const search = document.querySelector("#flip-search");
    const [back, on] = [document.querySelector("#back"), document.querySelector("#on")];
    const sides = [...document.querySelectorAll("[data-side]")];
    let page = 0;
    let side = "";

    const element = (name, css, text) => {
      const made = document.createElement(name);
      if (css) made.className = css;
      if (text !== undefined) made.textContent = text;
      return made;
    };
    const answer = (name, text, css) => {
      const box = element("div");
      const value = element("dd", css, text === "" ? "(empty)" : text);
      value.dir = "auto";
      box.append(element("dt", "", name), value);
      return box;
    };
    const words = { gained: "gained", lost: "lost", changed: "answer changed" };
    const show = (flip) => {
      const item = element("li", images[flip.doc_id] ? "" : "bare");
      if (images[flip.doc_id]) {
        const image = element("img");
        image.src = images[flip.doc_id];
        image.alt = `Image of example ${flip.doc_id}`;
        image.loading = "lazy";
        item.append(image);
      }
      const content = element("div");
      const badge = flip.side === "gained" ? "better" : flip.side === "lost" ? "worse" : "";
      const title = element("div");
      title.append(element("span", `badge ${badge}`, words[flip.side]),
        element("small", "", ` example ${flip.doc_id}${flip.scores ? ` · ${flip.scores}` : ""}`));
      const question = element("p", "question text", flip.question);
      question.dir = "auto";
      const answers = element("dl", "answers");
      answers.append(answer("Gold", flip.gold, ""),
        answer("Baseline", flip.baseline, flip.side === "lost" ? "wins" : flip.side === "gained" ? "fails" : ""),
        answer("Steered", flip.steered, flip.side === "gained" ? "wins" : flip.side === "lost" ? "fails" : ""));
      content.append(title, question, answers);
      item.append(content);
      return item;
    };
    const draw = () => {
      const text = search.value.toLowerCase();
      const kept = flips.filter((flip) => (!side || flip.side === side) && (!text
        || `${flip.question}\n${flip.gold}\n${flip.baseline}\n${flip.steered}`.toLowerCase().includes(text)));
      const pages = Math.max(1, Math.ceil(kept.length / size));
      page = Math.min(page, pages - 1);
      list.replaceChildren(...kept.slice(page * size, (page + 1) * size).map(show));
      status.textContent = `${kept.length} examples, page ${page + 1} of ${pages}`;
      back.disabled = page === 0;
      on.disabled = page >= pages - 1;
    };
    back.addEventListener("click", () => { page -= 1; draw(); });
    on.addEventListener("click", () => { page += 1; draw(); });
    search.addEventListener("input", () => { page = 0; draw(); });
    sides.forEach((button) => button.addEventListener("click", () => {
      side = button.dataset.side;
      page = 0;
      sides.forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
      draw();
    }));
    draw();
  }
})();
