"""A few thousand strings to tokenize: languages, emoji, code, white space, digits, odd characters."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence
from functools import cache

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure they'll say it's fine; we've seen it, don't you think? SHE'D GO, I'LL WAIT.",
    "Der Fußballübungsleiter größter Güte isst Äpfel – „natürlich“!",
    "Où est passé l'été à Fontainebleau ? « Là-bas », dit-il.",
    "El niño comió jalapeños; ¿qué pasó? ¡Ándale!",
    "Zażółć gęślą jaźń, příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "数字人民币试点范围再次扩大，覆盖一百二十三个城市。",
    "いろはにほへと ちりぬるを、カタカナとｶﾅと漢字を混ぜる。",
    "다람쥐 헌 쳇바퀴에 타고파. 한국어 텍스트입니다!",
    "مرحبا بالعالم، كيف حالك اليوم؟ ١٢٣٤",
    "שלום עולם, מה שלומך היום?",
    "नमस्ते दुनिया, आप कैसे हैं? १२३ क्षत्रिय",
    "সুপ্রভাত বিশ্ব, ৪৫৬।",
    "สวัสดีชาวโลก วันนี้อากาศดี ๑๒๓",
    "Xin chào thế giới, tiếng Việt có nhiều dấu.",
    "İstanbul'da ılık bir gün; ğüşiöç.",
    "ꦲꦏ꧀ꦱꦫꦗꦮ ᚠᚢᚦᚨᚱᚲ 𐍈 𓀀𓂀",
    "naïve façade coöperate Ångström ﬁﬂ ﬀ Ⅷ ½ ² ³ ㎏",
)
EMOJI = ("😀", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷", "❤️", "☃", "1️⃣", "🤷🏿‍♀️", "🫠🪿")
CODE = (
    "def f(x: int) -> int:\n    return x**2 + 3  # ok\n",
    "for (int i = 0; i < n; ++i) {\n\ta[i] = b[i] / 2;\n}\r\n",
    "SELECT * FROM t WHERE a>=10 AND b<>'x' -- comment\n",
    '{"key": [1, 2.50, -3e-7], "nested": {"a": null}}',
    '<div class="x">&nbsp;</div>\n\n\n',
    "https://example.org/a/b?c=d&e=%20#frag",
    "git commit -m 'fix: don''t crash' && echo $HOME | tr a-z A-Z",
    "camelCaseWordsHTTPServer snake_case SCREAMING_SNAKE kebab-case",
    "x≠y ∀ε>0 ∃δ: |f(x)−L|<ε ∑∫√∞ → ⇒",
    "\\frac{a}{b}\\,\\mathrm{d}x % 100",
)
SPACES = (
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\r\n",
    "\n\n",
    " \n ",
    "\t\t ",
    "\u00a0",
    "\u3000",
    "\u2003",
    "\x0b",
    "\x0c",
    "\u200b",
    "\u2028",
)
DIGITS = (
    "0",
    "7",
    "42",
    "123",
    "1234",
    "12345",
    "3.14159",
    "1,000,000",
    "２０２４",
    "٣٤٥",
    "²³",
    "½",
    "Ⅻ",
    "𝟙𝟚",
)
ODD = (
    "\x00",
    "\x1b[0m",
    "\ufeff",
    "\u0301",
    "e\u0301\u0323",
    "\ufffd",
    "\ue000",
    "\U0010ffff",
    "\u202e",
    "ｆｕｌｌ",
    "Ａ",
    "'",
    "''",
    "’s",
    "▁",
    "▁▁",
    "Ġ",
    "<0x0A>",
    "_",
    "...",
    "…",
    "！",
    "、",
)


@cache
def texts(special: tuple[str, ...] = (), count: int = 2500) -> Sequence[str]:
    """Strings from a fixed seed: each sample alone, with spaces around, decomposed, and random mixtures."""
    rng = random.Random(5)
    samples = [*SENTENCES, *EMOJI, *CODE, *SPACES, *DIGITS, *ODD, *special]
    found = ["", *samples, *(f" {sample}" for sample in samples), *(f"{sample}\n" for sample in samples)]
    found += [unicodedata.normalize(form, sample) for sample in SENTENCES for form in ("NFD", "NFKC")]
    found += [chr(code) for code in range(0x20)]
    pools = [SENTENCES, EMOJI, CODE, SPACES, DIGITS, ODD] + [special] * bool(special)
    while len(found) < count:
        pieces = []
        for _ in range(rng.randint(2, 8)):
            sample = rng.choice(rng.choice(pools))
            if len(sample) > 12 and rng.random() < 0.8:
                start = rng.randrange(len(sample))
                sample = sample[start : start + rng.randint(1, 12)]
            pieces.append(sample)
        if rng.random() < 0.2:
            pieces.append("".join(map(random_character, [rng] * rng.randint(1, 6))))
        rng.shuffle(pieces)
        found.append("".join(pieces))
    return found


def random_character(rng: random.Random) -> str:
    """Any code point but a surrogate; half of them below U+3000."""
    code = rng.randrange(0x3000 if rng.random() < 0.5 else 0x110000)
    return chr(code) if not 0xD800 <= code < 0xE000 else " "
