"""What is written is read back the same, by a YAML reader."""

import random
import string
import sys

import pytest

from launch import yaml_text

yaml = pytest.importorskip("yaml")

STRINGS = [
    "",
    " ",
    "a",
    "y",
    "No",
    "on",
    "TRUE",
    "null",
    "~",
    "Nan",
    ".inf",
    "-",
    "--flag=value",
    "- a",
    "a: b",
    "a:",
    "a #b",
    "#",
    "1",
    "01",
    "1e3",
    "0x1f",
    "1_000",
    "1:30",
    "2026-11-25",
    "1.5",
    "+1",
    "=",
    "<<",
    "!tag",
    "&anchor",
    "*alias",
    "{a: b}",
    "[a]",
    "a, b",
    "'",
    '"',
    "\\",
    "\\n",
    "line\nline\n",
    "\ttab",
    "\r",
    "\x00\x07\x1b\x7f\x85\xa0\xad",
    "\u2028\u2029\ufeff\u200b",
    "é ü ß 漢字 🙂",
    "$(NAME) $$ `id`",
    "%",
    "@",
    "`",
    "|",
    ">",
    "?",
    "? a",
    "---",
    "...",
    "/dev/shm",
    "nvidia.com/gpu",
]


@pytest.mark.parametrize("text", STRINGS)
def test_a_string_stays_the_same_string(text):
    document = {"a": text, "b": [text, {"c": text}], "d": {"e": [text]}}
    written = yaml_text.dump([document])
    assert yaml.safe_load(written) == document
    assert all(line.isprintable() for line in written.splitlines())


def test_random_strings_as_values_and_as_keys():
    generator = random.Random(0)
    characters = string.printable + "\x00\x85\u2028é🙂"
    for _ in range(500):
        length = generator.randrange(12)
        text = "".join(generator.choices(characters, k=length))
        document = {text: text, "a": [text]}
        assert yaml.safe_load(yaml_text.dump([document])) == document


def test_every_shape():
    document = {
        "number": 3,
        "float": 1.5,
        "yes": True,
        "no": False,
        "empty": [{}, [], {"a": {}, "b": []}],
        "nested": {"a": {"b": {"c": [1, 2]}}},
        "mappings": [{"a": 1, "b": {"c": 2}}, {"d": [{"e": 1}, {"f": 2}]}],
    }
    written = yaml_text.dump([document, {"a": 1}])
    assert list(yaml.safe_load_all(written)) == [document, {"a": 1}]


def test_it_reads_well():
    document = {"kind": "Job", "spec": {"args": ["--a=1", "b"], "number": 1}}
    assert yaml_text.dump([document]) == (
        'kind: Job\nspec:\n  args:\n  - "--a=1"\n  - b\n  number: 1\n'
    )


def test_what_it_cannot_write_is_an_error():
    for value in (None, object()):
        with pytest.raises(TypeError, match="is not written here"):
            yaml_text.dump([{"a": value}])
    with pytest.raises(TypeError, match="list is not written here"):
        yaml_text.dump([{"a": [[1]]}])


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
