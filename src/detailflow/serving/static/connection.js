// A server that is away, busy or wants a key: say so, wait, and go on where it stopped.

import { Unreachable } from "./api.js";

const FIRST_WAIT = 500; // milliseconds, which double up to the longest
const LONGEST_WAIT = 5000;
const HEARTBEAT = 15_000;
const MOST_BREAKS = 5; // of one request, while the server says that it is ready

export class Connection {
  #whenReady = null; // while a server is waited for

  /** `askForKey` resolves with a key; `onReturn` is called when the server is back, or may have been away. */
  constructor(api, notices, askForKey, onReturn) {
    Object.assign(this, { api, notices, askForKey, onReturn });
    setInterval(() => this.#listen(), HEARTBEAT);
    addEventListener("visibilitychange", () => this.#listen());
  }

  /** Do `work`, again and again until the server has answered it, be it with an error. */
  async persist(work, signal) {
    for (let breaks = 0; ;) {
      try {
        return await work();
      } catch (error) {
        if (signal?.aborted) throw error;
        if (error instanceof Unreachable && breaks++ < MOST_BREAKS) await abortable(this.#untilReady(), signal);
        else if (error.status === 429) await this.#untilFree(error, signal);
        else if (error.status === 401) await this.#getKey();
        else throw error;
      }
    }
  }

  #untilReady() {
    this.#whenReady ??= this.#wait().finally(() => (this.#whenReady = null));
    return this.#whenReady;
  }

  async #wait() {
    if (await this.api.ready()) return sleep(FIRST_WAIT); // it only broke off
    for (let wait = FIRST_WAIT; ; wait = Math.min(2 * wait, LONGEST_WAIT)) {
      this.notices.warn("The server does not answer. Waiting for it; your images stay here.");
      await sleep(wait);
      if ((await this.api.ready()) && (await this.#hasReturned())) return;
    }
  }

  async #hasReturned() {
    try {
      this.notices.tell("The server is back.");
      await this.onReturn();
      return true;
    } catch (error) {
      if (error.status === 401) await this.#getKey();
      else if (!(error instanceof Unreachable)) throw error;
      return false;
    }
  }

  async #getKey() {
    this.api.key = await this.askForKey(Boolean(this.api.key));
  }

  async #untilFree(error, signal) {
    try {
      for (let left = Math.min(error.retryAfter ?? 2, 60); left > 0; left--) {
        this.notices.warn(`Many people are making images. Trying again in ${left} s.`, { quietly: true });
        await sleep(1000, signal);
      }
    } finally {
      this.notices.clear(); // also when somebody has stopped waiting
    }
  }

  async #listen() {
    if (document.hidden || this.#whenReady) return;
    try {
      if (await this.api.ready()) await this.onReturn();
      else await this.#untilReady();
    } catch (error) {
      if (!(error instanceof Unreachable) && error.status !== 401) this.notices.fail(error.message);
    }
  }
}

/** Wait; reject as soon as `signal` is aborted. */
function sleep(milliseconds, signal) {
  return abortable(new Promise((resolve) => setTimeout(resolve, milliseconds)), signal);
}

/** Return a promise that is also rejected as soon as `signal` is aborted. */
function abortable(promise, signal) {
  if (!signal) return promise;
  const aborted = new Promise((_, reject) => {
    if (signal.aborted) reject(signal.reason);
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
  return Promise.race([promise, aborted]);
}
