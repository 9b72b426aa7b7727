"""What sides a network can take, and what they are padded to."""

from itertools import product

import pytest

from lamp3d.errors import ConfigError
from lamp3d.sides import check_sides, largest_padded, padded_sides


@pytest.mark.parametrize("sides", list(product((1, 16, 17, 40), repeat=3)))
def test_scans_are_padded_to_the_least_that_a_network_can_take(sides: tuple[int, int, int]) -> None:
    padded = padded_sides(sides, 16)
    check_sides("a volume", padded, 16)
    assert all(side <= to for side, to in zip(sides, padded, strict=True))
    if max(sides) <= 16:
        assert padded == (32, 16, 16), "instance norm has nothing to normalise in a single voxel"
    else:
        assert all(to - side < 16 for side, to in zip(sides, padded, strict=True))


def test_the_largest_volume_is_that_after_padding() -> None:
    assert largest_padded([(112, 96, 96), (97, 97, 97)], 16) == (112, 112, 112)


@pytest.mark.parametrize(
    ("sides", "fitting"),
    [
        ((20, 64, 64), "take 16x64x64 or 32x64x64"),
        ((30, 30, 30), r"take 32x16x16 or 32x32x32\."),  # of 16³ instance norm has nothing to normalise
        ((8, 16, 16), r"take 32x16x16\."),
        ((0, 16, 16), r"take 32x16x16\."),
    ],
)
def test_other_sides_are_refused_with_what_would_do(sides: tuple[int, int, int], fitting: str) -> None:
    with pytest.raises(ConfigError, match=f"a patch of {'x'.join(map(str, sides))}: .* multiple of 16, .*{fitting}"):
        check_sides("a patch", sides, 16)
