"use strict";

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("inspection").textContent);
const tokens = data.tokenIds.length;
const layers = data.layers;
const heads = data.heads.length;
const CHUNK = 200; // tokens that are coloured together
const COLOURS = 64;

/** What is shown. layer, head: -1 is all of them. cursorLayer: -1 is none. */
const view = { round: 0, layer: -1, head: -1, cursor: 0, cursorLayer: -1 };

/** Uint16 [layers][heads][tokens]: the last round after which the token was still kept. */
let lastKept;
/** Of the chosen layers and heads, how many keep each token now; for tokens that are there. */
const keepers = new Uint32Array(tokens);
let palette = [];
let updates = 0;

async function unpack(text) {
  if (typeof DecompressionStream === "undefined") {
    throw new Error("this page needs a browser of 2023 or later");
  }
  const letters = atob(text);
  const packed = new Uint8Array(letters.length);
  for (let i = 0; i < packed.length; i++) packed[i] = letters.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const table = new Uint16Array(await new Response(stream).arrayBuffer());
  // 0 is "never evicted".
  for (let i = 0; i < table.length; i++) table[i] = table[i] === 0 ? 0xffff : table[i] - 1;
  return table;
}

/** Tokens with a KV entry, kept or not, just before the round after this one. */
function present(round) {
  return round < data.rounds ? data.roundLengths[round] : tokens - 1; // the newest has none
}

const chosenLayers = () => (view.layer < 0 ? layers : 1);
const chosenHeads = () => (view.head < 0 ? heads : 1);

/* ---- Counting ---- */

/** Fills `keepers`; returns the map's cells, share 0 to 1 or -1, [layers][columns]. */
function count(columns) {
  const end = present(view.round);
  const firstHead = view.head < 0 ? 0 : view.head;
  const row = new Uint16Array(end);
  const cells = new Float32Array(layers * columns);
  const members = new Uint32Array(columns);
  const columnOf = new Uint32Array(end);
  for (let p = 0; p < end; p++) {
    columnOf[p] = Math.floor((p * columns) / tokens);
    members[columnOf[p]]++;
  }
  keepers.fill(0);
  for (let layer = 0; layer < layers; layer++) {
    row.fill(0);
    for (let head = firstHead; head < firstHead + chosenHeads(); head++) {
      const base = (layer * heads + head) * tokens;
      for (let p = 0; p < end; p++) row[p] += lastKept[base + p] >= view.round ? 1 : 0;
    }
    const at = layer * columns;
    for (let p = 0; p < end; p++) cells[at + columnOf[p]] += row[p];
    if (view.layer < 0 || view.layer === layer) {
      for (let p = 0; p < end; p++) keepers[p] += row[p];
    }
    for (let c = 0; c < columns; c++) {
      cells[at + c] = members[c] ? cells[at + c] / (members[c] * chosenHeads()) : -1;
    }
  }
  return cells;
}

/* ---- Colours ---- */

function readPalette() {
  const style = getComputedStyle(document.documentElement);
  const stops = ["--none", "--half", "--all"].map((name) => {
    const hex = style.getPropertyValue(name).trim();
    return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  });
  palette = Array.from({ length: COLOURS }, (_, i) => {
    const place = (i / (COLOURS - 1)) * 2;
    const from = Math.min(Math.floor(place), 1);
    return stops[from].map((x, c) => Math.round(x + (stops[from + 1][c] - x) * (place - from)));
  });
}

const level = (share) => Math.round(share * (COLOURS - 1));

/* ---- The map ---- */

const map = byId("map");

function drawMap() {
  const scale = window.devicePixelRatio || 1;
  const width = Math.max(1, Math.round(map.clientWidth * scale));
  const rowHeight = Math.max(4, Math.min(16, Math.floor(340 / layers)));
  const height = Math.round(rowHeight * layers * scale);
  map.width = width;
  map.height = height;
  map.style.height = `${rowHeight * layers}px`;
  const columns = Math.max(1, Math.min(tokens, width));
  const cells = count(columns);
  const image = new ImageData(columns, layers);
  for (let i = 0; i < cells.length; i++) {
    if (cells[i] < 0) continue; // transparent: not there yet
    const [r, g, b] = palette[level(cells[i])];
    image.data.set([r, g, b, 255], 4 * i);
  }
  const small = document.createElement("canvas");
  small.width = columns;
  small.height = layers;
  small.getContext("2d").putImageData(image, 0, 0);
  const context = map.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, width, height);
  drawMarks(context, width, height, scale);
}

function drawMarks(context, width, height, scale) {
  const style = getComputedStyle(document.documentElement);
  const x = (position) => (position * width) / tokens;
  context.fillStyle = style.getPropertyValue("--fore");
  context.fillRect(x(data.promptTokens), 0, Math.max(1, scale), height);
  context.strokeStyle = style.getPropertyValue("--accent");
  context.lineWidth = 2 * scale;
  const top = view.cursorLayer < 0 ? 0 : (view.cursorLayer * height) / layers;
  const tall = view.cursorLayer < 0 ? height : height / layers;
  context.strokeRect(x(view.cursor), top, Math.max(x(1), scale), tall);
}

function placeOnMap(event) {
  const box = map.getBoundingClientRect();
  const part = (value, size, whole) =>
    Math.max(0, Math.min(whole - 1, Math.floor((value / size) * whole)));
  return {
    position: part(event.clientX - box.left, box.width, tokens),
    layer: part(event.clientY - box.top, box.height, layers),
  };
}

/* ---- The text ---- */

const text = byId("text");
const elements = [];
const chunks = []; // {element, from, painted}
const chunkOf = new Map();
const visible = new Set();

// Cannot be seen as they are, or would hide or reorder text.
const HIDDEN = /(?![\t\n])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}]/gu;

function revealed(own) {
  return own.replace(HIDDEN, (c) => {
    const digits = c.codePointAt(0).toString(16).padStart(4, "0");
    return digits.length > 4 ? `\\u{${digits}}` : `\\u${digits}`;
  });
}

function shown(position) {
  if (data.texts === null) return `${data.tokenIds[position]} `;
  const own = data.texts[position];
  if (own === null) return `[${data.tokenIds[position]}]`; // not in the tokenizer
  if (own === "") return "·"; // part of a character that a later token completes
  return revealed(own).replace(/\t/g, "⇥\t").replace(/\n/g, "⏎\n");
}

function writeText() {
  for (let from = 0; from < tokens; from += CHUNK) {
    const element = document.createElement("span");
    for (let p = from; p < Math.min(from + CHUNK, tokens); p++) {
      if (p === data.promptTokens) {
        const mark = document.createElement("b");
        mark.textContent = "answer";
        element.append(mark);
      }
      const token = document.createElement("i");
      token.textContent = shown(p);
      token.position = p;
      elements.push(token);
      element.append(token);
    }
    const chunk = { element, from, painted: -1 };
    chunks.push(chunk);
    chunkOf.set(element, chunk);
    text.append(element);
  }
}

/** Colours are set when a chunk is in sight, so a long text costs no more than a short one. */
function watchText() {
  const observer = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        const chunk = chunkOf.get(entry.target);
        if (entry.isIntersecting) {
          visible.add(chunk);
          paint(chunk);
        } else {
          visible.delete(chunk);
        }
      }
    },
    { root: text, rootMargin: "300px" },
  );
  for (const chunk of chunks) observer.observe(chunk.element);
}

function paint(chunk) {
  if (chunk.painted === updates) return;
  chunk.painted = updates;
  const end = present(view.round);
  const all = chosenLayers() * chosenHeads();
  for (let p = chunk.from; p < Math.min(chunk.from + CHUNK, tokens); p++) {
    const there = p < end;
    const element = elements[p];
    element.className = there ? (keepers[p] ? "" : "gone") : "later";
    if (p === view.cursor) element.classList.add("here");
    const colour = there ? `rgb(${palette[level(keepers[p] / all)].join(" ")})` : "";
    if (element.style.backgroundColor !== colour) element.style.backgroundColor = colour;
  }
}

/* ---- Words ---- */

const percent = (part, whole) => `${whole ? Math.round((100 * part) / whole) : 0} %`;
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

/** Where the slider stands, with `end` tokens there: what is kept is a budget and these few. */
function describeMoment(end) {
  if (data.rounds === 0) return "there was no round";
  if (view.round === 0) return "before the first round";
  const since = end - data.roundLengths[view.round - 1];
  return `after round ${view.round} of ${data.rounds} and the ${plural(since, "token")} since`;
}

function describeState() {
  const end = present(view.round);
  const all = chosenLayers() * chosenHeads();
  let kept = 0;
  let nowhere = 0;
  for (let p = 0; p < end; p++) {
    kept += keepers[p];
    nowhere += keepers[p] === 0 ? 1 : 0;
  }
  const when = describeMoment(end);
  const mean = Math.round(kept / all);
  byId("state").textContent =
    `${when}: ${end} tokens seen; a head keeps ${mean} of them (${percent(mean, end)}); ` +
    `${nowhere} kept by no chosen head`;
  byId("round").setAttribute("aria-valuetext", when);
}

/** Two or three lines about a token; `layer` -1: no single layer is meant. */
function describeToken(position, layer) {
  const kind = position < data.promptTokens ? "prompt" : "answer";
  const own = data.texts === null ? null : data.texts[position];
  const quoted = own === null ? "" : ` ${revealed(JSON.stringify(own))}`;
  const lines = [`Token ${position}${quoted}, id ${data.tokenIds[position]}, ${kind}`];
  const all = chosenLayers() * chosenHeads();
  if (position === tokens - 1) {
    lines.push("The last token: it was never cached.");
  } else {
    const kept = keepers[position];
    const now = `Kept by ${kept} of ${all} chosen heads (${percent(kept, all)}). ${fate(position)}`;
    lines.push(position < present(view.round) ? now : "Not there yet in this round.");
    if (layer >= 0) lines.push(fateInLayer(position, layer));
  }
  byId("details").textContent = lines.join("\n");
}

/** Whether the file has all rounds. If not, a head may evict a token in a round it does not have. */
const whole = data.recordedRounds === data.rounds;

/** In which rounds heads let go of a token, all layers and heads, all recorded rounds. */
function fate(position) {
  let first = 0xffff;
  let last = 0;
  let stayed = 0;
  for (let row = 0; row < layers * heads; row++) {
    const value = lastKept[row * tokens + position];
    if (value === 0xffff) {
      stayed++;
    } else {
      first = Math.min(first, value + 1);
      last = Math.max(last, value + 1);
    }
  }
  if (stayed === layers * heads) {
    return whole ? "No head ever evicts it." : "No head evicts it in a recorded round.";
  }
  const rounds = first === last ? `in round ${first}` : `in rounds ${first} to ${last}`;
  const others = whole ? `never by ${stayed}` : `in no recorded round by ${stayed}`;
  return `Evicted by ${plural(layers * heads - stayed, "head")} ${rounds}, ${others}.`;
}

function fateInLayer(position, layer) {
  const parts = data.heads.map((name, head) => {
    const value = lastKept[(layer * heads + head) * tokens + position];
    if (value < 0xffff) return `head ${name} in round ${value + 1}`;
    return `head ${name} ${whole ? "never" : "in no recorded round"}`;
  });
  return `Layer ${layer} evicts it: ${parts.join(", ")}`;
}

function describeRequest() {
  const { policy, budget, window: size, prompt, ...others } = data.params;
  const own = Object.entries(others).map(([name, value]) => `, ${name} ${value}`);
  byId("facts").textContent = [
    `request ${data.requestId}`,
    data.model,
    `${policy}, budget ${budget}, window ${size}, prompt mode ${prompt}${own.join("")}`,
    `${layers} layers × ${plural(heads, "KV head")}`,
    `${data.promptTokens} prompt and ${tokens - data.promptTokens} answer tokens`,
    plural(data.rounds, "round"),
  ].join(" · ");
  const notes = [];
  if (data.missingHeads.length) {
    notes.push(
      `KV heads ${data.missingHeads.join(", ")} are missing: the files of their ranks were not there.`,
    );
  }
  if (data.recordedRounds < data.rounds) {
    notes.push(
      `Only the first ${data.recordedRounds} of ${data.rounds} rounds were recorded: ` +
        "the worker's memory for it was full.",
    );
  }
  if (data.texts === null) notes.push("Token ids are shown: the page was made without a tokenizer.");
  tell(notes.join("\n"));
}

function tell(notes) {
  byId("notes").textContent = notes;
  byId("notes").hidden = notes === "";
}

/* ---- Acting ---- */

let scheduled = false;

/** Show `view`, once for each frame. */
function update() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    updates++;
    byId("round").value = view.round;
    drawMap();
    for (const chunk of visible) paint(chunk);
    describeState();
    describeToken(view.cursor, view.cursorLayer);
    document.documentElement.dataset.round = view.round; // shown; for tests
  });
}

function moveTo(position, layer) {
  view.cursor = Math.max(0, Math.min(tokens - 1, position));
  view.cursorLayer = Math.max(-1, Math.min(layers - 1, layer));
  const element = elements[view.cursor];
  if (
    element.offsetTop < text.scrollTop ||
    element.offsetTop + element.offsetHeight > text.scrollTop + text.clientHeight
  ) {
    text.scrollTop = element.offsetTop - text.clientHeight / 2;
  }
  update();
}

function onKey(event) {
  const onMap = event.currentTarget === map;
  const layer = view.cursorLayer;
  const moves = {
    ArrowLeft: () => moveTo(view.cursor - 1, layer),
    ArrowRight: () => moveTo(view.cursor + 1, layer),
    Home: () => moveTo(0, layer),
    End: () => moveTo(tokens - 1, layer),
  };
  if (onMap) {
    moves.ArrowUp = () => moveTo(view.cursor, Math.max(layer - 1, 0));
    moves.ArrowDown = () => moveTo(view.cursor, layer + 1);
  }
  const move = moves[event.key];
  if (move === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  move();
}

let player = 0;

function play() {
  const running = player !== 0;
  clearInterval(player);
  player = 0;
  if (!running) {
    if (view.round >= data.recordedRounds) view.round = 0;
    player = setInterval(() => {
      view.round++;
      if (view.round >= data.recordedRounds) play();
      update();
    }, Math.max(60, Math.min(600, 20000 / data.recordedRounds)));
    update();
  }
  byId("play").textContent = running ? "▶" : "⏸";
  byId("play").setAttribute("aria-label", running ? "Play the rounds" : "Pause");
}

function fillChoice(select, names) {
  select.append(new Option("all", "-1"));
  names.forEach((name, index) => select.append(new Option(String(name), String(index))));
}

function listen() {
  byId("round").addEventListener("input", (event) => {
    view.round = Number(event.target.value);
    update();
  });
  for (const name of ["layer", "head"]) {
    byId(name).addEventListener("change", (event) => {
      view[name] = Number(event.target.value);
      update();
    });
  }
  byId("play").addEventListener("click", play);
  map.addEventListener("keydown", onKey);
  text.addEventListener("keydown", onKey);
  map.addEventListener("mousemove", (event) => {
    const { position, layer } = placeOnMap(event);
    describeToken(position, layer);
  });
  map.addEventListener("click", (event) => {
    const { position, layer } = placeOnMap(event);
    moveTo(position, layer);
  });
  text.addEventListener("mouseover", (event) => {
    const { position } = event.target;
    if (position !== undefined) describeToken(position, view.layer);
  });
  text.addEventListener("click", (event) => {
    const { position } = event.target;
    if (position !== undefined) moveTo(position, view.cursorLayer);
  });
  for (const element of [map, text]) {
    element.addEventListener("mouseleave", () => describeToken(view.cursor, view.cursorLayer));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    readPalette();
    update();
  });
  new ResizeObserver(update).observe(byId("map-frame"));
}

async function start() {
  describeRequest();
  lastKept = await unpack(data.evictedInRound);
  view.round = data.recordedRounds;
  byId("round").max = data.recordedRounds;
  byId("round").disabled = byId("play").disabled = data.recordedRounds === 0;
  fillChoice(byId("layer"), Array.from({ length: layers }, (_, layer) => layer));
  fillChoice(byId("head"), data.heads);
  byId("axis-start").textContent = "token 0";
  byId("axis-prompt").textContent = `the line: the answer begins at ${data.promptTokens}`;
  byId("axis-end").textContent = `token ${tokens - 1}`;
  map.setAttribute(
    "aria-label",
    `Heat map of ${layers} layers, the first on top, and ${tokens} token positions`,
  );
  readPalette();
  writeText();
  watchText();
  listen();
  update();
}

start().catch((error) => tell(`The page cannot be shown: ${error.message}`));
