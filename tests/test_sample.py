"""Sampling: names of files, what a pipeline accepts, and what a stop leaves."""

import unicodedata

from hypothesis import example, given, settings
from hypothesis import strategies as st

import sample

# letters whose cases, spellings or marks meet, other scripts, and what is no letter
LETTERS = "aA1 -!./\\:*\n\0\ud800ıIİiſsSßẞǅéÉe\u0301ﬁfΣσςα한ᄒ各紅नमस्ते😀²Ⅷ"  # noqa: RUF001
PROMPTS = st.one_of(
    *(st.text(letters, max_size=3) for letters in ("ıIİi", "ſsßẞ", "éÉe\u0301", "ΣσςA! ")),  # noqa: RUF001
    st.text(LETTERS),
    st.text(),
    st.text(max_size=3).map(lambda text: text * 70),
)


def same_file(name: str) -> set[str]:
    """What file systems that fold case or spelling make of a name."""
    cases = [name, name.lower(), name.upper(), name.casefold(), name.lower().upper()]
    return {unicodedata.normalize(form, case) for case in cases for form in ("NFC", "NFD")}


@example(["一只长颈鹿", "红色的狗"])
@example(["a red dog", "A red dog!", "a red dog 2", "a-red-dog-2"])
@example(["x" * 60 + "a", "x" * 60 + "b", "😀", "!"])
@settings(max_examples=300)
@given(st.lists(PROMPTS, min_size=2, max_size=8, unique=True))
def test_prompts_of_one_call_have_names_of_their_own(prompts):
    rows = [(prompt, seed) for prompt in prompts for seed in (0, 10, 2**62)]
    names = sample.file_names(rows)
    forms = [form for name in names for form in same_file(name)]
    assert len(set(forms)) == len(forms)
    for name in names:
        assert len(f".{name}.12345678.tmp".encode()) <= 255  # as `replacing` writes it
        assert not set(name) & set('<>:"/\\|?*\0') and name.isprintable()


def test_a_name_is_the_prompts_letters():
    rows = [("A giraffe, flat!", 0), ("一只长颈鹿", 3), ("Żółw śpi", 0), ("नमस्ते", 1), ("?!", 2)]
    names = ["a-giraffe-flat-0", "一只长颈鹿-3", "żółw-śpi-0", "नमस्ते-1", "prompt-2"]
    assert sample.file_names(rows) == [f"{name}.png" for name in names]
    assert sample.file_names([("a dog", 1), ("a dog", 1)]) == ["a-dog-1.png"] * 2  # one image
    assert sample.file_names([("x" * 99, 0)]) == ["x" * 60 + "-0.png"]
