// Chat with the model, or let it continue a text, and look at the probability of each token.
//
// What the model, the server or the user says enters the page as text nodes only. The Content-Security-Policy forbids
// HTML in strings, too.

import { TokenText, chatTokens, completionTokens, make, sums } from "./tokens.js";

const $ = (id) => document.getElementById(id);
const [prompt, go, status] = ["prompt", "go", "status"].map($);
const COMPLETION = 64; // new tokens in Complete, where nothing else ends most texts of a base model
const CLOSE = 40; // pixels from the end of the page within which it is scrolled as the text grows
const REASONS = { length: " · ended by the limit of tokens", stopped: " · not complete", content_filter: " · refused" };

const messages = []; // of the chat, without the system prompt
let running = null; // the AbortController of the answer that is being generated

function say(text, isError = false) {
  if (status.textContent !== text) status.textContent = text; // screen readers read each change
  status.classList.toggle("error", isError);
}

// The server -----------------------------------------------------------------------------------------

/** The response to a request, once its status is 200. Asks for a key as long as the server does. */
async function request(path, body = null, signal = null) {
  for (;;) {
    const key = sessionStorage.getItem("api_key");
    const headers = {};
    if (key) headers.Authorization = `Bearer ${key}`;
    if (body) headers["Content-Type"] = "application/json";
    const method = body ? "POST" : "GET";
    const response = await network(fetch(path, { method, headers, signal, body: body && JSON.stringify(body) }));
    if (response.ok) return response;
    if (response.status === 401 && (await askForKey(key !== null))) continue;
    // A proxy's errors need not be JSON.
    const message = (await response.json().catch(() => null))?.error?.message;
    throw new Error(message ?? `The server answered with status ${response.status}.`);
  }
}

async function network(promise) {
  try {
    return await promise;
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server cannot be reached, or the connection was lost.");
  }
}

/** Returns whether the user has given one. */
function askForKey(isWrong) {
  const dialog = $("key-dialog");
  $("key-problem").textContent = isWrong ? "The server does not accept this key." : "";
  dialog.returnValue = ""; // Escape leaves it as it was
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      if (dialog.returnValue === "ok") sessionStorage.setItem("api_key", $("key").value);
      $("key").value = "";
      resolve(dialog.returnValue === "ok");
    }, { once: true });
  });
}

/** The JSON of server-sent events, until [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let received = "";
  for (;;) {
    const { value, done } = await network(reader.read());
    if (done) throw new Error("The server ended the answer too early.");
    const parts = (received + value).split("\n\n");
    received = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// Answers --------------------------------------------------------------------------------------------

const number = (id) => (Number.isNaN($(id).valueAsNumber) ? null : $(id).valueAsNumber);
const sampling = () => ({ temperature: number("temperature"), top_p: number("top_p"), seed: number("seed") });

/** Change the page, and keep its end in view if it was. */
function following(change) {
  const page = document.documentElement;
  const follow = innerHeight + scrollY >= page.scrollHeight - CLOSE;
  change();
  if (follow) scrollTo(0, page.scrollHeight);
}

function setRunning(controller) {
  running = controller;
  const isBusy = controller !== null;
  document.body.classList.toggle("busy", isBusy);
  for (const id of ["modes", "clear"]) $(id).disabled = isBusy;
  go.textContent = isBusy ? "Stop" : "Send";
}

/** Stream the answer to `body` into a text. Returns why it ended, or null if nothing came.
 *  read: the function for the endpoint's log-probabilities. prepare: is awaited first, as a part of the request. */
async function answer(text, path, body, read, prepare = async () => {}) {
  let reason = "stopped";
  setRunning(new AbortController());
  say("Waiting for the server …");
  try {
    await prepare(running.signal);
    const response = await request(path, { ...body, ...sampling(), stream: true }, running.signal);
    for await (const { choices: [choice] } of events(response)) {
      following(() => text.add(choice.delta?.content ?? choice.text ?? "", read(choice.logprobs)));
      if (text.text) say("Answering …"); // the first event may come while the request waits for a slot
      reason = choice.finish_reason ?? reason;
    }
    say("Done.");
    return reason;
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else say(error.message, true);
    return text.text ? reason : null;
  } finally {
    setRunning(null);
  }
}

/** Answer the dialog. Returns whether anything came. */
async function reply() {
  const text = new TokenText();
  const turn = make("article", "answer", make("div", "text", text.element));
  turn.ariaLabel = $("model").textContent;
  following(() => $("chat").append(turn));
  const system = $("system").value.trim() ? [{ role: "system", content: $("system").value }] : [];
  const more = { logprobs: true, top_logprobs: number("alternatives"), max_tokens: number("max_tokens") };
  const reason = await answer(text, "v1/chat/completions", { messages: [...system, ...messages], ...more }, chatTokens);
  if (reason === null) {
    turn.remove();
    return false;
  }
  messages.push({ role: "assistant", content: text.text });
  const again = make("button", "again quiet", "Regenerate");
  again.addEventListener("click", () => regenerate(turn));
  following(() => turn.append(make("p", "sums", sums(text.tokens) + (REASONS[reason] ?? ""), again)));
  return true;
}

async function regenerate(turn) {
  const old = messages.pop();
  turn.remove();
  go.focus(); // the button that had the focus is gone
  if (!(await reply())) {
    messages.push(old);
    $("chat").append(turn);
  }
}

async function chat(content) {
  const turn = make("article", "question", make("p", "", content));
  turn.ariaLabel = "You";
  messages.push({ role: "user", content });
  $("chat").append(turn);
  scrollTo(0, document.documentElement.scrollHeight);
  prompt.value = "";
  if (await reply()) return;
  messages.pop(); // nothing was answered: the question is the user's again, to be sent once more
  turn.remove();
  prompt.value ||= content;
}

async function complete(content) {
  const text = new TokenText();
  const echo = $("echo").checked;
  const turn = make("article", "answer", make("div", "text", make("span", "", echo ? "" : content), text.element));
  const before = [...$("complete").children];
  $("complete").replaceChildren(turn);
  const max_tokens = number("max_tokens") ?? COMPLETION;
  const body = { prompt: content, echo, logprobs: number("alternatives"), max_tokens };
  const countOwn = async (signal) => {
    const response = await request("tokenize", { content, add_special: true }, signal);
    text.own = (await response.json()).tokens.length;
  };
  const reason = await answer(text, "v1/completions", body, completionTokens, echo ? countOwn : undefined);
  if (reason === null) return $("complete").replaceChildren(...before);
  const [own, added] = [text.tokens.slice(0, text.own), text.tokens.slice(text.own)];
  if (echo) turn.append(make("p", "sums", `Your text: ${sums(own)}`));
  turn.append(make("p", "sums", `Continuation: ${sums(added)}${REASONS[reason] ?? ""}`));
}

// Controls -------------------------------------------------------------------------------------------

function setMode() {
  const mode = $("modes").querySelector(":checked").value;
  document.body.dataset.mode = mode;
  prompt.placeholder = prompt.ariaLabel = mode === "chat" ? "Message" : "Text to continue";
  $("max_tokens").placeholder = mode === "chat" ? "No limit" : String(COMPLETION);
}

$("modes").addEventListener("change", () => {
  setMode();
  say("");
});
$("colors").addEventListener("change", ({ target }) => document.body.classList.toggle("colors", target.checked));

$("clear").addEventListener("click", () => {
  messages.length = 0;
  document.querySelectorAll("#chat article").forEach((turn) => turn.remove());
  say("");
  prompt.focus();
});

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort();
  if (!$("fields").checkValidity()) {
    $("settings").open = true;
    return $("fields").reportValidity();
  }
  if (!prompt.value.trim()) return prompt.focus();
  return document.body.dataset.mode === "chat" ? chat(prompt.value) : complete(prompt.value);
});

go.addEventListener("click", (event) => {
  if (event.detail > 1) event.preventDefault(); // the second click of a double one would stop what the first began
});

prompt.addEventListener("keydown", (event) => {
  // While an input method composes a character, Enter belongs to it. Safari says so by the code 229 only.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  if (!running) $("composer").requestSubmit();
});

document.addEventListener("keydown", (event) => {
  const settings = $("settings");
  if (event.key !== "Escape" || event.defaultPrevented || !settings.open) return;
  settings.open = false;
  settings.firstElementChild.focus();
});

document.addEventListener("pointerdown", ({ target }) => {
  if (!$("settings").contains(target)) $("settings").open = false;
});

setMode();
try {
  const { data: [model] } = await (await request("v1/models")).json();
  $("model").textContent = model.id;
  document.title = `${model.id} · llama serve`;
} catch (error) {
  say(error.message, true);
}
