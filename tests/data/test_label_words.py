"""Label words: by order, by name, as JSON, as templates; and what is refused."""

import pytest

from zofed.base.errors import UserError
from zofed.data.label_words import label_words

CLASSES = ("negative", "positive")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (" terrible, great", (" terrible", " great")),
        ("positive= great, negative= terrible", (" terrible", " great")),
        ('["yes, please", "no"]', ("yes, please", "no")),
        ('{"positive": "a=b", "negative": "no"}', ("no", "a=b")),
        ("{{ a }},{{ b | replace('x', 'y,z') }}", ("{{ a }}", "{{ b | replace('x', 'y,z') }}")),
        ("{{ a if a == 'x' else b }},b", ("{{ a if a == 'x' else b }}", "b")),
    ],
)
def test_each_class_gets_its_word(setting: str, words: tuple[str, ...]) -> None:
    assert label_words(setting).of(CLASSES) == words


def test_numbers_are_names_too_and_nothing_is_no_word() -> None:
    assert label_words("1= great,0= terrible").of(("0", "1")) == (" terrible", " great")
    assert label_words("").texts == ()
    assert label_words(" {{ candidate }}").are_templates and not label_words(" a, b").are_templates


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (" great", "give a word for each class"),
        (" a,, b", "give a word for each class"),
        (",a", "give a word for each class"),
        ("a,b,", "give a word for each class"),
        (" a, b, a", "has one word twice"),
        ("a= x, b", "some words with the name of a class and some without"),
        ("a= x,a= y", "names a class twice"),
        ('{"a": "x", "a": "y"}', "names a class twice"),
        ('["a", 1]', "holds strings alone"),
        ('["a", "b"', "begins like JSON but is none"),
    ],
)
def test_what_says_no_words_is_refused(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        label_words(setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (" a, b, c", "are 3 words .*, but there are 2 classes"),
        ("good= a, bad= b", "name 'good', which is none of the classes negative, positive"),
    ],
)
def test_words_that_do_not_fit_the_classes_are_refused(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        label_words(setting).of(CLASSES)
