"""The benchmark of tokenization."""

from __future__ import annotations

from benchmarks import tokenization as benchmark


def test_texts_of_the_benchmark_are_the_same_every_time_and_know_their_copy(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(" ".join(f"{name}{n}" for n in range(100)))
    case = benchmark.Case(characters=3000, document=50)
    texts = list(benchmark.documents(case, str(tmp_path)))
    assert texts == list(benchmark.documents(case, str(tmp_path))) and len(texts) == 60
    copies = [int(text.split()[0]) for text in texts]
    assert copies == sorted(copies) and copies[-1] > 1 and len(set(texts)) == 60
    first = [word for text, copy in zip(texts, copies, strict=True) if copy == 0 for word in text.split()[1:]]
    assert first == [f"{name}{n}" for name in "ab" for n in range(100)], "cut at spaces, nothing lost"
    (whole,) = benchmark.documents(benchmark.Case(3000, 3000), str(tmp_path))
    assert 3000 <= len(whole) < 3000 + 4100
