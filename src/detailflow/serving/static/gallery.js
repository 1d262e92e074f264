// The images of a step, as large as the window allows; for people's own picture also the original and a row of stages.

import { drawFrame, drawTokens, newCanvas } from "./drawing.js";

const GAP = 16; // pixels between tiles, as in the style sheet
const LARGEST = 640; // pixels of a tile
const SMALLEST = 96;
const NARROW = 720; // pixels of a window with one column, as in the style sheet
const BELOW = 150; // pixels of the window's height, for the timeline

export class Gallery {
  #tiles = [];
  #stages = [];
  #original = null;

  constructor(studio) {
    this.studio = studio;
    this.element = document.getElementById("gallery");
    this.row = document.getElementById("stages");
    this.stage = document.getElementById("stage");
    studio.addEventListener("step", () => this.#build());
    studio.addEventListener("stage", () => this.#draw());
    studio.addEventListener("scrub", () => this.#draw());
    studio.addEventListener("select", () => this.#mark());
    studio.addEventListener("state", () => this.#mark());
    new ResizeObserver(() => this.#fit()).observe(this.stage);
  }

  #build() {
    const { step } = this.studio;
    this.element.hidden = !step;
    this.row.parentElement.hidden = step?.kind !== "picture";
    if (!step) return;
    this.#tiles = step.pictures.map((_, i) => this.#tile(step, i));
    this.#original = step.kind === "picture" && step.source.file ? originalTile() : null;
    this.element.replaceChildren(...this.#tiles, ...(this.#original ? [this.#original] : []));
    this.#stages = [];
    this.row.replaceChildren();
    this.#fit();
    this.#mark();
  }

  #tile(step, i) {
    const tile = document.createElement("button");
    tile.type = "button";
    tile.className = "tile";
    const number = step.pictures.length > 1 ? `Image ${i + 1} of ${step.pictures.length}` : "Image";
    tile.setAttribute("aria-label", `${number}, ${step.title}`);
    tile.style.setProperty("--order", i);
    tile.append(newCanvas("picture blank"), newCanvas("tokens"));
    tile.addEventListener("click", () => this.studio.select(i));
    return tile;
  }

  #draw() {
    const { step, shown } = this.studio;
    if (!step) return;
    step.pictures.forEach((picture, i) => {
      const [canvas, tokens] = this.#tiles[i].children;
      const frame = picture.at(shown);
      drawFrame(canvas, frame);
      drawTokens(tokens, picture.tokens, frame?.numTokens ?? 0, step.model.numTokens);
    });
    if (this.#original && step.original) drawFrame(this.#original.firstChild, step.original);
    if (step.kind === "picture") this.#drawStages(step);
  }

  #drawStages({ picture, model }) {
    const { numTokens } = this.studio;
    const frames = picture.frames.filter((frame) => model.milestones.includes(frame.numTokens));
    if (this.#stages.length !== frames.length) {
      this.#stages = frames.map((frame) => this.#stageButton(frame));
      this.row.replaceChildren(...this.#stages);
      frames.forEach((frame, i) => drawFrame(this.#stages[i].firstChild, frame));
    }
    frames.forEach((frame, i) => this.#stages[i].setAttribute("aria-pressed", String(frame.numTokens === numTokens)));
  }

  #stageButton(frame) {
    const button = document.createElement("button");
    button.type = "button";
    const text = document.createElement("span");
    text.append(strong(frame.numTokens), decibels(frame.psnr));
    button.setAttribute("aria-label", `${frame.numTokens} of its tokens, ${decibels(frame.psnr)}`);
    button.append(newCanvas("picture"), text);
    button.addEventListener("click", () => this.studio.hold(frame.numTokens));
    return button;
  }

  #mark() {
    const { step } = this.studio;
    this.#tiles.forEach((tile, i) => {
      tile.setAttribute("aria-pressed", String(i === step?.selected));
    });
    this.element.setAttribute("aria-busy", String(this.studio.isRunning));
  }

  /** Choose the columns that make the tiles largest, at whole multiples of small images' pixels; draw the tiles. */
  #fit() {
    const { step } = this.studio;
    if (!step) return;
    const count = this.element.childElementCount;
    const width = this.stage.clientWidth;
    const top = this.element.getBoundingClientRect().top + scrollY;
    const below = BELOW + this.row.parentElement.offsetHeight;
    const height = Math.max(innerHeight - top - below, innerWidth < NARROW ? width : 320);
    let best = { side: 0, columns: 1 };
    for (let columns = 1; columns <= count; columns++) {
      const rows = Math.ceil(count / columns);
      const room = Math.min((width + GAP) / columns - GAP, (height + GAP) / rows - GAP - 8, LARGEST);
      const side = wholePixels(room, step.model.imageSize);
      if (side >= best.side) best = { side, columns }; // of equal ones the most columns, so the fewest rows
    }
    if (best.side < SMALLEST) {
      const side = wholePixels(Math.min(SMALLEST, (width - GAP) / 2), step.model.imageSize);
      best = { side, columns: Math.floor((width + GAP) / (side + GAP)) }; // more than the window's height
    }
    this.element.style.setProperty("--side", `${best.side}px`);
    this.element.style.setProperty("--columns", best.columns);
    this.#draw();
  }
}

/** Return PSNR as people read it. */
export function decibels(psnr) {
  return psnr === null ? "" : `${psnr.toFixed(1)} dB`;
}

/** Round a side in CSS pixels down to a whole multiple of an image's, in the screen's pixels. */
function wholePixels(side, imageSize) {
  const factor = Math.floor((side * devicePixelRatio) / imageSize);
  return factor < 2 ? Math.floor(side) : (factor * imageSize) / devicePixelRatio;
}

function originalTile() {
  const tile = document.createElement("figure");
  tile.className = "tile original";
  const caption = document.createElement("figcaption");
  caption.textContent = "original";
  const canvas = newCanvas("picture blank");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "Your picture, as it was encoded");
  tile.append(canvas, caption);
  return tile;
}

function strong(text) {
  return Object.assign(document.createElement("b"), { textContent: text });
}
