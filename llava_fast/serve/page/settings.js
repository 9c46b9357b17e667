// The settings of a request, kept in this browser.

import { byId } from "./words.js";

const KEPT = "llava_fast settings";

export function openSettings() {
  const form = byId("settings");
  const button = byId("settings-button");
  for (const [name, value] of Object.entries(kept())) {
    if (form.elements[name]) form.elements[name].value = value;
  }
  button.addEventListener("click", () => {
    form.hidden = !form.hidden;
    button.setAttribute("aria-expanded", String(!form.hidden));
    if (!form.hidden) form.elements[0].focus();
  });
  form.addEventListener("input", () => {
    localStorage.setItem(KEPT, JSON.stringify(Object.fromEntries(new FormData(form))));
  });
  form.addEventListener("reset", () => localStorage.removeItem(KEPT));
  form.addEventListener("submit", (event) => event.preventDefault());
}

/** Fields of a request's body; null, and the form opened at the field, where one is not valid. */
export function options() {
  const form = byId("settings");
  if (!form.checkValidity()) {
    if (form.hidden) byId("settings-button").click();
    form.reportValidity();
    return null;
  }
  const { temperature, top_p, max_tokens, seed } = form.elements;
  const body = { temperature: Number(temperature.value), top_p: Number(top_p.value) };
  if (max_tokens.value !== "") body.max_tokens = Number(max_tokens.value);
  if (seed.value !== "") body.seed = Number(seed.value);
  return body;
}

/** The conversation's first messages: the system prompt, if there is one. */
export function systemMessages() {
  const content = byId("settings").elements.system.value.trim();
  return content ? [{ role: "system", content }] : [];
}

function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEPT)) ?? {};
  } catch {
    return {};
  }
}
