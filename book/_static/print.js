/* Paper is light: a browser prints no dark ground, which would leave a dark theme's light text on white. And what opens
   on demand, such as the claims' evidence, is open on paper. */
(() => {
  "use strict";
  const root = document.documentElement;
  let theme = "";
  let opened = [];
  addEventListener("beforeprint", () => {
    theme = root.dataset.theme;
    root.dataset.theme = "light";
    opened = [...document.querySelectorAll("details.derta-claim:not([open])")];
    for (const card of opened) card.open = true;
  });
  addEventListener("afterprint", () => {
    root.dataset.theme = theme;
    for (const card of opened) card.open = false;
  });
})();
