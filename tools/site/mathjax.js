// Equations in text only: code, tables and printed numbers keep their dollar signs.
window.MathJax = {
  tex: { inlineMath: [["$", "$"], ["\\(", "\\)"]], displayMath: [["$$", "$$"], ["\\[", "\\]"]], processEscapes: true },
  chtml: { matchFontHeight: false, scale: 1.1 },  // the height of a sans serif's x makes it too large
  options: { ignoreHtmlClass: "output_wrapper|input", enableMenu: false },
};
