// What happens when something is typed, moved or pressed.

const TOP = 16; // rows of the chart
const TYPING_MS = 250;
const SHOWN_CONTEXT = 32; // characters
const output = new Output(byId("output"), () => refreshChart());
let controller = null; // of the completion that is being generated
let followsPrompt = true; // the chart is about the prompt as typed, not about the text

function say(text, isError = false) {
  byId("status").textContent = text;
  byId("status").className = isError ? "error" : "";
}

/** The last words of `text`. */
function ending(text) {
  const words = text.replace(/\s+/g, " ");
  return words.length > SHOWN_CONTEXT ? `…${words.slice(-SHOWN_CONTEXT).trimStart()}` : words;
}

/** Prompt and output before the token that the chart is about, and the token that was drawn there. */
function place() {
  if (followsPrompt) return { prompt: byId("prompt").value, output_tokens: [] };
  const end = output.selected ?? output.ids.length;
  return { prompt: output.prompt, output_tokens: output.ids.slice(0, end), chosen: output.ids[end] };
}

let asking = false;
let askAgain = false;

/** Brings the chart up to date. What changes meanwhile is asked for once the answer has come. */
async function refreshChart() {
  askAgain = true;
  if (asking) return;
  asking = true;
  document.body.classList.add("busy");
  while (askAgain) {
    askAgain = false;
    const { chosen, ...where } = place();
    const before = where.prompt + output.text.slice(0, followsPrompt ? 0 : output.tokens[output.selected]?.begin);
    try {
      showChart(await nextToken({ ...parameters(), ...where, top: TOP }), chosen);
      byId("after").textContent = `after “${ending(before)}”`;
    } catch (error) {
      byId("left").textContent = error.message;
      byId("left").className = "error";
    }
  }
  asking = false;
  document.body.classList.remove("busy");
}

async function refreshModels() {
  const models = await listModels();
  byId("model").replaceChildren(...models.map((name) => new Option(name, name)));
  refreshChart();
}

function completionBody() {
  const stop = byId("stop").value.replaceAll("\\n", "\n");
  return { ...parameters(), prompt: byId("prompt").value, max_tokens: Number(byId("max_tokens").value), logprobs: 0,
    return_token_ids: true, stream_options: { include_usage: true }, ...(stop && { stop }) };
}

async function run() {
  if (!byId("model").value) await refreshModels();
  output.clear(byId("prompt").value);
  followsPrompt = false;
  const begin = performance.now();
  let ended;
  for await (const { choices, usage } of complete(completionBody(), controller.signal)) {
    for (const choice of choices) {
      output.add(choice);
      ended = choice;
    }
    if (usage) {
      const seconds = (performance.now() - begin) / 1000;
      const count = usage.completion_tokens;
      say(`${count} tokens in ${seconds.toFixed(2)} s (${(count / seconds).toFixed(1)} a second)`);
    }
  }
  // behind an end token nothing follows: the chart is about that token then
  if (ended?.finish_reason === "stop" && ended.stop_reason === null) output.select(output.tokens.length - 1);
}

byId("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (controller) return;
  controller = new AbortController();
  byId("go").disabled = true;
  byId("halt").disabled = false;
  byId("output").setAttribute("aria-busy", "true");
  say("Generating …");
  try {
    await run();
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else say(error.message, true);
  } finally {
    controller = null;
    byId("go").disabled = false;
    byId("halt").disabled = true;
    byId("output").removeAttribute("aria-busy");
    refreshChart();
  }
});
byId("halt").addEventListener("click", () => controller?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") controller?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("form").requestSubmit();
});
let typing = 0;
byId("prompt").addEventListener("input", () => {
  followsPrompt = true;
  clearTimeout(typing);
  typing = setTimeout(refreshChart, TYPING_MS);
});
byId("reset").addEventListener("click", () => {
  for (const id of [...SLIDERS.map((slider) => slider.id), "max_tokens", "seed", "stop"]) byId(id).value = byId(id).defaultValue;
  SLIDERS.forEach(showValue);
  refreshChart();
});
for (const id of ["model", "seed"]) byId(id).addEventListener("change", refreshChart);
byId("key").addEventListener("change", () => refreshModels().catch((error) => say(error.message, true)));
makeSliders(refreshChart);
refreshModels().catch((error) => say(error.message, true));
