// A link holds all that makes images: the class, the settings, and of variations the tokens that were kept.

import { NAMES } from "./settings.js";

/** Return the fragment of a step's link. */
export function linkOf(step) {
  const fields = new URLSearchParams();
  if (step.image) fields.set("class", step.image.prompt);
  if (step.kind === "picture") fields.set("picture", written(step.pictures[0].tokens));
  else for (const name of NAMES) fields.set(name, step.settings[name]);
  if (step.kind === "variation") fields.set("keep", written(step.kept));
  fields.set("model", step.model.fingerprint.slice(0, 12));
  if (step.kind !== "picture") fields.set("gpt", step.model.gptFingerprint.slice(0, 12));
  return `#${fields}`;
}

/** Return what a link's fragment asks for, or `null` if it asks for nothing. */
export function readLink(fragment, model) {
  const fields = new URLSearchParams(fragment.replace(/^#/, ""));
  const settings = Object.fromEntries(NAMES.filter((name) => fields.has(name)).map((name) => [name, fields.get(name)]));
  const prompt = fields.get("class");
  const image = prompt === null ? null : model.classOf(prompt);
  if (image === undefined) throw new Error(`the link’s class “${prompt}” is none of this model’s`);
  const own = { model: model.fingerprint, gpt: model.gptFingerprint };
  const otherModel = Object.keys(own).some((name) => fields.has(name) && !own[name].startsWith(fields.get(name)));
  const common = { image, settings, otherModel };
  if (fields.has("picture")) return { ...common, kind: "picture", tokens: read(fields.get("picture"), model) };
  if (fields.has("keep")) return { ...common, kind: "variation", kept: read(fields.get("keep"), model) };
  const isOfClasses = image || (!model.classes.length && fields.has("seed")); // or of a model without any
  return isOfClasses ? { ...common, kind: "class" } : null;
}

function written(tokens) {
  return tokens.map((code) => code.toString(36)).join(".");
}

function read(text, model) {
  const tokens = text.split(".").map((code) => (/^[0-9a-z]{1,6}$/.test(code) ? parseInt(code, 36) : NaN));
  if (!tokens.every((code) => code < model.codebookSize) || !model.counts.includes(tokens.length)) {
    throw new Error("the link’s tokens are incomplete, or another model’s: ask for the whole link");
  }
  return tokens;
}
