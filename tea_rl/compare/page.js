"use strict";
// The sample browser. Everything a model wrote goes in as text, never as markup.
(() => {
  const root = document.getElementById("browser");
  if (!root) return;
  const { methods, prompts } = JSON.parse(document.getElementById("samples").textContent);
  const PAGE = 12, STRONG = 2; // cards at a time; nats at which a token has its full colour

  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const labelled = (text, control) => {
    const label = make("label", "", text + " ");
    label.append(control);
    return label;
  };

  const search = make("input");
  search.type = "search";
  search.placeholder = "Filter by text";
  search.setAttribute("aria-label", "Filter by text");
  const where = make("select");
  where.setAttribute("aria-label", "Filter in");
  const sort = make("select");
  sort.setAttribute("aria-label", "Sort by");
  const colour = make("input");
  colour.type = "checkbox";
  colour.checked = true;
  const addOption = (select, value, text) => {
    const option = make("option", "", text);
    option.value = value;
    select.append(option);
  };
  addOption(where, "", "prompt or any completion");
  for (const method of methods) addOption(where, method.name, method.name);
  addOption(sort, "", "as in the data");
  for (const method of methods) {
    addOption(sort, "down:" + method.name, "reward of " + method.name + ", high to low");
    addOption(sort, "up:" + method.name, "reward of " + method.name + ", low to high");
  }
  const shown = new Map();
  const boxes = make("fieldset");
  boxes.append(make("legend", "", "Show"));
  methods.forEach((method, place) => {
    const box = make("input");
    box.type = "checkbox";
    box.checked = place < 4;
    shown.set(method.name, box);
    const label = make("label");
    const chip = make("span", "chip");
    chip.style.setProperty("--c", method.colour);
    label.append(box, " ", chip, method.name);
    boxes.append(label);
  });
  const controls = make("div", "controls");
  const count = make("span", "count");
  count.setAttribute("aria-live", "polite");
  controls.append(
    search, labelled("in", where), labelled("Sort", sort), labelled("Colour tokens", colour), count, boxes);
  const list = make("div", "cards");
  const more = make("button", "", "Show more");
  more.type = "button";
  root.append(controls, list, more);
  let limit = PAGE;

  const background = (gain) => {
    const share = Math.min(1, Math.abs(gain) / STRONG);
    if (share < 0.05) return "";
    return gain > 0 ? `rgba(26, 127, 55, ${(0.45 * share).toFixed(3)})` : `rgba(207, 34, 46, ${(0.4 * share).toFixed(3)})`;
  };

  const completionOf = (sample) => {
    const paragraph = make("p");
    if (!sample.text) {
      paragraph.append(make("span", "empty", "(nothing)"));
    } else if (!colour.checked || !sample.tokens.length) {
      paragraph.textContent = sample.text;
    } else {
      sample.tokens.forEach((text, place) => {
        if (!text) return;
        const token = make("span", "token", text);
        const gain = sample.gains[place];
        if (gain !== null && gain !== undefined) {
          token.style.background = background(gain);
          token.title = (gain >= 0 ? "+" : "\u2212") + Math.abs(gain).toFixed(2) + " nats";
        }
        paragraph.append(token);
      });
    }
    return paragraph;
  };

  const rewardOf = (row, name) => {
    const sample = row.samples[name];
    return sample && sample.reward !== null ? sample.reward : null;
  };

  const cellOf = (method, sample, base) => {
    const cell = make("div", "cell");
    cell.style.setProperty("--c", method.colour);
    const better = base !== null && sample.reward !== null && sample.reward > base && method.name !== "base";
    const badge = make("span", better ? "badge better" : "badge", sample.reward === null ? "NaN" : sample.reward.toFixed(2));
    badge.title = Object.entries(sample.terms).map(([name, value]) => name + " " + value).join("\n");
    cell.append(badge, make("span", "who", method.name), completionOf(sample));
    return cell;
  };

  const matches = (row, text, name) => {
    if (!text) return true;
    const found = (value) => value.toLowerCase().includes(text);
    if (name) return Boolean(row.samples[name]) && found(row.samples[name].text);
    return found(row.prompt) || methods.some((m) => row.samples[m.name] && found(row.samples[m.name].text));
  };

  const render = () => {
    const text = search.value.trim().toLowerCase();
    let rows = prompts.filter((row) => matches(row, text, where.value));
    if (sort.value) {
      const [direction, ...rest] = sort.value.split(":");
      const name = rest.join(":"), sign = direction === "down" ? -1 : 1;
      // What has no reward comes last in either direction.
      rows = rows.slice().sort((a, b) => {
        const [x, y] = [rewardOf(a, name), rewardOf(b, name)];
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (x - y);
      });
    }
    count.textContent = `${rows.length} of ${prompts.length} prompts`;
    list.replaceChildren();
    for (const row of rows.slice(0, limit)) {
      const card = make("article", "card");
      card.append(make("h3", "", row.prompt));
      const cells = make("div", "cells");
      for (const method of methods) {
        const sample = row.samples[method.name];
        if (sample && shown.get(method.name).checked) cells.append(cellOf(method, sample, rewardOf(row, "base")));
      }
      card.append(cells);
      list.append(card);
    }
    more.hidden = rows.length <= limit;
  };

  const restart = () => { limit = PAGE; render(); };
  search.addEventListener("input", restart);
  for (const control of [where, sort]) control.addEventListener("change", restart);
  for (const control of [colour, ...shown.values()]) control.addEventListener("change", render);
  more.addEventListener("click", () => { limit += PAGE; render(); });
  render();
})();
