// The form of settings: from what people set to what the API takes, checked, and back.

import { mark } from "./notices.js";

const WHOLE = ["n", "seed", "top_k"];
const SAMPLING = ["guidance_scale", "temperature", "top_k", "top_p"];
const NUMBERS = ["n", "seed", ...SAMPLING];
const LARGEST_SEED = 2 ** 32 - 1;
export const NAMES = [...NUMBERS, "guidance_schedule", "num_tokens"];

/** A field has a value that cannot be. */
export class WrongSetting extends Error {}

export class Settings {
  constructor(form) {
    this.form = form;
    this.newSeed = document.getElementById("new-seed");
    for (const slider of form.querySelectorAll("input[type=range]"))
      this.#couple(slider, this.#field(slider.dataset.for));
    this.#field("seed").addEventListener("input", () => (this.newSeed.checked = false));
    for (const name of NAMES) this.#field(name).addEventListener("input", (event) => mark(event.target, null));
    document.getElementById("reset").addEventListener("click", () => this.write(this.#own));
  }

  /** Fit the ranges to a model, and set its own sampling where nothing has been set yet. */
  fit(model) {
    this.#field("top_k").max = model.codebookSize;
    this.#field("n").max = this.#slider("n").max = model.limits.n;
    for (const name of SAMPLING) widen(this.#field(name), model.sampling[name]);
    this.#own = { ...model.sampling, num_tokens: model.numTokens };
    const options = model.counts.toReversed().map((n) => new Option(n === model.numTokens ? `all ${n}` : String(n), n));
    this.#field("num_tokens").replaceChildren(...options);
    const n = Math.min(4, model.limits.n);
    this.write({ n, ...this.#own });
  }

  /** Draw a seed, unless people hold one. */
  drawSeed() {
    if (this.newSeed.checked) this.write({ seed: crypto.getRandomValues(new Uint32Array(1))[0] });
  }

  /** Set fields; `null` and "off" switch a limit of sampling off. */
  write(values) {
    for (const [name, value] of Object.entries(values)) {
      const field = this.#field(name);
      const isOff = value === null || value === "off";
      const isWrong = NUMBERS.includes(name) && !Number.isFinite(Number(value));
      if (isOff) field.value = name === "top_p" ? 1 : "";
      else field.value = isWrong ? "" : value;
      if (field.value === "" && !isOff) throw new WrongSetting(`${labelOf(field)} cannot be ${value}`);
      this.#slider(name)?.dispatchEvent(new Event("refresh"));
      mark(field, null);
    }
  }

  /** Return what the API takes; mark what cannot be, and throw. */
  read() {
    const values = Object.fromEntries(NUMBERS.map((name) => [name, this.#number(name)]));
    return {
      ...values,
      top_k: values.top_k ?? "off",
      top_p: values.top_p === 1 ? "off" : values.top_p,
      guidance_schedule: this.#field("guidance_schedule").value,
      num_tokens: Number(this.#field("num_tokens").value),
    };
  }

  /** Mark the field that the server does not like; return whether there is one. */
  blame(param, message) {
    if (!NAMES.includes(param)) return false;
    const field = this.#field(param);
    this.#complain(field, message.replace(param, labelOf(field)));
    return true;
  }

  #own = {};

  #number(name) {
    const field = this.#field(name);
    if (name === "top_k" && field.value === "" && !field.validity.badInput) return null;
    const value = field.valueAsNumber;
    const [least, most] = [Number(field.min), Number(field.max)];
    if (value >= least && value <= most && (!WHOLE.includes(name) || Number.isInteger(value))) return value;
    const kind = WHOLE.includes(name) ? "a whole number from" : "from";
    const message = `${labelOf(field)} must be ${kind} ${least} to ${most === LARGEST_SEED ? "4,294,967,295" : most}`;
    this.#complain(field, message);
    throw new WrongSetting(message);
  }

  #complain(field, message) {
    const hidden = field.closest("details");
    if (hidden) hidden.open = true;
    mark(field, message);
    field.focus();
  }

  #couple(slider, field) {
    const show = () => (slider.value = field.value === "" ? slider.max : field.value);
    slider.addEventListener("input", () => {
      field.value = slider.value;
      mark(field, null);
    });
    field.addEventListener("input", show);
    slider.addEventListener("refresh", show);
  }

  #field(name) {
    return this.form.elements.namedItem(name);
  }

  #slider(name) {
    return this.form.querySelector(`[data-for="${name}"]`);
  }
}

/** Let a field's range hold a model's own value. */
function widen(field, value) {
  if (!Number.isFinite(value)) return; // it is off
  field.min = Math.min(field.min, value);
  field.max = Math.max(field.max, value);
}

function labelOf(field) {
  return field.labels[0].textContent;
}
