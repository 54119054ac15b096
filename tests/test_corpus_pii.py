"""Personal data is masked by kind; numbers of other kinds stay."""

import pytest

from data.corpus.pii import MaskPII
from data.corpus.steps import Document, Verdict


def mask(text: str, **options: object) -> Verdict:
    return MaskPII(**options)(Document("a#0", text, {}))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("text", "masked", "kind"),
    [
        ("Mail jane.doe+x@mail.example.co.uk.", "Mail <EMAIL>.", "email"),
        ("邮箱zhang_san@example.com。", "邮箱<EMAIL>。", "email"),
        ("Call +1 (415) 555-0144 now", "Call <PHONE> now", "phone"),
        ("415-555-0144", "<PHONE>", "phone"),
        ("+46 (0)8 928 571 38", "<PHONE>", "phone"),
        ("手机13912345678，", "手机<PHONE>，", "phone"),
        ("+86 139-1234-5678", "<PHONE>", "phone"),
        ("电话：010-62345678", "电话：<PHONE>", "phone"),
        ("Phone:\n467 3395\n", "Phone:\n<PHONE>\n", "phone"),
        ("from 203.0.113.7 at", "from <IP> at", "ip"),
        ("2001:4860:4860::8888", "<IP>", "ip"),
        ("身份证11010519491231002X。", "身份证<ID>。", "chinese_id"),
        ("卡号4111 1111 1111 1111", "卡号<CARD>", "card"),
        ("378282246310005", "<CARD>", "card"),
        ("IBAN DE89 3704 0044 0532 0130 00 please", "IBAN <IBAN> please", "iban"),
        ("GB29NWBK60161331926819", "<IBAN>", "iban"),
        ("SSN 460-89-9847.", "SSN <SSN>.", "us_ssn"),
    ],
)
def test_each_kind_is_masked_and_counted(text: str, masked: str, kind: str) -> None:
    assert mask(text) == Verdict(masked, changes={kind: 1})
    assert mask(masked) == Verdict(masked)


@pytest.mark.parametrize(
    "text",
    [
        "2021-03-15, 15.03.2021, 1914-1918, from 1939 to 1945",
        "v1.2.3.4, version 8.0.11.35, 版本 5.7.44.120, 2.4.7.11 章",
        "127.0.0.1, 10.0.0.12, 192.168.1.1, 999.1.1.1",
        "$1,234,567.89 and 3.14159265358979",
        "第五百零一条，(2013)民一终字第123号",
        "ISBN 978-3-16-148410-0",
        "4111 1111 1111 1112 fails the checksum",
        "110105194912310021 and 110105194913310025 are no identity numbers",
        "DE89 3704 0044 0532 0130 01",
        "000-12-3456, 123-00-4567",
        "TSO 421758868510212097",
        "12:34:56, 2001::, a:b:c",
        "user@localhost, @handle, a@b",
        "call 911; tel 2010-2015",
        "0x13912345678ab and 1391234567890",
    ],
)
def test_other_numbers_stay(text: str) -> None:
    assert mask(text) == Verdict(text)


def test_placeholders_and_kinds_are_free() -> None:
    text = "a@example.com 415-555-0144"
    assert mask(text, placeholders={"email": "[mail]"}).text == "[mail] <PHONE>"
    assert mask(text, kinds=["phone"]).text == "a@example.com <PHONE>"
    assert mask(text, placeholders={"email": "", "phone": ""}).text == " "
    with pytest.raises(ValueError, match="'fax'"):
        MaskPII(kinds=["fax"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="could be found again"):
        MaskPII(placeholders={"email": "me@example.com"})


def test_many_finds_are_all_masked() -> None:
    verdict = mask("a.b@example.com 415-555-0144\n" * 500)
    assert verdict.text == "<EMAIL> <PHONE>\n" * 500
    assert verdict.changes == {"email": 500, "phone": 500}
