// The text as tokens, shaded by how unlikely each was; one of them may be selected.

const RARE = 5; // minus the log probability of a token that has the full shade: one in 150
const SHADE = 65; // percent
const MARKS = { "\n": "↵\n", "\t": "⇥\t", "\r": "␍" };

/** `text` in which what can't be seen has a mark: a list of strings and elements. */
function visible(text) {
  return text.split(/([\n\t\r])/).filter((part) => part).map((part) =>
    MARKS[part] ? element("span", { className: "mark", textContent: MARKS[part] }) : part);
}

const percent = (share) => (share >= 0.9995 || share === 0 ? `${Math.round(100 * share)} %`
  : share >= 0.0005 ? `${(100 * share).toFixed(1)} %` : "<0.1 %");

class Output {
  /** `onSelect(index)` is told which token is selected; null: none. */
  constructor(holder, onSelect) {
    this.holder = holder;
    this.onSelect = onSelect;
    holder.addEventListener("click", (event) => this.select(this.indexOf(event.target)));
    holder.addEventListener("keydown", (event) => this.move(event));
    this.clear("");
  }

  clear(prompt) {
    this.prompt = prompt;
    this.ids = [];
    this.tokens = []; // { text, span, begin }: where it begins in `this.text`
    this.text = "";
    this.selected = null;
    this.decoder = new TextDecoder();
    this.holder.replaceChildren(element("span", { className: "prompt", textContent: prompt }));
  }

  /** Adds a piece of the completion. */
  add({ text, token_ids, logprobs, finish_reason }) {
    this.ids.push(...(token_ids ?? []));
    this.text += text;
    for (const { token, bytes, logprob } of logprobs?.content ?? []) {
      // a character's bytes may be those of several tokens: it belongs to the last
      const decoded = this.decoder.decode(new Uint8Array(bytes), { stream: true });
      const last = this.tokens.at(-1);
      const span = element("span", { className: "token", role: "button", tabIndex: last ? -1 : 0 });
      const share = Math.exp(logprob);
      span.style.setProperty("--surprise", `${Math.round(SHADE * Math.min(1, -logprob / RARE))}%`);
      span.title = percent(share);
      span.setAttribute("aria-label", `${JSON.stringify(token)}, ${percent(share)}`);
      span.setAttribute("aria-pressed", "false");
      this.tokens.push({ token, text: decoded, span, begin: last ? last.begin + last.text.length : 0 });
      this.holder.append(span);
    }
    for (const token of this.tokens) this.show(token, Boolean(finish_reason));
  }

  /** As much of a token as has come; at the end one that isn't in the text, such as the end token, by its name. */
  show(token, atEnd) {
    const shown = this.text.slice(token.begin, token.begin + token.text.length);
    if (shown === token.shown && !atEnd) return;
    token.shown = shown;
    const unseen = shown === "";
    token.span.classList.toggle("unseen", unseen);
    token.span.replaceChildren(...(unseen ? [atEnd && token.text ? token.token : "◌"] : visible(shown)));
  }

  select(index) {
    const [before, now] = [this.tokens[this.selected], this.tokens[index]];
    before?.span.setAttribute("aria-pressed", "false");
    now?.span.setAttribute("aria-pressed", "true");
    if (now) {
      for (const { span } of this.tokens) span.tabIndex = span === now.span ? 0 : -1;
    }
    this.selected = now ? index : null;
    this.onSelect(this.selected);
  }

  move(event) {
    const here = this.indexOf(event.target);
    const last = this.tokens.length - 1;
    const there = { ArrowLeft: Math.max(here - 1, 0), ArrowRight: Math.min(here + 1, last), Home: 0, End: last,
      Enter: here, " ": here }[event.key];
    if (here === null || there === undefined || event.ctrlKey) return;
    event.preventDefault();
    this.tokens[there].span.focus();
    this.select(there);
  }

  indexOf(target) {
    const index = this.tokens.findIndex(({ span }) => span.contains(target));
    return index < 0 ? null : index;
  }
}
