// The server's endpoints: JSON, and answers as they are made (server-sent events).

import { byId } from "./words.js";

const KEY = "llava_fast key";

export class ApiError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** What /v1/models says of the one model that is served. */
export async function servedModel() {
  const response = await request("v1/models");
  return (await response.json()).data[0];
}

/** What the model would see of these messages' pictures. */
export async function plan(model, messages, signal) {
  const response = await request("v1/llava_fast/plan", { model, messages }, signal);
  return response.json();
}

/** The chunks of an answer as they come. Aborting the signal closes the connection, which ends the answer there. */
export async function* chat(body, signal) {
  const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", streamed, signal);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(response.status, sentence(chunk.error.message), chunk.error.code);
    yield chunk;
  }
  throw new ApiError(0, "The server closed the connection before the answer was whole.");
}

async function request(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = { headers, signal };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  const problem = await errorOf(response);
  if (response.status === 401 && (await askForKey(key ? "The server did not accept this key." : undefined))) {
    return request(path, body, signal);
  }
  throw problem;
}

async function errorOf(response) {
  try {
    const { error } = await response.json();
    const wait = response.headers.get("Retry-After");
    const hint = wait ? ` Try again in ${wait} s.` : "";
    return new ApiError(response.status, sentence(error.message) + hint, error.code);
  } catch {
    return new ApiError(response.status, `The server answered with status ${response.status}.`);
  }
}

export function sentence(text) {
  const begun = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}

let asking = null;

/** Ask for an API key; true if one was given. Requests that fail at the same time share the question. */
export function askForKey(why) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    const field = byId("key");
    if (why) byId("key-why").textContent = why;
    field.value = "";
    dialog.returnValue = "cancel";
    dialog.addEventListener(
      "close",
      () => {
        const given = dialog.returnValue === "use" && field.value.trim() !== "";
        if (given) sessionStorage.setItem(KEY, field.value.trim());
        asking = null;
        resolve(given);
      },
      { once: true },
    );
    dialog.showModal();
  });
  return asking;
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let read = await reader.read(); !read.done; read = await reader.read()) {
    const pieces = (rest + read.value).split("\n\n");
    rest = pieces.pop();
    for (const piece of pieces) {
      if (piece.startsWith("data: ")) yield piece.slice("data: ".length);
    }
  }
}
