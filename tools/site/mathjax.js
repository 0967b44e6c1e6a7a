// Equations in text only: code, tables and printed numbers keep their dollar signs.
window.MathJax = {
  tex: { inlineMath: [["$", "$"], ["\\(", "\\)"]], displayMath: [["$$", "$$"], ["\\[", "\\]"]], processEscapes: true },
  options: { ignoreHtmlClass: "output_wrapper|input", enableMenu: false },
};
