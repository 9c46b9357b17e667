// Numbers and elements, as the page writes them.

const number = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

/** "1 token", "1,200 tokens". */
export function count(n, noun, plural = `${noun}s`) {
  return `${number.format(n)} ${n === 1 ? noun : plural}`;
}

export function digits(n) {
  return number.format(n);
}

export function duration(milliseconds) {
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${number.format(milliseconds / 1000)} s`;
}

export function megabytes(bytes) {
  return `${number.format(bytes / 1e6)} MB`;
}

export const byId = (id) => document.getElementById(id);

/** An element with properties and children; a child that is null is left out. */
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Put pairs of term and description in place of a list's own. */
export function describe(list, pairs) {
  list.replaceChildren(
    ...pairs.flatMap(([term, text]) => [
      element("dt", { textContent: term }),
      element("dd", { textContent: text }),
    ]),
  );
}

/** Read out by screen readers; not shown. */
export function announce(text) {
  byId("status").textContent = text;
}
