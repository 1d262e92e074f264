// Where images came from: a tree of all steps, each a way back.

import { drawFrame, newCanvas } from "./drawing.js";

export class Trail {
  #canvases = new WeakMap(); // by step

  constructor(studio) {
    this.studio = studio;
    this.element = document.getElementById("trail");
    this.list = document.getElementById("steps");
    this.back = document.getElementById("back");
    this.back.addEventListener("click", () => studio.show(studio.step.parent, { push: true }));
    studio.addEventListener("step", () => this.#build());
    studio.addEventListener("state", () => this.#build());
    studio.addEventListener("select", () => this.#drawCurrent());
  }

  #build() {
    const { step, roots } = this.studio;
    this.element.hidden = !roots.length || (roots.length === 1 && !roots[0].children.length && step === roots[0]);
    this.back.hidden = !step?.parent;
    this.list.replaceChildren(...roots.map((root) => this.#item(root)));
    const current = this.list.querySelector("[aria-current]");
    if (current) this.list.scrollLeft = current.offsetLeft - this.list.clientWidth / 2;
    this.#drawCurrent();
  }

  #item(step) {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.title = caption(step);
    button.setAttribute("aria-label", caption(step));
    if (step === this.studio.step) button.setAttribute("aria-current", "step");
    button.append(this.#canvas(step));
    button.addEventListener("click", () => this.studio.show(step, { push: true }));
    item.append(button);
    if (step.children.length) {
      const children = document.createElement("ol");
      children.append(...step.children.map((child) => this.#item(child)));
      item.append(children);
    }
    return item;
  }

  #canvas(step) {
    if (!this.#canvases.has(step)) this.#canvases.set(step, newCanvas("blank"));
    return this.#canvases.get(step);
  }

  #drawCurrent() {
    const { step } = this.studio;
    if (step?.picture.last?.bitmap) drawFrame(this.#canvas(step), step.picture.last);
  }
}

function caption(step) {
  if (step.kind === "picture") return "Your picture";
  if (step.kind === "class") return `${step.title}, seed ${step.settings.seed}`;
  return `${step.kept.length} tokens kept, then ${step.title}`;
}
