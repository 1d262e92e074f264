// What the browser remembers, or, if people forbid it to, this page until it is left.

const page = new Map();

/** Return what was remembered in "localStorage" or "sessionStorage"; `null` if nothing was. */
export function recall(storage, key) {
  if (page.has(key)) return page.get(key); // newer than what is stored
  try {
    return window[storage].getItem(key);
  } catch {
    return null;
  }
}

/** Remember a text. */
export function remember(storage, key, value) {
  try {
    window[storage].setItem(key, value);
    page.delete(key);
  } catch {
    page.set(key, value); // storage is forbidden, or full
  }
}
