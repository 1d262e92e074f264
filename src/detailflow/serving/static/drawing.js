// Frames, tokens and the illustration, drawn on canvases.

const GOLDEN_ANGLE = 137.508; // degrees: neighbouring codes get hues far apart

export function newCanvas(className, side = 1) {
  return Object.assign(document.createElement("canvas"), { className, width: side, height: side });
}

/** Draw a frame in its own pixels; the style sheet enlarges it, crisp if it is small. */
export function drawFrame(canvas, frame) {
  const bitmap = frame?.bitmap;
  canvas.classList.toggle("blank", !bitmap);
  if (!bitmap) return;
  if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) {
    canvas.width = bitmap.width;
    canvas.height = bitmap.height;
  }
  canvas.classList.toggle("few", 2 * bitmap.width <= 1.01 * canvas.clientWidth);
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
}

/** Draw tokens as a row of cells: a colour for each code, pale from `shown` on, none where no token has come. */
export function drawTokens(canvas, tokens, shown, count) {
  canvas.width = count;
  canvas.height = 1;
  const context = canvas.getContext("2d");
  tokens.forEach((code, i) => {
    context.fillStyle = `hsl(${(code * GOLDEN_ANGLE) % 360} 52% 56% / ${i < shown ? 1 : 0.25})`;
    context.fillRect(i, 0, 1, 1);
  });
}

/** Return a PNG of a frame, `factor` times as large, with crisp pixels. */
export async function enlarged(frame, factor) {
  const bitmap = await frame.load();
  const canvas = new OffscreenCanvas(bitmap.width * factor, bitmap.height * factor);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type: "image/png" });
}

/** Fill an element with one landscape in 1, 2, 4, 8, … pixels a side. */
export function illustrate(element, sides = [1, 2, 4, 8, 16, 32]) {
  element.replaceChildren(
    ...sides.map((side, i) => {
      const canvas = newCanvas("", side);
      canvas.style.setProperty("--order", i);
      const context = canvas.getContext("2d");
      for (let y = 0; y < side; y++) {
        for (let x = 0; x < side; x++) {
          context.fillStyle = averageColour(x / side, y / side, 1 / side);
          context.fillRect(x, y, 1, 1);
        }
      }
      return canvas;
    }),
  );
}

const SAMPLES = 8; // along each side of a pixel

function averageColour(left, top, side) {
  const sum = [0, 0, 0];
  for (let i = 0; i < SAMPLES ** 2; i++) {
    const x = left + (side * ((i % SAMPLES) + 0.5)) / SAMPLES;
    const y = top + (side * (Math.floor(i / SAMPLES) + 0.5)) / SAMPLES;
    landscape(x, y).forEach((value, channel) => (sum[channel] += value));
  }
  return `rgb(${sum.map((value) => Math.round(value / SAMPLES ** 2)).join(" ")})`;
}

/** A sun over hills and water. */
function landscape(x, y) {
  if (Math.hypot(x - 0.66, y - 0.3) < 0.13) return [255, 214, 120];
  if (y > 0.8)
    return Math.abs(x - 0.66) < 0.05 + (y - 0.8) * 0.4 && Math.sin(y * 150) > -0.2 ? [233, 190, 132] : [38, 88, 104];
  const near = 0.66 - 0.2 * Math.sin(3.3 * x + 0.2);
  if (y > near) return [26, 82, 72];
  const far = 0.56 - 0.12 * Math.sin(5 * x + 2.4) - 0.04 * Math.sin(17 * x);
  if (y > far) return [70, 128, 118];
  return [120 + 128 * y, 178 - 14 * y, 198 - 70 * y];
}
