/* The order of search results: Sphinx's own, with the changelog, which has every word, behind all other pages. */
var Scorer = {
  score: ([docname, title, anchor, descr, score]) => (docname === "changelog" ? score - 1000 : score),
  // Sphinx's defaults, which a scorer has to repeat.
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
