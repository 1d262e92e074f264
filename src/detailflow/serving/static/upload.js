// People's own picture: chosen, dropped anywhere on the page, or pasted.

const LONGEST_SIDE = 2048; // pixels, of a picture that is too large to be sent as it is

/** Call `open` with each picture that people give; `refuse` with a sentence for anything else. */
export function listenForPictures(open, refuse) {
  const file = document.getElementById("file");
  const target = document.getElementById("drop");
  document.getElementById("choose").addEventListener("click", () => file.click());
  file.addEventListener("change", () => {
    if (file.files.length) take([...file.files]);
    file.value = "";
  });
  addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) take([...event.clipboardData.files]);
  });

  addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    target.hidden = false;
  });
  addEventListener("dragleave", (event) => event.relatedTarget === null && (target.hidden = true));
  addEventListener("drop", (event) => {
    target.hidden = true;
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    take([...event.dataTransfer.files]);
  });

  function take(files) {
    if (!files.length) return; // as of some programs' drops
    const picture = files.find((one) => one.type.startsWith("image/"));
    if (picture) open(picture);
    else refuse(`“${files[0].name}” is not a picture: give a PNG, JPEG or WebP file`);
  }
}

/** Return a picture as it is, or smaller if the server's limits ask for it and the browser can open it. */
export async function withinLimits(picture, limits) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(picture);
  } catch {
    return picture; // the server says what is wrong with it
  }
  const { width, height } = bitmap;
  if (picture.size <= limits.upload_bytes && width * height <= limits.upload_pixels) return picture;
  let scale = Math.min(1, LONGEST_SIDE / Math.max(width, height), Math.sqrt(limits.upload_pixels / (width * height)));
  let smaller = await scaled(bitmap, scale);
  while (smaller.size > limits.upload_bytes && scale * Math.min(width, height) > 1) {
    scale *= 0.75;
    smaller = await scaled(bitmap, scale);
  }
  bitmap.close();
  return smaller;
}

/** Return a picture's JPEG file, its sides multiplied by `scale`. */
function scaled(bitmap, scale) {
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.floor(side * scale)));
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // as the server shows what is transparent; a JPEG would have it black
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  return canvas.convertToBlob({ type: "image/jpeg", quality: 0.95 });
}
