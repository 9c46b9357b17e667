// A picture with the model's tiles and tokens laid over it. All places come from the server's plan; nothing is computed
// here but how large they are on the screen.

const INK = { tile: "#ffffff", edge: "#06245c", dot: "#ffd54a", label: "#06245c" };
const OUTER = { light: "#d5dae1", dark: "#2b323c" };

/** Draw `regions` of a picture of width x height pixels; `pixels` are what to draw it from, or null. `sharpness` is the
 * size (width, height) at which the model reads what the regions cover; null: show every pixel. */
export function draw(canvas, pixels, { width, height }, regions, sharpness) {
  const around = union([[0, 0, width, height], ...regions.map((region) => region.box)]);
  const room = canvas.parentElement.clientWidth - 2 * parseFloat(getComputedStyle(canvas.parentElement).paddingLeft);
  const scale = Math.min(room / around[2], Math.max(240, 0.6 * innerHeight) / around[3]);
  const density = devicePixelRatio;
  const size = [around[2] * scale, around[3] * scale].map((side) => Math.max(Math.round(side), 8));
  canvas.width = size[0] * density;
  canvas.height = size[1] * density;
  canvas.style.aspectRatio = `${size[0]} / ${size[1]}`;
  canvas.style.maxWidth = `${size[0]}px`;

  const context = canvas.getContext("2d");
  context.scale(density, density);
  const place = ([left, top, across, down]) => [
    ((left - around[0]) / around[2]) * size[0],
    ((top - around[1]) / around[3]) * size[1],
    (across / around[2]) * size[0],
    (down / around[3]) * size[1],
  ];

  const outer = matchMedia("(prefers-color-scheme: dark)").matches ? OUTER.dark : OUTER.light;
  context.fillStyle = outer;
  context.fillRect(0, 0, ...size);
  const whole = place([0, 0, width, height]);
  const covered = place(union(regions.map((region) => region.box)));
  if (pixels && sharpness) drawSharp(context, pixels, whole, covered, sharpness);
  else if (pixels) context.drawImage(pixels, ...whole);
  else drawMissing(context, whole);

  veil(context, size, regions.filter((region) => region.tokens).map((region) => place(region.kept ?? region.box)));
  const most = Math.max(...regions.map((region) => region.points.length / 2));
  for (const region of regions) drawDots(context, region, place, most);
  for (const region of regions) outline(context, place(region.box));
  for (const region of regions) label(context, region, place(region.kept ?? region.box));
}

function drawSharp(context, pixels, whole, covered, sharpness) {
  const small = document.createElement("canvas");
  small.width = Math.max(1, Math.round((whole[2] / covered[2]) * sharpness.width));
  small.height = Math.max(1, Math.round((whole[3] / covered[3]) * sharpness.height));
  const within = small.getContext("2d");
  within.imageSmoothingQuality = "high";
  within.drawImage(pixels, 0, 0, small.width, small.height);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, ...whole);
  context.imageSmoothingEnabled = true;
}

function drawMissing(context, [left, top, across, down]) {
  context.fillStyle = "#808890";
  context.fillRect(left, top, across, down);
}

/** Darken everything but some rectangles: what the model does not read. */
function veil(context, size, rectangles) {
  context.save();
  context.beginPath();
  context.rect(0, 0, ...size);
  context.clip();
  const veiled = new Path2D();
  veiled.rect(0, 0, ...size);
  // Each rectangle turned the other way round, so that "nonzero" leaves it out.
  for (const [left, top, across, down] of rectangles) {
    veiled.moveTo(left, top);
    veiled.lineTo(left, top + down);
    veiled.lineTo(left + across, top + down);
    veiled.lineTo(left + across, top);
    veiled.closePath();
  }
  context.fillStyle = stripes(context);
  context.fill(veiled);
  context.restore();
}

function stripes(context) {
  const side = 8;
  const cell = document.createElement("canvas");
  cell.width = cell.height = side;
  const within = cell.getContext("2d");
  within.fillStyle = "rgb(10 14 20 / 55%)";
  within.fillRect(0, 0, side, side);
  within.strokeStyle = "rgb(255 255 255 / 35%)";
  within.lineWidth = 1.4;
  within.beginPath();
  for (const start of [-side, 0, side]) {
    within.moveTo(start, side);
    within.lineTo(start + side, 0);
  }
  within.stroke();
  return context.createPattern(cell, "repeat");
}

function drawDots(context, region, place, most) {
  const kept = place(region.kept ?? region.box);
  const apart = Math.sqrt((kept[2] * kept[3]) / Math.max(most, 1));
  const radius = Math.min(3, Math.max(0.6, apart / 5));
  context.fillStyle = INK.dot;
  context.strokeStyle = INK.edge;
  context.lineWidth = radius > 1.2 ? 1 : 0.4;
  for (let at = 0; at < region.points.length; at += 2) {
    const [x, y] = place([region.points[at], region.points[at + 1], 0, 0]);
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    context.fill();
    context.stroke();
  }
}

function outline(context, [left, top, across, down]) {
  for (const [color, width] of [[INK.edge, 4], [INK.tile, 2]]) {
    context.strokeStyle = color;
    context.lineWidth = width;
    context.strokeRect(left + 1, top + 1, across - 2, down - 2);
  }
}

function label(context, region, [left, top, across, down]) {
  const text = String(region.tokens);
  context.font = "600 13px system-ui, sans-serif";
  const wide = context.measureText(text).width + 12;
  if (wide > across || down < 22) return;
  context.fillStyle = INK.tile;
  context.strokeStyle = INK.label;
  context.lineWidth = 1.5;
  context.beginPath();
  context.roundRect(left + 5, top + 5, wide, 20, 10);
  context.fill();
  context.stroke();
  context.fillStyle = INK.label;
  context.textBaseline = "middle";
  context.fillText(text, left + 11, top + 15.5);
}

export function union(rectangles) {
  const left = Math.min(...rectangles.map((each) => each[0]));
  const top = Math.min(...rectangles.map((each) => each[1]));
  const right = Math.max(...rectangles.map((each) => each[0] + each[2]));
  const bottom = Math.max(...rectangles.map((each) => each[1] + each[3]));
  return [left, top, right - left, bottom - top];
}

/** Whether two rectangles share more than a seam. */
export function overlap(a, b) {
  const across = Math.min(a[0] + a[2], b[0] + b[2]) - Math.max(a[0], b[0]);
  const down = Math.min(a[1] + a[3], b[1] + b[3]) - Math.max(a[1], b[1]);
  return across > 0.01 * Math.min(a[2], b[2]) && down > 0.01 * Math.min(a[3], b[3]);
}
