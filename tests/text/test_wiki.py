from __future__ import annotations

import pytest

from lib.text.wiki import plain_quotes, plain_text

TAIL = " which is long enough to be kept as a paragraph of prose, and so it ends here."


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("A '''bold''' and ''slanted'' word", "A bold and slanted word"),
        ("See [[the harbour|a harbour]] and [[rope]]", "See a harbour and rope"),
        ("A claim<ref name=a>{{cite|x}}</ref><ref name=b /> of note", "A claim of note"),
        ("Deep {{one|{{two|{{three}}}}}}nesting", "Deep nesting"),
        ("It is {{convert|12|km|mi|abbr=on}} away", "It is 12 km away"),
        ("A town ({{lang-el|x}}; {{IPA|y}}) of old", "A town of old"),
        ("A [[File:x.jpg|thumb|with [[a link]] inside]]picture", "A picture"),
        ("A [http://example.org plain name] here", "A plain name here"),
        ("A<!-- hidden --> line<br/> with <small>tags</small>", "A line with tags"),
        ("Ships &amp;amp; boats", "Ships & boats"),
        ("The <math>x^2</math> law", "The law"),
    ],
)
def test_markup_becomes_prose(markup: str, expected: str) -> None:
    import html

    assert plain_text(html.unescape(markup) + TAIL) == expected + TAIL


def test_only_paragraphs_are_kept() -> None:
    sentence = "This sentence" + TAIL
    wikitext = "\n".join(
        [
            "{{Infobox\n| a = b\n}}",
            sentence,
            "== Heading ==",
            "* item" + TAIL,
            "{| class=x\n|-\n| cell" + TAIL + "\n|}",
            "Short line.",
            "Broken {{template" + TAIL,
            ", of which the beginning is lost" + TAIL,
            sentence,
            "== References ==",
            "Never shown" + TAIL,
        ]
    )
    assert plain_text(wikitext) == f"{sentence}\n\n{sentence}"


def test_quotes() -> None:
    assert plain_quotes("He said ``no'' and it's so. ") == 'He said "no" and it\'s so.'
