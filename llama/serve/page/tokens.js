// Texts as tokens, and the panel that shows the probabilities of one.

const panel = document.getElementById("panel");
const LEVELS = [1, 2, 4, 8]; // bits of surprise at which the next color begins, as in the legend

/** An element. Texts become text nodes, never HTML. */
export function make(tag, className = "", ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

// Numbers --------------------------------------------------------------------------------------------

const bits = (logprob) => -logprob / Math.LN2;
const decimals = (value, digits) => value.toFixed(digits).replace("-", "−");

function percent(probability) {
  const value = 100 * probability;
  return value < 0.001 ? "< 0.001 %" : `${Number(value.toPrecision(3))} %`;
}

/** "12 tokens · log-probability −9.31 · perplexity 2.17" */
export function sums(tokens) {
  const known = tokens.filter((token) => token.logprob !== null);
  const total = known.reduce((sum, token) => sum + token.logprob, 0);
  const parts = [tokens.length === 1 ? "1 token" : `${tokens.length} tokens`];
  if (known.length) {
    parts.push(`log-probability ${decimals(total, 2)}`, `perplexity ${decimals(Math.exp(-total / known.length), 2)}`);
  }
  return parts.join(" · ");
}

// Both forms of log-probabilities as a list of {name, logprob, top: [[name, logprob], ...]}, with `bytes` or `offset`.
// A part of a character has the name \xe2\x82; completions write bytes:\xe2\x82.

export function chatTokens(logprobs) {
  const read = ({ token, bytes, logprob, top_logprobs }) =>
    ({ name: token, bytes, logprob, top: top_logprobs.map((one) => [one.token, one.logprob]) });
  return (logprobs?.content ?? []).map(read);
}

export function completionTokens(logprobs) {
  const plain = (name) => name.replace(/^bytes:(?=\\x)/, "");
  return (logprobs?.tokens ?? []).map((name, i) => ({
    name: plain(name),
    offset: logprobs.text_offset[i],
    logprob: logprobs.token_logprobs[i],
    top: Object.entries(logprobs.top_logprobs[i] ?? {}).map(([name, logprob]) => [plain(name), logprob]),
  }));
}

// A text as tokens -----------------------------------------------------------------------------------

const tokenOf = new WeakMap(); // of a span
const isPart = (name) => /^(\\x[0-9a-f]{2})+$/.test(name);
const visible = (name) => name.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "(empty)";

/** Each token begins at an index of the text and ends where the next one begins. So a character of several tokens is
 *  shown at the last of them; the others get a mark, as those without visible text. */
export class TokenText {
  element = make("span", "tokens");
  text = "";
  tokens = [];
  own = 0; // tokens of the user's text, which come first
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  #end = 0; // of the tokens so far
  #at = [0, 0]; // the last offset in characters, and the index in the text, which counts UTF-16 units

  /** Add what has become final: a text, and tokens that end where the whole text ends now. */
  add(text, tokens) {
    this.text += text;
    this.#place(tokens);
    if (!this.tokens.length) this.element.textContent = tokens.length ? "" : this.text;
    let from = Math.max(this.tokens.length - 1, 0);
    for (const token of tokens) {
      token.span = make("span", "token");
      token.span.tabIndex = this.tokens.length ? -1 : 0; // one stop of the Tab key; arrows move from there
      if (token.logprob !== null) {
        token.span.classList.add(`s${LEVELS.filter((level) => bits(token.logprob) >= level).length}`);
      }
      if (this.tokens.length < this.own) token.span.classList.add("own");
      tokenOf.set(token.span, token);
      this.tokens.push(token);
      this.element.append(token.span);
    }
    for (; from < this.tokens.length; from++) {
      draw(this.tokens[from], this.text.slice(this.tokens[from].start, this.tokens[from + 1]?.start));
    }
  }

  /** Find where tokens begin: by their bytes (chat) or by their offsets in characters (completions). */
  #place(tokens) {
    const decode = ({ bytes }) => (bytes ? this.#decoder.decode(new Uint8Array(bytes), { stream: true }) : "");
    const texts = tokens.map(decode);
    const joined = texts.join("");
    // Elsewhere than expected if the text lacks the space of the first token, or where bytes are not UTF-8.
    let start = this.text.startsWith(joined, this.#end) ? this.#end : this.text.length - joined.length;
    tokens.forEach((token, i) => {
      token.start = token.bytes ? Math.max(start, 0) : this.#index(token.offset);
      start += texts[i].length;
    });
    this.#end = start;
  }

  #index(offset) {
    let [characters, index] = offset < this.#at[0] ? [0, 0] : this.#at;
    for (; characters < offset; characters++) index += this.text.codePointAt(index) > 0xffff ? 2 : 1;
    this.#at = [characters, index];
    return index;
  }
}

/** The color leaves out the space before a word. Marks are drawn by the style sheet, so they are not copied. */
function draw({ span, name }, text) {
  const [, space, rest] = /^( *)(.*)$/s.exec(text);
  const ink = make("span", "ink", rest || text);
  if (text === "") ink.dataset.mark = isPart(name) ? "◌" : name;
  else if (text.trim() === "") ink.dataset.mark = text.replace(/[^\n]/g, "").replaceAll("\n", "⏎");
  span.replaceChildren(rest ? space : "", ink);
}

// The panel of a token -------------------------------------------------------------------------------

let hovered = null;
let focused = null;
let leaving = 0; // a timer: the pointer has left a token, perhaps for the panel

function look() {
  document.querySelector(".token.on")?.classList.remove("on");
  const span = [hovered, focused].find((one) => one?.getClientRects().length); // not one that is hidden or removed
  panel.hidden = !span;
  if (!span) return;
  span.classList.add("on");
  panel.replaceChildren(...describe(tokenOf.get(span)));
  // Next to the token, below it if there is room. In a narrow window the style sheet puts it at the bottom instead.
  const [box] = span.lastElementChild.getClientRects();
  const room = document.querySelector("footer").getBoundingClientRect().top - box.bottom;
  const top = room > panel.offsetHeight + 8 ? box.bottom + 6 : Math.max(box.top - panel.offsetHeight - 6, 8);
  const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - panel.offsetWidth - 8));
  panel.style.setProperty("--left", `${left + scrollX}px`);
  panel.style.setProperty("--top", `${top + scrollY}px`);
}

function describe({ name, logprob, top }) {
  const head = [make("strong", "name", visible(name))];
  if (isPart(name)) head.push(make("p", "", "These bytes are a part of a character."));
  if (logprob === null) return [...head, make("p", "", "The first token: nothing predicts it.")];
  const numbers = make("dl");
  for (const [term, value] of [
    ["probability", percent(Math.exp(logprob))],
    ["log-probability", decimals(logprob, 3)],
    ["surprise", `${decimals(bits(logprob), 2)} bits`],
  ]) numbers.append(make("div", "", make("dt", "", term), make("dd", "", value)));
  // The alternatives may lack the chosen token.
  const isChosen = ([other, value]) => other === name && value === logprob;
  const rows = [...top.filter((row) => !isChosen(row)), [name, logprob]].sort((a, b) => b[1] - a[1]);
  const list = make("ol");
  for (const row of rows) {
    const probability = Math.exp(row[1]);
    const item = make("li", isChosen(row) ? "chosen" : "");
    item.append(make("bdi", "", visible(row[0])), " ", make("b", "", percent(probability)));
    item.style.setProperty("--width", `${100 * probability}%`);
    list.append(item);
  }
  const rest = Math.max(0, 1 - rows.reduce((sum, row) => sum + Math.exp(row[1]), 0));
  return [...head, numbers, list, make("p", "", `All others: ${percent(rest)}`)];
}

document.addEventListener("pointerover", ({ target, pointerType }) => {
  if (pointerType !== "mouse") return; // a finger focuses the token
  clearTimeout(leaving);
  const span = target.closest(".token");
  if (span) {
    hovered = span;
    look();
  } else if (hovered && !panel.contains(target)) {
    leaving = setTimeout(() => { hovered = null; look(); }, 150);
  }
});

document.addEventListener("pointerdown", ({ target }) => {
  // Where a finger touches something that cannot have the focus, some browsers leave it at the token.
  if (focused && !target.closest(".token") && !panel.contains(target)) focused.blur();
});

document.addEventListener("focusin", ({ target }) => {
  if (!target.matches(".token")) return;
  target.parentElement.querySelector("[tabindex='0']").tabIndex = -1;
  target.tabIndex = 0;
  target.setAttribute("aria-describedby", "panel");
  [hovered, focused] = [null, target];
  look();
});

document.addEventListener("focusout", ({ target }) => {
  if (target !== focused) return;
  target.removeAttribute("aria-describedby");
  focused = null;
  look();
});

const KEYS = {
  ArrowRight: (span) => span.nextElementSibling,
  ArrowLeft: (span) => span.previousElementSibling,
  Home: (span) => span.parentElement.firstElementChild,
  End: (span) => span.parentElement.lastElementChild,
};

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !panel.hidden) {
    event.preventDefault();
    [hovered, focused] = [null, null];
    look();
  } else if (event.key in KEYS && event.target.matches(".token") && !(event.ctrlKey || event.altKey || event.metaKey)) {
    event.preventDefault(); // no scrolling
    KEYS[event.key](event.target)?.focus();
  }
});

addEventListener("resize", look);
