"""Markup and page furniture go, prose that looks like them stays."""

import pytest

from data.corpus.boilerplate import RemoveBoilerplate, is_boilerplate
from data.corpus.markup import RemoveMarkup
from data.corpus.steps import Document, Verdict

MARKDOWN = """---
title: Guide
aliases: ['/a', '/b']
---

# A **bold** guide {#top}

See [the page](/docs/page.md "title"), ![logo](logo.png)and `code`.<!-- hidden -->

```python
print("no prose")
```

| a | b |
|---|:-:|
| 1 | 2 |

> quoted *words*

---
{{< copyable "sql" >}}
The end.
"""


def clean(step: RemoveMarkup | RemoveBoilerplate, text: str) -> Verdict:
    return step(Document("a#0", text, {}))


def test_markdown_becomes_its_prose() -> None:
    verdict = clean(RemoveMarkup(), MARKDOWN)
    assert verdict.text is not None
    lines = [line for line in verdict.text.split("\n") if line]
    assert lines == ["A bold guide", "See the page, and code.", "quoted words", "The end."]
    assert verdict.changes["code_block"] == verdict.changes["table"] == 1
    assert verdict.changes["front_matter"] == verdict.changes["image"] == 1


def test_code_and_tables_can_be_kept() -> None:
    verdict = clean(RemoveMarkup(code="keep", tables="keep"), MARKDOWN)
    assert verdict.text is not None
    assert 'print("no prose")' in verdict.text
    assert "| 1 | 2 |" in verdict.text
    assert "```" not in verdict.text
    with pytest.raises(ValueError, match="code is 'maybe'"):
        RemoveMarkup(code="maybe")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('<p class="x">One&nbsp;</p><br/>\n<b>two</b> &amp; three', "One\n\ntwo & three"),
        ("a<script>var x = '<p>';</script>b", "ab"),
        ("&amp;lt;p&amp;gt;text", "text"),
        ("&#20013;&#x6587;", "中文"),
        ("a\r\n<i>b</i>", "a\nb"),
    ],
)
def test_html_goes(text: str, right: str) -> None:
    assert clean(RemoveMarkup(), text).text == right


@pytest.mark.parametrize(
    "text",
    [
        "if a < b and c > d, or x<y, y>z",
        "if (a<b && b>c) return;",
        "List<T> and map<string, int>",
        "2 * 3 * 4 = 24, 5*3*2",
        "f[i](x) and [1](see) the note",
        "He said *yes* once, and __init__ is a name",
        "AT&T; Q&A; I <3 you",
        "write to <a@b.com>",
        "#hashtag and # alone",
        "```\nnever closed",
    ],
)
def test_prose_that_only_looks_like_markup_stays(text: str) -> None:
    assert clean(RemoveMarkup(), text) == Verdict(text)


def test_a_document_of_only_markup_is_dropped() -> None:
    assert clean(RemoveMarkup(), "<div><br></div>\n<!-- x -->").reason == "empty"


@pytest.mark.parametrize(
    "line",
    [
        "Accept all cookies | Reject | Manage preferences",
        "Share on Facebook Share on Twitter Share on LinkedIn",
        "© 2021 Example Corp. All rights reserved.",
        "Home > News > Article",
        "Subscribe to our newsletter!",
        "Please enable JavaScript to view this page.",
        "Terms of Use | Privacy Policy | Contact us",
        "版权所有 未经许可不得转载",
        "京ICP备12345678号-1",
        "首页 | 新闻 | 体育 | 登录",
        "责任编辑：王某 分享到：微博 微信",
        "上一篇：没有了 下一篇：返回列表",
        "扫一扫关注我们",
        "点击加载更多...",
    ],
)
def test_page_furniture_is_known(line: str) -> None:
    assert is_boilerplate(line)
    verdict = clean(RemoveBoilerplate(), f"Text before.\n{line}\nText after.")
    assert verdict.text == "Text before.\nText after."
    assert verdict.changes == {"boilerplate_line": 1}


@pytest.mark.parametrize(
    "line",
    [
        "The cookies were baked by the baker and eaten by all of us.",
        "He told her that all rights are reserved for those who came before them in this life.",
        "I share everything on this street with my neighbour, and he with me.",
        "他登录以后看见了新闻。",
        "本书的版权归作者，未经许可他也不肯把它送给别人看。",
        "He ran home - to the news - of his father",
        "※　※　※",
        "read",
    ],
)
def test_prose_with_the_same_words_stays(line: str) -> None:
    assert not is_boilerplate(line)


def test_lines_said_again_and_again_are_kept_once() -> None:
    text = "\n".join(["A line that is on every page."] * 9 + ["Short."] * 9 + ["The text."])
    verdict = clean(RemoveBoilerplate(), text)
    assert verdict.text == "\n".join(
        ["A line that is on every page."] + ["Short."] * 9 + ["The text."]
    )
    assert verdict.changes == {"repeated_line": 8}
    assert clean(RemoveBoilerplate(max_line_repeats=0), text) == Verdict(text)
    with pytest.raises(ValueError, match="max_line_repeats is -1"):
        RemoveBoilerplate(max_line_repeats=-1)


def test_gutenberg_keeps_the_book() -> None:
    text = (
        "The Project Gutenberg EBook of X\n\nTitle: X\n\n"
        "*** START OF THIS PROJECT GUTENBERG EBOOK X ***\n\nProduced by A. B.\n\n\nChapter I\n\n"
        "It was a book.\n\nEnd of the Project Gutenberg EBook of X\n\n"
        "*** END OF THIS PROJECT GUTENBERG EBOOK X ***\nlicence"
    )
    verdict = clean(RemoveBoilerplate(), text)
    assert verdict.text == "Chapter I\n\nIt was a book."
    assert verdict.changes == {"gutenberg_header": 1, "gutenberg_licence": 1}


def test_a_page_without_text_is_dropped() -> None:
    verdict = clean(RemoveBoilerplate(), "Home | News | Login\nAll rights reserved")
    assert (verdict.text, verdict.reason) == (None, "only_boilerplate")


@pytest.mark.parametrize(
    ("step", "options", "message"),
    [
        (RemoveMarkup, {"markdown": "no"}, "markdown is 'no'"),
        (RemoveMarkup, {"tables": 1}, "tables is 1"),
        (RemoveBoilerplate, {"min_repeat_chars": "12"}, "min_repeat_chars is '12'"),
    ],
)
def test_wrong_options_are_told(step: type, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step(**options)
