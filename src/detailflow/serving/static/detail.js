// The selected image: what it is, variations of it, and files and links to take along.

import { drawFrame, enlarged } from "./drawing.js";
import { Picker } from "./picker.js";

const LARGE = 1024; // pixels of a side
const NO_CLASS = { name: "no class", prompt: null };

export class Detail {
  #counts = []; // of tokens that can be kept

  /** `onVary` is called with the class, or null, and the tokens that stay. */
  constructor(studio, notices, onVary) {
    Object.assign(this, { studio, notices, onVary });
    for (const id of ["detail", "detail-title", "detail-text", "vary", "keep", "keep-value", "preview"]) {
      this[id] = document.getElementById(id);
    }
    this.picker = new Picker(document.getElementById("vary-class"), NO_CLASS);
    this.vary.addEventListener("submit", (event) => (event.preventDefault(), this.#vary()));
    this.keep.addEventListener("input", () => studio.hold(this.#counts[this.keep.valueAsNumber]));
    for (const [id, action] of [
      ["save-exact", () => this.#save(this.#frame.blob, `${this.#name}-${this.#frame.numTokens}-tokens.png`)],
      ["save-large", () => this.#saveLarge()],
      ["save-animation", () => this.#saveAnimation()],
      ["copy-link", () => this.#copyLink()],
    ]) {
      document.getElementById(id).addEventListener("click", action);
    }
    studio.addEventListener("step", () => this.#build());
    studio.addEventListener("select", () => this.#show());
    studio.addEventListener("scrub", () => this.#show());
    studio.addEventListener("hold", () => this.#follow());
    studio.addEventListener("stage", () => this.#show());
    studio.addEventListener("state", () => this.#show());
  }

  get #frame() {
    return this.studio.step.picture.at(this.studio.shown);
  }

  get #factor() {
    return Math.max(2, Math.floor(LARGE / this.#frame.bitmap.width));
  }

  #build() {
    const { step } = this.studio;
    this.detail.hidden = !step;
    if (!step) return;
    const { model } = step;
    this.#counts = model.counts.slice(0, -1);
    this.keep.max = this.#counts.length - 1;
    const quarter = this.#counts.findLastIndex((n) => n === 1 || 4 * n <= model.numTokens);
    this.keep.value = Math.max(quarter, 0);
    this.picker.fit(model);
    this.picker.value = step.image ?? NO_CLASS;
    this.picker.input.closest(".field").hidden = !model.classes.length;
    document.getElementById("link").hidden = true;
    this.#show();
  }

  /** What the timeline shows is what stays, unless that is all. */
  #follow() {
    const index = this.#counts.indexOf(this.studio.numTokens);
    if (index < 0 || this.studio.shown === Infinity) return;
    this.keep.value = index;
    this.#showKept();
  }

  #show() {
    const { step } = this.studio;
    if (!step) return;
    const many = step.pictures.length;
    this["detail-title"].textContent = many > 1 ? `Image ${step.selected + 1} of ${many}` : "This image";
    this["detail-text"].textContent = describe(step);
    const frame = this.#frame;
    for (const button of this.detail.querySelectorAll(".downloads button")) button.disabled = !frame;
    if (frame?.bitmap) {
      const { width, height } = frame.bitmap;
      label("save-exact", "PNG", `${width} × ${height}`);
      label("save-large", "PNG", `${width * this.#factor} × ${height * this.#factor}`);
      label("save-animation", "Animation", "GIF");
    }
    this.#showKept();
  }

  #showKept() {
    const keep = this.#counts[this.keep.valueAsNumber];
    const text = keep === 1 ? "1 token" : `${keep} tokens`;
    this["keep-value"].textContent = text;
    this.keep.setAttribute("aria-valuetext", text);
    const { picture, model } = this.studio.step;
    drawFrame(this.preview, picture.at(keep));
    const hasCome = picture.tokens.length >= keep && model === this.studio.model; // not of an earlier server
    this.vary.querySelector("[type=submit]").disabled = !hasCome;
  }

  #vary() {
    const image = this.picker.take();
    if (!image) return;
    const keep = this.#counts[this.keep.valueAsNumber];
    this.onVary(image === NO_CLASS ? null : image, this.studio.step.picture.tokens.slice(0, keep));
  }

  async #saveAnimation() {
    const { api, connection, step } = this.studio;
    const button = document.getElementById("save-animation");
    const name = this.#name; // of now: another image may be shown when it is made
    button.setAttribute("aria-busy", "true");
    try {
      const animated = async () => {
        await this.studio.checkModel(step);
        return api.animate(step.picture.tokens);
      };
      this.#save(await connection.persist(animated), `${name}.gif`);
    } catch (error) {
      this.notices.fail(error.message);
    } finally {
      button.removeAttribute("aria-busy");
    }
  }

  async #saveLarge() {
    const name = `${this.#name}-${this.#frame.numTokens}-tokens-large.png`;
    this.#save(await enlarged(this.#frame, this.#factor), name);
  }

  /** What the selected image's files are called, without an ending. */
  get #name() {
    const { step } = this.studio;
    const seed = step.settings.seed === undefined ? "" : `-${step.settings.seed}`;
    const number = step.pictures.length > 1 ? `-${step.selected + 1}` : "";
    return `${step.title.replace(/[^\p{L}\p{N}]+/gu, "-")}${seed}${number}`;
  }

  #save(blob, name) {
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob) });
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  }

  async #copyLink() {
    const { fragment } = this.studio;
    const link = new URL(fragment, location.href).href;
    try {
      await navigator.clipboard.writeText(link);
      this.notices.tell("The link is copied.");
    } catch {
      // no clipboard without https, or no permission
      const text = document.getElementById("link-text");
      document.getElementById("link").hidden = false;
      text.value = link;
      text.select();
    }
  }
}

function describe(step) {
  if (step.kind === "picture") return "Your picture in tokens.";
  const from = step.kind === "variation" ? `, first ${step.kept.length} tokens kept` : "";
  return `${step.title}${from} · seed ${step.settings.seed}`;
}

function label(id, name, size) {
  const small = Object.assign(document.createElement("small"), { textContent: size });
  document.getElementById(id).replaceChildren(name, " ", small);
}
