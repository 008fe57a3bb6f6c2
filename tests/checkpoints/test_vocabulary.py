"""Vocabularies: read from tokenizers of either form, united by token, refused where they contradict each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lors import LorsError
from lors.checkpoints.vocabulary import BASE, FRESH, OWN, Run, Vocabulary, token_tables, unite
from lors.experts.aligned import Aligned, FreshRows
from lors.experts.source import MemorySource, Slot


def words(name: str, tokens: str, rows: int | None = None, **ids: int) -> Vocabulary:
    """One token per letter, from id 0 on."""
    found = {token: place for place, token in enumerate(tokens)} | ids
    return Vocabulary(name, found, len(found) if rows is None else rows)


def test_new_tokens_follow_expert_by_expert() -> None:
    united = unite(words("base", "abc"), [words("x", "abczy"), words("y", "abcyw")])
    assert united.rows == 6 and united.new == {"z": 3, "y": 4, "w": 5}
    assert united.holders == [[(0, 3)], [(0, 4), (1, 3)], [(1, 4)]]
    assert united.runs == [[Run(0, 3, OWN, 0), Run(3, 3, FRESH, 0)]] * 3


def test_rows_go_by_token_and_not_by_id() -> None:
    united = unite(words("base", "abcd"), [words("x", "badc"), words("y", "ad")])
    assert united.runs[1] == [Run(0, 1, OWN, 1), Run(1, 1, OWN, 0), Run(2, 1, OWN, 3), Run(3, 1, OWN, 2)]
    assert united.runs[2] == [Run(0, 1, OWN, 0), Run(1, 2, BASE, 1), Run(3, 1, OWN, 1)]


def test_new_tokens_take_padding_before_the_table_grows() -> None:
    base, x = words("base", "ab", rows=4), words("x", "abz", rows=4)
    united = unite(base, [x])
    assert united.rows == 4 and united.new == {"z": 2}
    assert united.runs[0] == [Run(0, 2, OWN, 0), Run(2, 1, FRESH, 0), Run(3, 1, OWN, 3)]
    grown = unite(base, [words("x", "abzyw")])
    assert grown.rows == 5 and list(grown.new.values()) == [2, 3, 4]


def state(rows: int, width: int, seed: int) -> dict[str, Any]:
    return {
        "model.embed_tokens.weight": np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32),
        "other": np.full(3, seed, np.float32),
    }


@pytest.mark.parametrize("part", [1, 3, 7, 1000])
def test_aligned_rows(part: int) -> None:
    """Read a part at a time that ends anywhere in a row."""
    base, x, y = words("base", "abcd"), words("x", "badczy"), words("y", "bzaw")
    united = unite(base, [x, y])
    states = [state(4, 5, 0), state(6, 5, 1), state(4, 5, 2)]
    sources = [MemorySource(name, s) for name, s in zip(("base", "x", "y"), states, strict=True)]
    table = "model.embed_tokens.weight"
    fresh = FreshRows(sources[1:], list(united.new), united.holders, lambda name: [3.0, 1.0])
    aligned = [Aligned(s, sources[0], frozenset([table]), r, fresh) for s, r in zip(sources, united.runs, strict=True)]
    w, (ex, ey) = states[0][table], (states[1][table], states[2][table])
    new = np.stack([(3 * ex[4].astype(np.float64) + ey[1]) / 4, ex[5], ey[3]]).astype(np.float32)  # z, y, w
    wanted = [
        np.concatenate([w, new]),
        np.concatenate([ex[[1, 0, 3, 2]], new]),
        np.concatenate([ey[[2, 0]], w[[2, 3]], new]),
    ]
    for source, want in zip(aligned, wanted, strict=True):
        assert source.tensors[table].shape == want.shape == (7, 5)
        slot = Slot()
        parts = [source.fetch(table, at, min(at + part, want.size), slot).copy() for at in range(0, want.size, part)]
        assert np.concatenate(parts).tobytes() == want.tobytes()
        assert source.fetch("other", 0, 3, slot).tolist() == [source.fetch("other", 0, 1, slot)[0]] * 3


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([0.0, 1.0], "token 'z': expected positive weights of the experts that have it (x), got [0.0]"),
        ([-1.0, 2.0], "[-1.0]"),
    ],
)
def test_weights_that_have_no_mean(weights: list[float], said: str) -> None:
    united = unite(words("base", "ab"), [words("x", "abz"), words("y", "ab")])
    sources = [MemorySource(name, state(3, 2, 0)) for name in ("x", "y")]
    fresh = FreshRows(sources, list(united.new), united.holders, lambda name: weights)
    with pytest.raises(LorsError) as caught:
        fresh.require_weights("model.embed_tokens.weight")
    assert said in str(caught.value)


def test_new_rows_that_are_not_finite_are_whose_they_are() -> None:
    united = unite(words("base", "ab"), [words("x", "abz")])
    broken = state(3, 2, 0)
    broken["model.embed_tokens.weight"][2, 1] = np.nan
    fresh = FreshRows([MemorySource("x", broken)], list(united.new), united.holders, lambda name: [1.0])
    with pytest.raises(
        LorsError, match=r"x: tensor 'model.embed_tokens.weight': expected finite values in the row of 'z'"
    ):
        fresh.of("model.embed_tokens.weight")


def test_tables_are_found_by_name_and_rows() -> None:
    shapes = {
        "model.decoder.embed_tokens.weight": (9, 4),
        "model.decoder.embed_positions.weight": (9, 4),
        "fc.weight": (9, 4),
    }
    assert token_tables("m", shapes, {"vocab_size": 9}) == {"model.decoder.embed_tokens.weight"}
    both = {"shared.weight": (9, 4), "lm_head.weight": (9, 4), "lm_head.bias": (9,), "t2u.lm_head.weight": (5, 4)}
    assert token_tables("m", both, None) == {"shared.weight", "lm_head.weight", "lm_head.bias"}
    assert token_tables("m", both, {"text_config": {"vocab_size": 5}}) == {"t2u.lm_head.weight"}
    for config, said in (
        ({"vocab_size": 8}, "m: expected a token embedding of 8 rows, as config.json says, got 'shared.weight' with 9"),
        ({"vocab_size": "9"}, "m: config.json: vocab_size: expected an integer, got '9'"),
        ({}, "m: config.json: vocab_size: expected an integer, got nothing"),
    ):
        with pytest.raises(LorsError) as caught:
            token_tables("m", {"shared.weight": (9, 4)}, config)
        assert str(caught.value) == said


def test_attributes_of_a_new_token_must_agree() -> None:
    def with_z(name: str, special: bool) -> Vocabulary:
        return Vocabulary(name, {"a": 0, "z": 1}, 2, {"z": {"content": "z", "id": 1, "special": special}})

    base = words("base", "a")
    assert unite(base, [with_z("x", True), with_z("y", True)]).new == {"z": 1}
    with pytest.raises(LorsError, match=r"y: token 'z': expected special true as in x, got false"):
        unite(base, [with_z("x", True), with_z("y", False)])


def test_a_tokenizer_that_was_trained_anew_is_refused() -> None:
    def trained(name: str, vocab: dict[str, int], merges: list[str]) -> Vocabulary:
        return Vocabulary(name, vocab, len(vocab), {}, vocab, merges)

    base = trained("base", {"a": 0, "b": 1, "ab": 2}, ["a b"])
    for expert, said in (
        (trained("x", {"a": 1, "b": 0, "ab": 2}, ["a b"]), "expected id"),
        (trained("x", {"a": 0, "b": 1, "ab": 2, "ba": 3}, ["a b", "b a"]), "token 'ba': expected id nothing, got 3"),
        (trained("x", {"a": 0, "b": 1, "ab": 2}, ["b a"]), "expected the 1 merges of base, got 1 others"),
    ):
        with pytest.raises(LorsError) as caught:
            unite(base, [expert])
        assert said in str(caught.value) and "x: another tokenizer" in str(caught.value)
