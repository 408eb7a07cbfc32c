"""The text that the tour finds: Python's own, or the user's, cut and shuffled without losing any of it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacore.data import found_text
from megacore.data.stamps import Stamps


def test_python_brings_half_a_megabyte_of_documentation():
    pages = list(found_text.topics())
    assert len(pages) > 50
    assert sum(map(len, pages)) > 300_000
    assert any('The "for" statement' in page for page in pages)


def test_library_files_are_in_a_fixed_order_and_without_tests():
    files = found_text.library_files()
    assert len(files) > 300
    assert files == found_text.library_files()
    assert not [file for file in files if {"test", "site-packages"} & set(file.parts)]
    depths = [len(file.parts) for file in files]
    assert depths == sorted(depths)


def test_docstrings_stand_below_what_they_document(tmp_path):
    good = tmp_path / "good.py"
    class_a = 'class A:\n    """A class."""\n    def f(self, x=1):\n        """Does.\n\n        More.\n        """\n'
    good.write_text(f'"""The module."""\n\n{class_a}')
    (tmp_path / "bad.py").write_text("def broken(:\n")
    (tmp_path / "none.py").write_text("x = 1\n")
    texts = list(found_text.docstrings([tmp_path / "bad.py", tmp_path / "none.py", good]))
    assert texts == ["The module.\n\nclass A:\n    A class.\n\ndef f(self, x=1):\n    Does.\n\n    More."]


def test_sources_stop_at_the_limit(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name * 10)
    files = [tmp_path / name for name in "abc"]
    assert list(found_text.sources(files, 25)) == ["a" * 10, "b" * 10]


def test_user_texts_of_several_kinds(tmp_path):
    (tmp_path / "a.txt").write_text("plain text", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "first 中文"}\n{"text": "second"}\n', encoding="utf-8")
    (tmp_path / "c.bin").write_bytes(b"\0\1\2")
    assert [text.strip() for text in found_text.user_texts([str(tmp_path)], 1000)] == [
        "plain text",
        "first 中文",
        "second",
    ]
    assert [text.strip() for text in found_text.user_texts([str(tmp_path)], 5)] == ["plain text"]


@given(st.text(alphabet="ab \n", max_size=300), st.integers(2, 50))
def test_pieces_lose_nothing_but_space_at_their_ends(text, size):
    cut = list(found_text.pieces(text, size))
    assert all(0 < len(piece) <= size for piece in cut if piece)
    assert "".join("".join(cut).split()) == "".join(text.split())


def test_pieces_prefer_blank_lines():
    assert list(found_text.pieces("one\ntwo\n\nthree\nfour", 12)) == ["one\ntwo", "three\nfour"]


def test_one_huge_document_becomes_many_the_same_each_time(tmp_path):
    text = "\n".join(f"line number {number}" for number in range(5000))
    for name in ("a.jsonl", "b.jsonl"):
        found_text.write_corpus([text], tmp_path / name)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    parts = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(parts) >= 200
    assert sorted("\n".join(parts).split("\n")) == sorted(text.split("\n"))


@pytest.mark.parametrize(
    ("text", "opening"),
    [
        ("\n\n  A title of more than twenty letters\nbody", "A title of more than"),
        ("这是一个没有空格的很长的中文句子，用来测试模型的开头。", "这是一个没有空格的很长的中文句子，用来测试"),
    ],
)
def test_openings_are_in_the_language_of_the_corpus(tmp_path, text, opening):
    found_text.write_corpus([text], tmp_path / "corpus.jsonl")
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": text}) + "\n")
    assert found_text.openings(path, 3, 21) == [opening]


def test_stamps_know_what_changed(tmp_path):
    result = tmp_path / "result"
    stamps = Stamps(tmp_path / "stamps.json")
    assert not stamps.current("text", [1], result)
    stamps.done("text", [1])
    assert not stamps.current("text", [1], result), "the result is missing"
    result.touch()
    again = Stamps(tmp_path / "stamps.json")
    assert again.current("text", [1], result)
    assert not again.current("text", [2], result)
    again.begin("text")
    assert not Stamps(tmp_path / "stamps.json").current("text", [1], result), "it broke off"
    assert not Stamps(tmp_path / "stamps.json", fresh=True).made


def test_a_spoilt_stamp_file_means_everything_is_made_again(tmp_path):
    (tmp_path / "stamps.json").write_text("{not json")
    assert Stamps(tmp_path / "stamps.json").made == {}
