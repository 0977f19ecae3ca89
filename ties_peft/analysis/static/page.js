"use strict";
// Names from files reach the page as text nodes and attribute values only, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main");
const charts = [];

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

function section(title, ...children) {
  const id = "section-" + main.children.length;
  main.append(element("section", { "aria-labelledby": id }, element("h2", { id }, title), ...children));
}

const muted = (text) => element("p", { class: "muted" }, text);
const cut = (text, length) => (text.length > length ? text.slice(0, length - 1) + "…" : text);
const middle = (text, length) => (text.length > length ? text.slice(0, Math.floor(length / 2) - 1) + "…" + text.slice(-Math.ceil(length / 2)) : text);
const tail = (text, length) => (text.length > length ? "…" + text.slice(1 - length) : text);

function shown(value, format) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (typeof value === "string") return value;
  if (format === "percent") return (100 * value).toFixed(1) + " %";
  if (format === "points") return (value > 0 ? "+" : "") + (100 * value).toFixed(1) + " points";
  if (format === "degrees") return value.toFixed(1) + "°";
  if (format === "whole") return String(value);
  return Math.abs(value) >= 100 ? value.toFixed(0) : Math.abs(value) >= 10 ? value.toFixed(1) : value.toFixed(3);
}

function chooser(label, options, change) {
  const select = element("select", { onchange: () => change(Number(select.value)) });
  options.forEach((text, number) => select.append(element("option", { value: number }, cut(text, 60))));
  return [element("label", {}, label, select), select];
}

// A chart is drawn anew when its width or the theme changes. draw(width) returns what Plot makes.
function chart(draw) {
  const holder = element("div", { class: "chart" });
  let last = 0;
  const redraw = () => {
    last = holder.clientWidth;
    if (last) holder.replaceChildren(draw(last));
  };
  new ResizeObserver(() => holder.clientWidth !== last && redraw()).observe(holder);
  charts.push(redraw);
  return [holder, redraw];
}

function table(caption, columns, rows, filtered = false) {
  const body = element("tbody");
  const wanted = element("input", { type: "search", oninput: fill });
  let order = rows.map((_, place) => place);
  function fill() {
    const words = wanted.value.toLowerCase();
    const kept = order.filter((place) => !words || String(rows[place][0]).toLowerCase().includes(words));
    body.replaceChildren(...kept.map((place) => element("tr", {}, ...rows[place].map(cell))));
  }
  const cell = (value, number) =>
    element(number ? "td" : "th", number ? {} : { scope: "row", style: "font-weight: 400" }, shown(value, columns[number].format));
  const heads = columns.map((column, number) => {
    const sort = element("button", { type: "button", onclick: () => reorder(number) }, column.label);
    return element("th", { scope: "col", "aria-sort": "none", title: column.meaning || null }, sort);
  });
  function reorder(number) {
    const up = heads[number].getAttribute("aria-sort") === "descending" || (columns[number].text && heads[number].getAttribute("aria-sort") !== "ascending");
    heads.forEach((head, place) => head.setAttribute("aria-sort", place !== number ? "none" : up ? "ascending" : "descending"));
    const sign = up ? 1 : -1;
    order.sort((a, b) => {
      const [one, two] = [rows[a][number], rows[b][number]];
      if (one === null || two === null) return (one === null) - (two === null);
      return sign * (typeof one === "string" ? one.localeCompare(two, "en", { numeric: true }) : one - two);
    });
    fill();
  }
  fill();
  const parts = element("div", {}, element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    element("table", {}, element("caption", {}, caption), element("thead", {}, element("tr", {}, ...heads)), body)));
  if (filtered) parts.prepend(element("div", { class: "controls" }, element("label", {}, "Show rows with", wanted)));
  return parts;
}

function copied(text, label) {
  const said = element("span", { role: "status", class: "muted" });
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text());
      said.textContent = " copied";
    } catch {
      said.textContent = " select the text and copy it: this browser forbids the button";
    }
  };
  return element("p", {}, element("button", { type: "button", onclick: copy }, label), said);
}

// The ends of a scale of colours for values, with 0 in the middle where a figure is diverging. It goes to `figure.reach` at
// least, so that differences of no importance look alike.
function scale(figure, values) {
  const known = values.filter((value) => value !== null && Number.isFinite(value));
  const top = Math.max(1e-9, figure.reach, ...known.map(Math.abs));
  return figure.diverging ? [-top, top] : [Math.min(0, ...known), top];
}

// Black or white, whichever has the larger contrast (WCAG 2) to the colour of a value.
function ink({ diverging }, [low, high], value) {
  const part = (value - low) / (high - low);
  const { r, g, b } = d3.rgb(diverging ? d3.interpolateRdBu(1 - part) : d3.interpolateViridis(part));
  const [red, green, blue] = [r, g, b].map((own) => (own <= 10 ? own / 255 / 12.92 : ((own / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? "black" : "white";
}

function colour(figure, domain) {
  const { diverging } = figure;
  const percent = figure.format === "percent" || figure.format === "points";
  return {
    type: diverging ? "diverging" : "linear", scheme: diverging ? "RdBu" : "viridis", reverse: diverging,
    domain, legend: true, label: figure.label, unknown: "transparent", width: 290, marginLeft: 24, marginRight: 24, ticks: 4,
    ...(percent ? { percent: true, domain: domain.map((end) => 100 * end), label: figure.label + (figure.format === "points" ? " (points)" : " (%)") } : {}),
  };
}

// What stands at the top

function overview() {
  for (const text of data.facts) main.append(element("p", {}, text));
  if (!data.advice.length) return;
  const items = data.advice.map(({ text, option, severity }) => element("li", { class: severity },
    ...(severity === "warning" ? [element("b", {}, "Warning. ")] : []), text,
    ...(option ? [" ", element("code", {}, option)] : [])));
  section("Advice", element("ul", { class: "advice" }, ...items));
}

// Adapters and pairs

function adapters() {
  section("Adapters", table("One row for each adapter", data.adapters.columns, data.adapters.rows));
}

function pairs() {
  const { figures, values } = data.pairs;
  if (!figures.length || data.names.length < 2) return;
  let figure = figures[0];
  const of = (a, b) => values[figure.key].find(([i, j]) => (i === a && j === b) || (i === b && j === a))?.[2] ?? null;
  const meaning = muted(figure.meaning);
  const [holder, redraw] = chart((width) => {
    const narrow = width < 560 || data.names.length > 12;
    const label = (place) => (narrow ? String(place + 1) : `${place + 1} ${middle(data.names[place], 14)}`);
    const cells = data.names.flatMap((_, a) => data.names.map((_, b) => ({ a, b, value: a === b ? null : of(a, b) }))).filter((cell) => cell.a > cell.b);
    const size = Math.min(width, 90 + data.names.length * 64);
    const row = Math.max(22, Math.min(40, size / data.names.length));
    const text = data.names.length <= 8 && width >= 560;
    const range = scale(figure, cells.map((cell) => cell.value));
    return Plot.plot({
      width: size, height: row * (data.names.length - 1) + 90, marginLeft: narrow ? 36 : 130, marginBottom: narrow ? 30 : 60,
      ariaLabel: `${figure.label} of every pair of adapters. The table of pairs below has the same values.`,
      style: { fontSize: "13px" },
      x: { domain: d3.range(data.names.length - 1), tickFormat: label, label: null, tickRotate: narrow ? 0 : -25 },
      y: { domain: d3.range(1, data.names.length), tickFormat: label, label: null },
      color: colour(figure, range),
      marks: [
        Plot.cell(cells, { x: "b", y: "a", fill: "value", inset: 1, tip: true, title: (cell) => `${data.names[cell.b]}\n${data.names[cell.a]}\n${figure.label}: ${shown(cell.value, figure.format)}` }),
        ...(text ? [Plot.text(cells, { x: "b", y: "a", text: (cell) => shown(cell.value, figure.format).replace(" points", ""), fill: (cell) => ink(figure, range, cell.value), pointerEvents: "none" })] : []),
      ],
    });
  });
  const [choice] = chooser("Figure", figures.map((one) => one.label), (number) => {
    figure = figures[number];
    meaning.textContent = figure.meaning;
    redraw();
  });
  const columns = [{ label: "pair", text: true }, ...figures];
  const rows = values[figures[0].key].map(([i, j], place) => [`${data.names[i]} and ${data.names[j]}`, ...figures.map((one) => values[one.key][place][2])]);
  section("Pairs of adapters", element("div", { class: "controls" }, choice), meaning, holder, muted(data.names.map((name, place) => `${place + 1} ${cut(name, 40)}`).join(", ")),
    element("details", {}, element("summary", {}, `Table of ${rows.length} pairs`), table("One row for each pair", columns, rows, true)));
}

// Layer × module × pair

function modules({ title, what, series, figures }) {
  if (!figures.length) return;
  const { layers, kinds: labels, modules: places } = data.places;
  let figure = figures[0];
  let chosen = series.length > 1 ? -1 : 0;
  const read = (one, number, place) => {
    const value = one.values[number]?.[place];
    return value === null || value === undefined ? null : value / one.factor;
  };
  const value = (one, place) => {
    if (chosen >= 0) return read(one, chosen, place);
    const known = series.map((_, number) => read(one, number, place)).filter((own) => own !== null);
    return known.length ? d3.mean(known) : null;
  };
  const kinds = Object.keys(labels);
  const meaning = muted(figure.meaning);
  const [holder, redraw] = chart((width) => {
    const cells = places.map((place, number) => ({ ...place, value: value(figure, number) })).filter((cell) => cell.value !== null);
    const wide = Math.min(width, 110 + kinds.length * 90);
    const letters = Math.min(24, Math.max(...Object.values(labels).map((label) => label.length)));
    return Plot.plot({
      width: wide, height: Math.max(12, Math.min(30, 900 / layers.length)) * layers.length + 30 + 7 * letters, marginTop: 10, marginBottom: 20 + 7 * letters,
      marginLeft: 16 + 8 * Math.max(6, ...layers.map((layer) => Math.min(18, layer.length))),
      ariaLabel: `${figure.label} of each module: layers from top to bottom, kinds of module from left to right. The table below has the same values.`,
      style: { fontSize: "13px" },
      x: { domain: kinds, label: null, tickRotate: -55, tickFormat: (kind) => tail(labels[kind], letters) },
      y: { domain: layers, label: "layer", tickFormat: (layer) => tail(layer, 18) },
      color: colour(figure, scale(figure, cells.map((cell) => cell.value))),
      marks: [Plot.cell(cells, { x: "kind", y: "layer", fill: "value", inset: 0.5, tip: true, title: (cell) => `${cell.name}\n${cell.shape}\n${figure.label}: ${shown(cell.value, figure.format)}` })],
    });
  });
  const listed = element("div");
  const list = () => listed.replaceChildren(table("One row for each module", [{ label: "module", text: true }, { label: "layer", text: true }, ...figures],
    places.map((place, number) => [place.name, place.layer, ...figures.map((one) => value(one, number))]), true));
  const details = element("details", { ontoggle: () => details.open && list() }, element("summary", {}, `Table of ${places.length} modules`), listed);
  const [figureChoice] = chooser("Figure", figures.map((one) => one.label), (number) => {
    figure = figures[number];
    meaning.textContent = figure.meaning;
    redraw();
  });
  const all = series.length > 1 ? ["mean over all"] : [];
  const [seriesChoice] = chooser(what, [...all, ...series], (number) => {
    chosen = number - all.length;
    redraw();
    if (details.open) list();
  });
  section(title, element("div", { class: "controls" }, figureChoice, ...(series.length > 1 ? [seriesChoice] : [])), meaning, holder, details);
}

// Methods

function retention() {
  if (!data.retention.rows.length) return;
  const figures = data.retention.figures;
  let figure = figures[0];
  const methods = [...new Set(data.retention.rows.map((row) => row.method))];
  const meaning = muted(figure.meaning);
  const [holder, redraw] = chart((width) => {
    const left = Math.min(150, width / 3);
    const letters = Math.floor(left / 8);
    const bars = 18 * data.names.length, gap = 34;
    return Plot.plot({
      width: Math.min(width, 820), height: methods.length * (bars + gap) + 74, marginLeft: left, marginRight: 16, marginTop: gap, marginBottom: 44,
      ariaLabel: `${figure.label} of each adapter, for each method. The table below has the same values.`,
      style: { fontSize: "13px" },
      x: { label: figure.label, grid: true, nice: true }, y: { label: null, tickFormat: (place) => middle(data.names[place], letters) },
      fy: { axis: null, domain: methods, padding: gap / (bars + gap) },
      marks: [
        Plot.text(methods, { fy: (method) => method, text: (method) => cut(method, 40), frameAnchor: "top-left", dy: -18, dx: 2, fontWeight: 600, fontSize: 14 }),
        Plot.barX(data.retention.rows, { y: "adapter", fy: "method", x: figure.key, fill: "#4269d0", inset: 1, tip: true, title: (row) => `${row.method}: ${data.names[row.adapter]}\n` + figures.map((one) => `${one.label}: ${shown(row[one.key])}`).join("\n") }),
        Plot.ruleX([0]),
        ...(figure.key === "projection" ? [Plot.ruleX([data.retention.low], { stroke: "currentColor", strokeDasharray: "4 3" })] : []),
      ],
    });
  });
  const [choice] = chooser("Figure", figures.map((one) => one.label), (number) => {
    figure = figures[number];
    meaning.textContent = figure.meaning;
    redraw();
  });
  const columns = [{ label: "adapter", text: true }, { label: "method", text: true }, ...figures];
  const rows = data.retention.rows.map((row) => [data.names[row.adapter], row.method, ...figures.map((one) => row[one.key])]);
  section("What is left of each adapter", element("div", { class: "controls" }, choice), meaning, holder,
    element("details", {}, element("summary", {}, `Table of ${rows.length} rows`), table("One row for each adapter and method", columns, rows, true)));
}

function energy() {
  if (!data.curves.length) return;
  const rows = data.curves.flatMap(({ method, energies }) => energies.map((share, place) => ({ method, rank: place + 1, share: 100 * share })));
  const [holder] = chart((width) => Plot.plot({
    width: Math.min(width, 820), height: 340, marginTop: 32, marginRight: 20, marginLeft: 46, marginBottom: 44, style: { fontSize: "13px" },
    ariaLabel: "Share of the merged energy that a rank keeps, for each method. The table below has some of the values.",
    x: { label: "rank", grid: true }, y: { label: "energy kept (%)", grid: true, domain: [0, 100] }, color: { legend: true, scheme: "Observable10", domain: data.curves.map((curve) => curve.method) },
    marks: [
      Plot.line(rows, { x: "rank", y: "share", stroke: "method", strokeWidth: 2, marker: rows.length < 300 ? "dot" : null }),
      Plot.tip(rows, Plot.pointer({ x: "rank", y: "share", maxRadius: 200, title: (row) => `${row.method}\nrank ${row.rank} keeps ${row.share.toFixed(1)} %` })),
    ],
  }));
  const most = Math.max(...data.curves.map((curve) => curve.energies.length));
  const ranks = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512].filter((rank) => rank < most).concat(most);
  const columns = [{ label: "method", text: true }, ...ranks.map((rank) => ({ label: `rank ${rank}`, format: "percent" }))];
  const values = data.curves.map(({ method, energies }) => [method, ...ranks.map((rank) => energies[rank - 1] ?? null)]);
  section("Energy against rank", muted("The share of the squared norm of the merged task vector that the best approximation of each rank keeps, over all modules."), holder,
    element("details", {}, element("summary", {}, "Table of ranks"), table("One row for each method", columns, values)));
}

function commands() {
  if (!data.commands.length) return;
  let chosen = data.commands[0];
  const command = element("pre", { tabindex: 0, "aria-label": "command" }), recipe = element("pre", { tabindex: 0, "aria-label": "recipe" });
  const fill = () => {
    command.textContent = chosen.command;
    recipe.textContent = chosen.recipe;
  };
  const [choice] = chooser("Method", data.commands.map((one) => one.method), (number) => {
    chosen = data.commands[number];
    fill();
  });
  fill();
  section("To repeat it", ...(data.commands.length > 1 ? [element("div", { class: "controls" }, choice)] : []), command, copied(() => chosen.command, "Copy the command"),
    muted("The same as a recipe:"), recipe, copied(() => chosen.recipe, "Copy the recipe"));
}

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  charts.forEach((redraw) => redraw());
});
overview();
adapters();
retention();
energy();
pairs();
data.modules.forEach(modules);
commands();
