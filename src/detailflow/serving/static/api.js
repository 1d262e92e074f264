// The service's documented API. Errors are `ApiError` if the server says what is wrong, else `Unreachable`.

import { serverSentEvents } from "./events.js";
import { recall, remember } from "./memory.js";

const KEY = "detailflow-api-key";
const LONGEST_SILENCE = 10_000; // milliseconds, after which a server does not answer
const NO_ANSWER = [502, 504]; // of a proxy before a server that is down

/** What the server says is wrong with a request. */
export class ApiError extends Error {
  constructor(status, { message, param, code }, retryAfter = null) {
    super(message);
    Object.assign(this, { status, param, code, retryAfter });
  }
}

/** There is no server, or it went away in the middle of an answer. */
export class Unreachable extends Error {}

export class Api {
  constructor(base) {
    this.base = base;
  }

  get key() {
    return recall("sessionStorage", KEY);
  }

  set key(value) {
    remember("sessionStorage", KEY, value);
  }

  /** Return the server's model and its classes. */
  async describe(signal) {
    const [models, classes] = await Promise.all([
      this.#json("v1/models", { signal }),
      this.#json("v1/classes", { signal }),
    ]);
    return { model: models.data[0], classes: classes.data };
  }

  /** Return the server's model alone. */
  async model(signal) {
    return (await this.#json("v1/models", { signal })).data[0];
  }

  /** Return whether the server takes requests. */
  async ready() {
    try {
      const signal = AbortSignal.timeout(LONGEST_SILENCE);
      return (await fetch(this.#url("readyz"), { cache: "no-store", signal })).ok;
    } catch {
      return false;
    }
  }

  /** Yield `{ index, numTokens, tokens, png }` for every stage of every image of a class. */
  generate(fields, signal) {
    return this.#stages("v1/images/generations", json(fields), fields.n, signal);
  }

  /** Yield the same for images that keep the first of `tokens`; `fields` also has `keep`. */
  vary(tokens, fields, signal) {
    const form = formOf({ ...fields, tokens: JSON.stringify(tokens) });
    return this.#stages("v1/images/variations", { body: form }, fields.n, signal);
  }

  /** Return a picture's tokens, and what each number of them shows of it. */
  reconstruct(picture, counts, signal) {
    const form = new FormData();
    form.append("image", picture);
    for (const n of counts) form.append("num_tokens", n);
    return this.#json("v1/tokens/reconstruct", { method: "POST", body: form, signal });
  }

  /** Return what tokens show, for each number of them. */
  decode(tokens, counts, signal) {
    return this.#json("v1/tokens/decode", { ...json({ tokens, num_tokens: counts }), method: "POST", signal });
  }

  /** Return an animation of tokens as a blob. */
  async animate(tokens, signal) {
    const response = await this.#fetch("v1/tokens/animate", { ...json({ tokens }), method: "POST", signal });
    return response.blob();
  }

  async *#stages(path, request, count, signal) {
    const response = await this.#fetch(path, { ...request, method: "POST", signal });
    let completed = 0;
    try {
      for await (const { name, data } of serverSentEvents(response.body)) {
        if (name === "error") throw failure(0, data.error);
        completed += name.endsWith(".completed");
        yield { index: data.image_index, numTokens: data.num_tokens, tokens: data.tokens, png: data.b64_json };
      }
    } catch (error) {
      throw error instanceof TypeError ? new Unreachable(error.message) : error;
    }
    if (completed < count) throw new Unreachable("the answer ended early");
  }

  async #json(path, options) {
    const response = await this.#fetch(path, options);
    try {
      return await response.json();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Unreachable("the answer ended early");
    }
  }

  async #fetch(path, options) {
    const headers = { ...options.headers };
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    let response;
    try {
      response = await fetch(this.#url(path), { ...options, headers });
    } catch (error) {
      throw error instanceof TypeError ? new Unreachable(error.message) : error;
    }
    if (response.ok) return response;
    if (NO_ANSWER.includes(response.status)) throw new Unreachable(`status ${response.status}`);
    const body = await response.json().catch(() => ({}));
    const retryAfter = Number(response.headers.get("Retry-After")) || null;
    throw failure(response.status, body.error, retryAfter);
  }

  #url(path) {
    return new URL(path, this.base);
  }
}

function failure(status, error, retryAfter) {
  if (error?.code === "stopping" || (status === 503 && !error)) return new Unreachable("the server is stopping");
  return new ApiError(status, error ?? { message: `the server answers with status ${status}` }, retryAfter);
}

function json(fields) {
  return { body: JSON.stringify(fields), headers: { "Content-Type": "application/json" } };
}

function formOf(fields) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) if (value !== null) form.append(name, value);
  return form;
}
