// The page: what is attached, the conversation, and sending it.

import { ApiError, askForKey, chat, plan, sentence, servedModel } from "./api.js";
import { Attachment } from "./attachments.js";
import { COVERS, hideSeen, isShown, openPanel, showSeen } from "./seen.js";
import { openSettings, options, systemMessages } from "./settings.js";
import { announce, byId, count, digits, duration, element, megabytes } from "./words.js";

let model = null; // what /v1/models says
let turns = []; // { role, content, attachments }: content is what the server is sent
let attached = []; // Attachments of the question that is being written
const reading = new Set(); // promises of `attach`, of files whose plans have not come yet
let running = null; // the AbortController of the answer that is being made
let totals = { questions: 0, read: 0, visual: 0, cached: 0, written: 0 };
let planned = null; // the AbortController of the last plan that was asked for

// ------------------------------------------------------------ attaching

/** Attach files. What goes wrong is shown. */
function give(files) {
  const done = attach(files)
    .catch((error) => {
      problem(error.message);
      return false;
    })
    .finally(() => reading.delete(done));
  reading.add(done);
}

/** Whether all files were attached. */
async function attach(files) {
  let all = true;
  problem(null);
  await connected();
  for (const file of files) {
    const attachment = new Attachment(file);
    byId("size").textContent = `Reading ${attachment.name} …`;
    try {
      await check(attachment);
    } catch (error) {
      attachment.close();
      problem(`${attachment.name}: ${error.message}`);
      all = false;
      continue;
    }
    attached.push(attachment);
    showAttached();
    announce(`${attachment.name} attached: ${count(attachment.plan.tokens, "token")}`);
    if (!COVERS.matches) showSeen(attachment);
  }
  replan();
  return all;
}

/** Ask the server what the model sees of it. Raises an error in words for what cannot be read. */
async function check(attachment) {
  if (!/^(image|video)\//.test(attachment.file.type)) {
    throw new Error("this is neither a picture nor a video.");
  }
  if (model && attachment.bytes > model.limits.max_body_bytes) {
    const most = megabytes((model.limits.max_body_bytes * 3) / 4);
    throw new Error(`it has ${megabytes(attachment.file.size)}, and the server takes about ${most}.`);
  }
  const content = [await attachment.part(), { type: "text", text: "" }];
  [attachment.plan] = (await plan(model.id, [{ role: "user", content }])).items;
}

function showAttached() {
  byId("attached").replaceChildren(
    ...attached.map((attachment) => {
      const remove = element("button", { type: "button", className: "remove", textContent: "×" });
      remove.setAttribute("aria-label", `Remove ${attachment.name}`);
      remove.addEventListener("click", () => {
        attached = attached.filter((each) => each !== attachment);
        if (isShown(attachment)) hideSeen();
        attachment.close();
        showAttached();
        replan();
        byId("question").focus();
      });
      return element("li", {}, thumbnail(attachment), remove);
    }),
  );
}

/** A button that shows what the model sees of an attachment. */
function thumbnail(attachment) {
  const { tokens, kind, views } = attachment.plan;
  const tiles = views.reduce((sum, view) => sum + view.regions.length, 0);
  const parts = kind === "video" ? count(views.length, "frame") : tiles > 1 ? count(tiles, "tile") : "";
  const size = [count(tokens, "token"), parts].filter(Boolean).join(", ");
  const button = element("button", { type: "button", className: "thumbnail" }, attachment.thumbnail());
  button.append(element("span", { className: "badge", textContent: digits(tokens) }));
  button.title = `${attachment.name}: ${size}. Show what the model sees.`;
  button.setAttribute("aria-label", button.title);
  button.addEventListener("click", () => showSeen(attachment, button));
  return button;
}

/** Ask what the whole conversation would take: several pictures may be read otherwise than one alone. */
async function replan() {
  planned?.abort();
  byId("size").textContent = "";
  byId("size").classList.remove("over");
  if (!attached.length || running) return; // while an answer is made it has no place yet: then afterwards
  planned = new AbortController();
  try {
    const { items, prompt_tokens: tokens, max_prompt_tokens: most } = await plan(
      model.id,
      [...messages(), { role: "user", content: await contentOf("", attached) }],
      planned.signal,
    );
    items.slice(-attached.length).forEach((item, at) => (attached[at].plan = item));
    showAttached();
    const current = attached.find(isShown);
    if (current) showSeen(current);
    byId("size").textContent = `${digits(tokens)} of ${count(most, "token")}, before the question`;
    byId("size").classList.toggle("over", tokens > most);
  } catch (error) {
    if (error.name !== "AbortError") problem(error.message);
  }
}

async function contentOf(text, attachments) {
  const parts = await Promise.all(attachments.map((attachment) => attachment.part()));
  return parts.length ? [...parts, { type: "text", text }] : text;
}

function messages() {
  return [...systemMessages(), ...turns.map(({ role, content }) => ({ role, content }))];
}

// ------------------------------------------------------------ asking

async function ask() {
  const question = byId("question");
  const body = options();
  if (running || body === null) return;
  problem(null);
  running = new AbortController();
  showRunning(true);
  const conversation = turns;
  const ready = await allRead(running.signal);
  const text = question.value.trim(); // now: it may have been written on meanwhile
  if (ready && !text && !attached.length) problem("Write a question first.");
  if (!ready || (!text && !attached.length)) {
    running = null;
    showRunning(false);
    replan();
    question.focus();
    return;
  }
  const attachments = attached;
  attached = []; // what is given from now on is the next question's
  const turn = { role: "user", content: await contentOf(text, attachments), attachments };
  const asked = show(turn, text);
  const answer = showAnswer();
  const clock = { asked: performance.now(), first: null, last: null };
  turns.push(turn);
  question.value = "";
  showAttached();
  replan(); // its size is not shown any more
  let usage = null;
  let reason = null;
  try {
    await connected();
    for await (const chunk of chat({ ...body, model: model.id, messages: messages() }, running.signal)) {
      const [choice] = chunk.choices;
      if (choice?.delta.content) {
        clock.last = performance.now();
        clock.first ??= clock.last;
        append(answer, choice.delta.content);
      }
      reason = choice?.finish_reason ?? reason;
      usage = chunk.usage ?? usage;
    }
    finish(answer, usage, reason, clock);
  } catch (error) {
    if (conversation !== turns) announce("Stopped.");
    else if (error.name === "AbortError") stopped(answer);
    else failed(error, answer);
  }
  running = null;
  showRunning(false);
  if (conversation !== turns) return; // a new one was begun
  if (answer.text || usage) turns.push({ role: "assistant", content: answer.text, attachments: [] });
  else takeBack(turn, text, asked, answer);
  replan();
}

/** Wait for files that are being read. False if one could not be attached, which is shown, or if the wait was stopped:
 *  the question then stays as it is. */
async function allRead(signal) {
  if (!reading.size) return true;
  announce("The question is sent once its files are read.");
  const stop = new Promise((resolve) => signal.addEventListener("abort", () => resolve([false])));
  let all = true;
  while (reading.size && all) all = (await Promise.race([Promise.all(reading), stop])).every(Boolean);
  return all && !signal.aborted;
}

function show(turn, text) {
  const pictures = element("div", { className: "pictures" }, ...turn.attachments.map(thumbnail));
  const item = element(
    "article",
    { className: "question" },
    element("span", { className: "unseen", textContent: "You: " }),
    turn.attachments.length ? pictures : null,
    text ? element("p", { textContent: text }) : null,
  );
  byId("welcome").hidden = true;
  byId("log").append(item);
  return item;
}

function showAnswer() {
  const words = element("p", { className: "words" });
  const speaker = element("span", { className: "unseen", textContent: "Model: " });
  const item = element("article", { className: "answer" }, speaker, words);
  item.setAttribute("aria-busy", "true"); // read out when it is whole
  byId("log").append(item);
  item.scrollIntoView({ block: "nearest" });
  return { item, words, text: "" };
}

function append(answer, text) {
  const { scrollingElement } = document;
  const atEnd = scrollingElement.scrollHeight - scrollingElement.scrollTop - innerHeight < 80;
  answer.words.append(answer.text ? text : text.trimStart()); // models begin with a space
  answer.text += text;
  if (atEnd) scrollTo({ top: scrollingElement.scrollHeight });
}

function finish(answer, usage, reason, clock) {
  const details = usage.prompt_tokens_details;
  totals.questions += 1;
  totals.read += usage.prompt_tokens;
  totals.visual += details.visual_tokens;
  totals.cached += details.cached_tokens;
  totals.written += usage.completion_tokens;
  if (reason === "length") note(answer, "Cut off: the answer reached its limit of tokens.");
  if (!answer.text) note(answer, "The model ended its answer without a word.");
  answer.item.append(costOf(usage, clock));
  answer.item.removeAttribute("aria-busy");
  byId("totals").textContent =
    `This conversation: ${count(totals.questions, "answer")}, ${count(totals.read, "token")} read ` +
    `(${digits(totals.visual)} of pictures, ${digits(totals.cached)} from the cache), ` +
    `${digits(totals.written)} written.`;
}

const SOURCES = {
  encoded: "encoded now",
  feature_cache: "features from the cache",
  prefix_cache: "from the cache, as the prompt before it",
};

/** What an answer took; times are the browser's. */
function costOf(usage, clock) {
  const { cached_tokens: cached, images } = usage.prompt_tokens_details;
  const first = clock.first === null ? null : clock.first - clock.asked;
  const seconds = (clock.last - clock.first) / 1000;
  const speed = seconds > 0.05 ? (usage.completion_tokens - 1) / seconds : null; // else the clock is too coarse
  const summary = [
    `${count(usage.prompt_tokens, "token")} read`,
    `${digits(usage.completion_tokens)} written`,
    first === null ? null : `first after ${duration(first)}`,
    speed === null ? null : `${digits(Math.round(speed))} a second`,
  ];
  const lines = [
    `${count(cached, "token")} of the prompt came from the cache.`,
    ...images.map(
      ({ tokens, source }, at) => `Picture ${at + 1}: ${count(tokens, "token")}, ${SOURCES[source]}.`,
    ),
  ];
  return element(
    "details",
    { className: "cost" },
    element("summary", { textContent: summary.filter(Boolean).join(" · ") }),
    element("ul", {}, ...lines.map((textContent) => element("li", { textContent }))),
  );
}

function stopped(answer) {
  note(answer, "Stopped.");
  announce("Stopped.");
}

function failed(error, answer) {
  if (!(error instanceof ApiError)) console.error(error);
  if (answer.text) note(answer, sentence(error.message));
  problem(error.message);
}

function note(answer, text) {
  answer.item.append(element("p", { className: "note", textContent: text }));
  answer.item.removeAttribute("aria-busy");
}

/** Nothing was answered: the question is the user's to change again. */
function takeBack(turn, text, asked, answer) {
  turns.splice(turns.indexOf(turn), 1);
  asked.remove();
  answer.item.remove();
  byId("welcome").hidden = turns.length > 0;
  attached = [...turn.attachments, ...attached];
  byId("question").value ||= text;
  showAttached();
}

function showRunning(now) {
  const [send, stop] = [byId("send"), byId("stop")];
  const focused = document.activeElement === (now ? send : stop);
  send.hidden = now;
  stop.hidden = !now;
  if (focused) (now ? stop : byId("question")).focus();
}

// ------------------------------------------------------------ the rest

function problem(text) {
  byId("problem").hidden = !text;
  byId("problem").textContent = text ?? "";
}

/** Once the server has said which model it serves. Raises an error in words. */
async function connected() {
  if (model) return;
  model = await servedModel();
  byId("model").textContent = model.id;
  document.title = `${model.id} – llava_fast`;
}

function restart() {
  running?.abort();
  for (const each of [...turns.flatMap((turn) => turn.attachments), ...attached]) each.close();
  turns = [];
  attached = [];
  totals = { questions: 0, read: 0, visual: 0, cached: 0, written: 0 };
  byId("log").replaceChildren();
  byId("totals").textContent = "";
  byId("welcome").hidden = false;
  hideSeen();
  problem(null);
  showAttached();
  replan();
  byId("question").focus();
}

function listen() {
  const question = byId("question");
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask();
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("new").addEventListener("click", restart);
  byId("key-button").addEventListener("click", () => askForKey());
  byId("files").addEventListener("change", (event) => {
    give([...event.target.files]);
    event.target.value = "";
  });
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || byId("key-dialog").open) return;
    if (running) running.abort();
    else hideSeen();
  });
  addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    give(files);
  });
  listenForDrops();
}

function listenForDrops() {
  let inside = 0; // enter and leave come for each element
  const shown = (now) => document.body.classList.toggle("dropping", now);
  addEventListener("dragenter", () => shown(++inside > 0));
  addEventListener("dragleave", () => shown(--inside > 0));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    inside = 0;
    shown(false);
    const files = [...event.dataTransfer.files];
    if (files.length) give(files);
    else problem("Only files can be dropped here. Save the picture first, or copy and paste it.");
  });
}

openSettings();
openPanel();
listen();
connected().catch((error) => {
  byId("model").textContent = "not connected";
  problem(error.message);
});
byId("question").focus();
