"""Random streams: named, independent, and without a trace on torch's own."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scforget import seeding

NAMES = st.lists(st.one_of(st.text(st.characters(exclude_characters="\x1f"), max_size=5), st.integers()), max_size=4)


def test_derive_is_the_first_63_bits_of_a_sha256() -> None:
    """The definition, so that a change of it, which would change every model, is seen here."""
    digest = hashlib.sha256(b"42\x1ftrain\x1fpbmc68k\x1f0").hexdigest()
    assert seeding.derive(42, "train", "pbmc68k", 0) == int(digest[:16], 16) // 2


@settings(deadline=None, max_examples=50)
@given(st.integers(), NAMES, st.integers(), NAMES)
def test_derive_differs_wherever_seed_or_names_do(
    seed: int, names: list[object], other: int, others: list[object]
) -> None:
    one, two = seeding.derive(seed, *names), seeding.derive(other, *others)
    assert 0 <= one < 2**63
    assert (one == two) == ((seed, [str(n) for n in names]) == (other, [str(n) for n in others]))


def test_derive_keeps_the_order_and_the_bounds_of_names() -> None:
    found = {seeding.derive(0, *names) for names in (("a", "b"), ("b", "a"), ("ab",), ("a", "b", ""), ("a",), ())}
    assert len(found) == 6


def test_generators_give_their_named_stream() -> None:
    wanted = np.random.default_rng(seeding.derive(3, "x")).integers(0, 1000, 20)
    np.testing.assert_array_equal(seeding.numpy_generator(3, "x").integers(0, 1000, 20), wanted)
    drawn = torch.rand(20, generator=seeding.torch_generator(3, "x"))
    assert torch.equal(drawn, torch.rand(20, generator=torch.Generator().manual_seed(seeding.derive(3, "x"))))
    assert not torch.equal(drawn, torch.rand(20, generator=seeding.torch_generator(3, "y")))


def test_scope_seeds_the_global_stream_by_name_and_restores_it() -> None:
    before = torch.get_rng_state()
    with seeding.scope(1, "epoch", 2) as noise:
        first, explicit = torch.rand(5), torch.rand(5, generator=noise)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    with seeding.scope(1, "epoch", 2) as noise:
        assert torch.equal(torch.rand(5), first)
        assert torch.equal(torch.rand(5, generator=noise), explicit)
    with seeding.scope(1, "epoch", 3):
        assert not torch.equal(torch.rand(5), first)
    assert not torch.equal(first, explicit)


def test_scope_restores_the_global_stream_after_an_error() -> None:
    def fail() -> None:
        with seeding.scope(1, "x"):
            torch.rand(5)
            raise KeyError

    before = torch.get_rng_state()
    with pytest.raises(KeyError):
        fail()
    assert torch.equal(torch.get_rng_state(), before)
