/* Paper is light: a browser prints no dark ground, which would leave a dark theme's light text on white. */
(() => {
  "use strict";
  const root = document.documentElement;
  let theme = "";
  addEventListener("beforeprint", () => {
    theme = root.dataset.theme;
    root.dataset.theme = "light";
  });
  addEventListener("afterprint", () => {
    root.dataset.theme = theme;
  });
})();
