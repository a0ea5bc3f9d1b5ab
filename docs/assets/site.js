/* What the theme's templates and script leave to mend: neither the buttons of each block of code nor each part of the table of
   contents is a landmark of its own, and what is wider than the window can be scrolled by keys. */
const parts = "nav.md-code__nav:not([role]), .md-nav--secondary nav:not([role])";
const mend = () => {
  document.querySelectorAll(parts).forEach((each) => { each.setAttribute("role", "none"); each.removeAttribute("aria-label"); });
  document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])").forEach((each) => each.setAttribute("tabindex", "0"));
};
new MutationObserver(mend).observe(document.body, { childList: true, subtree: true });
mend();
