"use strict";
(() => {
  document.documentElement.classList.remove("no-script");

  // The filters of a page are kept in its address, after the #, so that a link shows what its sender saw.
  const fromAddress = () => new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
  const toAddress = (entries) => {
    const kept = new URLSearchParams(Object.entries(entries).filter(([, value]) => value));
    const hash = `${kept}`;
    if (!hash && !location.hash.includes("=")) return; // a link to a section of the page stays
    history.replaceState(null, "", hash ? `#${hash}` : location.href.split("#")[0]);
  };
  const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

  const table = document.querySelector("table.sortable");
  if (table) {
    const PAGE = 50; // rows at a time
    const body = table.tBodies[0];
    const rows = [...body.rows];
    let order = rows; // as sorted
    let page = 0;
    const search = document.querySelector("#search");
    const selects = [...document.querySelectorAll("select[data-filter]")];
    const count = document.querySelector("#count");
    const pager = document.querySelector("#pages");
    const [back, on, every] = ["#back", "#on", "#every"].map((name) => document.querySelector(name));

    const texts = new Map();
    const textOf = (row) => {
      if (!texts.has(row)) texts.set(row, row.textContent.toLowerCase());
      return texts.get(row);
    };
    const draw = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const kept = order.filter((row) => selects.every(
        (select) => !select.value || row.dataset[select.dataset.filter] === select.value)
        && words.every((word) => textOf(row).includes(word)));
      const whole = every.getAttribute("aria-pressed") === "true";
      const pages = whole ? 1 : Math.max(1, Math.ceil(kept.length / PAGE));
      page = Math.max(0, Math.min(page, pages - 1));
      const shown = new Set(whole ? kept : kept.slice(page * PAGE, (page + 1) * PAGE));
      for (const row of rows) row.hidden = !shown.has(row);
      const all = plural(rows.length, "row");
      count.textContent = kept.length === rows.length ? all : `${kept.length} of ${all}`;
      pager.hidden = kept.length <= PAGE;
      back.disabled = page === 0;
      on.disabled = page >= pages - 1;
      const first = Math.min(kept.length, page * PAGE + 1);
      document.querySelector("#page-status").textContent = whole ? `all ${kept.length} rows`
        : `rows ${first} to ${Math.min(kept.length, (page + 1) * PAGE)} of ${kept.length}`;
      const filters = selects.map((select) => [select.dataset.filter, select.value]);
      toAddress({ q: search.value, ...Object.fromEntries(filters), sort: chosen.value,
        page: page ? String(page + 1) : "" });
    };
    const turn = (pages) => {
      page += pages;
      draw();
      table.scrollIntoView({ block: "start" });
    };
    const again = () => { page = 0; draw(); };
    back.addEventListener("click", () => turn(-1));
    on.addEventListener("click", () => turn(1));
    every.addEventListener("click", () => {
      every.setAttribute("aria-pressed", String(every.getAttribute("aria-pressed") !== "true"));
      again();
    });
    // On paper there are no pages to turn.
    addEventListener("beforeprint", () => { every.setAttribute("aria-pressed", "true"); draw(); });
    addEventListener("afterprint", () => { every.setAttribute("aria-pressed", "false"); draw(); });
    search.addEventListener("input", again);
    selects.forEach((select) => select.addEventListener("change", again));

    const valueOf = (row, column) => {
      const cell = row.cells[column];
      const value = cell.dataset.value ?? cell.textContent.trim();
      if (value === "") return null;
      return cell.dataset.value === undefined || Number.isNaN(Number(value)) ? value : Number(value);
    };
    const compare = (first, second) => {
      if (first === null || second === null) return (first === null) - (second === null);
      if (typeof first === "number" && typeof second === "number") return first - second;
      return String(first).localeCompare(String(second), undefined, { numeric: true });
    };
    const heads = [...table.tHead.rows[0].cells];
    const chosen = document.querySelector("#sort"); // where the heads are not shown, on narrow screens
    const sort = (column, down) => {
      heads.forEach((head) => head.removeAttribute("aria-sort"));
      heads[column]?.setAttribute("aria-sort", down ? "descending" : "ascending");
      chosen.value = column === undefined ? "" : `${column} ${down ? "down" : "up"}`;
      const keyed = rows.map((row, place) => [column === undefined ? 0 : valueOf(row, column), place, row]);
      keyed.sort((first, second) => {
        const missing = (first[0] === null) - (second[0] === null);
        return missing || (down ? -1 : 1) * compare(first[0], second[0]) || first[1] - second[1];
      });
      order = keyed.map((entry) => entry[2]);
      body.append(...order);
    };
    const sortBy = (text) => {
      const [column, way] = text.split(" ");
      sort(column === "" ? undefined : Number(column), way === "down");
    };
    chosen.append(new Option("smallest p first", ""));
    heads.forEach((head, column) => {
      const name = head.textContent.trim();
      chosen.append(new Option(`${name} ↑`, `${column} up`), new Option(`${name} ↓`, `${column} down`));
      head.querySelector("button").addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        sort(column, before === "ascending" || (before === null && head.classList.contains("n")));
        again();
      });
    });
    chosen.addEventListener("change", () => { sortBy(chosen.value); again(); });

    const restore = () => {
      const asked = fromAddress();
      search.value = asked.get("q") ?? "";
      for (const select of selects) {
        const value = asked.get(select.dataset.filter) ?? "";
        select.value = [...select.options].some((option) => option.value === value) ? value : "";
      }
      const way = asked.get("sort") ?? "";
      if ([...chosen.options].some((option) => option.value === way)) sortBy(way);
      page = Number(asked.get("page") ?? 1) - 1 || 0;
      draw();
    };
    addEventListener("hashchange", restore);
    restore();
  }

  const source = document.querySelector("#example-data");
  if (source) {
    const { examples, images, size } = JSON.parse(source.textContent);
    const list = document.querySelector("#examples");
    for (const shown of list.querySelectorAll("img")) images[shown.dataset.image].uri = shown.src;
    const status = document.querySelector("#example-status");
    const search = document.querySelector("#example-search");
    const [back, on] = [document.querySelector("#back"), document.querySelector("#on")];
    const sides = [...document.querySelectorAll("[data-side]")];
    const viewer = document.querySelector("#viewer");
    let page = 0;
    let side = "";

    const element = (name, css, text) => {
      const made = document.createElement(name);
      if (css) made.className = css;
      if (text !== undefined) made.textContent = text;
      return made;
    };
    const drawn = (name, values) => {
      const made = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, value] of Object.entries(values)) made.setAttribute(key, value);
      return made;
    };
    const boxes = (example) => {
      const svg = drawn("svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true" });
      for (const { whose, x, y, width, height } of example.boxes) {
        svg.append(drawn("rect", { class: "halo", x, y, width, height }),
          drawn("rect", { class: whose, x, y, width, height }));
      }
      return svg;
    };
    const enlarge = (example) => {
      const kept = images[example.image];
      const image = element("img");
      image.alt = `Image of example ${example.doc_id}`;
      const scale = Math.max(1, 480 / Math.max(kept.width, kept.height)); // where the file cannot be shown
      image.width = kept.width * scale;
      image.addEventListener("load", () => {
        if (kept.file && image.src !== kept.uri) image.width = Math.max(image.naturalWidth, kept.width * scale);
      });
      image.addEventListener("error", () => { if (image.src !== kept.uri) image.src = kept.uri; });
      image.src = kept.file || kept.uri;
      viewer.querySelector(".shot").replaceChildren(image, boxes(example));
      viewer.querySelector("p").textContent = `example ${example.doc_id}: ${example.question}`;
      viewer.showModal();
    };
    viewer.addEventListener("click", (event) => { if (event.target.closest(".shot") === null) viewer.close(); });
    const thumbnail = (example) => {
      const kept = images[example.image];
      const link = element("a", "shot");
      link.href = kept.file || "#examples-title";
      link.setAttribute("aria-label", `Image of example ${example.doc_id}, enlarge`);
      link.addEventListener("click", (event) => {
        if (event.ctrlKey || event.metaKey || event.shiftKey) return; // a new tab or window
        event.preventDefault();
        enlarge(example);
      });
      const image = element("img");
      image.src = kept.uri;
      image.alt = `Image of example ${example.doc_id}`;
      image.width = kept.width;
      image.height = kept.height;
      link.append(image);
      if (example.boxes.length) link.append(boxes(example));
      return link;
    };

    // Which words of two texts are in their longest common subsequence.
    const common = (first, second) => {
      const best = Array.from({ length: first.length + 1 }, () => new Uint16Array(second.length + 1));
      for (let i = first.length - 1; i >= 0; i -= 1) {
        for (let j = second.length - 1; j >= 0; j -= 1) {
          best[i][j] = first[i] === second[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
        }
      }
      const [inFirst, inSecond] = [new Set(), new Set()];
      for (let i = 0, j = 0; i < first.length && j < second.length;) {
        if (first[i] === second[j]) {
          inFirst.add(i);
          inSecond.add(j);
          i += 1;
          j += 1;
        } else if (best[i + 1][j] >= best[i][j + 1]) i += 1;
        else j += 1;
      }
      return [inFirst, inSecond];
    };
    const marked = (value, words, kept, name) => {
      words.forEach((word, place) => {
        value.append(/\s/.test(word) || kept.has(place) ? word : element(name, "", word));
      });
    };
    const answer = (name, text, css) => {
      const box = element("div");
      const value = element("dd", css, text === "" ? "(empty)" : text);
      value.dir = "auto";
      box.append(element("dt", "", name), value);
      return box;
    };
    const answers = (example) => {
      const shown = element("dl", "answers");
      const css = { gained: ["fails", "wins"], lost: ["wins", "fails"] }[example.side] ?? ["", ""];
      const baseline = answer("Baseline", example.baseline, css[0]);
      const steered = answer("Steered", example.steered, css[1]);
      const [first, second] = [example.baseline, example.steered].map((text) => text.split(/(\s+)/));
      if (example.baseline !== example.steered && first.length * second.length > 1) {
        const [inFirst, inSecond] = common(first, second);
        if ([...inFirst].some((place) => !/^\s*$/.test(first[place]))) {
          const [old, changed] = [baseline, steered].map((box) => box.querySelector("dd"));
          old.replaceChildren();
          changed.replaceChildren();
          marked(old, first, inFirst, "del");
          marked(changed, second, inSecond, "ins");
        }
      }
      shown.append(answer("Gold", example.gold, ""), baseline, steered);
      return shown;
    };
    const words = { gained: "gained", lost: "lost", changed: "other answer", same: "same answer" };
    const show = (example) => {
      const item = element("li", example.image ? "" : "bare");
      if (example.image) item.append(thumbnail(example));
      const content = element("div");
      const badge = { gained: "better", lost: "worse" }[example.side] ?? "";
      const title = element("div");
      title.append(element("span", `badge ${badge}`, words[example.side]),
        element("small", "", ` example ${example.doc_id}${example.scores ? ` · ${example.scores}` : ""}`));
      const question = element("p", "question text", example.question);
      question.dir = "auto";
      content.append(title, question, answers(example));
      item.append(content);
      return item;
    };
    const found = () => {
      const text = search.value.toLowerCase();
      return examples.filter((example) => (!side || example.side === side) && (!text
        || `${example.question}\n${example.gold}\n${example.baseline}\n${example.steered}`.toLowerCase()
          .includes(text)));
    };
    const draw = () => {
      const kept = found();
      const pages = Math.max(1, Math.ceil(kept.length / size));
      page = Math.max(0, Math.min(page, pages - 1));
      list.replaceChildren(...kept.slice(page * size, (page + 1) * size).map(show));
      status.textContent = `${plural(kept.length, "example")}, page ${page + 1} of ${pages}`;
      back.disabled = page === 0;
      on.disabled = page >= pages - 1;
      sides.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.side === side)));
      toAddress({ side, q: search.value, page: page ? String(page + 1) : "" });
    };
    const turn = (pages) => {
      page += pages;
      draw();
      document.querySelector("#examples-title").scrollIntoView({ block: "start" });
    };
    back.addEventListener("click", () => turn(-1));
    on.addEventListener("click", () => turn(1));
    search.addEventListener("input", () => { page = 0; draw(); });
    sides.forEach((button) => button.addEventListener("click", () => {
      side = button.dataset.side;
      page = 0;
      draw();
    }));

    // A cell that a spreadsheet would take for a formula gets an apostrophe.
    const cell = (value) => {
      const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
      return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    document.querySelector("#download").addEventListener("click", () => {
      const columns = ["doc_id", "side", "question", "gold", "baseline", "steered", "scores"];
      const lines = found().map((example) => columns.map((name) => cell(String(example[name]))).join(","));
      const link = element("a");
      const content = new Blob([`${[columns.join(","), ...lines].join("\n")}\n`], { type: "text/csv" });
      link.href = URL.createObjectURL(content);
      link.download = "examples.csv";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    });

    const restore = () => {
      const asked = fromAddress();
      const wanted = asked.get("side") ?? "";
      side = sides.some((button) => button.dataset.side === wanted) ? wanted : "";
      search.value = asked.get("q") ?? "";
      page = Number(asked.get("page") ?? 1) - 1 || 0;
      draw();
    };
    addEventListener("hashchange", restore);
    restore();
  }
})();
