// The slider over the tokens: back and forth through the stages of all images at once, and play.

import { decibels } from "./gallery.js";

const FRAME = 130; // milliseconds

export class Timeline {
  #timer = 0;
  #counts = [];

  constructor(studio) {
    this.studio = studio;
    this.element = document.getElementById("timeline");
    this.slider = document.getElementById("position");
    this.ticks = document.getElementById("ticks");
    this.reading = document.getElementById("reading");
    this.button = document.getElementById("play");
    this.slider.addEventListener("input", () => studio.hold(this.#counts[this.slider.valueAsNumber]));
    this.button.addEventListener("click", () => (this.#timer ? this.pause() : this.play()));
    studio.addEventListener("step", () => this.#build());
    studio.addEventListener("stage", () => this.#show());
    studio.addEventListener("scrub", () => this.#show());
    studio.addEventListener("hold", () => this.pause());
    studio.addEventListener("select", () => this.#show());
    studio.addEventListener("state", () => this.#showPicture());
  }

  /** Show the stages one after the other, from the first one if the last is shown. */
  play() {
    const { step, numTokens } = this.studio;
    let next = numTokens >= step.newest ? 0 : this.#counts.indexOf(numTokens) + 1;
    const advance = () => {
      const last = this.#counts.indexOf(step.newest);
      this.studio.scrub(this.#counts[Math.min(next, last)]);
      if (next++ >= last) this.pause();
    };
    this.#timer = setInterval(advance, FRAME);
    this.#label();
    advance();
  }

  pause() {
    clearInterval(this.#timer);
    this.#timer = 0;
    this.#label();
  }

  /** Let people's own picture take shape once, as it came all at once. */
  #showPicture() {
    const { step } = this.studio;
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    if (step?.kind !== "picture" || step.state !== "done" || step.hasPlayed) return;
    step.hasPlayed = true;
    if (!calm) this.play();
  }

  #build() {
    this.pause();
    const { step } = this.studio;
    this.element.hidden = !step;
    if (!step) return;
    const { model } = step;
    const last = Number(step.settings.num_tokens ?? model.numTokens);
    this.#counts = model.counts.filter((n) => n <= last && n >= (step.kept.length || 1));
    this.slider.max = this.#counts.length - 1;
    this.ticks.replaceChildren(...this.#counts.map((n) => tick(model.sizes.get(n) / model.imageSize)));
    this.#show();
  }

  #show() {
    const { step, numTokens } = this.studio;
    const { model } = step;
    const index = Math.max(this.#counts.indexOf(numTokens), 0);
    this.slider.value = index;
    const fill = this.#counts.length > 1 ? index / (this.#counts.length - 1) : 1;
    this.slider.style.setProperty("--fill", `${100 * fill}%`);
    const came = this.#counts.filter((n) => n <= step.newest).length;
    [...this.ticks.children].forEach((one, i) => one.classList.toggle("come", i < came));
    const size = model.sizes.get(numTokens);
    const psnr = step.picture.at(numTokens)?.psnr ?? null;
    const parts = [
      `${numTokens} of ${model.numTokens} tokens`,
      `${size} × ${size} pixels`,
      `${model.bytes(numTokens).toLocaleString("en")} bytes`,
      decibels(psnr),
    ].filter(Boolean);
    this.reading.replaceChildren(
      ...parts.map((part) => Object.assign(document.createElement("span"), { textContent: part })),
    );
    this.slider.setAttribute("aria-valuetext", parts.join(", "));
  }

  #label() {
    this.button.setAttribute("aria-label", this.#timer ? "Pause" : "Play");
    this.button.classList.toggle("playing", Boolean(this.#timer));
  }
}

/** A small square, as large as the stage is. */
function tick(share) {
  const element = document.createElement("i");
  element.style.setProperty("--share", share);
  return element;
}
