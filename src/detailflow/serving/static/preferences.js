// How the page looks, which the browser remembers.

import { recall, remember } from "./memory.js";

/** Let a button change a setting of the page: `data-NAME` of the root has one of `choices`. */
export function letChoose(button, name, choices) {
  const key = `detailflow-${name}`;
  const show = (choice) => {
    document.documentElement.dataset[name] = choice;
    button.textContent = `${name[0].toUpperCase()}${name.slice(1)}: ${choice}`;
  };
  button.addEventListener("click", () => {
    const next = choices[(choices.indexOf(document.documentElement.dataset[name]) + 1) % choices.length];
    remember("localStorage", key, next);
    show(next);
  });
  const stored = recall("localStorage", key);
  show(choices.includes(stored) ? stored : choices[0]);
}
