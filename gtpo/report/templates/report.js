// The theme, and the conflict view of the JSON in #view. Text is inserted as text, never as HTML.
"use strict";

(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  let chosen = null;
  const paint = () => {
    const isDark = chosen === null ? dark.matches : chosen;
    root.dataset.theme = isDark ? "dark" : "light";
    button.setAttribute("aria-pressed", String(isDark));
    button.textContent = isDark ? "Light theme" : "Dark theme";
  };
  dark.addEventListener("change", paint);
  button.addEventListener("click", () => { chosen = root.dataset.theme !== "dark"; paint(); });
  paint();
})();

(() => {
  const view = JSON.parse(document.getElementById("view").textContent);
  if (!view.runs) return;
  const at = (id) => document.getElementById(id);
  const runs = view.runs, texts = view.tokens;
  let run, group, rows, cells;  // cells: for each row, its token elements by position

  // ---- small helpers

  const element = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const options = (select, labels) => select.replaceChildren(...labels.map((label, i) => {
    const option = element("option", "", label);
    option.value = i;
    return option;
  }));
  const number = (value, digits) => value === null || value === undefined ? "not recorded" : value.toFixed(digits);
  const signed = (value) => value === null ? "?" : (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(2);
  const sign = (row) => Math.sign(row.advantage || 0);
  const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
  const HIDDEN = /[\u0000-\u001f\u007f-\u00a0\u00ad\u061c\u200b-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff]/gu;
  const hidden = (text) => text.replace(HIDDEN, (sign) => `\\u${sign.codePointAt(0).toString(16).padStart(4, "0")}`);
  const visible = (text) => hidden(text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "·")) || "∅";

  // ---- a token by its position in the completion: a completion that is too long has a gap

  const slot = (row, position) => {  // index into row.tokens, or -1
    if (!row.tokens || position < 0 || position >= row.length) return -1;
    if (position < row.head) return position;
    const fromEnd = row.length - position;
    return fromEnd <= row.tokens.length - row.head ? row.tokens.length - fromEnd : -1;
  };
  const tokenAt = (row, position) => { const i = slot(row, position); return i < 0 ? undefined : row.tokens[i]; };
  const positions = (row) => row.tokens.map((_, i) => i < row.head ? i : row.length - (row.tokens.length - i));
  const weightsOf = (row) => row.weights.flatMap(([weight, count]) => Array(count).fill(weight));

  // ---- choosing

  const showRun = () => {
    run = runs[at("run").value];
    at("would-be").hidden = !run.wouldBe;
    at("damped").hidden = !run.steps.some((step) => step.groups.some((group) => group.rows.some(
      (row) => (row.weights || []).some(([weight]) => weight > 0 && weight < 1))));
    options(at("step"), run.steps.map((step) => `${step.step} (${step.why})`));
    showStep();
  };
  const showStep = () => {
    const step = run.steps[at("step").value];
    options(at("group"), step.groups.map((group) => {
      const better = group.rows.filter((row) => sign(row) > 0).length;
      const worse = group.rows.filter((row) => sign(row) < 0).length;
      return `prompt ${group.group + 1} (${better} better, ${worse} worse)`;
    }));
    showGroup();
  };
  const showGroup = () => {
    group = run.steps[at("step").value].groups[at("group").value];
    rows = group.rows;
    showPrompt();
    showCompletions();
    inspect(null);
  };
  const showPrompt = () => {
    const lines = [...group.prompt, ...(group.reference === null ? [] : [["reference", group.reference]])];
    at("prompt").replaceChildren(...lines.flatMap(([role, text]) => [element("b", "", `${role}: `), `${text}\n`]));
  };

  // ---- completions: a grid of tokens, better completions beside worse ones

  const showCompletions = () => {
    cells = rows.map(() => new Map());
    const sides = element("div", "sides");
    sides.setAttribute("role", "grid");
    sides.setAttribute("aria-label", "Tokens of the group's completions. Arrow keys move between tokens.");
    const signal = rows.some((row) => sign(row) !== 0);
    for (const [title, wanted] of [["Better than the group", 1], ["Worse than the group", -1], ["No advantage", 0]]) {
      const members = rows.map((_, i) => i).filter((i) => sign(rows[i]) === wanted);
      if (!members.length && (wanted === 0 || !signal)) continue;
      const side = element("div");
      side.setAttribute("role", "rowgroup");
      side.append(element("h3", "", `${title} (${members.length})`), ...members.map(card));
      sides.append(side);
    }
    at("completions").replaceChildren(sides);
    const first = sides.querySelector(".tokens .token");
    if (first) first.tabIndex = 0;
  };
  const card = (index) => {
    const row = rows[index];
    const box = element("article", `completion${row.kept === false ? " filtered" : ""}`);
    const about = element("div", "about");
    const facts = [`reward ${number(row.reward, 2)}`, `mean entropy ${number(row.entropy, 3)}`,
                   row.kept === null ? "no filter" : row.kept ? "kept ✓" : "filtered ✗, no gradient"];
    if (row.length !== undefined) facts.push(counted(row.length, "token"));
    if (row.truncated) facts.push("truncated ✂");
    for (const [name, value] of Object.entries(row.rewards)) facts.push(`${name} ${number(value, 2)}`);
    about.append(element("strong", "", `#${row.row + 1}  advantage ${signed(row.advantage)}`), ...facts.map((fact) => element("span", "", fact)));
    const tokens = element("div", "tokens");
    tokens.setAttribute("role", "row");
    tokens.setAttribute("aria-label", `Completion ${row.row + 1}, advantage ${signed(row.advantage)}`);
    if (row.tokens) tokens.append(...tokenElements(row, index));
    else tokens.append(element("span", "", row.text));
    box.append(about, tokens);
    return box;
  };
  const tokenElements = (row, index) => {
    const weights = weightsOf(row), made = [];
    positions(row).forEach((position, i) => {
      if (i === row.head && row.tokens.length < row.length) {
        const hidden = row.length - row.tokens.length;
        made.push(element("span", "gap", ` … ${counted(hidden, "token")} not shown … `));
      }
      const weight = weights[position];
      const cell = element("span", "token");
      cell.classList.toggle("protected", weight === 0);
      cell.classList.toggle("damped", weight > 0 && weight < 1);
      cell.classList.toggle("amplified", weight > 1);
      cell.classList.toggle("prefix", position < row.prefix);
      cell.classList.toggle("suffix", position >= row.length - row.suffix);
      const text = texts[row.tokens[i]], ends = /\n*$/.exec(text)[0];
      fill(cell, text);
      cell.tabIndex = -1;
      cell.setAttribute("role", "gridcell");
      cell.setAttribute("aria-label", `${visible(texts[row.tokens[i]])}, weight ${weight}, entropy ${entropyOf(row, i)}`);
      cell.dataset.row = index;
      cell.dataset.position = position;
      cells[index].set(position, cell);
      made.push(cell, ends);  // line breaks at a token's end follow its box, so that the box ends with the line
    });
    return made;
  };
  const fill = (cell, text) => {  // white space gets a sign; a line break within a token also breaks the line
    const inner = text.replace(/\n+$/, "");
    for (const part of inner.split(/(\n|\t|^ +| +$)/).filter(Boolean)) {
      cell.append(/^[\n\t ]+$/.test(part) ? element("span", "blank", visible(part) + (part === "\n" ? "\n" : "")) : hidden(part));
    }
    if (inner !== text || !text) cell.append(element("span", "blank", visible(text.slice(inner.length))));
  };
  const entropyOf = (row, i) => row.entropies && row.entropies[i] !== null ? `${(row.entropies[i] / 1000).toFixed(3)} nats` : "not recorded";

  // ---- one token: its weight, where the group has it too, and why it is in conflict or not

  const inspect = (cell) => {
    for (const marked of at("completions").querySelectorAll(".current, .same-opposite, .same-side")) {
      marked.classList.remove("current", "same-opposite", "same-side");
    }
    if (!cell) {
      at("inspector").replaceChildren(element("p", "", "Point at a token, or press Tab and use the arrow keys."));
      return;
    }
    cell.classList.add("current");
    const index = Number(cell.dataset.row), position = Number(cell.dataset.position), row = rows[index];
    const fromEnd = row.length - 1 - position, i = slot(row, position), weight = weightsOf(row)[position];
    const runsOf = [position < row.prefix && "prefix run", fromEnd < row.suffix && "suffix run"].filter(Boolean);
    const alignedAtStart = () => position, alignedAtEnd = (other) => other.length - 1 - fromEnd;
    const atStart = matches(index, row.tokens[i], alignedAtStart), atEnd = matches(index, row.tokens[i], alignedAtEnd);
    const sides = [["start", "prefix run", atStart, alignedAtStart], ["end", "suffix run", atEnd, alignedAtEnd]]
      .filter(([, name]) => !runsOf.length || runsOf.includes(name));
    for (const [other, where] of sides.flatMap(([, , same]) => same)) {
      const same = cells[other].get(where);
      if (same) same.classList.add(sign(rows[other]) * sign(row) < 0 ? "same-opposite" : "same-side");
    }
    const what = element("p");
    const word = weight === 0 ? "protected" : weight > 1 ? "amplified" : weight < 1 ? "damped" : "unchanged";
    const facts = [`entropy ${entropyOf(row, i)}`, `weight ${weight}${run.wouldBe && weight !== 1 ? " (would be)" : ""}, ${word}`,
                   `position ${position + 1} from the start, ${fromEnd + 1} from the end`, ...runsOf];
    what.append(element("b", "", visible(texts[row.tokens[i]])), ` ${facts.join(" · ")}`);
    const lines = [what, element("p", "", reason(row, runsOf, atStart, atEnd, weight))];
    for (const [side, , same, positionIn] of sides) lines.push(element("p", "about", elsewhere(index, side, same, positionIn)));
    at("inspector").replaceChildren(...lines);
  };
  const matches = (index, token, positionIn) =>  // [row, position] of the same token at the aligned position of other completions
    rows.map((other, j) => [j, positionIn(other)]).filter(([j, where]) => j !== index && tokenAt(rows[j], where) === token);
  const elsewhere = (index, side, same, positionIn) => {
    const names = same.map(([j]) => name(rows[j])).join(", ") || "none";
    const different = rows.map((_, j) => j).filter((j) => j !== index && rows[j].tokens && !same.some(([k]) => k === j)).map((j) => {
      const token = tokenAt(rows[j], positionIn(rows[j]));
      return `${name(rows[j])} ${token === undefined ? "nothing shown" : visible(texts[token])}`;
    });
    const others = different.length ? ` Another token in: ${different.slice(0, 12).join(", ")}.` : "";
    return `At this position from the ${side}, the same token in: ${names}.${others}`;
  };
  const name = (row) => `#${row.row + 1}${sign(row) > 0 ? "+" : sign(row) < 0 ? "−" : ""}`;
  const reason = (row, runsOf, atStart, atEnd, weight) => {
    const opposite = (same) => same.filter(([j]) => sign(rows[j]) * sign(row) < 0).length;
    const other = sign(row) > 0 ? "worse" : "better";
    if (runsOf.length) {
      const side = runsOf[0] === "prefix run" ? "start" : "end";
      const count = opposite(side === "start" ? atStart : atEnd);
      const effect = weight === 0 ? "so it is protected here" : weight > 1 ? "so it is amplified here" : `but its weight is ${weight}`;
      return `In conflict: ${counted(count, `${other} completion`)} ${count === 1 ? "has" : "have"} the same token at this position from the ${side}, ${effect}.`;
    }
    if (sign(row) === 0) return "No conflict: a completion without an advantage is not compared with the others.";
    if (opposite(atStart) || opposite(atEnd)) {
      const side = opposite(atStart) ? "start" : "end";
      return `No conflict: a ${other} completion has the same token at this position from the ${side}, but the run of conflict tokens ends before it.`;
    }
    return `No conflict: no ${other} completion has this token at this position, from the start or from the end.`;
  };

  // ---- pointing and keys

  const grid = at("completions");
  grid.addEventListener("mouseover", (event) => {
    const cell = event.target.closest(".token");
    if (cell) inspect(cell);
  });
  grid.addEventListener("focusin", (event) => { if (event.target.classList.contains("token")) inspect(event.target); });
  grid.addEventListener("click", (event) => { const cell = event.target.closest(".token"); if (cell) go(cell); });
  const go = (cell) => {
    for (const old of grid.querySelectorAll('.token[tabindex="0"]')) old.tabIndex = -1;
    cell.tabIndex = 0;
    cell.focus();
    cell.scrollIntoView({ block: "nearest" });
  };
  grid.addEventListener("keydown", (event) => {
    const cell = event.target.closest(".token");
    if (!cell || event.altKey || event.ctrlKey || event.metaKey) return;
    const all = [...grid.querySelectorAll(".tokens .token")];
    const line = all.filter((other) => other.dataset.row === cell.dataset.row), i = line.indexOf(cell);
    const lines = [...new Set(all.map((other) => other.dataset.row))], j = lines.indexOf(cell.dataset.row);
    const beside = (row) => {  // the token at the same position in another completion, or its last one
      const other = all.filter((token) => token.dataset.row === row);
      return other.find((token) => token.dataset.position === cell.dataset.position) || other[other.length - 1];
    };
    const target = {
      ArrowRight: () => line[i + 1], ArrowLeft: () => line[i - 1], Home: () => line[0], End: () => line[line.length - 1],
      ArrowDown: () => j + 1 < lines.length ? beside(lines[j + 1]) : null, ArrowUp: () => j > 0 ? beside(lines[j - 1]) : null,
    }[event.key];
    if (!target) return;
    event.preventDefault();
    const next = target();
    if (next) go(next);
  });

  options(at("run"), runs.map((run) => run.label));
  at("run-choice").hidden = runs.length === 1;
  at("run").addEventListener("change", showRun);
  at("step").addEventListener("change", showStep);
  at("group").addEventListener("change", showGroup);
  showRun();
})();
