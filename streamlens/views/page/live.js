// The charts of a run in a notebook: draws what the kernel tells, and appends rows as they come.
// In front of this stand the Vega bundle and host.js, and what gives the page its own globals back.

const EMPTY = { content: { kind: "whole", number: 0, order: [], charts: [], rows: [] }, numbers: new ArrayBuffer(0) };
const { fit, tiedBy, RANGE } = streamlensCharts;

// Vega's expressions run several times faster compiled, which a page's policy may forbid.
const COMPILES = (() => {
  try {
    return new Function("return true")();
  } catch {
    return false;
  }
})();

const keyOf = (part) => `${part.form === "cell" || part.form === "bad" ? "cell" : "line"} ${part.topic}`;

function flagOf(value) {
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "+inf" : "-inf";
  return value === 0 ? "0" : String(Number(value.toPrecision(3)));
}

const NOT_FINITE = "NaN or infinity";
const drawable = (binding, value) => Number.isFinite(value) && (value > 0 || !binding.log);

// A row of numbers as a row of a data set; nothing where it has no place there.
const MAKE = {
  line: (binding, name, [, step, epoch, value]) =>
    ({ series: name, step, epoch, value: drawable(binding, value) ? value : null, ...binding.constants }),
  flag: (binding, name, [, step, epoch, value]) =>
    drawable(binding, value) ? null : { series: name, step, epoch, flag: flagOf(value) },
  cell: (binding, name, [, step, last, end, value, bad]) =>
    bad ? null : { layer: name, step, last, end, value: Math.max(value, binding.floor) },
  bad: (binding, name, [, step, last, end, , bad]) =>
    bad ? { layer: name, step, last, end, holds: NOT_FINITE } : null,
  topic: (binding, [layer, component], [, step, epoch, value]) => ({
    step, epoch, layer, component, run: "",
    value: Number.isFinite(value) ? value : null,
    flag: Number.isFinite(value) ? "" : flagOf(value),
  }),
};

function* made(binding, rows) {
  const make = MAKE[binding.form];
  for (const row of rows) {
    const name = binding.names[row[0]];
    const record = name == null ? null : make(binding, name, row);
    if (record) yield record;
  }
}

// Where the rows from a step on begin; rows are sorted by their steps.
function from(rows, since) {
  let low = 0;
  let high = rows.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (rows[middle][1] < since) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Everything that the kernel told, whether somebody looks at it or not.
class Board {
  constructor(model) {
    this.model = model;
    this.screens = new Set();
    this.clear();
    this.take(model.get("board") ?? EMPTY);
    this.listener = (content, buffers) => this.take({ content, numbers: buffers[0] });
    model.on("msg:custom", this.listener);
  }

  clear() {
    this.number = 0;
    this.order = [];
    this.charts = new Map();
    this.rows = new Map();
  }

  take({ content, numbers }) {
    const before = this.charts;
    if (content.kind === "whole") {
      if (content.number < this.number) return;
      this.clear();
    } else {
      if (content.number <= this.number) return;
      // Something was lost; a kernel that is busy answers when it can.
      if (content.number > this.number + 1) this.model.send({ kind: "whole" });
    }
    this.number = content.number;
    this.order = content.order;
    const changed = this.takeRows(content.rows, numbers);
    // One that is told again as it was keeps standing, with its zoom and selections.
    const anew = content.charts.filter((chart) => JSON.stringify(chart) !== JSON.stringify(before.get(chart.key)));
    for (const chart of content.charts) this.charts.set(chart.key, chart);
    const drawn = new Set(anew.map((chart) => chart.key));
    for (const screen of this.screens) screen.update(drawn, changed);
  }

  takeRows(told, numbers) {
    const changed = new Map();
    const view = numbers instanceof ArrayBuffer ? new DataView(numbers) : numbers;
    let at = 0;
    for (const part of told) {
      const { since, count, columns } = part;
      const rows = this.rows.get(keyOf(part)) ?? [];
      rows.length = since < 0 ? 0 : from(rows, since);
      for (let i = 0; i < count; i += 1) {
        const row = new Array(columns);
        for (let j = 0; j < columns; j += 1) row[j] = view.getFloat64(at + 8 * (j * count + i), true);
        rows.push(row);
      }
      at += 8 * columns * count;
      this.rows.set(keyOf(part), rows);
      changed.set(keyOf(part), since);
    }
    return changed;
  }

  datasets(chart) {
    const filled = { ...chart.datasets };
    for (const binding of chart.bindings) {
      const rows = [...made(binding, this.rows.get(keyOf(binding)) ?? [])];
      filled[binding.dataset] = [...(filled[binding.dataset] ?? []), ...rows];
    }
    return filled;
  }

  close() {
    this.model.off("msg:custom", this.listener);
  }
}

// Whether the notebook is dark, whatever it is called there.
function isDark(el) {
  for (let node = el; node; node = node.parentElement) {
    const [red, green, blue, alpha = 1] = (getComputedStyle(node).backgroundColor.match(/[\d.]+/g) ?? []).map(Number);
    if (blue !== undefined && alpha > 0.5) return 0.3 * red + 0.6 * green + 0.1 * blue < 110;
  }
  return false;
}

// One chart on a screen: drawn by one task after the other, what has come meanwhile all at once.
class Place {
  constructor(screen, key) {
    this.screen = screen;
    this.key = key;
    this.el = document.createElement("section");
    this.el.dataset.chart = key;
    this.heading = this.el.appendChild(document.createElement("h4"));
    this.reading = this.el.appendChild(document.createElement("p"));
    this.canvas = this.el.appendChild(document.createElement("div"));
    this.canvas.className = "streamlens-chart";
    this.view = null;
    this.tied = null; // by which signal it follows the steps that the others show
    this.result = null;
    this.anew = false;
    this.changed = new Map();
    this.working = false;
  }

  want(anew, changed) {
    this.anew ||= anew;
    for (const [key, since] of changed) {
      this.changed.set(key, Math.min(since, this.changed.get(key) ?? Infinity));
    }
    this.work();
  }

  async work() {
    if (this.working) return;
    this.working = true;
    try {
      while (this.screen.awake() && (this.anew || this.changed.size)) {
        const changed = this.changed;
        const anew = this.anew || !this.view;
        this.changed = new Map();
        this.anew = false;
        if (anew) await this.draw();
        else await this.append(changed);
      }
    } catch (error) {
      this.el.dataset.failed = "";
      console.error(error);
    } finally {
      this.working = false;
    }
  }

  async draw() {
    const { board } = this.screen;
    const chart = board.charts.get(this.key);
    if (!chart) return;
    this.heading.textContent = chart.title;
    this.reading.textContent = chart.reading;
    // Beside the old one until it is drawn: no blank in between.
    const next = document.createElement("div");
    next.classList.add("streamlens-next");
    this.canvas.appendChild(next);
    const specification = { ...fit(chart.specification), datasets: board.datasets(chart) };
    const result = await vegaEmbed(next, specification, {
      config: this.screen.config(),
      mode: "vega-lite",
      renderer: "canvas",
      ast: !COMPILES,
      downloadFileName: chart.key,
      actions: { export: true, source: false, compiled: false, editor: false },
    });
    this.result?.finalize();
    for (const old of [...this.canvas.children]) if (old !== next) old.remove();
    next.classList.remove("streamlens-next");
    this.result = result;
    this.view = result.view;
    this.bindings = chart.bindings;
    this.tied = await this.screen.tie(this.view);
    this.el.dataset.drawn = Number(this.el.dataset.drawn ?? 0) + 1;
  }

  async append(changed) {
    const sets = new Map();
    for (const binding of this.bindings) {
      const since = changed.get(keyOf(binding));
      if (since === undefined) continue;
      const set = sets.get(binding.dataset) ?? { gone: [], come: [] };
      sets.set(binding.dataset, set);
      const constants = Object.entries(binding.constants);
      set.gone.push((row) => row.step >= since && constants.every(([name, value]) => row[name] === value));
      const rows = this.screen.board.rows.get(keyOf(binding));
      for (const record of made(binding, rows.slice(from(rows, since)))) set.come.push(record);
    }
    for (const [name, { gone, come }] of sets) {
      this.view.change(name, vega.changeset().remove((row) => gone.some((is) => is(row))).insert(come));
    }
    if (sets.size) await this.view.runAsync();
  }

  close() {
    this.result?.finalize();
    this.el.remove();
  }
}

// One place on the page where the charts are shown.
class Screen {
  constructor(board, el) {
    this.board = board;
    this.el = el;
    this.places = new Map();
    this.range = null; // the steps that somebody chose; null for the whole run
    this.dark = isDark(el);
    this.woken = () => { for (const place of this.places.values()) place.work(); };
    document.addEventListener("visibilitychange", this.woken);
    this.themes = new MutationObserver(() => this.recolour());
    for (const node of [document.documentElement, document.body]) {
      this.themes.observe(node, { attributes: true, attributeFilter: ["class", "data-jp-theme-light", "data-theme"] });
    }
    el.classList.add("streamlens-live");
    board.screens.add(this);
    this.update(new Set(board.charts.keys()), new Map());
    el.streamlens = this; // for whoever wants to look into the charts from the browser's console
  }

  awake() {
    return !document.hidden;
  }

  config() {
    return this.board.model.get("configs")[this.dark ? "dark" : "light"];
  }

  recolour() {
    const dark = isDark(this.el);
    if (dark === this.dark) return;
    this.dark = dark;
    for (const place of this.places.values()) place.want(true, new Map());
  }

  update(drawn, changed) {
    for (const key of this.board.order) {
      if (!this.board.charts.has(key)) continue;
      let place = this.places.get(key);
      if (!place) {
        place = new Place(this, key);
        this.places.set(key, place);
        this.el.appendChild(place.el);
      }
      place.want(drawn.has(key), changed);
    }
    for (const [key, place] of this.places) {
      if (this.board.charts.has(key) && this.board.order.includes(key)) continue;
      place.close();
      this.places.delete(key);
    }
  }

  // All charts with steps show the same ones, those that are drawn later too.
  async tie(view) {
    const tied = tiedBy(view);
    if (tied && this.range) await view.signal(tied, this.range).runAsync();
    if (tied === RANGE) view.addSignalListener(RANGE, (_, range) => this.zoom(view, range));
    return tied;
  }

  zoom(source, range) {
    if (this.moving) return;
    this.moving = true;
    this.range = range ?? null;
    const others = [...this.places.values()].filter(({ tied, view }) => tied && view !== source);
    Promise.all(others.map(({ tied, view }) => view.signal(tied, this.range).runAsync()))
      .catch(console.error)
      .finally(() => { this.moving = false; });
  }

  close() {
    this.themes.disconnect();
    document.removeEventListener("visibilitychange", this.woken);
    this.board.screens.delete(this);
    for (const place of this.places.values()) place.close();
    this.places.clear();
  }
}

const boards = new WeakMap();

export default {
  initialize({ model }) {
    // Before anybody looks: what is told until then would be lost.
    const board = new Board(model);
    boards.set(model, board);
    return () => board.close();
  },
  render({ model, el }) {
    let board = boards.get(model);
    if (!board) boards.set(model, (board = new Board(model)));
    const screen = new Screen(board, el);
    return () => screen.close();
  },
};
