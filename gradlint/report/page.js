"use strict";
// The page reads without this: it adds copying, filtering, sorting, and folding all at once.
for (const pre of document.querySelectorAll(".fixes pre")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    const text = pre.querySelector("code").textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(pre.querySelector("code"));
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  pre.append(button);
}

for (const filters of document.querySelectorAll(".filters")) {
  filters.hidden = false;
  filters.addEventListener("change", ({ target }) => {
    for (const group of filters.parentElement.querySelectorAll(`.group[data-level="${target.value}"]`)) {
      group.hidden = !target.checked;
    }
  });
}

for (const ladder of document.querySelectorAll(".ladder")) {
  const parts = [...ladder.querySelectorAll("details.part")];
  if (!parts.length) continue;
  const button = document.createElement("button");
  button.type = "button";
  const name = () => { button.textContent = parts.every((part) => part.open) ? "Fold all" : "Unfold all"; };
  button.addEventListener("click", () => {
    const open = !parts.every((part) => part.open);
    for (const part of parts) part.open = open;
    name();
  });
  ladder.addEventListener("toggle", name, true);
  name();
  ladder.querySelector("h2").append(button);
}

const reveal = () => {
  const target = document.getElementById(location.hash.slice(1));
  for (let part = target; part; part = part.parentElement) {
    if (part.tagName === "DETAILS") part.open = true;
  }
  target?.scrollIntoView({ block: "center" });
};
addEventListener("hashchange", reveal);
if (location.hash) reveal();

const value = (row, column) => row.cells[column].textContent.trim();
for (const head of document.querySelectorAll(".sortable th[scope=col]")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0];
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const column = head.cellIndex;
    const order = head.classList.contains("n")
      ? (a, b) => (parseFloat(value(a, column)) || 0) - (parseFloat(value(b, column)) || 0)
      : (a, b) => value(a, column).localeCompare(value(b, column), "en", { numeric: true });
    body.append(...[...body.rows].sort((a, b) => (up ? order(a, b) : order(b, a))));
  });
}
