"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const table = byId("table"), body = table.tBodies[0], rows = [...body.rows];
  const filter = byId("filter"), status = byId("status");
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

  const apply = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const fits = words.every((word) => texts.get(row).includes(word)) && (!status.value || row.dataset.status === status.value);
      row.hidden = !fits;
      shown += fits;
    }
    byId("count").textContent = `${shown} of ${rows.length}`;
    byId("nothing").hidden = shown > 0;
  };
  filter.addEventListener("input", apply);
  status.addEventListener("change", apply);

  const key = (row, column, kind) => {
    const cell = row.cells[column];
    if (kind === "text") return cell.textContent.trim() || null;
    const value = cell.dataset.value, number = value === "inf" ? Infinity : Number(value);
    return value === "" || Number.isNaN(number) ? null : number;
  };
  const compare = (a, b) => typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : a - b || 0;
  table.tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const header = button.parentElement, column = header.cellIndex, kind = button.dataset.sort;
    const up = header.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    const keyed = rows.map((row, place) => ({ row, place, key: key(row, column, kind) }));
    keyed.sort((a, b) => {
      if (a.key === null || b.key === null) return (a.key === null) - (b.key === null) || a.place - b.place;
      return (up ? 1 : -1) * compare(a.key, b.key) || a.place - b.place;
    });
    body.append(...keyed.map((item) => item.row));
  });

  // A cell of the map leads to a row that the filter may hide.
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-layer]");
    if (!link) return;
    filter.value = "";
    status.value = "";
    apply();
  });

  // Paper shows what is closed, too, but for long lists of pictures.
  const folded = () => document.querySelectorAll("details:not(.many)");
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...folded()].filter((details) => !details.open);
    for (const details of closed) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of closed) details.open = false;
  });

  // A drawing that is wider than its place shows its middle first.
  const draw = (place, number) => {
    place.replaceChildren(byId(`drawing-${number}`).content.cloneNode(true));
    for (const scroll of place.querySelectorAll(".scroll")) scroll.scrollLeft = (scroll.scrollWidth - scroll.clientWidth) / 2;
  };
  for (const place of document.querySelectorAll(".block .pair")) {
    place.closest("details").addEventListener("toggle", () => {
      if (!place.hasChildNodes()) draw(place, place.dataset.drawing);
    });
  }

  const panel = byId("drawing");
  if (!panel) return;
  let opener = null;
  const press = (block) => {
    for (const button of document.querySelectorAll("button.open")) button.setAttribute("aria-pressed", String(button.dataset.block === block));
  };
  const close = () => {
    panel.hidden = true;
    press(null);
    if (opener) opener.focus();
  };
  for (const button of document.querySelectorAll("button.open")) {
    button.addEventListener("click", () => {
      opener = button;
      byId("drawing-name").textContent = button.dataset.block || "outside the blocks";
      panel.hidden = false;
      draw(byId("pair"), button.dataset.drawing);
      press(button.dataset.block);
      panel.scrollIntoView({ block: "start" });
      panel.focus({ preventScroll: true });
    });
  }
  byId("close").addEventListener("click", close);
  panel.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
  });
})();
