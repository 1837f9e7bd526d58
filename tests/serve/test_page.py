"""The page at `/` in a real browser: it shows what the endpoints answer, for any text, in any window, by mouse, by
keyboard and touch. No test may leave an error in the console or ask another host for anything."""

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, Route, expect

from helpers.browser import started_browser
from helpers.servers import Server, serving
from llama.serve.page import FILES

TIME = 60_000  # ms; the machine may be busy
PHONE: dict[str, Any] = {"viewport": {"width": 375, "height": 667}, "has_touch": True, "is_mobile": True}
QUESTION = "What is the capital of France?"
CHAT, COMPLETE = "Message", "Text to continue"
MINUS = "\N{MINUS SIGN}"
BROKEN = 2  # a temperature at which the seeded model writes parts of characters
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started_browser() as browser:
        expect.set_options(timeout=TIME)
        yield browser


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """visit(server, statuses=(), **context): the page in a fresh context. statuses: error statuses that are expected,
    which Chromium reports in the console."""
    contexts, wrong = [], []

    def open(server: Server, statuses: tuple[int, ...] = (), **options: Any) -> Page:
        def on_console(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning") and not any(
                f"status of {each} " in message.text for each in statuses
            ):
                wrong.append(message.text)

        def on_request(request: Request) -> None:
            if not request.url.startswith((server.url + "/", "data:")):
                wrong.append(request.url)

        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(TIME)
        page.on("console", on_console)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", on_request)
        page.goto(server.url)
        return page

    yield open
    for context in contexts:
        context.close()
    assert not wrong


class Gate:
    """Lets the engine compute single steps."""

    def __init__(self) -> None:
        self._steps, self._is_open = threading.Semaphore(0), False

    def let(self, steps: int) -> None:
        for _ in range(steps):
            self._steps.release()

    def open(self) -> None:
        self._is_open = True
        self.let(1)

    def wait(self) -> None:
        while not (self._is_open or self._steps.acquire(timeout=0.01)):
            pass


@pytest.fixture
def gate(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The seeded model behind a gate."""
    gate, worker = Gate(), server.llama.scheduler._worker
    run = worker.run

    def run_behind_gate(*args: Any) -> Any:
        gate.wait()
        return run(*args)

    server.wait_until_idle()
    monkeypatch.setattr(worker, "run", run_behind_gate)
    yield gate
    gate.open()
    server.wait_until_idle()


def send(page: Page, text: str, box: str = CHAT) -> None:
    page.get_by_role("textbox", name=box).fill(text)
    page.get_by_role("textbox", name=box).press("Enter")


def say_status(page: Page, text: str | re.Pattern[str]) -> None:
    expect(page.get_by_role("status")).to_have_text(text)


def set_fields(page: Page, **values: object) -> None:
    """Fill in settings, by the ids of their fields."""
    page.locator("summary").click()
    for name, value in values.items():
        page.locator(f"#{name}").fill(str(value))
    page.locator("summary").click()


def choose(page: Page, mode: str) -> None:
    page.get_by_role("radio", name=mode).check()


def tokens(page: Page) -> Locator:
    return page.locator("section:visible .token")


def texts(found: Locator) -> list[str]:
    return found.evaluate_all("all => all.map(one => one.textContent)")


def shown(name: str) -> str:
    """A token as the panel writes it."""
    return name.removeprefix("bytes:").replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥") or "(empty)"


def is_utf8(data: bytes) -> bool:
    return "\ufffd" not in data.decode(errors="replace")


def check_percent(text: str, logprob: float) -> None:
    """A percentage with three digits, against the log-probability."""
    if text == "< 0.001 %":
        assert math.exp(logprob) < 1.01e-5
    else:
        assert float(text.removesuffix(" %")) == pytest.approx(100 * math.exp(logprob), rel=6e-3)


def check_panel(page: Page, name: str, logprob: float | None, top: dict[str, float]) -> None:
    """The panel that is open against the numbers of the API."""
    panel = page.locator("#panel")
    expect(panel).to_be_visible()
    assert panel.locator(".name").inner_text() == shown(name)
    if logprob is None:
        assert "nothing predicts it" in panel.inner_text() and not panel.locator("li").count()
        return
    probability, natural, surprise = panel.locator("dd").all_inner_texts()
    check_percent(probability, logprob)
    assert float(natural.replace(MINUS, "-")) == pytest.approx(logprob, abs=2e-3)
    assert float(surprise.removesuffix(" bits")) == pytest.approx(-logprob / math.log(2), abs=0.02)
    rows = sorted((top | {name: logprob}).items(), key=lambda row: -row[1])
    assert panel.locator("li bdi").all_inner_texts() == [shown(other) for other, _ in rows]
    for text, (_, value) in zip(panel.locator("li b").all_inner_texts(), rows, strict=True):
        check_percent(text, value)
    assert panel.locator("li.chosen bdi").all_inner_texts() == [shown(name)]
    rest = panel.locator("p").last.inner_text().removeprefix("All others: ")
    check_percent(rest, math.log(max(1e-12, 1 - sum(math.exp(value) for _, value in rows))))
    width = panel.locator("li.chosen").evaluate("one => one.style.getPropertyValue('--width')")
    assert float(width.removesuffix("%")) == pytest.approx(100 * math.exp(logprob), rel=6e-3, abs=1e-6)


def check_sums(line: str, logprobs: list[float]) -> None:
    n, total, perplexity = re.search(r"(\d+) tokens? · log-probability (\S+) · perplexity (\S+)", line).groups()  # type: ignore[union-attr]
    assert int(n) == len(logprobs)
    assert float(total.replace(MINUS, "-")) == pytest.approx(sum(logprobs), abs=0.01)
    assert float(perplexity) == pytest.approx(math.exp(-sum(logprobs) / len(logprobs)), rel=0.01)


# The files ------------------------------------------------------------------------------------------


def test_the_files(server: Server) -> None:
    folder = resources.files("llama.serve.page")
    names = {each.name for each in folder.iterdir() if not each.name.startswith("__")}
    assert names == {name for name, _ in FILES.values()}
    for path, (name, media_type) in FILES.items():
        response = server.client.get(path)
        assert response.status_code == 200 and response.content == (folder / name).read_bytes()
        headers = response.headers
        assert headers["content-type"] == f"{media_type}; charset=utf-8" and headers["cache-control"] == "no-cache"
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert "unsafe" not in str(policy)
        head = server.client.head(path)
        assert (
            head.status_code == 200
            and not head.content
            and head.headers["content-length"] == str(len(response.content))
        )
        for tag in (headers["etag"], f'"other", W/{headers["etag"]}'):
            unchanged = server.client.get(path, headers={"If-None-Match": tag})
            assert (
                unchanged.status_code == 304 and not unchanged.content and unchanged.headers["etag"] == headers["etag"]
            )
        assert server.client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
        assert server.client.post(path).status_code == 405
        assert server.metric("llama_requests_total", endpoint=path, status="200") >= 3
    assert server.client.get("/page/index.html").status_code == 404


# A chat ---------------------------------------------------------------------------------------------


def test_an_answer_appears_as_it_is_generated(server: Server, gate: Gate, visit: Open) -> None:
    page = visit(server)
    expect(page).to_have_title(f"{server.service.name} · llama serve")
    expect(page.get_by_role("heading", name=server.service.name)).to_be_visible()
    set_fields(page, temperature=0, max_tokens=40)
    with page.expect_response("**/v1/chat/completions"):
        send(page, QUESTION)
    time.sleep(0.3)  # the first event, which has no text
    say_status(page, "Waiting for the server …")
    counts = [0]
    for _ in range(3):
        gate.let(8)
        expect(tokens(page).nth(counts[-1])).to_be_attached()
        counts.append(tokens(page).count())
    assert counts[-1] < 40
    say_status(page, "Answering …")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    gate.open()
    say_status(page, "Done.")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(tokens(page)).to_have_count(40)
    answer = server.chat(QUESTION, temperature=0, max_tokens=40)["choices"][0]["message"]["content"]
    assert "".join(texts(tokens(page))) == answer
    assert page.locator(".question").inner_text() == QUESTION
    assert page.get_by_role("textbox", name=CHAT).input_value() == ""


def test_the_numbers_are_those_of_the_api(demo_server: Server, visit: Open) -> None:
    """Each token by keyboard, some by the mouse: text, probability, alternatives."""
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "logprobs": True, "top_logprobs": 5}
    answer = demo_server.chat("Name three colors.", **fields)["choices"][0]
    entries = answer["logprobs"]["content"]
    page = visit(demo_server)
    set_fields(page, temperature=0, max_tokens=12)
    send(page, "Name three colors.")
    say_status(page, "Done.")
    assert "".join(texts(tokens(page))) == answer["message"]["content"]
    tokens(page).first.focus()
    for i, entry in enumerate(entries):
        expect(tokens(page).nth(i)).to_be_focused()
        top = {one["token"]: one["logprob"] for one in entry["top_logprobs"]}
        check_panel(page, entry["token"], entry["logprob"], top)
        level = sum(-entry["logprob"] / math.log(2) >= bits for bits in (1, 2, 4, 8))
        expect(tokens(page).nth(i)).to_have_class(f"token s{level} on")
        page.keyboard.press("ArrowRight")
    page.get_by_role("textbox", name=CHAT).focus()
    expect(page.locator("#panel")).to_be_hidden()
    for i in (2, 0):
        tokens(page).nth(i).hover()
        top = {one["token"]: one["logprob"] for one in entries[i]["top_logprobs"]}
        check_panel(page, entries[i]["token"], entries[i]["logprob"], top)
        page.locator("#panel .name").hover()  # the panel stays while the pointer is on it
        time.sleep(0.3)
        expect(page.locator("#panel")).to_be_visible()
    page.locator("h1").hover()
    expect(page.locator("#panel")).to_be_hidden()
    check_sums(page.locator(".sums").inner_text(), [entry["logprob"] for entry in entries])


def test_texts_are_those_of_the_api_where_characters_are_broken(server: Server, visit: Open) -> None:
    """The seeded model writes bytes at random: parts of characters, and such as are not UTF-8."""
    page = visit(server)
    broken = 0
    for seed in range(3):
        fields: dict[str, Any] = {"temperature": BROKEN, "max_tokens": 40, "seed": seed}
        set_fields(page, top_p=1, **fields)
        choose(page, "Chat")
        page.get_by_role("button", name="New chat").click()
        send(page, "Hi")
        say_status(page, "Done.")
        answer = server.chat("Hi", logprobs=True, **fields)["choices"][0]
        found = texts(tokens(page))
        assert "".join(found) == answer["message"]["content"]
        for text, entry in zip(found, answer["logprobs"]["content"], strict=True):
            data = bytes(entry["bytes"])
            assert text.endswith(data.decode(errors="replace").lstrip(" ")) or not is_utf8(data)
        choose(page, "Complete")
        send(page, "Grüße 🦙 日本", COMPLETE)
        say_status(page, "Done.")
        choice = server.complete("Grüße 🦙 日本", echo=True, logprobs=0, **fields)["choices"][0]
        found = texts(tokens(page))
        assert "".join(found) == choice["text"]
        assert "".join(texts(page.locator(".own"))) == "Grüße 🦙 日本"
        for text, name in zip(found, choice["logprobs"]["tokens"], strict=True):
            assert text == "" or name.startswith("bytes:") or text.endswith(name.lstrip(" "))
            broken += name.startswith("bytes:")
    assert broken > 20
    part = page.locator("section:visible .ink[data-mark='◌']").first
    part.hover()
    expect(page.locator("#panel")).to_contain_text("a part of a character")


def events(*chunks: tuple[str, list[bytes]], end: str = "data: [DONE]\n\n") -> dict[str, str]:
    """A streamed chat: for each chunk its text and the bytes of its tokens, as arguments of Playwright's `fulfill`."""
    body = ""
    for content, parts in chunks:
        scores = [
            {"token": part.decode(errors="replace"), "bytes": list(part), "logprob": -1, "top_logprobs": []}
            for part in parts
        ]
        choice = {"index": 0, "delta": {"content": content}, "logprobs": {"content": scores}, "finish_reason": None}
        body += f"data: {json.dumps({'choices': [choice]})}\n\n"
    return {"body": body + end, "content_type": "text/event-stream"}


def test_several_tokens_in_one_event(server: Server, visit: Open) -> None:
    """As a client gets them that reads slowly: the text may be ahead of the tokens, and lacks the first space."""
    llama = "🦙".encode()
    cases: dict[str, tuple[list[tuple[str, list[bytes]]], list[str]]] = {
        "a space that the text lacks": ([("Yes it", [b" Yes", b" it"]), (" is", [b" is"])], ["Yes", " it", " is"]),
        "text ahead of its token": (
            [("So ", [b"So"]), ("🦙!", [b" " + llama[:2], llama[2:], b"!"])],
            ["So", " ", "🦙", "!"],
        ),
        "bytes that are no text": ([("a\ufffd", [b"a", b"\xff"]), ("b", [b"b"])], ["a", "\ufffd", "b"]),
        "marks that decoders drop": ([("\ufeffx", ["\ufeff".encode(), b"x"])], ["\ufeff", "x"]),
    }
    for name, (chunks, expected) in cases.items():
        page = visit(server)
        page.route("**/v1/chat/completions", lambda route, request, chunks=chunks: route.fulfill(**events(*chunks)))
        send(page, "Hi")
        say_status(page, "Done.")
        assert texts(tokens(page)) == expected, name


def test_stop_frees_the_slot(server: Server, gate: Gate, visit: Open) -> None:
    page = visit(server)
    cancelled = server.metric("llama_requests_cancelled_total")
    send(page, "Hi")
    gate.let(8)
    expect(tokens(page).first).to_be_attached()
    assert server.metric("llama_slots_in_use") == 1
    page.get_by_role("button", name="Stop").click()
    say_status(page, "Stopped.")
    gate.open()
    server.wait_until_idle()
    assert server.metric("llama_slots_in_use") == 0
    assert server.metric("llama_requests_cancelled_total") == cancelled + 1
    expect(page.locator(".sums")).to_contain_text("not complete")
    assert 0 < tokens(page).count() <= 8
    send(page, "Hi")  # what came remains a part of the dialog
    say_status(page, "Done.")
    expect(page.locator(".answer")).to_have_count(2)


def test_what_is_sent(server: Server, visit: Open) -> None:
    page = visit(server)
    sent: list[dict[str, Any]] = []
    page.on("request", lambda request: sent.append(json.loads(request.post_data)) if request.post_data else None)
    set_fields(page, max_tokens=9)
    send(page, "First")
    say_status(page, "Done.")
    assert sent[0]["messages"] == [{"role": "user", "content": "First"}]
    assert sent[0]["stream"] and sent[0]["logprobs"] and sent[0]["top_logprobs"] == 5
    assert (sent[0]["temperature"], sent[0]["top_p"], sent[0]["max_tokens"], sent[0]["seed"]) == (0.6, 0.9, 9, None)
    first = page.locator(".answer .text").first.inner_text()
    set_fields(page, system="Be brief.", temperature=1.25, top_p=0.5, max_tokens=7, seed=3, alternatives=2)
    send(page, "Second\nline")
    say_status(page, "Done.")
    roles = [message["role"] for message in sent[1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert sent[1]["messages"][0]["content"] == "Be brief." and sent[1]["messages"][3]["content"] == "Second\nline"
    assert sent[1]["messages"][2]["content"].strip() == first.strip()
    wanted = {"temperature": 1.25, "top_p": 0.5, "max_tokens": 7, "seed": 3, "top_logprobs": 2}
    assert sent[1] | wanted == sent[1]
    expect(page.get_by_role("button", name="Regenerate")).to_have_count(1)
    page.get_by_role("button", name="Regenerate").click()
    say_status(page, "Done.")
    expect(page.locator(".answer")).to_have_count(2)
    assert sent[2] == sent[1]
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)
    send(page, "Third")
    say_status(page, "Done.")
    assert [message["content"] for message in sent[3]["messages"]] == ["Be brief.", "Third"]
    page.locator("summary").click()
    page.locator("#temperature").fill("3")
    page.keyboard.press("Escape")
    expect(page.locator("#fields")).to_be_hidden()
    send(page, "Not sent")
    expect(page.locator("#temperature")).to_be_focused()
    assert len(sent) == 4 and page.get_by_role("textbox", name=CHAT).input_value() == "Not sent"


# Completions ----------------------------------------------------------------------------------------


def test_a_completion_with_the_probabilities_of_the_own_text(demo_server: Server, visit: Open) -> None:
    prompt = "The capital of France is"
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 3, "logprobs": 5}
    answer = demo_server.complete(prompt, echo=True, **fields)["choices"][0]
    scores = answer["logprobs"]
    page = visit(demo_server)
    choose(page, "Complete")
    set_fields(page, temperature=0, max_tokens=3)
    send(page, prompt, COMPLETE)
    say_status(page, "Done.")
    assert "".join(texts(tokens(page))) == answer["text"] and tokens(page).count() == len(scores["tokens"])
    own = len(demo_server.post("/tokenize", content=prompt)["tokens"])
    expect(page.locator(".own")).to_have_count(own)
    tokens(page).first.focus()
    for i, name in enumerate(scores["tokens"]):
        check_panel(page, name, scores["token_logprobs"][i], scores["top_logprobs"][i] or {})
        page.keyboard.press("ArrowRight")
    known = scores["token_logprobs"][1:own]
    yours, continuation = page.locator(".sums").all_inner_texts()
    assert yours.startswith("Your text: ") and continuation.startswith("Continuation: ")
    check_sums(yours.replace(f"{own} tokens", f"{own - 1} tokens"), known)  # the first token has no probability
    check_sums(continuation, scores["token_logprobs"][own:])
    assert page.get_by_role("textbox", name=COMPLETE).input_value() == prompt, "to be changed and sent again"
    page.locator("summary").click()
    page.get_by_label("Probabilities of my text, too").uncheck()
    page.locator("summary").click()
    send(page, prompt, COMPLETE)
    say_status(page, "Done.")
    plain = demo_server.complete(prompt, **fields)["choices"][0]
    assert page.locator("section:visible .text").evaluate("one => one.textContent") == prompt + plain["text"]
    expect(page.locator(".own")).to_have_count(0)
    expect(tokens(page)).to_have_count(len(plain["logprobs"]["tokens"]))


def test_a_base_model(server: Server, visit: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.llama, "chat_format", None)
    page = visit(server, statuses=(400,))
    send(page, "Once upon a time")
    say_status(page, re.compile("no chat format .* text completion works"))
    choose(page, "Complete")
    page.get_by_role("textbox", name=COMPLETE).press("Enter")  # the text is still there
    say_status(page, "Done.")
    assert "".join(texts(page.locator(".own"))) == "Once upon a time"


# Texts are texts ------------------------------------------------------------------------------------

HTML = "<img src=x onerror=\"document.title='broken'\"> <b>&amp;</b> <script>document.title='broken'</script>"


def test_html_is_shown_as_text(server: Server, visit: Open) -> None:
    """In what the user writes, what the model answers, names of alternatives, and messages of the server."""
    page = visit(server, statuses=(400,))

    def answer(route: Route) -> None:
        score = {"token": HTML, "logprob": -2.5, "bytes": list(HTML.encode())}
        logprobs = {"content": [score | {"top_logprobs": [score | {"token": f"{HTML} ", "logprob": -1}]}]}
        choice = {"index": 0, "delta": {"content": HTML}, "logprobs": logprobs, "finish_reason": "stop"}
        body = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
        route.fulfill(body=body, content_type="text/event-stream")

    page.route("**/v1/chat/completions", answer)
    send(page, HTML)
    say_status(page, "Done.")
    assert texts(tokens(page)) == [HTML] and page.locator(".question").inner_text() == HTML
    tokens(page).first.hover()
    assert page.locator("#panel li bdi").all_inner_texts() == [shown(HTML + " "), shown(HTML)]
    choose(page, "Complete")
    send(page, HTML, COMPLETE)
    say_status(page, "Done.")
    assert "".join(texts(page.locator(".own"))) == HTML
    error = {"error": {"message": HTML}}
    page.route("**/v1/completions", lambda route: route.fulfill(status=400, json=error))
    send(page, "x", COMPLETE)
    say_status(page, HTML)
    expect(page.locator("img, body script, article b")).to_have_count(0)
    expect(page).to_have_title(f"{server.service.name} · llama serve")


# Errors and the key ---------------------------------------------------------------------------------


def test_errors_are_one_line_and_the_question_can_be_sent_again(
    server: Server, visit: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit(server, statuses=(400, 429, 502, 503))
    box = page.get_by_role("textbox", name=CHAT)

    def check_failure(message: str) -> None:
        box.press("Enter")
        say_status(page, re.compile(message))
        expect(page.get_by_role("status")).to_have_class("error")
        assert page.get_by_role("status").evaluate("one => one.getClientRects().length") == 1
        expect(page.locator("article")).to_have_count(0)
        expect(box).to_have_value("Hi")

    box.fill("Hi")
    with monkeypatch.context() as patch:
        patch.setattr(server.service, "max_queue", -4)  # four slots
        check_failure("running or waiting, and the server admits no more: try again later")
    with monkeypatch.context() as patch:
        patch.setattr(server.service, "_llama", None)
        check_failure(f"{server.service.name} is being loaded")
    with monkeypatch.context() as patch:
        patch.setattr(server.service, "is_stopping", True)
        check_failure("the server is shutting down")
    set_fields(page, max_tokens=1000)
    check_failure("max_tokens is 1,000, but max_seq_len is 160")
    set_fields(page, max_tokens=5)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"), times=1)
    check_failure("The server answered with status 502")
    box.press("Enter")
    say_status(page, "Done.")
    expect(page.get_by_role("status")).not_to_have_class("error")
    expect(box).to_have_value("")


@pytest.mark.parametrize("end", ["", 'data: {"error": {"message": "computation failed"}}\n\n'])
def test_an_answer_that_breaks_off(end: str, server: Server, visit: Open) -> None:
    """What has come stays, and says that it is not complete."""
    page = visit(server)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**events(("Ye", [b"Ye"]), end=end)))
    send(page, "Hi")
    say_status(page, "computation failed" if end else "The server ended the answer too early.")
    expect(page.locator(".answer .text")).to_have_text("Ye")
    expect(page.locator(".sums")).to_contain_text("not complete")


def test_a_server_that_has_gone(checkpoint: Callable[..., Path], browser: Browser) -> None:
    page = browser.new_page()
    with serving(checkpoint("mha"), max_seq_len=32, max_batch_size=1) as server:
        page.goto(server.url)
        expect(page).to_have_title(re.compile(server.service.name))
    send(page, "Hi")
    say_status(page, "The server cannot be reached, or the connection was lost.")
    expect(page.get_by_role("textbox", name=CHAT)).to_have_value("Hi")
    page.close()


def test_the_key_is_asked_for_and_kept_in_the_tab(checkpoint: Callable[..., Path], visit: Open) -> None:
    service = {"api_key": "secret-key"}
    with serving(checkpoint("mha"), service=service, max_seq_len=160, max_batch_size=2) as server:
        for path in FILES:
            assert server.client.get(path).status_code == 200
        page = visit(server, statuses=(401,))
        dialog = page.get_by_role("dialog", name="This server needs a key")
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.press("Escape")
        expect(dialog).to_be_hidden()
        say_status(page, re.compile("the API key is wrong or missing"))
        send(page, "Hi")
        page.get_by_label("API key").fill("wrong-key")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("does not accept this key")
        page.get_by_label("API key").fill("secret-key")
        page.get_by_role("button", name="Continue").click()
        say_status(page, "Done.")  # the question was not lost
        expect(tokens(page).first).to_be_visible()
        assert page.evaluate("Object.values(sessionStorage)") == ["secret-key"]
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""] and not page.context.cookies()
        assert "secret-key" not in page.content() and page.get_by_label("API key").input_value() == ""
        page.reload()
        expect(page).to_have_title(f"{server.service.name} · llama serve")
        expect(dialog).to_be_hidden()
        other = page.context.new_page()
        other.goto(server.url)
        expect(other.get_by_role("dialog")).to_be_visible()


# Keyboards, phones, colors --------------------------------------------------------------------------


def test_the_keyboard_alone(server: Server, visit: Open) -> None:
    page = visit(server)
    press, box = page.keyboard.press, page.get_by_role("textbox", name=CHAT)
    expect(box).to_be_focused()

    def tab_to(goal: Locator, key: str = "Tab") -> None:
        for _ in range(20):
            press(key)
            if goal.evaluate("one => one === document.activeElement"):
                # Something of the element, or around it, is drawn for the focus.
                assert goal.evaluate(IS_MARKED), goal
                return
        raise AssertionError(f"{key} does not lead to {goal}")

    tab_to(page.locator("summary"), "Shift+Tab")
    press("Enter")
    tab_to(page.locator("#max_tokens"))
    page.keyboard.type("6")
    press("Escape")
    expect(page.locator("#fields")).to_be_hidden()
    expect(page.locator("summary")).to_be_focused()
    tab_to(box)
    page.keyboard.type("one")
    press("Shift+Enter")
    page.keyboard.type("two")
    assert box.input_value() == "one\ntwo"
    # Enter that ends the composition of a character, in Chromium and Firefox, and in Safari.
    for event in ("isComposing: true", "keyCode: 229"):
        box.evaluate(
            f"one => one.dispatchEvent(new KeyboardEvent('keydown', {{key: 'Enter', bubbles: true, {event}}}))"
        )
    expect(page.locator("article")).to_have_count(0)
    press("Enter")
    say_status(page, "Done.")
    assert page.locator(".question").inner_text() == "one\ntwo"
    expect(box).to_be_focused()
    tab_to(tokens(page).first, "Shift+Tab")
    panel = page.locator("#panel")
    expect(panel).to_be_visible()
    expect(tokens(page).first).to_have_attribute("aria-describedby", "panel")
    for key, index in {"ArrowRight": 1, "End": 5, "ArrowLeft": 4, "Home": 0}.items():
        press(key)
        expect(tokens(page).nth(index)).to_be_focused()
        expect(page.locator(".token.on")).to_have_count(1)
        expect(tokens(page).nth(index)).to_have_class(re.compile(r"\bon\b"))
    press("ArrowLeft")  # there is none before it
    expect(tokens(page).first).to_be_focused()
    press("ArrowRight")
    press("Escape")
    expect(panel).to_be_hidden()
    assert tokens(page).nth(1).evaluate(IS_MARKED)
    press("ArrowRight")
    expect(panel).to_be_visible()
    tab_to(page.get_by_role("button", name="Regenerate"))
    expect(panel).to_be_hidden()
    press("Shift+Tab")
    expect(tokens(page).nth(2)).to_be_focused()  # one stop, where the arrows left it
    tab_to(page.locator("#colors"))
    press("Space")
    expect(page.locator("#colors")).not_to_be_checked()
    tab_to(page.get_by_role("radio", name="Chat"), "Shift+Tab")
    press("ArrowRight")
    expect(page.get_by_role("textbox", name=COMPLETE)).to_be_visible()


IS_MARKED = """one => {
  const around = [one, one.lastElementChild, one.nextElementSibling, one.closest('form')].filter(Boolean);
  const hasOutline = style => style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2;
  const hasRing = style => /0px 0px 0px [12]px/.test(style.boxShadow);
  return around.map(each => getComputedStyle(each)).some(style => hasOutline(style) || hasRing(style));
}"""


def test_colors_can_be_turned_off(server: Server, visit: Open) -> None:
    page = visit(server)
    set_fields(page, temperature=BROKEN, max_tokens=40, seed=1)
    send(page, "Hi")
    say_status(page, "Done.")
    backgrounds = "all => [...new Set(all.map(one => getComputedStyle(one).backgroundColor))]"
    assert len(page.locator(".token .ink").evaluate_all(backgrounds)) > 2
    page.get_by_label("Color by surprise").uncheck()
    assert page.locator(".token .ink").evaluate_all(backgrounds) == ["rgba(0, 0, 0, 0)"]
    tokens(page).first.hover()
    expect(page.locator("#panel")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str, server: Server, visit: Open) -> None:
    """Every text, on whatever is behind it, as WCAG 2.2 asks for at level AA. Colors of surprise also differ in
    lightness, so that they can be told apart without seeing hues."""
    page = visit(server, color_scheme=scheme, reduced_motion="reduce")
    back = luminance(page.locator("body").evaluate("one => getComputedStyle(one).backgroundColor"))
    assert back > 0.9 if scheme == "light" else back < 0.02
    ratios = dict(page_contrasts(page))
    choose(page, "Complete")
    set_fields(page, temperature=BROKEN, max_tokens=40, seed=1)
    send(page, "Grüße 🦙 über\n\nalles", COMPLETE)
    say_status(page, "Done.")
    tokens(page).nth(3).focus()
    ratios |= dict(page_contrasts(page))
    page.locator("summary").click()
    ratios |= dict(page_contrasts(page))
    page.evaluate("document.getElementById('key-problem').textContent = 'Wrong key'")
    page.evaluate("document.getElementById('key-dialog').showModal()")
    page.evaluate("document.getElementById('status').className = 'error'")
    ratios |= dict(page_contrasts(page))
    assert {"All others", "Wrong key", "Done.", "Temperature", "> 8 bits", "Complete"} <= {
        text.split(":")[0] for text in ratios
    }
    assert not {text: ratio for text, ratio in ratios.items() if ratio < 4.5}
    colors = page.locator(".scale .s1, .scale .s2, .scale .s3, .scale .s4").evaluate_all(
        "all => all.map(one => getComputedStyle(one).backgroundColor)"
    )
    steps = [back, *map(luminance, colors)]
    for before, after in pairwise(steps):
        assert (max(before, after) + 0.05) / (min(before, after) + 0.05) > 1.1
    assert steps == sorted(steps, reverse=scheme == "light")
    edges = page.locator("#composer, #fields input:not([type=checkbox])").evaluate_all(
        "all => all.map(one => getComputedStyle(one).borderTopColor)"
    )
    assert all((max(back, edge) + 0.05) / (min(back, edge) + 0.05) >= 3 for edge in map(luminance, edges))


def page_contrasts(page: Page) -> Iterator[tuple[str, float]]:
    """Each text that is visible, with the contrast to its background."""
    found = page.evaluate(
        """() => {
          const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
          while (walker.nextNode()) {
            const text = walker.currentNode, element = text.parentElement;
            if (!text.data.trim() || !element.checkVisibility()) continue;
            let behind = element;
            while (/^rgba\\(.* 0\\)$/.test(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
            found.push([text.data.trim(), getComputedStyle(element).color, getComputedStyle(behind).backgroundColor]);
          }
          return found;
        }"""
    )
    for text, color, behind in found:
        low, high = sorted((luminance(color), luminance(behind)))
        yield text, (high + 0.05) / (low + 0.05)


def luminance(color: str) -> float:
    """WCAG's relative luminance of "rgb(r, g, b)"."""
    match = re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", color)
    assert match, color
    parts = [int(part) / 255 for part in match.groups()]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_phone(server: Server, visit: Open) -> None:
    page = visit(server, **PHONE)
    is_narrow = "() => document.documentElement.scrollWidth <= 375 && innerWidth === 375"
    assert page.evaluate(is_narrow)
    small = """all => all.filter(one => one.checkVisibility()).map(one => one.getBoundingClientRect())
        .filter(({width, height}) => width < 44 || height < 44).length"""
    targets = page.locator("button, summary, .modes label, label.check, textarea, input[type=number]")
    page.locator("summary").tap()
    assert targets.count() > 10 and targets.evaluate_all(small) == 0
    assert page.evaluate(is_narrow)
    page.locator("#temperature").fill("2")
    page.locator("#max_tokens").fill("60")
    page.locator("h1").tap()
    expect(page.locator("#fields")).to_be_hidden()
    page.get_by_role("textbox", name=CHAT).fill("x" * 70 + " Hi")
    page.get_by_role("button", name="Send").tap()
    say_status(page, "Done.")
    assert page.evaluate(is_narrow)
    # The last token is in view while the panel is open, and so are the panel's ends.
    panel = page.locator("#panel")
    for token in (tokens(page).first, tokens(page).last):
        token.tap()
        expect(panel).to_be_visible()
        box, ink = panel.bounding_box(), token.locator(".ink").bounding_box()
        assert box and ink and box["x"] == 0 and box["width"] == 375 and box["y"] + box["height"] == 667
        assert ink["y"] >= 0 and ink["y"] + ink["height"] <= box["y"]
        assert page.evaluate(is_narrow)
    page.locator(".sums").evaluate("one => one.dispatchEvent(new PointerEvent('pointerdown', {bubbles: true}))")
    expect(panel).to_be_hidden()
    choose(page, "Complete")
    send(page, "y" * 80, COMPLETE)
    say_status(page, "Done.")
    assert page.evaluate(is_narrow) and targets.evaluate_all(small) == 0


def test_the_end_is_followed_only_by_those_who_are_there(server: Server, gate: Gate, visit: Open) -> None:
    page = visit(server, viewport={"width": 320, "height": 300})
    left = "() => document.documentElement.scrollHeight - innerHeight - scrollY"
    set_fields(page, temperature=BROKEN, seed=1)
    send(page, "line\n" * 8)
    gate.let(50)
    expect(tokens(page).nth(30)).to_be_attached()
    assert page.evaluate(left) < 2
    page.evaluate("scrollTo(0, 50)")
    before = tokens(page).count()
    gate.let(20)
    expect(tokens(page).nth(before + 10)).to_be_attached()
    assert page.evaluate("scrollY") == 50 and page.evaluate(left) > 100
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    gate.open()
    say_status(page, "Done.")
    assert page.evaluate(left) < 2


def test_a_double_click_sends(server: Server, gate: Gate, visit: Open) -> None:
    page = visit(server)
    page.get_by_role("textbox", name=CHAT).fill("Hi")
    page.get_by_role("button", name="Send").dblclick()
    gate.open()
    say_status(page, "Done.")
    expect(page.locator(".answer")).to_have_count(1)


def test_motion_is_reduced(server: Server, gate: Gate, visit: Open) -> None:
    for motion, name in {"no-preference": "blink", "reduce": "none"}.items():
        page = visit(server, reduced_motion=motion)
        send(page, "Hi")
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        style = "one => getComputedStyle(one, '::after').animationName"
        assert page.locator(".answer .text").evaluate(style) == name
        page.get_by_role("button", name="Stop").click()
        say_status(page, "Stopped.")
