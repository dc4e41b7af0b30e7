// What the next token is drawn from: a row a token, with two bars, or the step that has cut it.

const STEPS = { temperature: "temperature 0", min_p: "min-p", top_k: "top-k", top_p: "top-p" };

function chartRow() {
  const bar = element("div", { className: "bar" },
    element("span", { className: "model" }), element("span", { className: "drawn" }));
  return element("tr", {}, Object.assign(element("th"), { scope: "row" }),
    element("td", {}, bar), element("td"), element("td"));
}

/** Shows `found`; `chosen` is the id of the token that was drawn there, if one was. */
function showChart({ tokens, left, vocab_size }, chosen) {
  const body = byId("chart").tBodies[0];
  while (body.rows.length < tokens.length) body.append(chartRow());
  while (body.rows.length > tokens.length) body.rows[body.rows.length - 1].remove();
  const largest = Math.max(...tokens.flatMap((token) => [token.model_probability, token.probability]));
  tokens.forEach((token, index) => {
    const row = body.rows[index];
    const [name, bars, model, drawn] = row.cells;
    const written = token.text === "" ? ["◌"] : visible(token.text.replace(/^ /, "␣"));
    name.replaceChildren(...written);
    name.title = `${JSON.stringify(token.text)}, id ${token.id}`;
    bars.querySelector(".model").style.width = `${(100 * token.model_probability) / largest}%`;
    bars.querySelector(".drawn").style.width = `${(100 * token.probability) / largest}%`;
    model.textContent = percent(token.model_probability);
    drawn.textContent = token.cut_by ? STEPS[token.cut_by] : percent(token.probability);
    row.className = `${token.cut_by ? "cut" : ""} ${token.id === chosen ? "chosen" : ""}`.trim();
    if (token.id === chosen) row.setAttribute("aria-current", "true");
    else row.removeAttribute("aria-current");
  });
  let before = vocab_size;
  const cuts = [];
  for (const { step, tokens: count } of left) {
    if (count < before) cuts.push(`${STEPS[step]} leaves ${count.toLocaleString("en")}`);
    before = count;
  }
  byId("left").className = "";
  byId("left").textContent = `${vocab_size.toLocaleString("en")} tokens${cuts.length ? "; " : ", none cut"}${cuts.join(", ")}`;
}
