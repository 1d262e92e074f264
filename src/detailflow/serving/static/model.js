// What the server's model can do: its stages, its classes, how many bytes its tokens are.

export class Model {
  constructor({ model, classes }) {
    this.name = model.id;
    this.fingerprint = model.fingerprint; // what its tokens mean
    this.gptFingerprint = model.gpt_fingerprint; // which tokens it writes
    this.imageSize = model.image_size;
    this.counts = model.stages.map((stage) => stage.num_tokens); // numbers of tokens that show an image
    this.sizes = new Map(model.stages.map((stage) => [stage.num_tokens, stage.size]));
    this.codebookSize = model.codebook_size;
    this.sampling = model.sampling;
    this.limits = model.limits;
    const uses = Map.groupBy(classes, (one) => one.names);
    this.classes = classes.map((one) => {
      const label = one.wordnet_id ?? (uses.get(one.names).length > 1 ? one.id : one.names); // means this class alone
      return { ...one, label, prompt: String(label) }; // text that is a number may be another class's name
    });
  }

  /** Return whether `model`, as the server describes it, is this one. */
  is(model) {
    const same = this.name === model.id && this.fingerprint === model.fingerprint;
    return same && this.gptFingerprint === model.gpt_fingerprint;
  }

  get numTokens() {
    return this.counts.at(-1);
  }

  /** Return the bytes of `n` tokens. */
  bytes(n) {
    return Math.ceil((n * Math.log2(this.codebookSize)) / 8);
  }

  /** Return 1, 2, 4, … and all: the stages that a short row shows. */
  get milestones() {
    return this.counts.filter((n) => n === this.numTokens || Number.isInteger(Math.log2(n)));
  }

  /** Return the class of a prompt as links have it; `undefined` if there is none. */
  classOf(prompt) {
    return this.classes.find((one) => one.prompt === prompt || one.name === prompt);
  }

  /** Return the classes that a search finds, the best first: case matters only if names differ in nothing else. */
  search(text) {
    const exact = text.trim();
    const word = exact.toLowerCase();
    if (!word) return this.classes;
    const rank = (one) => {
      if (one.names === exact) return -1;
      const names = one.names.toLowerCase();
      if (names === word || one.wordnet_id === word || String(one.id) === word) return 0;
      if (names.startsWith(word)) return 1;
      if (names.includes(` ${word}`)) return 2;
      return names.includes(word) ? 3 : 4;
    };
    return this.classes
      .map((one) => [rank(one), one])
      .filter(([place]) => place < 4)
      .sort(([a], [b]) => a - b)
      .map(([, one]) => one);
  }
}
