// The sampling parameters, each with a slider; at its neutral value it is off.

const SLIDERS = [
  { id: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: 0.7 },
  { id: "min_p", label: "Min-p", min: 0, max: 1, step: 0.01, value: 0, off: 0 },
  { id: "top_k", label: "Top-k", min: 0, max: 100, step: 1, value: 0, off: 0 },
  { id: "top_p", label: "Top-p", min: 0, max: 1, step: 0.01, value: 1, off: 1 },
  { id: "repetition_penalty", label: "Repetition penalty", min: 0.5, max: 2, step: 0.05, value: 1, off: 1 },
  { id: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, value: 0, off: 0 },
  { id: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, value: 0, off: 0 },
];

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function showValue({ id, step, off }) {
  const input = byId(id);
  const isOff = Number(input.value) === off;
  const digits = step < 0.1 ? 2 : step < 1 ? 1 : 0;
  const text = isOff ? "off" : Number(input.value).toFixed(digits);
  input.nextElementSibling.value = text;
  input.setAttribute("aria-valuetext", text);
  input.parentElement.classList.toggle("off", isOff);
}

function makeSliders(onChange) {
  for (const slider of SLIDERS) {
    const { id, label, min, max, step, value } = slider;
    const input = element("input", { id, type: "range" });
    for (const [name, given] of Object.entries({ min, max, step, value, form: "form" })) input.setAttribute(name, given);
    input.addEventListener("input", () => { showValue(slider); onChange(); });
    byId("sliders").append(element("div", { className: "slider" },
      element("label", { htmlFor: id, textContent: label }), input, element("output", { htmlFor: id })));
    showValue(slider);
  }
}

/** What a request says of its parameters. */
function parameters() {
  const body = { model: byId("model").value };
  for (const { id } of SLIDERS) body[id] = Number(byId(id).value);
  const seed = byId("seed").value.trim();
  if (/^-?\d+$/.test(seed)) body.seed = BigInt(seed);
  return body;
}
