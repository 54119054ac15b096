"""A text in, counts of its kinds of characters out: the measure that the cleaning steps share.

Counting runs in numpy over the UTF-32 form of the text, whatever the script.
"""

import functools
import unicodedata
from enum import IntEnum

import numpy

# The 1,000 most frequent Han characters of novels, laws, encyclopedia, technical and classical
# prose and poems, simplified and traditional, each kind with equal weight. They make up 66 % (Tang
# poems) to 93 % (technical prose) of the Han characters of real text, and 1 % to 13 % of those in
# text that was decoded with a wrong charset: a gap wide enough to tell the two apart by counting.
COMMON_HAN = frozenset(
    """
    的一不人是有之以在了中上为也大行我和可下子个其而用者这来他法出十得年道定所二生自于如时三到数要作
    第事日地国此家成公使当里能理去分相文说同然民方条对就天或本前会后多山应过知们為明王曰小主因何那你
    又部四入月五关等学心政都看西起外见只水将合及南点并无高面名着至已与实通发但经由國管安無门意正重物
    进务先表向好规位据未北於全老回時代还太最性便么机间言新金两情立來从路被制今动件现处海度果平保开式
    工君则量非即與业内常些取命建元化更任院字故接问没期且提白解城身请信空將加例设六百原集後程手次江直
    头证見查流長求世花产教必东利令府指八算軍想風州首少书口照复共死依员置九列夫样交单若计清儿存七结春
    石构权值士力长种目需女形受雲体系改古类色收引义亦区夜兵示却乃做東该特给客变朝级再走望把林包各反德
    持神治馬别官玉节比才组往帝品思责己息始执千打记光告序送欲资施话标每放市青案很似根支步容报连功配题
    秋真论章歌除會服皆几运听许深认書社它基语歸近足群坐爲門参居初乎具叫司酒失边武落转按布從句气决影斯
    萬称笑矣住什符當调准河造半项史统军完侯展臣發詩早操登整李余云父素開美议器活商候源周留备土陽监确境
    還总格树易张爷草限声學處著香尚罪止界弟修型過曾秦移衣聞申病环写供甚雨师食守致检注马况图個护究吃考
    线模莫星曲阿志律對款則經审科场眼應左域传漢吾害聲遂万母船倒台密別承办忽寒右索导卷委久予破推數楚质
    待遠間段祖內火動房约皇效復函英排戰采精督虽關這态术敢省版龍选怎游罢木景宋华增華氏既堂善樂消含京职
    批呢盡料诉负码满飛达违换遇說黃辭仙带急校营防风宗氣感众投仍亲研益电强頭兩封革编師問喜否越傳干獨须
    微象苦諸晚川兄号難像宝刑徒胡费觉县谓洞伯音验竟范专状進难松族宮领随快车田假張唐哥察某村疑超读犯雪
    划拉企试克遊角录端终技餘错僧孙耳野免户征降输散退举询魏並般罚念稱核较沙臺乘医區宣药語邊育射织寺羅
    观率奉测夏略拜亡策庭溪低助判寄价拿维局优樹离黑险杀差答杂远義煙广围适姓梁車齊波離孔创响另攻峰業济
    良權聖燕歲托控恐室份樓识黄财奇恩括归属愁续战救暗殺藏际追异鬼停誰印闻严默让佛尽钱底历焉切滿隨郡危
    竹玄返断威親齐露怕她预陵农均孫孤述爾終舊懷臨曹題連装友陰升固极片唯枝虎哉细希译误末幾機银禁體宿销
    评视启协郎塞福独裁获速計鄉興變塵猶謂湖派诸卒宜简鼓丹背翻港吳池休觀昔輕娘库紅忙普延担柳雖汉泉怪跟
    逐牛陳惟縣尔種抵朱载悲刻旧童串報站典兴显迎招爱珠現幸卫谁聽永舉避統垂禮付饭幽陈亞
    """
) - frozenset("\n ")
# scripts written without spaces between words, as ranges inside a regular expression
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
KANA = "\u3041-\u3096\u30a1-\u30fa\u31f0-\u31ff\uff66-\uff9d"
HANGUL = "\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3"
UNSPACED = HAN + KANA + "\u0e01-\u0e5b\u0e81-\u0edf\u1000-\u109f\u1780-\u17d3"  # Thai ... Khmer


class Kind(IntEnum):
    """Kinds of characters; each character is of one kind."""

    OTHER = 0  # punctuation, symbols, marks, controls
    SPACE = 1
    DIGIT = 2
    UPPER = 3
    LOWER = 4  # and letters without case that are in none of the kinds below
    COMMON_HAN = 5
    RARE_HAN = 6
    UNSPACED = 7  # Kana, Thai, Lao, Burmese, Khmer
    PRIVATE = 8
    LOST = 9  # U+FFFD, lone surrogates


def kinds_of(text: str) -> numpy.ndarray:
    """The Kind of each character: u8[len(text)]."""
    codes = numpy.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return _kinds().take(codes, mode="clip")


def count_kinds(text: str) -> list[int]:
    """How many characters of each Kind, indexed by it."""
    return numpy.bincount(kinds_of(text), minlength=len(Kind)).tolist()


def common_share(text: str) -> tuple[int, float]:
    """The number of Han characters, and the share of common ones among them (1.0 of none)."""
    counts = count_kinds(text)
    num_han = counts[Kind.COMMON_HAN] + counts[Kind.RARE_HAN]
    return num_han, counts[Kind.COMMON_HAN] / num_han if num_han else 1.0


@functools.cache
def _kinds() -> numpy.ndarray:
    """Code point -> Kind, u8[0x40001]; the last entry stands for all that lies above."""
    kinds = numpy.zeros(0x40001, numpy.uint8)
    by_category = {"Nd": Kind.DIGIT, "Lu": Kind.UPPER, "Lt": Kind.UPPER, "Co": Kind.PRIVATE}
    by_category |= dict.fromkeys(("Ll", "Lm", "Lo", "Mn", "Mc"), Kind.LOWER)
    by_category |= dict.fromkeys(("Zs", "Zl", "Zp"), Kind.SPACE) | {"Cs": Kind.LOST}
    for code in range(0x1FFFF):  # what lies above is Han, tags, or private use
        kinds[code] = by_category.get(unicodedata.category(chr(code)), Kind.OTHER)
    kinds[[ord(space) for space in "\t\n\v\f\r"]] = Kind.SPACE
    for first, last, kind in (
        (0x3041, 0x30FA, Kind.UNSPACED),
        (0xFF66, 0xFF9D, Kind.UNSPACED),
        (0x0E01, 0x0E4E, Kind.UNSPACED),
        (0x0E81, 0x0ECD, Kind.UNSPACED),
        (0x1000, 0x103F, Kind.UNSPACED),
        (0x1780, 0x17D3, Kind.UNSPACED),
        (0x3400, 0x4DBF, Kind.RARE_HAN),
        (0x4E00, 0x9FFF, Kind.RARE_HAN),
        (0xF900, 0xFAFF, Kind.RARE_HAN),
        (0x20000, 0x3FFFF, Kind.RARE_HAN),
    ):
        kinds[first : last + 1] = kind
    kinds[[ord(han) for han in COMMON_HAN]] = Kind.COMMON_HAN
    kinds[0xFFFD] = Kind.LOST
    kinds[0x40000] = Kind.OTHER
    return kinds
