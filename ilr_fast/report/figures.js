"use strict";
// Draws the figures when they come into view, in the colours of the page, and saves them.
const root = document.documentElement;
const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;

async function unpack(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), c => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

function report(problem) {
  const place = document.getElementById("problem");
  place.textContent = "Figures or dialogues can't be shown: " + problem;
  place.hidden = false;
}

const ready = (async () => {
  if (!window.DecompressionStream) throw new Error("this needs a browser from 2023 or later");
  if (!document.getElementById("library").textContent) throw new Error("the library is missing");
  const [library, figures] = await Promise.all([unpack("library"), unpack("figures")]);
  new Function(library)();
  return JSON.parse(figures);
})();
ready.catch(report);

async function embed(place, number, theme) {
  const {figures, config} = await ready, {spec, legend} = figures[number];
  const longest = Math.max(0, ...legend.map(name => Math.min(name.length, 30)));
  const columns = Math.max(1, Math.floor((place.clientWidth - 50) / (6.6 * longest + 38)));
  const themed = {...config[theme], legend: {...config[theme].legend, columns}};
  const drawn = await vegaEmbed(place, structuredClone(spec), {
    actions: false, renderer: "svg", config: themed, tooltip: {theme: "page", offsetX: 14, offsetY: 14},
  });
  return drawn.view;
}

async function draw(plot) {
  const theme = isDark() ? "dark" : "light";
  if (plot.dataset.drawn === theme) return;
  plot.dataset.drawn = theme;
  if (plot.view) plot.view.finalize();
  plot.view = await embed(plot, plot.dataset.figure, theme);
  plot.style.minHeight = 0;  // it kept the place until now
}

// What is saved is for paper: in the light colours, whatever the page has.
async function lit(plot, use) {
  const place = document.createElement("div");
  Object.assign(place.style, {position: "absolute", left: "-10000px", width: plot.clientWidth + "px"});
  document.body.append(place);
  const view = await embed(place, plot.dataset.figure, "light");
  try { return await use(view); } finally { view.finalize(); place.remove(); }
}

const plots = [...document.querySelectorAll("[data-figure]")];
const inView = new IntersectionObserver(entries => {
  for (const entry of entries) {
    entry.target.isNear = entry.isIntersecting;
    if (entry.isIntersecting) draw(entry.target).catch(report);
  }
}, {rootMargin: "500px"});
plots.forEach(plot => inView.observe(plot));
const redraw = () => plots.filter(plot => plot.isNear).forEach(plot => draw(plot).catch(report));
addEventListener("beforeprint", () => plots.forEach(plot => draw(plot).catch(report)));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
document.getElementById("theme").onclick = () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  redraw();
};

const quoted = value => {
  const text = value === null || value === undefined ? "" : String(value);
  return /[",\n\r]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
};
function csv({spec, columns}) {
  const keys = Object.keys(columns).filter(key => spec.data.values.some(row => row[key] !== null && row[key] !== undefined));
  const lines = [keys.map(key => quoted(columns[key])), ...spec.data.values.map(row => keys.map(key => quoted(row[key])))];
  return lines.map(line => line.join(",")).join("\n") + "\n";
}

function save(content, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

document.addEventListener("click", async event => {
  const kind = event.target.dataset?.export;
  if (!kind) return;
  try {
    const plot = event.target.closest("figure").querySelector("[data-figure]");
    const figure = (await ready).figures[plot.dataset.figure];
    const name = figure.title.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") + "." + kind.toLowerCase();
    if (kind === "CSV") return save(new Blob([csv(figure)], {type: "text/csv"}), name);
    if (kind === "SVG") return save(new Blob([await lit(plot, view => view.toSVG())], {type: "image/svg+xml"}), name);
    const canvas = await lit(plot, view => view.toCanvas(3));
    canvas.toBlob(blob => save(blob, name), "image/png");
  } catch (problem) { report(problem); }
});
