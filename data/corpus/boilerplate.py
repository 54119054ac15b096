"""A document in, out the same without the lines that belong to its page and not to its text.

Cookie notices, navigation, share buttons, copyright and "read more" lines, in English and Chinese; the header
and licence of Project Gutenberg; and long lines said again and again. A line goes only as a whole.
"""

import re
from collections import Counter
from dataclasses import dataclass

from data.corpus.steps import Document, Verdict

MAX_LINE_CHARS = 160  # what is longer is text
_SITES = (
    r"(?:facebook|twitter|x|linked-?in|pinterest|reddit|whatsapp|telegram|e-?mail|wechat|weibo|instagram|"
    r"youtube|tumblr|微博|新浪微博|微信|朋友圈|qq空间|qq|豆瓣|空间|人人网|贴吧|知乎|复制链接)"
)
_PROVINCE = "[京沪粤浙苏闽川渝津鲁豫湘鄂皖赣冀晋辽吉黑陕甘青宁新藏桂琼滇黔蒙]"
HINT = re.compile(  # what every line of LINES holds; most lines are cleared by this alone
    "cookie|newsletter|mailing list|updates|e-?mail|javascript|loading|share|follow|like|tweet|find|"
    "print|facebook|©|\\(c\\)|copyright|rights reserved|terms|privacy|contact|about|site ?map|imprint|"
    "disclaimer|advertis|back to|skip to|log ?in|sign ?(?:in|up)|register|read |show |load |view |"
    "leave a|post a|related|you may|powered|preferences|微博|微信|版权|未经|icp|公网|扫|长按|关注|责任|分享|"
    "上一|下一|返回|加载|查看|阅读|显示|展开|位置|打开|下载|登录|注册|免责|相关|热门|猜你|qq|豆瓣|空间"
)
# Whole lines, bullets and arrows around them or not. *+ gives nothing back: no line takes long.
LINES = re.compile(
    rf"""(?=\W*+\w)[^\w©(]*+(?:
      (?:(?:please\ )?accept|reject|allow|manage|we\ use|this\ (?:web)?site\ uses|by\ using\ this\ site)\b
          [^.!?]{{0,80}}\b(?:cookies?|preferences)\b.{{0,90}}
    | (?:subscribe|sign\ up)\b[^.!?]{{0,40}}\b(?:newsletter|mailing\ list|updates)\b.{{0,60}}
    | (?:enter\ )?your\ e-?mail(?:\ address)?
    | (?:loading(?:\.\.\.|…)?\W*+)?(?:please\ )?enable\ javascript\b.{{0,60}} | loading(?:\.\.\.|…)
    | javascript\ is\ (?:disabled|required)\b.{{0,80}}
    | (?:(?:share|follow|like|tweet|find)(?:\ (?:this|us))?(?:\ (?:on|via|to))?:?\W*+{_SITES}?\W*+
        |(?:{_SITES}|print)\b\W*+){{2,}}
    | (?:share|tweet|print)\ this(?:\ (?:page|article|post|story))?
    | (?:©|\(c\)|copyright)[^.!?]{{0,60}}(?:\.\W*+)?(?:all\ rights\ reserved)?.{{0,60}}
    | .{{0,50}}\ball\ rights\ reserved\b\W*+(?:(?:terms|privacy|contact|about|sitemap)\b.{{0,60}})?
    | (?:terms\ (?:of\ (?:use|service)|(?:and|&)\ conditions)|privacy\ (?:policy|notice)|cookie\ policy
        |contact(?:\ us)?|about(?:\ us)?|site\ ?map|imprint|disclaimer|advertis(?:e|ing)(?:\ with\ us)?
        |back\ to\ top|skip\ to\ (?:main\ )?content|log\ ?in|sign\ ?(?:in|up)|register|[\s|•·/>,-])+
    | (?:read|show|load|view)\ (?:more|all)(?:\ (?:comments|posts|articles|results))?
    | (?:leave\ a\ (?:reply|comment)|post\ a\ comment|related\ (?:articles|posts)|you\ may\ also\ like)
    | powered\ by\ (?:wordpress|blogger|drupal|mediawiki|hugo|jekyll|shopify)\b.{{0,40}}
    | (?:本(?:网)?站)?版权所有.{{0,80}} | .{{0,30}}{_PROVINCE}(?:ICP[备证]\W{{0,2}}\d{{4,}}|公网安备).{{0,40}}
    | .{{0,40}}未经(?:书面|许可|授权|允许|同意).{{0,12}}(?:不得|禁止|严禁)(?:转载|复制|使用).{{0,40}}
    | (?:请)?(?:长按|扫一扫|扫描|扫码)(?:识别|关注|下方|上方|左侧|右侧|二维码|我们|添加).{{0,30}}
    | (?:欢迎|点击|请)?关注(?:我们|本站|微信)?(?:的)?(?:微信)?(?:公众号|官方微博|微信号).{{0,20}}
    | 责任编辑\s*[:：].{{0,12}}(?:分享.{{0,40}})? | (?:一键)?分享(?:到|至)\s*[:：]?(?:\W*+{_SITES})*
    | 上一[篇页]\s*[:：].{{0,60}} | 下一[篇页]\s*[:：].{{0,60}} | 返回(?:列表|顶部|首页|上一页)
    | (?:点击)?(?:加载|查看|阅读|显示|展开)(?:更多|全文|全部|下一页)(?:内容|评论|文章)?
    | (?:正在)?加载中\W*+ | (?:您(?:所在|现在|当前)的?位置|当前位置)\s*[:：].{{0,60}}
    | (?:打开|下载)(?:app|APP|客户端).{{0,20}} | (?:用户|会员)?(?:登录|注册)(?:\W+(?:登录|注册))*
    | 请(?:开启|启用)javascript.{{0,30}} | 本(?:网)?站使用cookie.{{0,60}}
    | 免责声明\W*+ | 相关(?:阅读|推荐|文章|新闻|链接)\W*+ | 热门(?:推荐|文章|标签)\W*+ | 猜你喜欢\W*+
    )\W*+""",
    re.VERBOSE | re.IGNORECASE,
)
MENU_HINT = re.compile(r"[|｜>»›•·/\t].*[|｜>»›•·/\t]|:: .*::| - .* - |  .*  ")
SEPARATOR = re.compile(r"\s*(?:[|｜>»›•·/]|::|\s-\s|\t| {2,})\s*")
MENU_ITEMS = frozenset(
    """
    home news sport sports business world politics opinion tech technology science health video
    videos blog about contact products services support download downloads docs documentation
    community forum search login logout register menu shop cart account help faq careers press rss
    article articles 首页 新闻 体育 财经 娱乐 科技 汽车 房产 教育 军事 国际 国内 社会 登录 注册 论坛 博客
    视频 图片 下载 帮助 关于我们 联系我们 网站地图 产品 服务 招聘 搜索 主页 返回首页 设为首页 加入收藏 更多
    资讯 专题 评论
    """.split()  # noqa: SIM905
)
MENU_PHRASES = re.compile(
    r"(?:about|contact) us|log ?in|sign (?:in|up)|terms of (?:use|service)|privacy policy|site ?map|my account"
)
GUTENBERG_START = re.compile(
    r"^.*\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG.*$|^\*END\*? ?THE SMALL PRINT.*$",
    re.MULTILINE | re.IGNORECASE,
)
GUTENBERG_END = re.compile(
    r"^.*\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG"
    r"|^[ \t]*\**[ \t]*End of (?:the |this )?Project Gutenberg(?:'s|’s)?\b",
    re.MULTILINE | re.IGNORECASE,
)
PRODUCED_BY = re.compile(
    r"\A\s*(?:E-?text )?(?:Produced|Prepared|Transcribed) by [^\n]*\n(?:[^\n]+\n)*", re.IGNORECASE
)
SENTENCE_END = (".", "!", "?", "。", "！", "？", "；", "”", '"')


@dataclass(frozen=True)
class RemoveBoilerplate:
    """Take out a page's own lines, by rule and by repetition; count each kind.

    A line of at least `min_repeat_chars` characters that stands more than `max_line_repeats` times
    in the document is kept once (0: repetition is left to the quality rules). A document that was
    nothing else is dropped ("only_boilerplate").
    """

    max_line_repeats: int = 5
    min_repeat_chars: int = 12

    def __post_init__(self) -> None:
        problems = [
            f"{field} is {value!r}; give 0 or more"
            for field, value in vars(self).items()
            if not isinstance(value, int) or value < 0
        ]
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def name(self) -> str:
        return "remove_boilerplate"

    def __call__(self, document: Document) -> Verdict:
        changes: Counter[str] = Counter()
        text = _without_gutenberg(document.text, changes)
        lines = text.split("\n")
        repeated = self._repeated(lines)
        kept = []
        for line in lines:
            if len(line) <= MAX_LINE_CHARS and line and is_boilerplate(line):
                changes["boilerplate_line"] += 1
            elif line in repeated and repeated[line] == 0:
                changes["repeated_line"] += 1
            else:
                kept.append(line)
                if line in repeated:
                    repeated[line] = 0
        if not changes:
            return Verdict(text)
        text = "\n".join(kept).strip("\n")
        if not text.strip():
            return Verdict(None, "only_boilerplate", f"all {len(lines)} lines", dict(changes))
        return Verdict(text, changes=dict(changes))

    def _repeated(self, lines: list[str]) -> dict[str, int]:
        """Lines that stand too often, with a 1 that becomes 0 once the first is kept."""
        if not self.max_line_repeats or len(set(lines)) == len(lines):
            return {}
        counts = Counter(lines)
        return {
            line: 1
            for line, number in counts.items()
            if number > self.max_line_repeats and len(line) >= self.min_repeat_chars
        }


def is_boilerplate(line: str) -> bool:
    """Whether a short line as a whole is a notice, a button or a menu."""
    if HINT.search(line.lower()) and LINES.fullmatch(line):
        return True
    return MENU_HINT.search(line) is not None and _is_menu(line)


def _is_menu(line: str) -> bool:
    """Three or more short items between separators, at least half of them what menus hold."""
    items = [item for item in SEPARATOR.split(line.strip()) if item]
    if len(items) < 3 or max(map(len, items)) > 30 or line.endswith(SENTENCE_END):
        return False
    known = sum(
        item.lower() in MENU_ITEMS or MENU_PHRASES.fullmatch(item.lower()) is not None
        for item in items
    )
    return 2 * known >= len(items)


def _without_gutenberg(text: str, changes: Counter[str]) -> str:
    """The book alone, where Project Gutenberg's marks stand around it."""
    if "utenberg" not in text and "UTENBERG" not in text:
        return text
    start = 0
    for found in GUTENBERG_START.finditer(text):
        start = found.end()
    end_mark = GUTENBERG_END.search(text, start)
    end = end_mark.start() if end_mark else len(text)
    if start:
        changes["gutenberg_header"] += 1
        produced = PRODUCED_BY.match(text[start:end])
        start += produced.end() if produced else 0
    if end_mark:
        changes["gutenberg_licence"] += 1
    return text[start:end].strip("\n") if start or end_mark else text
