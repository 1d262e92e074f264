// The class picker: a text field with a list that a search narrows, by mouse, touch and keyboard.

import { mark } from "./notices.js";

const MOST_SHOWN = 80; // of a long list; the rest comes with a search

export class Picker {
  #model = null;
  #chosen = null;
  #options = [];
  #active = -1;

  /** `extra` is a choice before all classes, such as `{ name: "no class" }`, or null. */
  constructor(input, extra = null) {
    this.input = input;
    this.list = document.getElementById(input.getAttribute("aria-controls"));
    this.extra = extra;
    input.addEventListener("input", () => this.#search(input.value));
    input.addEventListener("click", () => this.list.hidden && this.#search(""));
    input.addEventListener("focus", () => input.select());
    input.addEventListener("keydown", (event) => this.#key(event));
    input.addEventListener("blur", () => this.#leave());
    this.list.addEventListener("pointerdown", (event) => event.preventDefault()); // the field keeps the focus
    this.list.addEventListener("click", (event) => this.#take(event.target.closest("[role=option]")));
  }

  /** Offer a model's classes. */
  fit(model) {
    this.#model = model;
    this.value = (this.#chosen && model.classOf(this.#chosen.prompt)) ?? this.extra ?? model.classes[0];
  }

  /** The chosen class, or the extra choice; `null` if the text is neither. */
  get value() {
    return this.#chosen;
  }

  set value(choice) {
    this.#chosen = choice;
    this.input.value = choice?.name ?? "";
    mark(this.input, null);
  }

  /** Say what is wrong with the choice, and go there. */
  complain(message) {
    mark(this.input, message);
    this.input.focus();
  }

  /** Return the chosen class, or the first that the text finds; mark the text if there is none. */
  take() {
    this.#leave();
    if (!this.#chosen) this.complain(`no class is called “${this.input.value}”`);
    return this.#chosen;
  }

  #search(text) {
    this.#chosen = text ? null : this.#chosen;
    mark(this.input, null);
    const found = this.#model?.search(text) ?? [];
    const extra = this.extra && this.extra.name.toLowerCase().includes(text.toLowerCase()) ? [this.extra] : [];
    this.#options = [...extra, ...found].slice(0, MOST_SHOWN);
    const items = this.#options.map((choice, i) => this.#item(choice, i));
    const more = found.length + extra.length - items.length;
    if (more) items.push(note(`and ${more.toLocaleString("en")} more: type to find one`));
    if (!items.length) items.push(note("no such class"));
    this.list.replaceChildren(...items);
    this.#open(true);
    this.#activate(text && this.#options.length ? 0 : this.#options.indexOf(this.#chosen));
  }

  #item(choice, i) {
    const item = document.createElement("li");
    item.id = `${this.list.id}-${i}`;
    item.setAttribute("role", "option");
    item.textContent = choice.name;
    if (choice.names && choice.names !== choice.name) {
      const others = document.createElement("small");
      others.textContent = choice.names.slice(choice.name.length).replace(/^, /, "");
      item.append(" ", others);
    }
    item.setAttribute("aria-selected", "false");
    return item;
  }

  #activate(i) {
    this.list.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    this.#active = i;
    const item = this.#options[i] && this.list.children[i];
    if (!item) {
      this.input.removeAttribute("aria-activedescendant");
      return;
    }
    item.setAttribute("aria-selected", "true");
    this.input.setAttribute("aria-activedescendant", item.id);
    item.scrollIntoView({ block: "nearest" });
  }

  #key(event) {
    const count = this.#options.length;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (this.list.hidden) this.#search("");
      else if (count)
        this.#activate((this.#active + (event.key === "ArrowDown" ? 1 : count - 1 + (this.#active < 0))) % count);
    } else if (event.key === "Enter" && !this.list.hidden && this.#active >= 0) {
      event.preventDefault();
      this.#take(this.list.children[this.#active]);
    } else if (event.key === "Escape" && !this.list.hidden) {
      event.preventDefault();
      event.stopPropagation();
      this.#open(false);
    }
  }

  #take(item) {
    if (!item) return;
    this.value = this.#options[[...this.list.children].indexOf(item)];
    this.#open(false);
    this.input.dispatchEvent(new Event("change", { bubbles: true }));
  }

  #leave() {
    this.#open(false);
    const text = this.input.value.trim();
    if (this.#chosen?.name === text || !this.#model) return;
    const found = text ? this.#model.search(text)[0] : this.extra;
    if (found) this.value = found;
    else this.#chosen = null;
  }

  #open(open) {
    this.list.hidden = !open;
    this.input.setAttribute("aria-expanded", String(open));
    if (!open) this.input.removeAttribute("aria-activedescendant");
  }
}

function note(text) {
  const item = document.createElement("li");
  item.className = "note";
  item.setAttribute("role", "option");
  item.setAttribute("aria-disabled", "true");
  item.textContent = text;
  return item;
}
