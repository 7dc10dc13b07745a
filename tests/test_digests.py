"""The same bits on every machine and from every compiler: those of data/digests.txt.

Where this fails and test_bits.py does not, either a change of bits is meant (`python tests/bits.py renew`,
and a line in CHANGELOG.md) or a compiler does what it may not. If inputs differ too, it is not the kernel.
"""

import bits
import numpy as np
import pytest
from helpers import LEVELS, name_of

STORED = {level: bits.stored(level) for level in LEVELS}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", bits.CASES, ids=name_of)
def test_the_bits_are_those_of_every_machine(level, case):
    found = bits.digests(level, *case)
    assert found == {name: STORED[level].get(name) for name in found}


def test_nothing_else_is_stored():
    calls = {
        f"{dtype} {layout} {'x'.join(map(str, shape))} {name}"
        for shape, num_groups, dtype, layout in bits.CASES
        for name in ["inputs", *bits.calls(shape, num_groups, dtype, layout)]
    }
    assert calls == set(STORED[LEVELS[0]])


def test_the_inputs_are_made_of_integers():
    words = [0xA30FEBCFD9C2825F, 0x4510BDF882D9D721, 0x0A7D3DA94ECDE8B8]
    assert np.random.PCG64(0).random_raw(3).tolist() == words
    uniform = bits.Numbers(np.random.PCG64(0)).random((3,))
    assert (uniform * 2.0**53).astype(np.uint64).tolist() == [word >> 11 for word in words]
