// A server that is away, busy or wants a key: say so, wait, and go on where it stopped.

import { ApiError, Unreachable } from "./api.js";

const FIRST_WAIT = 500; // milliseconds, which double up to the longest
const LONGEST_WAIT = 5000;
const HEARTBEAT = 15_000;
const MOST_BREAKS = 5; // of one request, while the server says that it is ready

export class Connection {
  #lost = false;

  /** `askForKey` resolves with a key; `onReturn` is called when the server is back. */
  constructor(api, notices, askForKey, onReturn) {
    Object.assign(this, { api, notices, askForKey, onReturn });
    setInterval(() => this.#listen(), HEARTBEAT);
  }

  /** Do `work`, again and again until the server has answered it, be it with an error. */
  async persist(work, signal) {
    for (let breaks = 0; ;) {
      try {
        return await work();
      } catch (error) {
        if (signal?.aborted) throw error;
        if (error instanceof Unreachable && breaks++ < MOST_BREAKS) await this.#untilReady(signal);
        else if (error instanceof ApiError && error.status === 429) await this.#untilFree(error, signal);
        else if (error instanceof ApiError && error.status === 401)
          this.api.key = await this.askForKey(Boolean(this.api.key));
        else throw error;
      }
    }
  }

  async #untilReady(signal) {
    for (let wait = FIRST_WAIT; !(await this.api.ready()); wait = Math.min(2 * wait, LONGEST_WAIT)) {
      this.#lost = true;
      this.notices.warn("The server does not answer. Waiting for it; your images stay here.");
      await sleep(wait, signal);
    }
    if (!this.#lost) return sleep(FIRST_WAIT, signal);
    this.#lost = false;
    this.notices.tell("The server is back.");
    return this.persist(this.onReturn, signal);
  }

  async #untilFree(error, signal) {
    for (let left = Math.min(error.retryAfter ?? 2, 60); left > 0; left--) {
      this.notices.warn(`Many people are making images. Trying again in ${left} s.`, { quietly: true });
      await sleep(1000, signal);
    }
    this.notices.clear();
  }

  async #listen() {
    if (document.hidden || this.#lost || (await this.api.ready())) return;
    try {
      await this.#untilReady();
    } catch (error) {
      this.notices.fail(error.message);
    }
  }
}

/** Wait; reject as soon as `signal` is aborted. */
export function sleep(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}
