// What is shown and what runs: one step at a time; a newer one takes its place.

import { linkOf } from "./link.js";
import { Step } from "./step.js";

const EVERY_STAGE = 10_000;
const MOST_ROOTS = 24; // trees of steps that are kept in the page

/**
 * Events: "step" (another one is shown), "stage" (frames came), "scrub" (other tokens are shown), "hold" (people chose
 * them), "select" (another picture), "state" (a step began or ended).
 */
export class Studio extends EventTarget {
  roots = [];
  step = null;
  shown = Infinity; // tokens; beyond what has come, the newest
  #wanted = null; // the step to be shown once its frames are decoded
  #running = null;
  #drawing = 0;
  #session = crypto.getRandomValues(new Uint32Array(1))[0]; // tells this page's history from an earlier one's

  /** `meetModel` learns which model the server has; `onRefusal` is called with errors. */
  constructor(api, connection, meetModel, onRefusal) {
    super();
    Object.assign(this, { api, connection, meetModel, onRefusal, model: null });
  }

  /** The tokens shown now. */
  get numTokens() {
    return Math.min(this.shown, this.step.newest || this.step.model.counts[0]);
  }

  get isRunning() {
    return this.#running !== null;
  }

  /** Make a step, shown at once; what runs is given up. `file` is a picture, `tokens` are those of a link. */
  make(spec, { file = null, tokens = null, replace = false } = {}) {
    const step = new Step(this.model, spec);
    step.source = { file, tokens };
    if (!step.parent) this.roots = [...this.roots, step].slice(-MOST_ROOTS);
    this.#display(step);
    const state = { session: this.#session, step: step.id };
    if (file)
      history.pushState(state, "", location.pathname + location.search); // its link needs its tokens
    else history[replace ? "replaceState" : "pushState"](state, "", tokens ? location.hash : linkOf(step));
    return this.#run(step);
  }

  /** Show a step that was made before. */
  async show(step, { push = false } = {}) {
    this.#wanted = step;
    await step.load();
    if (this.#wanted !== step || this.step === step) return; // another one was asked for meanwhile
    this.#display(step);
    if (push) history.pushState({ session: this.#session, step: step.id }, "", this.fragment ?? location.pathname);
  }

  #display(step) {
    if (this.step !== step) this.step?.unload();
    this.step = this.#wanted = step;
    this.shown = Infinity;
    this.#tell("step");
  }

  /** Show no step, as at first. */
  leave() {
    this.stop();
    this.#display(null);
  }

  /** Return the step of an entry of the browser's history, if it is still here. */
  find(state) {
    if (state?.session !== this.#session) return undefined;
    const all = (steps) => steps.flatMap((step) => [step, ...all(step.children)]);
    return all(this.roots).find((step) => step.id === state.step);
  }

  /** The fragment of the link to the step that is shown; `null` while its tokens are not known. */
  get fragment() {
    const known = this.step && (this.step.kind !== "picture" || this.step.picture.tokens.length);
    return known ? linkOf(this.step) : null;
  }

  /** Show the first `numTokens` tokens; beyond what has come, follow what comes. */
  scrub(numTokens) {
    this.shown = numTokens >= this.step.newest ? Infinity : numTokens;
    this.#tell("scrub");
  }

  /** Show the first `numTokens` tokens because people want to. */
  hold(numTokens) {
    this.scrub(numTokens);
    this.#tell("hold");
  }

  select(index) {
    this.step.selected = index;
    this.#tell("select");
  }

  /** Give up what runs. */
  stop() {
    this.#running?.abort();
    this.#running = null;
  }

  async #run(step) {
    this.stop();
    const running = (this.#running = new AbortController());
    this.#tell("state");
    try {
      await this.connection.persist(() => this.#receive(step, running.signal), running.signal);
      step.state = "done";
    } catch (error) {
      step.state = running.signal.aborted ? "stopped" : "failed";
      if (step.state === "failed") this.onRefusal(error);
    }
    if (this.#running === running) this.#running = null;
    if (!step.newest) this.#discard(step);
    else if (step === this.step) this.#tell("stage");
    else step.unload();
    this.#tell("state");
  }

  /** Forget a step that gave nothing, and show the one before. */
  #discard(step) {
    if (step.parent) step.parent.children = step.parent.children.filter((one) => one !== step);
    this.roots = this.roots.filter((one) => one !== step);
    if (step !== this.step) return;
    const before = step.parent ?? this.roots.at(-1) ?? null;
    history.replaceState({ session: this.#session, step: before?.id }, "", before ? linkOf(before) : location.pathname);
    if (before) this.show(before);
    else this.leave();
  }

  async #receive(step, signal) {
    await this.checkModel(step, signal);
    const decoded = [];
    for await (const stage of this.#stages(step, signal)) {
      signal.throwIfAborted();
      decoded.push(step.pictures[stage.index].add(stage).then(() => this.#tellSoon(step)));
    }
    await Promise.all(decoded);
    if (step.kind === "picture" && step === this.step) history.replaceState(history.state, "", this.fragment);
  }

  /** Throw an error if the server has another model than the step's: it would take the tokens for other images'. */
  async checkModel(step, signal) {
    await this.meetModel(signal);
    if (step.model !== this.model) throw new Error("the server is back, with another model: generate again");
  }

  #stages(step, signal) {
    if (step.source.file) return this.#reconstructed(step, signal);
    if (step.source.tokens) return this.#decoded(step, signal);
    const fields = { ...step.settings, prompt: step.image?.label ?? null, stream: true, partial_images: EVERY_STAGE };
    if (step.kind === "class") return this.api.generate(fields, signal);
    return this.api.vary(step.kept, { ...fields, keep: step.kept.length }, signal);
  }

  async *#reconstructed(step, signal) {
    const answer = await this.api.reconstruct(step.source.file, step.model.counts, signal);
    await step.keepOriginal(answer.original);
    for (const stage of answer.data) yield stageOf(stage);
  }

  async *#decoded(step, signal) {
    const { tokens } = step.source;
    const counts = step.model.counts.filter((n) => n <= tokens.length);
    for (const stage of (await this.api.decode(tokens, counts, signal)).data) yield stageOf(stage);
  }

  /** Tell that stages came: once for all that came since the screen was last drawn. */
  #tellSoon(step) {
    if (step !== this.step || this.#drawing) return;
    this.#drawing = requestAnimationFrame(() => {
      this.#drawing = 0;
      if (this.step) this.#tell("stage");
    });
  }

  #tell(name) {
    this.dispatchEvent(new Event(name));
  }
}

function stageOf({ tokens, b64_json, psnr }) {
  return { index: 0, numTokens: tokens.length, tokens, png: b64_json, psnr };
}
