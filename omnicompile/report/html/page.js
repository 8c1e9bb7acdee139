(() => {
  "use strict";
  const all = (query, from = document) => [...from.querySelectorAll(query)];
  const shown = (query) => all(query).forEach((element) => { element.hidden = false; });

  // What SVG titles say, at once and beside the pointer.
  const tip = document.getElementById("tip");
  const told = new WeakMap();
  all("svg title").forEach((title) => {
    if (title.id) return;
    told.set(title.parentNode, title.textContent);
    title.remove();
  });
  const saying = (element) => {
    for (let at = element; at && at !== document; at = at.parentNode) if (told.has(at)) return told.get(at);
    return "";
  };
  document.addEventListener("pointermove", (event) => {
    const words = saying(event.target);
    tip.hidden = !words;
    if (!words) return;
    tip.textContent = words;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    const below = event.clientY + 18 + tip.offsetHeight < document.documentElement.clientHeight;
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 12, room))}px`;
    tip.style.top = `${below ? event.clientY + 18 : event.clientY - tip.offsetHeight - 12}px`;
  });
  document.addEventListener("pointerleave", () => { tip.hidden = true; });

  // The timeline's zoom: the drawing gets wider than its frame.
  const frame = document.querySelector(".frame");
  const drawing = frame.querySelector("svg.lanes");
  const levels = [1, 2, 4, 8, 16, 32];
  let level = 0;
  const labels = () => all("svg svg", frame).forEach((phase) => {
    const words = phase.querySelector("text");
    words.style.visibility = phase.getBoundingClientRect().width > 0 &&
      words.getComputedTextLength() + 10 > phase.querySelector("rect").getBoundingClientRect().width ? "hidden" : "visible";
  });
  const zoom = (next, x = frame.clientWidth / 2) => {
    const old = levels[level];
    level = Math.max(0, Math.min(levels.length - 1, next));
    const factor = levels[level] / old;
    const left = (frame.scrollLeft + x) * factor - x;
    drawing.setAttribute("class", `lanes z${levels[level]}`);
    drawing.style.width = `${100 * levels[level]}%`;
    frame.scrollLeft = left;
    document.querySelector(".zoom output").textContent = `${levels[level]}x`;
    labels();
  };
  const asked = { in: () => zoom(level + 1), out: () => zoom(level - 1), all: () => zoom(0) };
  all("[data-zoom]").forEach((button) => button.addEventListener("click", asked[button.dataset.zoom]));
  frame.addEventListener("keydown", (event) => {
    if (event.key === "+" || event.key === "=") asked.in();
    if (event.key === "-") asked.out();
    if (event.key === "0") asked.all();
  });
  frame.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(level + (event.deltaY < 0 ? 1 : -1), event.clientX - frame.getBoundingClientRect().left);
  }, { passive: false });
  window.addEventListener("resize", labels);
  labels();

  // Copying, also where a page from a file may not use the clipboard.
  const select = (element) => {
    const range = document.createRange();
    range.selectNodeContents(element);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
  };
  const copy = async (button) => {
    const source = document.getElementById(button.dataset.copy);
    let done = true;
    try {
      await navigator.clipboard.writeText(source.textContent);
    } catch {
      select(source);
      done = document.execCommand("copy");
    }
    button.textContent = done ? "Copied" : "Press Ctrl+C";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };
  all("[data-copy]").forEach((button) => button.addEventListener("click", () => copy(button)));
  shown(".zoom, .hint, [data-copy]");

  // On paper everything is open.
  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = all("details:not([open])");
    closed.forEach((details) => { details.open = true; });
  });
  window.addEventListener("afterprint", () => closed.forEach((details) => { details.open = false; }));
})();
