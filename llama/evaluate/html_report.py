"""A token report as an HTML file, without scripts or external resources."""

from collections.abc import Iterator
from html import escape
from itertools import pairwise

from llama.console import visible
from llama.evaluate.text_report import LEVELS, display_piece, level, percent_text
from llama.evaluate.token_report import Alternative, Token, TokenReport


def html_report(report: TokenReport, name: str, summary: str) -> str:
    """The HTML text. Tokens are coloured by probability. Hover or focus opens a card with a token's numbers.

    name: the model's name, used as heading. summary: a line below the heading.
    """
    tokens = report["tokens"]
    text = "".join(token["text"] for token in tokens)
    title = display_piece(text if len(text) <= 60 else f"{text[:60]}…").replace("·", " ")
    generated = ' <span class="g">generated</span>' if any(token["generated"] for token in tokens) else ""
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(name)}</h1>
<p>{escape(summary)}</p>
<p class="legend">{"".join(_legend())}{generated}</p>
<p>Point at a token, tap it, or go there with the Tab key.</p>
</header>
<main translate="no" tabindex="-1">{"".join(map(_token, tokens))}{_next(report["next"])}</main>
</body>
</html>
"""


def _legend() -> Iterator[str]:
    for i, (upper, lower) in enumerate(pairwise((100, *LEVELS, 0))):
        span = f"{lower:g} to {upper:g} %" if lower else f"under {upper:g} %"
        yield f'<span class="p{i}">{span}</span> '


def _token(token: Token) -> str:
    # Line breaks and ids without text get a mark. The style sheet draws it, so copied text does not contain it.
    text = escape(visible(token["text"])).replace("\n", _mark("⏎") + "\n") or _mark(display_piece(token["piece"]))
    classes = ["t"]
    card = f"<b><bdi>{escape(display_piece(token['piece']))}</bdi></b> token {token['position']}, id {token['id']}"
    if token["generated"]:
        classes.append("g")
        card += ", generated"
    if token["percent"] is None:
        card += '<span class="h">Nothing predicts the first token.</span>'
    else:
        classes.append(f"p{level(token['percent'])}")
        numbers = {
            "probability": f"{percent_text(token['percent'])} %",
            "logprob": f"{token['logprob']:.3f}",
            "rank": f"{token['rank']:,}",
            "entropy": f"{token['entropy']:.2f} nats",
        }
        card += f'<span class="n">{"".join(f"<span>{key}<b>{number}</b></span>" for key, number in numbers.items())}'
        card += f'</span><span class="h">Expected here, %</span>{_bars(token["top"], token["id"])}'
    card += f'<span class="h">Expected after it, %</span>{_bars([token["next"]])}'
    return _with_card(classes, text, card)


def _next(alternatives: list[Alternative]) -> str:
    return _with_card(["t"], _mark("next?"), f"<b>What comes next, %</b>{_bars(alternatives)}")


def _with_card(classes: list[str], text: str, card: str) -> str:
    return f'<span class="{" ".join(classes)}" tabindex="0">{text}<span class="card">{card}</span></span>'


def _bars(alternatives: list[Alternative], chosen: int | None = None) -> str:
    """A bar for each alternative. chosen: the id of the text at this position, which is highlighted."""
    return "".join(
        f'<span class="a{" own" * (each["id"] == chosen)}" style="--w:{each["percent"]:.1f}%">'
        f"<bdi>{escape(display_piece(each['piece']))}</bdi> {escape(percent_text(each['percent']))}</span>"
        for each in alternatives
    )


def _mark(sign: str) -> str:
    return f'<i data-s="{escape(sign)}"></i>'


# A card covers the header. In a narrow window the header is at the bottom, within reach of a thumb; in a wide one it is
# next to the text. The text never extends there, so a card is always inside the window and covers no token.
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1b1f;--dim:#5c5c66;--card:#f5f5f8;--line:#cfcfd6;--bar:#c9dcf5;
--p0:#c4ead0;--p1:#e3efb8;--p2:#fde7a3;--p3:#fdc79a;--p4:#f9a8a8;scroll-padding-bottom:min(20rem,50vh)}
@media(prefers-color-scheme:dark){:root{--bg:#16161a;--fg:#ececf1;--dim:#b0b0ba;--card:#232329;--line:#44444e;
--bar:#2c4a72;--p0:#1d4d30;--p1:#43501c;--p2:#644d0c;--p3:#763d12;--p4:#812a2a}}
body{margin:0;padding:1rem 1rem calc(min(20rem,50vh) + 2rem);background:var(--bg);color:var(--fg);
font:1rem/1.4 system-ui,sans-serif}
header,.card{position:fixed;inset:auto 0 0;height:min(20rem,50vh);box-sizing:border-box;overflow:auto;
padding:.8rem 1rem;background:var(--card);border:0 solid var(--line);border-top-width:1px;overflow-wrap:anywhere}
h1{font-size:1.1rem;margin:0}
p{margin:.5rem 0;color:var(--dim);font-size:.9rem}
.legend span{display:inline-block;padding:0 .4em;margin:.1em 0;border-radius:.2em;color:var(--fg)}
main{max-width:45rem;margin:auto;font-size:1.2rem;line-height:1.9;white-space:pre-wrap;overflow-wrap:anywhere;
tab-size:4;outline:0}
.t{padding:.2em 0;border-radius:.2em;box-shadow:inset -1px 0 var(--bg);cursor:pointer;
-webkit-box-decoration-break:clone;box-decoration-break:clone}
@media(pointer:coarse){.t{padding:.3em .12em}}
.p0{background:var(--p0)}.p1{background:var(--p1)}.p2{background:var(--p2)}.p3{background:var(--p3)}
.p4{background:var(--p4)}
.g{text-decoration:underline 2px;text-underline-offset:.25em}
.t i::before{content:attr(data-s);font:.75em system-ui,sans-serif;color:var(--dim);padding:0 .15em}
.t:hover,.t:focus{outline:2px solid var(--fg);outline-offset:-1px}
.card{display:none;cursor:auto;font-size:.95rem;line-height:1.4;white-space:normal}
.t:hover>.card,.t:focus>.card{display:block}
body:has(.t:hover) .t:focus:not(:hover)>.card{display:none}
.card>b{font-size:1.1em;margin-right:.5em}
.n{display:flex;justify-content:space-between;gap:.5rem;margin:.5rem 0}
.n span,.h{color:var(--dim);font-size:.85em}
.n b{display:block;color:var(--fg);font-size:1.15em}
.h{display:block;margin-top:.5rem}
.a{display:flex;justify-content:space-between;gap:1rem;margin:.15rem 0;padding:.05rem .4rem;border-radius:.2em;
background:linear-gradient(var(--bar) 0 0) 0/var(--w) 100% no-repeat}
.own{font-weight:600;box-shadow:inset 0 0 0 1px var(--dim)}
@media(min-width:48rem){:root{scroll-padding:0}body{padding:2rem 25rem 2rem 2rem}
header,.card{inset:0 0 0 auto;width:23rem;height:auto;padding:2rem 1.5rem;border-width:0 0 0 1px}}
"""
