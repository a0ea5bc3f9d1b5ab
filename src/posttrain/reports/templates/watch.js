(() => {
  "use strict";
  // The table again every few seconds; what was chosen stays chosen, and what has the focus keeps it.
  const EVERY = 3000;
  const live = document.getElementById("live"), pause = live.querySelector("button"), note = live.querySelector("[role='status']");
  let paused = false;
  pause.hidden = false;
  pause.addEventListener("click", () => {
    paused = !paused;
    pause.setAttribute("aria-pressed", String(paused));
  });
  const boxes = (place) => [...place.querySelectorAll("input[name='run']")];
  const keyOf = (element) => element && (element.value || element.getAttribute("href") || element.textContent);
  const look = async () => {
    if (paused || document.hidden || String(getSelection())) return;
    try {
      const text = await (await fetch(location.href, { cache: "no-store" })).text();
      const next = new DOMParser().parseFromString(text, "text/html").getElementById("shown");
      const shown = document.getElementById("shown");
      note.textContent = "";
      if (!next || next.innerHTML === shown.innerHTML) return;
      const chosen = new Set(boxes(shown).filter((box) => box.checked).map((box) => box.value));
      const focused = shown.contains(document.activeElement) ? keyOf(document.activeElement) : null;
      const across = [...shown.querySelectorAll(".card")].map((card) => card.scrollLeft);
      for (const box of boxes(next)) box.checked = chosen.has(box.value);
      shown.replaceWith(document.adoptNode(next));
      [...next.querySelectorAll(".card")].forEach((card, i) => { card.scrollLeft = across[i] || 0; });
      if (focused) [...next.querySelectorAll("a, input, button")].find((element) => keyOf(element) === focused)?.focus({ preventScroll: true });
      const lead = new DOMParser().parseFromString(text, "text/html").querySelector(".lead");
      if (lead && document.querySelector(".lead")) document.querySelector(".lead").textContent = lead.textContent;
    } catch {
      note.textContent = "posttrain watch does not answer any more.";
    }
  };
  setInterval(look, EVERY);
})();
