"""Plain prose from a MediaWiki dump."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

_PAGE = re.compile(
    r"<page>.*?<title>(.*?)</title>.*?<ns>(\d+)</ns>.*?<text[^>]*>(.*?)</text>", re.DOTALL
)
_REDIRECT = re.compile(r"\s*#redirect", re.IGNORECASE)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_REFERENCE = re.compile(r"<ref\b[^>]*?/>|<ref\b.*?</ref\s*>", re.DOTALL | re.IGNORECASE)
_BLOCK = re.compile(
    r"<(math|gallery|timeline|pre|source|syntaxhighlight|nowiki|table|imagemap|blockquote|code)\b"
    r".*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
_CONVERT = re.compile(r"\{\{ *(?:convert|cvt) *\|([^{}|]*)\|([^{}|]*)[^{}]*\}\}", re.IGNORECASE)
_AS_OF = re.compile(r"\{\{ *(as of) *\| *(\d+)[^{}]*\}\}", re.IGNORECASE)
_WORDING = re.compile(r"\{\{ *(?:nowrap|nobr|lang *\|[^{}|]*) *\|([^{}|]*)\}\}", re.IGNORECASE)
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)
_MEDIA_LINK = re.compile(
    r"\[\[(?:File|Image|Category|Media|[a-z-]{2,12}):[^\[\]]*\]\]", re.IGNORECASE
)
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_EXTERNAL_LINK = re.compile(r"\[(?:https?|ftp)://[^\s\]]+ ?([^\]]*)\]")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_END_MATTER = re.compile(
    r"\n==+ *(?:See also|References|External links|Further reading|Notes|Footnotes|Bibliography"
    r"|Sources|Citations)\b",
    re.IGNORECASE,
)
_NESTING = 8  # depth to which templates, tables and links are undone
_SHORTEST_LINE = 80  # characters; headings, list items and captions are shorter
_NOT_PROSE = re.compile(r"^[^\w\"'(]|[{}|]|\[\[|\]\]")


def articles_of(dump: str) -> Iterator[tuple[str, str]]:
    """(title, plain text) of every article of an XML dump; redirects and other pages left out."""
    for title, namespace, text in _PAGE.findall(dump):
        if namespace == "0" and not _REDIRECT.match(text):
            yield html.unescape(title), plain_text(html.unescape(text))


def plain_text(wikitext: str) -> str:
    """The paragraphs of an article, without headings, lists, tables, templates and references.

    A line that still shows markup afterwards (unbalanced braces) is left out whole.
    """
    text = html.unescape(wikitext)
    text = _END_MATTER.split(text)[0]
    for pattern in (_COMMENT, _REFERENCE, _BLOCK):
        text = pattern.sub("", text)
    text = _CONVERT.sub(r"\1 \2", text)
    text = _WORDING.sub(r"\1", _AS_OF.sub(r"\1 \2", text))
    text = _until_stable(_TEMPLATE, "", text)
    text = _until_stable(_TABLE, "", text)
    for _ in range(_NESTING):
        shorter = _LINK.sub(r"\1", _MEDIA_LINK.sub("", text))
        if shorter == text:
            break
        text = shorter
    text = _TAG.sub("", _EXTERNAL_LINK.sub(r"\1", text))
    lines = (_tidy(line) for line in text.split("\n") if not _NOT_PROSE.search(line.strip()))
    return "\n\n".join(line for line in lines if len(line) >= _SHORTEST_LINE)


def plain_quotes(text: str) -> str:
    """``Quotes'' of plain-text Wikipedia extracts as straight double quotes."""
    return re.sub(r"``|''", '"', text).strip()


def _until_stable(pattern: re.Pattern[str], by: str, text: str) -> str:
    for _ in range(_NESTING):
        text, count = pattern.subn(by, text)
        if not count:
            break
    return text


def _tidy(line: str) -> str:
    """Undo what removed markup leaves: emphasis, empty brackets, doubled spaces."""
    line = re.sub(r"'{2,}", "", line.replace("\u00a0", " "))
    line = re.sub(r"\([\s,;:]+", "(", line)
    line = re.sub(r"[\s,;:]+\)", ")", line)
    line = re.sub(r"\((?:or|and)?\)", "", line)
    line = re.sub(r"\s+([,.;:)])", r"\1", line)
    return re.sub(r"\s{2,}", " ", line).strip()
