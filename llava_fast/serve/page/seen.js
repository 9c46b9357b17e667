// The panel "What the model sees": one picture or video, view by view.

import { draw, overlap, union } from "./drawing.js";
import { byId, count, describe, digits, element } from "./words.js";

/** On a narrow screen the panel covers the page. */
export const COVERS = matchMedia("(max-width: 60rem)");

let shown = null; // { attachment, sheets, number, opener }

/** Show an attachment that has a plan; `opener` has the focus again when the panel is closed. */
export function showSeen(attachment, opener = null) {
  const { plan } = attachment;
  shown = { attachment, sheets: sheetsOf(plan), number: 0, opener };
  if (plan.kind === "image") shown.number = largest(shown.sheets);
  byId("seen").hidden = false;
  cover();
  byId("seen-name").textContent = `${attachment.name}, ${digits(plan.width)} × ${digits(plan.height)} pixels`;
  offerSheets();
  describe(byId("seen-facts"), factsOf(plan));
  if (opener) byId("seen-title").focus();
  return redraw();
}

export function hideSeen() {
  if (!shown) return;
  byId("seen").hidden = true;
  cover();
  (shown.opener?.isConnected ? shown.opener : byId("question")).focus();
  shown = null;
}

/** What the panel covers cannot be reached. */
function cover() {
  const covered = COVERS.matches && !byId("seen").hidden;
  for (const part of [document.querySelector("header"), byId("settings"), byId("chat")]) part.inert = covered;
}

export function isShown(attachment) {
  return shown?.attachment === attachment;
}

export function openPanel() {
  byId("seen-close").addEventListener("click", hideSeen);
  byId("sharpness").addEventListener("change", redraw);
  byId("seen-frames").querySelector("input").addEventListener("input", (event) => select(Number(event.target.value)));
  COVERS.addEventListener("change", cover);
  new ResizeObserver(redraw).observe(byId("seen"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

/** Views that can be drawn together because they lie side by side, as slices do. A frame is always alone. */
function sheetsOf(plan) {
  const sheets = [];
  for (const view of plan.views) {
    const last = sheets.at(-1);
    const apart = (old) => view.regions.every((region) => !overlap(region.box, old.box));
    if (plan.kind === "image" && last && last.regions.every(apart)) last.views.push(view);
    else sheets.push({ views: [view], regions: [] });
    sheets.at(-1).regions.push(...view.regions);
  }
  for (const sheet of sheets) sheet.tokens = sheet.regions.reduce((sum, region) => sum + region.tokens, 0);
  return sheets;
}

/** The number of the sheet with the most tokens: of a picture that is tiled, the tiles. */
function largest(sheets) {
  return sheets.reduce((best, sheet, at) => (sheet.tokens > sheets[best].tokens ? at : best), 0);
}

function offerSheets() {
  const { sheets, attachment } = shown;
  const isVideo = attachment.plan.kind === "video";
  const fieldset = byId("seen-views");
  fieldset.hidden = isVideo || sheets.length < 2;
  byId("seen-frames").hidden = !isVideo || sheets.length < 2;
  const slider = byId("seen-frames").querySelector("input");
  Object.assign(slider, { max: sheets.length - 1, value: 0 });
  fieldset.replaceChildren(
    fieldset.querySelector("legend"),
    ...sheets.map((sheet, at) => {
      const radio = element("input", { type: "radio", name: "view", checked: at === shown.number });
      radio.addEventListener("change", () => select(at));
      return element("label", {}, radio, element("span", { textContent: titleOf(sheet) }));
    }),
  );
}

function titleOf(sheet) {
  const { width, height } = shown.attachment.plan;
  const [{ box }] = sheet.regions;
  const covers = box[0] <= 0.5 && box[1] <= 0.5 && box[0] + box[2] >= width - 0.5 && box[1] + box[3] >= height - 0.5;
  return sheet.regions.length === 1 && covers ? "Whole picture" : count(sheet.regions.length, "tile");
}

function select(number) {
  shown.number = number;
  redraw();
}

async function redraw() {
  if (!shown || byId("seen").hidden) return;
  const asked = shown;
  const { attachment, sheets, number } = shown;
  const { plan } = attachment;
  const sheet = sheets[number];
  const [view] = sheet.views;
  const pixels = await attachment.pixels(view.seconds);
  if (asked !== shown || number !== shown.number) return; // another one since
  draw(byId("drawing"), pixels, plan, sheet.regions, byId("sharpness").checked ? sharpnessOf(sheet) : null);

  const where = plan.kind === "video" ? frameTitle(view, number, sheets.length) : titleOf(sheet);
  byId("seen-frames").querySelector("output").textContent = where;
  const text = sentenceOf(plan, sheet);
  byId("seen-view").textContent = pixels ? text : `${text} The browser cannot show this file; the server reads it.`;
  byId("drawing").setAttribute("aria-label", `${attachment.name}. ${where}. ${text}`);
  byId("seen-dot").hidden = sheet.regions.every((region) => region.points.length === 0);
  byId("seen-tiles").replaceChildren(
    ...sheet.regions.map((region, at) =>
      element(
        "tr",
        {},
        element("th", { scope: "row", textContent: at + 1 }),
        element("td", { textContent: digits(region.tokens) }),
        element("td", { textContent: span(region.box) }),
      ),
    ),
  );
}

/** The size in pixels that the model reads of what the sheet covers. */
function sharpnessOf(sheet) {
  const [view] = sheet.views;
  const [, , across, down] = union(sheet.regions.map((region) => region.box));
  const [, , ofView, downView] = union(view.regions.map((region) => region.box));
  return { width: (view.width * across) / ofView, height: (view.height * down) / downView };
}

function sentenceOf(plan, sheet) {
  const [{ width, height }] = sheet.views;
  const several = sheet.views.length > 1;
  const read = several
    ? `Cut into ${count(sheet.views.length, "slice")} of ${width} × ${height} pixels`
    : `Resized to ${width} × ${height} pixels`;
  const cut = !several && sheet.regions.length > 1 ? `, cut into ${count(sheet.regions.length, "tile")}` : "";
  return `${read}${cut}: ${count(sheet.tokens, "token")}.`;
}

function frameTitle(view, number, frames) {
  const when = view.seconds === null ? "" : `, at ${view.seconds.toFixed(2)} s`;
  return `${number + 1} of ${frames}${when}`;
}

function factsOf(plan) {
  const regions = plan.views.flatMap((view) => view.regions);
  const places = regions.reduce((sum, region) => sum + region.tokens, 0);
  const pooled = plan.pooled_tokens ? ` (${digits(plan.pooled_tokens)} pooled from several patches)` : "";
  return [
    [regions.length === plan.tiles ? "Tiles" : "Patches", digits(plan.tiles)],
    ["Tokens", digits(plan.tokens)],
    [plan.kind === "video" ? "of frames" : "of the picture", `${digits(places)}${pooled}`],
    ...(plan.newline_tokens ? [["line ends", digits(plan.newline_tokens)]] : []),
    ...(plan.optional_tokens ? [["of which a router may leave out", digits(plan.optional_tokens)]] : []),
    ...(plan.marker_tokens ? [["around and between tiles", digits(plan.marker_tokens)]] : []),
  ];
}

function span([left, top, across, down]) {
  const [x, y, right, bottom] = [left, top, left + across, top + down].map(Math.round);
  return `x ${x} to ${right}, y ${y} to ${bottom}`;
}
