// Server-sent events of a response to POST, which EventSource cannot send.

/** Yield `{ name, data }` of each event, as its bytes arrive. */
export async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      text += value;
      const blocks = text.split("\n\n");
      text = blocks.pop();
      for (const block of blocks) yield parsed(block);
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops reading frees the connection
  }
}

function parsed(block) {
  const event = { name: "message", data: null };
  for (const line of block.split("\n")) {
    const [field, ...rest] = line.split(": ");
    if (field === "event") event.name = rest.join(": ");
    if (field === "data") event.data = JSON.parse(rest.join(": "));
  }
  return event;
}
