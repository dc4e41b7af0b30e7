"use strict";
// The server's routes, and nothing else that is loaded.

const byId = (id) => document.getElementById(id);
const base = location.pathname.replace(/\/$/, "");

function headers() {
  const key = byId("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function call(path, options = {}) {
  const response = await fetch(`${base}/v1/${path}`, { headers: headers(), ...options });
  if (response.ok) return response;
  let message = `status ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* no JSON: a proxy's answer, perhaps */ }
  throw new Error(message);
}

/** JSON of `body`; its seed, a BigInt, is written as the number that it is: 64 bits fit no other. */
function toJson({ seed, ...body }) {
  const json = JSON.stringify(body);
  return seed === undefined ? json : `${json.slice(0, -1)},"seed":${seed}}`;
}

async function listModels() {
  return (await (await call("models")).json()).data.map((card) => card.id);
}

async function nextToken(body) {
  return (await call("next_token", { method: "POST", body: toJson(body) })).json();
}

/** The chunks of a completion, as they come. */
async function* complete(body, signal) {
  const response = await call("completions", { method: "POST", body: toJson({ ...body, stream: true }), signal });
  const decoder = new TextDecoder();
  let rest = "";
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    const frames = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      if (frame === "data: [DONE]") continue;
      const chunk = JSON.parse(frame.slice("data: ".length));
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}
