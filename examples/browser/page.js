// The page: reads the form, and shows every stage of the images.

import { bestBackend, load, readModel } from "./detailflow.js";

const FOLDER = "model";
const form = document.getElementById("form");
const field = (name) => document.getElementById(name);
const say = (text) => (field("status").textContent = text);
const asked = new URLSearchParams(location.search).get("backend"); // null if the address names none
const progress = field("progress");
const PRECISIONS = { float32: "float32", int8: "8 bits" };
const generators = {}; // by precision
let backend; // this and the model are known once the page has started
let model;

/** Return the generator with the chosen weights, loaded at first use. */
async function chosen() {
  const precision = field("precision").value;
  if (!generators[precision]) {
    say("Loading the model …");
    generators[precision] = await loadOrFallBack(precision);
  }
  return generators[precision];
}

/** Load with the backend; if the graphics processor fails and nobody asked for it, without. */
async function loadOrFallBack(precision) {
  try {
    return await load(FOLDER, precision, backend);
  } catch (error) {
    if (asked !== null || backend === "wasm") throw error;
    const generator = await load(FOLDER, precision, "wasm");
    backend = "wasm";
    return generator;
  }
}

function listPrecisions({ files }) {
  const names = Object.keys(PRECISIONS).filter((name) => files[name]);
  field("precision").replaceChildren(...names.map((name) => new Option(PRECISIONS[name], name)));
}

function listClasses({ class_names: names, num_classes: count, null_class: none }) {
  const often = names?.filter((name, i) => names.indexOf(name) < i); // ImageNet has two kinds of crane
  const label = (i) => (!names ? i : often.includes(names[i]) ? `${names[i]} (${i})` : names[i]);
  const options = Array.from({ length: count }, (_, i) => new Option(label(i), i));
  field("class").replaceChildren(...(count ? options : [new Option("no class", none)]));
}

async function generate() {
  const generator = await chosen();
  const count = Number(field("images").value);
  const canvases = Array.from({ length: count }, newCanvas);
  field("result").replaceChildren(...canvases);
  const classes = Array(count).fill(Number(field("class").value));
  say("Generating …");
  progress.max = generator.model.num_tokens;
  progress.value = 0;
  progress.hidden = false;
  let computing = 0; // milliseconds, without the time until the browser shows a stage
  let began = performance.now();
  for await (const { count: n, tokens } of generator.generate(classes, field("seed").value)) {
    const images = await generator.decode(tokens);
    computing += performance.now() - began;
    images.forEach((image, i) => show(canvases[i], image));
    field("tokens").textContent = JSON.stringify(tokens);
    progress.value = n;
    await new Promise(requestAnimationFrame);
    began = performance.now();
  }
  say(`${count} ${count > 1 ? "images" : "image"} in ${Math.round(computing)} ms, computed by ${generator.backend}`);
}

function newCanvas(_, image) {
  const canvas = document.createElement("canvas");
  canvas.role = "img";
  canvas.ariaLabel = `${field("class").selectedOptions[0].text}, image ${image + 1}`;
  return canvas;
}

function show(canvas, image) {
  canvas.width = canvas.height = image.width;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Do something while the button is off; say what went wrong. The keyboard's focus stays at the button. */
async function busy(work) {
  const focused = document.activeElement;
  field("generate").disabled = true;
  try {
    await work();
  } catch (error) {
    say(`Error: ${error?.message ?? String(error)}`); // ONNX Runtime throws numbers and strings too
    field("result").replaceChildren();
    field("tokens").textContent = "";
  }
  progress.hidden = true;
  field("generate").disabled = !model; // other weights may load where these did not
  if (document.activeElement === document.body) focused.focus();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  busy(generate);
});

await busy(async () => {
  say("Loading the model …");
  backend = asked ?? (await bestBackend());
  model = await readModel(FOLDER);
  listClasses(model);
  listPrecisions(model);
  await chosen();
  say(`Ready (${backend})`);
});
