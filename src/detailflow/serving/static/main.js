// The page: what people do leads to steps of the studio, and its state back to the page.

import { Api } from "./api.js";
import { Connection } from "./connection.js";
import { Detail } from "./detail.js";
import { illustrate } from "./drawing.js";
import { Gallery } from "./gallery.js";
import { readLink } from "./link.js";
import { Model } from "./model.js";
import { Notices } from "./notices.js";
import { Picker } from "./picker.js";
import { letChoose } from "./preferences.js";
import { Settings, WrongSetting } from "./settings.js";
import { Studio } from "./studio.js";
import { Timeline } from "./timeline.js";
import { Trail } from "./trail.js";
import { listenForPictures, withinLimits } from "./upload.js";

const MOST_SUGGESTIONS = 10;
const byId = (id) => document.getElementById(id);

const notices = new Notices();
const api = new Api(new URL(".", document.baseURI));
const connection = new Connection(api, notices, askForKey, () => meetModel());
const settings = new Settings(byId("controls"));
const picker = new Picker(byId("class"));
const studio = new Studio(api, connection, meetModel, refuse);
new Trail(studio);
new Gallery(studio);
new Timeline(studio);
const detail = new Detail(studio, notices, vary);

letChoose(byId("pixels"), "pixels", ["crisp", "smooth"]);
letChoose(byId("theme"), "theme", ["auto", "dark", "light"]);
illustrate(byId("illustration"));
byId("controls").addEventListener("submit", (event) => (event.preventDefault(), generate()));
byId("stop").addEventListener("click", () => studio.stop());
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address is that of the images
  byId("stage").focus();
});
addEventListener("popstate", (event) => returnTo(event.state));
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
  if (event.key === "Escape" && !event.defaultPrevented) studio.stop();
});
listenForPictures(openPicture, (message) => notices.fail(message));
studio.addEventListener("state", () => (showState(), announceState()));
studio.addEventListener("step", showState);

try {
  await connection.persist(() => meetModel());
  openLink({ replace: true });
} catch (error) {
  notices.fail(error.message);
}
document.documentElement.dataset.ready = "true";

/** Learn what the server's model can do: at first, and if the server has another one, as it may after a pause. */
async function meetModel(signal) {
  const known = studio.model;
  if (known?.is(await api.model(signal))) return;
  const model = new Model(await api.describe(signal));
  if (studio.model !== known) return; // another call has learnt it meanwhile
  studio.model = model;
  settings.fit(model);
  picker.fit(model);
  byId("model").textContent = model.name;
  const many = model.classes.length;
  for (const id of ["class", "guidance_scale", "guidance_schedule"]) byId(id).closest(".field").hidden = !many;
  byId("pick").hidden = !many;
  byId("class-hint").textContent =
    `${many.toLocaleString("en")} classes: type a part of a name${many > 20 ? " or a number" : ""}.`;
  suggest(model);
  if (known && !studio.isRunning) notices.fail("the server is back, with another model");
}

function suggest(model) {
  if (!model.classes.length) return byId("suggestions").replaceChildren(suggestion("Generate", generate));
  const every = Math.ceil(model.classes.length / MOST_SUGGESTIONS);
  const items = model.classes
    .filter((_, i) => i % every === 0)
    .map((image) =>
      suggestion(image.name, () => {
        picker.value = image;
        generate();
      }),
    );
  byId("suggestions").replaceChildren(...items);
}

function suggestion(text, act) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  button.addEventListener("click", act);
  const item = document.createElement("li");
  item.append(button);
  return item;
}

function generate() {
  if (!studio.model) return notices.fail("the server has not answered yet: try again in a moment");
  const image = studio.model.classes.length ? picker.take() : null;
  if (image || !studio.model.classes.length) make({ kind: "class", image });
}

function vary(image, kept) {
  make({ kind: "variation", image, kept, parent: studio.step });
}

/** Make a step with the settings of the form, a new seed among them if people want one. */
function make(spec, options) {
  try {
    settings.drawSeed();
    notices.clear();
    studio.make({ ...spec, settings: settings.read() }, options);
  } catch (error) {
    if (!(error instanceof WrongSetting)) throw error;
    return; // the field says so
  }
  const { top, bottom } = byId("stage").getBoundingClientRect();
  const isOutOfSight = top > innerHeight / 2 || bottom < innerHeight / 4;
  if (isOutOfSight) byId("stage").scrollIntoView({ block: "start" });
}

async function openPicture(picture) {
  if (!studio.model) return notices.fail("the server has not answered yet: try again in a moment");
  notices.clear();
  studio.make({ kind: "picture" }, { file: await withinLimits(picture, studio.model.limits) });
}

/** Make what the address asks for. */
function openLink(options) {
  try {
    const link = readLink(location.hash, studio.model);
    if (!link) return void studio.leave();
    settings.write(link.settings);
    if (link.settings.seed !== undefined) byId("new-seed").checked = false;
    if (link.image) picker.value = link.image;
    if (link.kind === "picture") studio.make({ kind: "picture" }, { tokens: link.tokens, ...options });
    else make({ kind: link.kind, image: link.image, kept: link.kept }, options);
    if (link.otherModel) notices.fail("this link was made with another model, so the images are others");
  } catch (error) {
    notices.fail(error.message);
  }
}

/** Show the step of an entry of the browser's history, or make it again. */
function returnTo(state) {
  const step = studio.find(state);
  if (step) studio.show(step);
  else if (studio.model) openLink({ replace: true });
}

function showState() {
  const { step, isRunning } = studio;
  byId("empty").hidden = Boolean(step);
  byId("stop").hidden = !isRunning;
  byId("generate").textContent = isRunning ? "Start over" : "Generate";
  document.body.classList.toggle("running", isRunning);
}

function announceState() {
  const { step, isRunning } = studio;
  if (!step) return;
  const count = step.pictures.length;
  const of = step.model.classes.length ? ` of ${step.title}` : "";
  const what = step.kind === "picture" ? step.title : `${count} ${count === 1 ? "image" : "images"}${of}`;
  if (isRunning) notices.announce(`Making ${what}`);
  else if (step.state === "done") notices.announce(`Done: ${what}`);
  else if (step.state === "stopped") notices.announce("Stopped");
}

/** Say what the server refuses, beside the field if it is about one. */
function refuse(error) {
  if (settings.blame(error.param, error.message)) return;
  if (error.param === "prompt") picker.complain(error.message);
  else notices.fail(error.message);
}

/** Ask for the server's key; reject if people give none. */
function askForKey(isWrong) {
  const dialog = byId("key");
  const input = byId("key-value");
  if (isWrong) byId("key-text").textContent = "That was not the right one.";
  input.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve, reject) => {
    const settle = () => {
      if (input.value) resolve(input.value.trim());
      else reject(new Error("this server wants a key: reload the page to give it"));
    };
    dialog.addEventListener("close", settle, { once: true });
  });
}
