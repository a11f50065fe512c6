// What is shown of the chosen runs: settings, numbers, alerts, sections with a chart each, one layer's lines.
// Every text comes from a run and is set as text, never as markup.
"use strict";

globalThis.streamlensShown = (() => {
  const { element, fill, number } = streamlensRuns;
  const at = (id) => document.getElementById(id);

  function settings(entries) {
    at("settings").hidden = !entries.length;
    at("settings").replaceChildren(
      ...entries.map(([name, value]) => {
        const pair = element("div");
        pair.title = value;
        pair.append(element("dt", "", name.replaceAll("_", " ")), element("dd", "", value));
        return pair;
      }),
    );
  }

  function differences(rows) {
    const table = at("differences");
    table.hidden = !rows;
    if (!rows) return;
    const [[, labels], ...others] = Object.entries(rows);
    const head = element("tr");
    head.append(element("td"), ...labels.map((label) => Object.assign(element("th", "", label), { scope: "col" })));
    table.replaceChildren(
      head,
      ...others.map(([name, cells]) => {
        const row = element("tr");
        const title = Object.assign(element("th", "", name.replaceAll("_", " ")), { scope: "row" });
        row.append(title, ...cells.map((cell) => element("td", "", cell)));
        return row;
      }),
    );
  }

  function tiles(entries) {
    at("tiles").hidden = !entries.length;
    at("tiles").replaceChildren(
      ...entries.map(({ label, value, note, verdict, wide }) => {
        const tile = element("div", wide ? "tile wide" : "tile");
        tile.append(element("dt", "", label), element("dd", "value", value));
        if (note) tile.append(element("dd", `note ${verdict}`, note));
        return tile;
      }),
    );
  }

  function alerts(entries, quiet, onSee) {
    at("alerts").hidden = !entries.length && !quiet;
    at("alerts-note").textContent = quiet || "Where rules found something wrong; charts mark these steps with a triangle.";
    at("alert-list").hidden = !entries.length;
    at("alert-list").replaceChildren(
      ...entries.map((alert) => {
        const item = element("li", ["info", "critical"].includes(alert.severity) ? alert.severity : "warning");
        const until = alert.until === null ? ", not over" : ` to ${number.format(alert.until)}`;
        const go = element("button", "", `step ${number.format(alert.step)}${until}`);
        go.type = "button";
        go.title = "Show these steps in the charts";
        go.addEventListener("click", () => onSee(alert));
        const who = [alert.run, alert.model, alert.severity].filter(Boolean).join(" · ");
        item.append(element("b", "", alert.rule.replaceAll("_", " ")), element("span", "when", ` ${who} · `), go);
        item.append(element("br"), element("span", "", alert.text));
        if (alert.layers.length) item.append(element("span", "when", ` (${alert.layers.join(", ")})`));
        return item;
      }),
    );
  }

  // By column as they came, by row as Vega takes them.
  function rowsOf(columns) {
    const names = Object.keys(columns);
    const length = names.length ? columns[names[0]].length : 0;
    const rows = new Array(length);
    for (let i = 0; i < length; i++) {
      const row = {};
      for (const name of names) row[name] = columns[name][i];
      rows[i] = row;
    }
    return rows;
  }

  const isHeatmap = (data) => Object.values(data).some((columns) => "layer" in columns && "end" in columns && "last" in columns);

  function cardOf(id) {
    const card = element("section", "card");
    card.dataset.id = id;
    card.append(element("h3"), element("p"), element("div", "chart"));
    return card;
  }

  function chartIn(card, section) {
    const [title, reading, place] = card.children;
    if (title.textContent !== section.title) title.textContent = section.title;
    if (reading.textContent !== section.reading) reading.textContent = section.reading;
    reading.hidden = !section.reading;
    place.setAttribute("aria-label", `${section.title}. ${section.reading}`);
    place.setAttribute("role", "figure");
    place.classList.toggle("rows", isHeatmap(section.data));
    const data = Object.fromEntries(Object.entries(section.data).map(([name, columns]) => [name, rowsOf(columns)]));
    const { spec, form, name, signals, model } = section;
    return { place, spec, form, name, signals, data, id: card.dataset.id, model };
  }

  // Cards in the order of the sections; those that are there already stay what they are.
  function cards(holder, sections, known) {
    return sections.map((section) => {
      const id = JSON.stringify([section.model, section.key]);
      return [known.get(id) ?? cardOf(id), section];
    });
  }

  function detailPanel(detail, close) {
    const panel = element("section", "detail");
    const head = element("div", "detail-head");
    const button = element("button", "", "Close");
    button.type = "button";
    button.addEventListener("click", close);
    head.append(element("h3"), button);
    panel.append(head);
    panel.dataset.detail = "";
    return panel;
  }

  // Lays the sections out and returns the charts to draw in them.
  function sections(found, after, close) {
    const holder = at("charts");
    const known = new Map([...holder.querySelectorAll("section.card")].map((card) => [card.dataset.id, card]));
    const placed = cards(holder, found.sections, known);
    const charts = placed.map(([card, section]) => chartIn(card, section));
    let children = [];
    let model = "";
    for (const [card, section] of placed) {
      if (section.model !== model) {
        model = section.model;
        children.push(element("h2", "", model));
      }
      children.push(card);
    }
    if (found.detail) {
      const panel = holder.querySelector("[data-detail]") ?? detailPanel(found.detail, close);
      panel.querySelector("h3").textContent = found.detail.row;
      panel.setAttribute("aria-label", `Lines of ${found.detail.row}`);
      const inside = cards(panel, found.detail.sections, known);
      charts.push(...inside.map(([card, section]) => chartIn(card, section)));
      const empty = inside.length ? [] : [element("p", "hint", "No metric of this layer was recorded.")];
      keep(panel, [panel.firstElementChild, ...empty, ...inside.map(([card]) => card)]);
      const clicked = children.findIndex((child) => child.dataset.id === after);
      const heatmap = children.findIndex((child) => child.querySelector?.(".chart.rows"));
      children.splice((clicked >= 0 ? clicked : heatmap) + 1, 0, panel);
    }
    if (!children.length) children = [nothing()];
    keep(holder, children);
    return charts;
  }

  // Only moved where the order changed: what is moved loses its focus and its place on the screen.
  function keep(holder, children) {
    const same = children.length === holder.children.length && children.every((c, i) => holder.children[i] === c);
    if (!same) holder.replaceChildren(...children);
  }

  function nothing() {
    const card = element("section", "card empty");
    card.append(element("h3", "", "Nothing to show yet"));
    card.append(element("p", "", "Charts appear here as soon as something of the run is recorded, or as soon as the filter leaves a layer."));
    return card;
  }

  function names(layers, row) {
    const listed = at("layer-names");
    const select = at("layer");
    if (listed.childElementCount !== layers.length || [...listed.children].some((option, i) => option.value !== layers[i])) {
      listed.replaceChildren(...layers.slice(0, 500).map((layer) => Object.assign(element("option"), { value: layer })));
      const options = layers.map((layer) => Object.assign(element("option", "", layer || "the model"), { value: `=${layer}` }));
      select.replaceChildren(Object.assign(element("option", "", "no single layer"), { value: "" }), ...options);
    }
    select.value = row === null ? "" : `=${row}`;
    if (select.selectedIndex < 0) select.value = "";
  }

  // Shows an answer of the server; returns the charts to draw.
  function show(found, { row, model, after, close, onSee }) {
    at("title").textContent = found.title ?? (found.gone ? "The run is no longer there" : "No run yet");
    document.title = `${at("title").textContent} · streamlens`;
    settings(found.settings ?? []);
    differences(found.differences);
    tiles(found.tiles ?? []);
    alerts(found.alerts ?? [], found.quiet ?? "", onSee);
    const gone = found.gone ? [`${found.gone === 1 ? "A chosen run is" : `${found.gone} chosen runs are`} no longer there.`] : [];
    fill(at("problems"), [...gone, ...(found.problems ?? [])]);
    names(found.layers ?? [], row === null ? null : model ? `${model}.${row}` : row);
    at("hint").hidden = !found.sections.length;
    return sections(found, after, close);
  }

  return { show };
})();
