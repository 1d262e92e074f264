// What the page tells people: a banner for all to see, an announcement for those who listen, a word beside a field.

const SHORTLY = 4000; // milliseconds

export class Notices {
  #timer = 0;

  constructor() {
    this.banner = document.getElementById("banner");
    this.text = document.getElementById("banner-text");
    this.announcement = document.getElementById("announcement");
    this.close = document.getElementById("banner-action");
    this.close.textContent = "Close";
    this.close.addEventListener("click", () => this.clear());
  }

  /** Something is wrong, and people have to do something. */
  fail(message) {
    this.#show("failed", sentence(message));
    this.close.hidden = false;
  }

  /** Something is wrong, and the page goes on by itself; `quietly` changes a text that has been read out before. */
  warn(message, { quietly = false } = {}) {
    this.banner.setAttribute("aria-live", quietly ? "off" : "assertive");
    this.#show("waiting", message);
  }

  /** Something is well again. */
  tell(message) {
    this.#show("well", message);
    this.#timer = setTimeout(() => this.clear(), SHORTLY);
  }

  clear() {
    clearTimeout(this.#timer);
    this.banner.hidden = true;
  }

  /** Tell those who listen to the page. */
  announce(message) {
    this.announcement.textContent = message;
  }

  #show(kind, message) {
    clearTimeout(this.#timer);
    if (kind !== "waiting") this.banner.setAttribute("aria-live", "assertive");
    this.close.hidden = true;
    this.banner.dataset.kind = kind;
    this.banner.hidden = false;
    if (this.text.textContent !== message) this.text.textContent = message;
  }
}

/** Say what is wrong beside a field; `null` if nothing is. */
export function mark(field, message) {
  const note = document.getElementById(`${field.id}-error`);
  if (!note) return;
  note.hidden = !message;
  note.textContent = message ? sentence(message) : "";
  if (message) field.setAttribute("aria-invalid", "true");
  else field.removeAttribute("aria-invalid");
}

function sentence(message) {
  const text = message[0].toUpperCase() + message.slice(1);
  return /[.!?…]$/.test(text) ? text : `${text}.`;
}
