/* Refusal explorer. Reads window.DERTA_EXPLORER (derta_lib/explorer.py); every text goes in through textContent. */
(() => {
  "use strict";

  const percent = (value) => (value > 0 && value < 0.005 ? "under 1 %" : `${Math.round(value * 100)} %`);
  const shown = (token) => token.replace(/\n/g, "↵\n");
  const spoken = (token) => (token === "\n" ? "line break" : token.trim() || "space");

  function element(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in node) node[name] = value;
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }

  function start(root, data) {
    const state = { query: 0, depth: 0, token: 0, hidden: new Set() };
    const query = () => data.queries[state.query];
    const methods = () => data.methods.filter(({ name }) => name in query().runs && !state.hidden.has(name));

    const choice = element("select", { id: "explorer-query" });
    data.queries.forEach(({ text }, index) => choice.append(element("option", { value: index, textContent: text })));
    const slider = element("input", { id: "explorer-depth", type: "range", min: 0, step: 1 });
    const boxes = data.methods.map(({ name, label }) => {
      const box = element("input", { type: "checkbox", checked: true, value: name });
      box.addEventListener("change", () => {
        if (box.checked) state.hidden.delete(name);
        else state.hidden.add(name);
        draw();
        if (status.textContent) tell();
      });
      return element("label", {}, box, label);
    });
    const depthLabel = element("label", { htmlFor: "explorer-depth" });
    const asked = element("p", { className: "query" });
    const scale = element("p", { className: "scale" }, "P(“Sorry” starts here): ");
    for (const value of [0, 0.25, 0.5, 0.75, 1]) scale.append(swatch(element("span"), value, ` ${value * 100} % `));
    const status = element("p", { className: "status", role: "status", "aria-live": "polite" });
    const panels = element("div", { className: "panels" });
    root.replaceChildren(
      element("div", { className: "controls" },
        element("div", {}, element("label", { htmlFor: "explorer-query", textContent: "Query" }), choice),
        element("div", {}, depthLabel, slider),
        element("fieldset", {}, element("legend", { textContent: "Methods" }), element("div", {}, ...boxes))),
      asked, scale, status, panels);

    function swatch(node, value, text) {
      node.className = `token ${node.className}`;
      node.style.setProperty("--p", value);
      node.textContent = text;
      return node;
    }

    // The panels are drawn anew: where the choice was made in `name`'s strip, the focus goes back to its token.
    function choose(depthIndex, name = "") {
      state.depth = Math.max(0, Math.min(query().depths.length - 1, depthIndex));
      draw();
      if (name) panels.querySelector(`[data-method="${name}"] [data-index="${state.token}"]`).focus({ preventScroll: true });
      tell();
    }

    function tell() {
      const depth = query().depths[state.depth];
      const told = methods().map(({ name, label }) => `${label} ${chance(name, depth)}`).join(", ");
      status.textContent = told ? `After ${depth} tokens of the harmful response: ${told}` : "";
    }

    function chance(name, depth) {
      const p = query().runs[name].p;
      return depth < p.length ? percent(p[depth]) : "not measured past the end";
    }

    function say(label, name, index) {
      status.textContent = `${label}, token ${index + 1} of ${query().tokens.length}, ` +
        `“${spoken(query().tokens[index])}”: ${percent(query().runs[name].p[index])} that “Sorry” starts here instead`;
    }

    function panel({ name, label }) {
      const { tokens, depths, runs } = query();
      const depth = depths[state.depth];
      const strip = element("div", { className: "tokens", role: "listbox", "aria-orientation": "horizontal" });
      strip.setAttribute("aria-label", `${label}: tokens of the harmful response by P(“Sorry”)`);
      tokens.forEach((token, index) => {
        const item = element("span", { role: "option", tabIndex: index === state.token ? 0 : -1 });
        item.className = [index >= depth ? "later" : "", index === depth ? "fork" : ""].join(" ");
        item.setAttribute("aria-selected", String(index === depth));
        item.setAttribute("aria-label", `${spoken(token)}, ${percent(runs[name].p[index])}`);
        item.title = percent(runs[name].p[index]);
        item.dataset.index = index;
        strip.append(swatch(item, runs[name].p[index], shown(token)));
      });
      strip.addEventListener("focusin", (event) => {
        const index = Number(event.target.dataset.index);
        strip.children[state.token]?.setAttribute("tabindex", "-1");
        event.target.setAttribute("tabindex", "0");
        state.token = index;
        say(label, name, index);
      });
      const nearest = (index) =>
        depths.reduce((best, d, at) => (Math.abs(d - index) < Math.abs(depths[best] - index) ? at : best), 0);
      strip.addEventListener("click", (event) => {
        if ("index" in event.target.dataset) choose(nearest(Number(event.target.dataset.index)), name);
      });
      strip.addEventListener("keydown", (event) => {
        const last = tokens.length - 1;
        const moves = { ArrowLeft: state.token - 1, ArrowRight: state.token + 1, Home: 0, End: last };
        if (event.key in moves) {
          event.preventDefault();
          strip.children[Math.max(0, Math.min(last, moves[event.key]))].focus();
        } else if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          choose(nearest(state.token), name);
        }
      });
      const box = element("section", { className: "panel" },
        element("h2", { textContent: label }), strip,
        element("p", { className: "chance",
          textContent: `P(“Sorry”) after ${depth} tokens: ${chance(name, depth)}. It goes on:` }),
        element("p", { className: "says", tabIndex: 0, textContent: runs[name].goes_on[state.depth] || "(nothing)" }));
      box.querySelector(".says").setAttribute("aria-label", `What ${label} says after ${depth} tokens`);
      box.querySelector(".says").setAttribute("role", "region");
      box.setAttribute("aria-label", label);
      box.dataset.method = name;
      return box;
    }

    function draw() {
      const { text, depths, tokens } = query();
      const depth = depths[state.depth];
      slider.max = depths.length - 1;
      slider.value = state.depth;
      slider.setAttribute("aria-valuetext", `${depth} of ${tokens.length} tokens`);
      depthLabel.textContent = `Depth: the model goes on after ${depth} of ${tokens.length} tokens of a harmful response`;
      asked.textContent = text;
      const drawn = methods().map(panel);
      panels.replaceChildren(...(drawn.length ? drawn : [element("p", { textContent: "Choose a method above." })]));
    }

    choice.addEventListener("change", () => {
      Object.assign(state, { query: Number(choice.value), depth: 0, token: 0 });
      choose(0);
    });
    slider.addEventListener("input", () => choose(Number(slider.value)));
    draw();
  }

  const root = document.getElementById("derta-explorer");
  if (root && window.DERTA_EXPLORER?.queries.length) start(root, window.DERTA_EXPLORER);
  else if (root) root.textContent = "The explorer's data did not load; build the book again.";
})();
