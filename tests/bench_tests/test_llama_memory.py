"""What a process's resident memory is made of, read from `smaps`; and which part of it counts as a decode peer's."""

import os
from collections import Counter

import pytest

from bench.llama.resident import Mapping, Resident, mappings, resident_of, sum_up

SMAPS = """\
55fc1f60e000-55fc1f60f000 r--p 00000000 fe:00 26723                      /models/tiny model.gguf
Size:                 64 kB
Rss:                  48 kB
Anonymous:             0 kB
THPeligible:           0
VmFlags: rd mr mw me
7f0000000000-7f0000010000 rw-p 00000000 fe:00 26724                      /lib/some.so
Size:                 64 kB
Rss:                  20 kB
Anonymous:             8 kB
VmFlags: rd wr mr mw me ac
7f0000100000-7f0000200000 rw-p 00000000 00:00 0
Size:               1024 kB
Rss:                 100 kB
Anonymous:           100 kB
VmFlags: rd wr mr mw me ac
"""


def test_each_mapping_has_its_file_and_its_resident_and_anonymous_bytes() -> None:
    assert list(mappings(SMAPS)) == [
        Mapping("/models/tiny model.gguf", 48 * 1024, 0),
        Mapping("/lib/some.so", 20 * 1024, 8 * 1024),
        Mapping("", 100 * 1024, 100 * 1024),
    ]


def test_changed_pages_of_a_file_count_as_anonymous() -> None:
    found = sum_up(mappings(SMAPS))
    assert (found.total, found.anonymous) == (168 * 1024, 108 * 1024)
    assert found.by_file == {"/models/tiny model.gguf": 48 * 1024, "/lib/some.so": 12 * 1024}


def test_what_is_no_smaps_is_refused() -> None:
    with pytest.raises(ValueError, match="not a line of smaps"):
        list(mappings("some other text"))


def test_the_parts_of_a_running_process_add_up() -> None:
    found = resident_of(os.getpid())
    assert found.total == found.anonymous + sum(found.by_file.values())
    assert 1_000_000 < found.anonymous < found.total


def test_every_byte_is_either_the_peers_or_one_of_those_that_do_not_count() -> None:
    pytest.importorskip("numpy")
    from bench.llama.context_alone import Stages
    from bench.llama.memory import figures

    by_file = Counter({"/models/tiny model.gguf": 100_000_000, "/lib/xllamacpp.so": 9_000_000, "/lib/some.so": 20_000_000})
    peer = Resident(329_000_000, 200_000_000, by_file)
    alone = Stages(2_000_000, 24_000_000, 110_000_000, 15_000_000, {"KV": 100_000_000, "compute": 16_000_000, "output": 12_000_000})
    found = figures(peer, alone, "tiny model.gguf")
    assert found["peer_mb"] == 104.0
    assert sum(found["parts_mb"].values()) == pytest.approx(104.0)
    assert sum(found["less_mb"].values()) == pytest.approx(329.0 - 104.0)
    assert found["less_mb"]["context_bookkeeping"] == 10.0
