"""Markup taken off documentation: each function returns texts whose paragraphs stand between blank lines."""

import ast
import email
import re

from gpt2lora.sample.corpus import DOCUMENTED

ROLE = re.compile(r":[\w:+.-]+:`([^`<]*?)(?:\s*<[^`>]*>)?`")
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
POD_CODE = re.compile(r"[A-Z]<(?:< )?([^<>|]*)(?:\|[^<>]*)?(?: >)?>")
BREAK = re.compile(r"\.(S[HS]|[PLTIH]?P|TQ|RS|RE|br|sp|Sp|nf|fi|Vb|Ve|EX|EE|TH|IX|de|\.)\b")
LITERAL = {".nf": ".fi", ".Vb": ".Ve", ".EX": ".EE", ".TS": ".TE", ".de": "..", ".ig": "..", ".SH": "", ".SS": ""}
FONTS = re.compile(r"\.(B|I|R|BI|BR|IB|IR|RB|RI|SM|SB)\s+(.*)")
ROFF_SIGNS = {"aq": "'", "cq": "'", "oq": "'", "lq": '"', "rq": '"', "dq": '"', "em": " - ", "en": "-", "hy": "-"}


def python(text: str) -> list[str]:
    """Return the docstrings of a module. The file is parsed, never run."""
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(text)) if isinstance(node, DOCUMENTED))
    return [docstring for docstring in found if docstring]


def plain(text: str) -> list[str]:
    return [text]


def metadata(text: str) -> list[str]:
    """Return the description of a package, which follows the headers."""
    return [email.message_from_string(text).get_payload()]


def pod(text: str) -> list[str]:
    """Return the POD of a Perl file; what is indented is code."""
    parts = re.split(r"^=(\w+)(.*)$", text, flags=re.MULTILINE)
    texts = []
    for command, body in zip(parts[1::3], parts[3::3], strict=True):
        if command not in ("cut", "begin", "for", "encoding"):
            for _ in range(3):  # codes stand within codes
                body = POD_CODE.sub(r"\1", body)
            texts.append(re.sub(r"^[ \t]+.*$", "", body, flags=re.MULTILINE))
    return texts


def roff(text: str) -> list[str]:
    """Return the text of a manual page in the man macros; none of one in mdoc, whose macros stand for words."""
    if re.search(r"^\.(Dd|Sh|so) ", text, re.MULTILINE):
        return []
    lines, until = [], None  # the macro that ends what is left out
    for line in text.splitlines():
        macro = line[:3].rstrip()
        if until is not None:
            until = None if macro == until else until
        elif macro in LITERAL:
            until = LITERAL[macro] or None
            lines.append("")
        elif BREAK.match(line):
            lines.append("")
        elif fonts := FONTS.match(line):
            words = re.findall(r'"([^"]*)"|(\S+)', fonts[2])
            alternate = len(fonts[1]) == 2 and fonts[1] not in ("SM", "SB")  # such macros set no space between
            lines.append(("" if alternate else " ").join(a or b for a, b in words))
        elif not line.startswith((".", "'")):
            lines.append(line)
    return [unescape("\n".join(lines))]


def unescape(text: str) -> str:
    """Return the characters that roff's escapes stand for; fonts and sizes are dropped."""
    text = re.sub(r'\\".*', "", text)
    text = re.sub(r"\\f(\[\w*\]|\(\w\w|\w)|\\s[-+]?\d+|\\[&|^/,:%c]", "", text)
    text = re.sub(r"\\\*?(?:\((..)|\[(\w+)\])", lambda sign: ROFF_SIGNS.get(sign[1] or sign[2], ""), text)
    text = re.sub(r"\\\*.", "", text)
    return text.replace("\\-", "-").replace("\\ ", " ").replace("\\~", " ").replace("\\e", "\\").replace("\\'", "'")


def inline(text: str) -> str:
    """Return a paragraph of reStructuredText or Markdown without its inline markup, on one line."""
    text = LINK.sub(r"\1", ROLE.sub(r"\1", text))
    text = re.sub(r"\*\*(.+?)\*\*", r"\1", text.replace("`", ""))
    text = re.sub(r"^([-*+•>#]+|\d+[.)])\s+", "", text)
    return " ".join(text.split())
