// What was made: a step has pictures, a picture has a frame for every number of tokens that came.

/** A picture as its first `numTokens` tokens show it. */
export class Frame {
  #bitmap = null;

  constructor({ numTokens, png, psnr = null }) {
    Object.assign(this, { numTokens, psnr, blob: new Blob([bytesOf(png)], { type: "image/png" }) });
  }

  /** Decode it, to be drawn at once later. */
  async load() {
    this.#bitmap ??= await createImageBitmap(this.blob);
    return this.#bitmap;
  }

  /** The decoded image, if it is loaded. */
  get bitmap() {
    return this.#bitmap;
  }

  unload() {
    this.#bitmap?.close();
    this.#bitmap = null;
  }
}

export class Picture {
  frames = []; // by number of tokens
  tokens = [];

  /** Add a stage, decoded; it takes the place of one that came before the connection broke. */
  async add(stage) {
    const frame = new Frame(stage);
    await frame.load();
    const others = this.frames.filter((one) => one.numTokens !== frame.numTokens);
    this.frames = [...others, frame].sort((a, b) => a.numTokens - b.numTokens);
    if (stage.tokens.length > this.tokens.length) this.tokens = stage.tokens;
  }

  /** Return the frame of at most `n` tokens, or else the first; `undefined` if none has come. */
  at(n) {
    return this.frames.findLast((frame) => frame.numTokens <= n) ?? this.frames[0];
  }

  get last() {
    return this.frames.at(-1);
  }
}

let made = 0;

/** One request and what came of it. */
export class Step {
  id = ++made;
  pictures = [];
  children = [];
  selected = 0;
  source = {}; // a file or tokens of a link, of a picture
  original = null; // of a picture of people's own
  hasPlayed = false;
  state = "running"; // then "done", "stopped" or "failed"

  /** `kind` is "class", "variation" or "picture"; `image` a class or null; `kept` the tokens of a variation. */
  constructor(model, { kind, image = null, settings = {}, kept = [], parent = null }) {
    Object.assign(this, { model, kind, image, settings, kept, parent });
    parent?.children.push(this);
    const count = kind === "picture" ? 1 : settings.n;
    this.pictures = Array.from({ length: count }, () => new Picture());
  }

  get picture() {
    return this.pictures[this.selected];
  }

  /** What it is called. */
  get title() {
    if (this.kind === "picture") return "your picture";
    if (!this.model.classes.length) return "sample";
    return this.image ? this.image.name : "no class";
  }

  /** The largest number of tokens that any picture has reached. */
  get newest() {
    return Math.max(...this.pictures.map((picture) => picture.last?.numTokens ?? 0));
  }

  /** Keep the picture as it was encoded. */
  async keepOriginal(png) {
    const original = new Frame({ numTokens: Infinity, png });
    await original.load();
    this.original = original;
  }

  async load() {
    await Promise.all(this.pictures.flatMap((picture) => picture.frames.map((frame) => frame.load())));
    await this.original?.load();
  }

  unload() {
    for (const picture of this.pictures) for (const frame of picture.frames) frame.unload();
    this.original?.unload();
  }
}

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}
