"""Who is alive: the rules as tables, with a made-up clock."""

import random

from hypothesis import given
from hypothesis import strategies as st

from meshserve.config import MeshConfig
from meshserve.mesh.hearsay import Dial
from meshserve.mesh.membership import Actions, Change, Member, Membership, PeerState
from meshserve.mesh.mesh import is_awaited
from meshserve.wire.hello import PeerHint, PeerInfo
from meshserve.wire.structs import replace

CONFIG = MeshConfig(roles=("decode",))
TICK_S = CONFIG.tick_interval_s


def a_peer(incarnation: str, role: str = "prefill", address: str = "10.0.0.2", port: int = 7800, name: str | None = None) -> PeerInfo:
    return PeerInfo(incarnation, name or incarnation, "default", (role,) if role else (), (address,), port, "1")


class Story:
    """A membership and its clock."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.membership = Membership(a_peer("me", "decode", "10.0.0.1"), CONFIG, self.now_s, random.Random(1))
        self.told: list[tuple[Change, str]] = []

    def tell(self, changes: list[tuple[Change, Member]]) -> None:
        self.told += [(change, member.info.incarnation) for change, member in changes]

    def joins(self, info: PeerInfo, age_s: float = 1.0) -> None:
        self.tell(self.membership.hello(info, age_s, self.now_s))
        if not info.is_observer:
            self.tell(self.membership.linked(info.incarnation, (info.addresses[0], info.port), self.now_s))

    def passes(self, seconds: float) -> Actions:
        """Time, tick by tick; the actions of the last tick, with all dials."""
        actions, dials = Actions(), []
        for _ in range(round(seconds / TICK_S)):
            self.now_s += TICK_S
            actions = self.membership.tick(self.now_s)
            self.tell(actions.changes)
            dials += actions.dials
        actions.dials = dials
        return actions

    def state(self, incarnation: str) -> PeerState | None:
        member = self.membership.members.get(incarnation)
        return member.state if member else None


def test_silence_makes_a_talking_peer_suspect_and_then_dead() -> None:
    story = Story()
    story.joins(a_peer("worker"))
    story.passes(1.4)
    assert story.state("worker") is PeerState.ALIVE
    story.passes(0.3)
    assert story.state("worker") is PeerState.SUSPECT and not story.membership.members["worker"].can_take_work
    story.passes(4.8)
    assert story.state("worker") is PeerState.SUSPECT
    story.passes(0.4)
    assert story.state("worker") is None
    assert story.told == [(Change.JOINED, "worker"), (Change.CALLABLE, "worker"), (Change.SUSPECTED, "worker"), (Change.DIED, "worker")]


def test_any_sign_of_life_makes_a_suspect_alive_again() -> None:
    story = Story()
    story.joins(a_peer("worker"))
    story.passes(2.0)
    story.tell(story.membership.heard("worker", story.now_s))
    assert story.told[-1] == (Change.RECOVERED, "worker")
    assert story.membership.members["worker"].can_take_work


def test_a_peer_whose_role_does_not_talk_to_ours_may_be_silent() -> None:
    story = Story()
    story.joins(a_peer("far", "frontend"))
    actions = story.passes(20.0)
    assert story.state("far") is PeerState.ALIVE and actions.pings == []


def test_two_idle_peers_ping_each_other_in_turn_and_not_both() -> None:
    story, config = Story(), CONFIG
    other = Membership(a_peer("worker"), config, story.now_s, random.Random(2))
    story.joins(a_peer("worker"))
    other.hello(a_peer("me", "decode", "10.0.0.1"), 1.0, story.now_s)
    other.linked("me", ("10.0.0.1", 7800), story.now_s)
    sides = ((story.membership, 0.0), (other, 0.04))
    heard_s, num_pings, longest_s = story.now_s, 0, 0.0
    for tick in range(1, 201):
        for side, phase_s in sides:
            now_s = 100.0 + tick * TICK_S + phase_s
            if side.tick(now_s).pings:
                num_pings += 1
                longest_s, heard_s = max(longest_s, now_s - heard_s), now_s
                story.membership.heard("worker", now_s)
                other.heard("me", now_s)
    intervals = 200 * TICK_S / config.heartbeat_interval_s
    assert num_pings <= intervals + 2 * 200 * TICK_S / 5.0, "one for both, and one each for the round trip now and then"
    assert longest_s < config.heartbeat_interval_s + TICK_S, "and no less often than if each asked for itself"


def test_a_peer_that_does_not_answer_is_pinged_once_in_an_interval_and_a_lively_one_hardly_ever() -> None:
    story = Story()
    story.joins(a_peer("silent"))
    story.joins(a_peer("lively", address="10.0.0.3"))
    counts = {"silent": 0, "lively": 0}
    for _ in range(14):
        story.tell(story.membership.heard("lively", story.now_s))
        for incarnation in story.passes(TICK_S).pings:
            counts[incarnation] += 1
    assert counts == {"silent": 5, "lively": 1}


def test_a_late_tick_of_our_own_moves_all_deadlines() -> None:
    story = Story()
    story.joins(a_peer("worker"))
    story.now_s += 60.0  # a lid was closed
    story.passes(1.0)
    assert story.state("worker") is PeerState.ALIVE


def test_a_cut_connection_whose_redial_is_refused_is_a_death_at_once() -> None:
    story = Story()
    story.joins(a_peer("worker"))
    story.tell(story.membership.unlinked("worker", story.now_s))
    (dial,) = story.membership.due_dials(story.now_s)
    story.tell(story.membership.dial_failed(dial, True, story.now_s))
    assert story.told[-2:] == [(Change.SUSPECTED, "worker"), (Change.DIED, "worker")]
    story.membership.hint(PeerHint("worker", ("10.0.0.2",), 7800), "mdns", story.now_s)
    assert story.passes(3.0).dials == [], "hearsay about the dead is not followed"


def test_a_cut_connection_whose_redial_only_times_out_stays_suspect_and_is_looked_for_after_its_death() -> None:
    story = Story()
    story.joins(a_peer("worker"))
    story.tell(story.membership.unlinked("worker", story.now_s))
    for dial in story.membership.due_dials(story.now_s):
        story.tell(story.membership.dial_failed(dial, False, story.now_s))
    assert story.state("worker") is PeerState.SUSPECT
    story.passes(5.2)
    assert story.state("worker") is None
    story.passes(3.0)
    story.joins(a_peer("worker"))
    assert story.state("worker") is PeerState.ALIVE


def test_a_cut_peer_is_not_alive_by_words_alone_before_its_connection_is_back() -> None:
    story = Story()
    story.joins(a_peer("worker"))
    story.tell(story.membership.unlinked("worker", story.now_s))
    story.tell(story.membership.heard("worker", story.now_s))
    assert story.state("worker") is PeerState.SUSPECT
    story.tell(story.membership.linked("worker", ("10.0.0.2", 7800), story.now_s))
    assert story.state("worker") is PeerState.ALIVE


def test_a_hello_that_claims_the_place_of_a_member_ends_nobody_before_a_dial_there_is_answered() -> None:
    story = Story()
    story.joins(a_peer("old"))
    story.tell(story.membership.hello(a_peer("new"), 1.0, story.now_s))
    assert set(story.membership.members) == {"old", "new"}
    assert not any(member.can_take_work for member in story.membership.members.values()), "new work goes to neither"
    (dial,) = story.membership.due_dials(story.now_s)
    assert dial.key == "new"
    story.tell(story.membership.linked("new", ("10.0.0.2", 7800), story.now_s))
    assert set(story.membership.members) == {"new"} and story.told[-2:] == [(Change.DIED, "old"), (Change.CALLABLE, "new")]


def test_a_forged_claim_of_a_members_place_costs_the_member_nothing_once_it_has_answered() -> None:
    story = Story()
    story.joins(a_peer("victim"))
    story.tell(story.membership.hello(a_peer("forger"), 1.0, story.now_s))
    (dial,) = story.membership.due_dials(story.now_s)
    story.tell(story.membership.dial_failed(dial, False, story.now_s, {"10.0.0.2": "victim"}))
    assert story.membership.members["victim"].can_take_work


def test_a_newcomer_that_is_reached_elsewhere_puts_nobody_in_doubt() -> None:
    story = Story()
    story.joins(a_peer("old"))
    claims_both = replace(a_peer("new"), addresses=("10.0.0.7", "10.0.0.2"))
    story.tell(story.membership.hello(claims_both, 1.0, story.now_s))
    assert not story.membership.members["old"].can_take_work
    story.tell(story.membership.linked("new", ("10.0.0.7", 7800), story.now_s))
    assert all(story.membership.members[peer].can_take_work for peer in ("old", "new"))


def test_row_38_an_incarnation_that_is_gone_is_no_longer_dialled_where_another_answers() -> None:
    story = Story()
    story.joins(a_peer("old"))
    dials = story.passes(7.0).dials
    assert story.state("old") is None
    assert dials and all(dial.key == "old" for dial in dials), "a silent peer is looked for"
    story.joins(a_peer("new"))
    story.tell(story.membership.dial_failed(dials[0], False, story.now_s, {"10.0.0.2": "new"}))
    dialled = set()
    for _ in range(6000):
        story.tell(story.membership.heard("new", story.now_s))
        dialled |= {dial.key for dial in story.passes(TICK_S).dials}
    assert not dialled and story.state("new") is PeerState.ALIVE


LATE = ("hello", "hint", "dial fails", "heard", "unlinked", "time")


def comes_late(story: Story, peer: str, event: str) -> None:
    """Something of a peer that said goodbye."""
    if event == "hello":
        story.tell(story.membership.hello(a_peer(peer), 1.0, story.now_s, "10.0.0.2"))
    elif event == "hint":
        story.membership.hint(PeerHint(peer, ("10.0.0.2",), 7800), "mdns", story.now_s)
    elif event == "dial fails":
        dial = Dial(peer, ("10.0.0.2",), 7800, peer)
        story.tell(story.membership.dial_failed(dial, False, story.now_s))
    elif event == "heard":
        story.tell(story.membership.heard(peer, story.now_s))
    elif event == "unlinked":
        story.tell(story.membership.unlinked(peer, story.now_s))
    else:
        assert story.passes(2.0).dials == []


@given(st.lists(st.sampled_from(LATE), max_size=30))
def test_row_42_a_peer_that_said_goodbye_never_returns_whatever_comes_in_late(
    events: list[str],
) -> None:
    story = Story()
    story.joins(a_peer("worker"))
    story.tell(story.membership.goodbye("worker", story.now_s))
    num_told = len(story.told)
    for event in events:
        comes_late(story, "worker", event)
    assert story.state("worker") is None and len(story.told) == num_told


def test_row_42_of_a_thousand_peers_that_left_none_rises_again() -> None:
    story, rng = Story(), random.Random(42)
    leavers = [f"worker{number}" for number in range(1000)]
    for peer in leavers:
        story.joins(a_peer(peer))
        story.tell(story.membership.goodbye(peer, story.now_s))
    num_told = len(story.told)
    for peer in leavers:
        for event in rng.sample(LATE, 3):
            comes_late(story, peer, event)
    assert not story.membership.members and len(story.told) == num_told


def test_an_address_that_many_hosts_share_proves_nothing() -> None:
    story = Story()
    bridge = "172.17.0.1"
    story.joins(replace(a_peer("one"), addresses=("10.0.0.2", bridge)))
    story.joins(replace(a_peer("two"), addresses=("10.0.0.3", bridge)))
    assert set(story.membership.members) == {"one", "two"}


def test_a_goodbye_ends_a_membership_and_hearsay_does_not_bring_it_back() -> None:
    story = Story()
    story.joins(a_peer("worker"))
    story.tell(story.membership.goodbye("worker", story.now_s))
    assert story.told[-1] == (Change.LEFT, "worker")
    story.membership.hint(PeerHint("worker", ("10.0.0.2",), 7800), "mdns", story.now_s)
    assert story.membership.due_dials(story.now_s) == []


def test_of_two_peers_with_one_name_the_later_gets_a_suffix() -> None:
    story = Story()
    story.joins(a_peer("bbbb1", address="10.0.0.2", name="twin"), age_s=50.0)
    story.joins(a_peer("aaaa1", address="10.0.0.3", name="twin"), age_s=10.0)
    shown = {incarnation: member.shown_name for incarnation, member in story.membership.members.items()}
    assert shown == {"bbbb1": "twin", "aaaa1": "twin~aaaa"}


def test_observers_are_neither_dialled_nor_listed_nor_passed_on() -> None:
    story = Story()
    story.joins(replace(a_peer("watcher", ""), addresses=()))
    assert story.membership.due_dials(story.now_s) == [] and story.membership.listed() == [] and story.membership.hints() == ()


def test_a_seed_is_dialled_for_ever_with_pauses_and_left_alone_once_it_led_to_a_peer() -> None:
    story = Story()
    story.membership.hearsay.seed("10.0.0.9", 7800, story.now_s)
    num_dials = 0
    for _ in range(600):
        story.now_s += TICK_S
        for dial in story.membership.tick(story.now_s).dials:
            num_dials += 1
            story.membership.dial_failed(dial, True, story.now_s)
    assert 25 <= num_dials <= 80
    story.passes(3.0)
    story.joins(a_peer("found", address="10.0.0.8"))
    story.membership.dial_found("10.0.0.9:7800", "found", story.now_s)
    story.tell(story.membership.heard("found", story.now_s))
    assert story.passes(1.0).dials == []


def test_hints_are_dialled_few_at_a_time_and_fruitless_ones_forgotten() -> None:
    story = Story()
    for number in range(CONFIG.max_hints + 50):
        forged = PeerHint(f"forged{number}", (f"10.9.{number // 250}.{number % 250}",), 7800)
        story.membership.hint(forged, f"source{number % 7}", story.now_s)
    under_way = story.membership.due_dials(story.now_s)
    assert 0 < len(under_way) <= 64 and story.membership.due_dials(story.now_s) == []
    num_dials = len(under_way)
    for _ in range(600):
        story.now_s += TICK_S
        for dial in under_way:
            story.tell(story.membership.dial_failed(dial, False, story.now_s))
        under_way = story.membership.tick(story.now_s).dials
        num_dials += len(under_way)
        assert len(under_way) <= 64
    assert num_dials <= 100 * 61
    story.now_s += CONFIG.forget_hint_s
    for _ in range(300):
        for dial in under_way:
            story.tell(story.membership.dial_failed(dial, False, story.now_s))
        story.now_s += TICK_S
        under_way = story.membership.tick(story.now_s).dials
    assert under_way == [], "all are forgotten"


def test_one_source_and_one_address_get_no_more_than_their_share_of_dials() -> None:
    story = Story()
    for number in range(200):
        story.membership.hint(PeerHint(f"one-place{number}", ("10.9.9.9",), 7800), "flood", story.now_s)
        story.membership.hint(PeerHint(f"many-places{number}", (f"10.8.0.{number}",), 7800), "flood", story.now_s)
    story.membership.hint(PeerHint("honest", ("10.0.0.7",), 7800), "mdns", story.now_s)
    story.membership.hearsay.seed("10.0.0.8", 7800, story.now_s)
    dials = story.membership.due_dials(story.now_s)
    assert {"honest", "10.0.0.8:7800"} <= {dial.key for dial in dials}
    assert sum(dial.addresses == ("10.9.9.9",) for dial in dials) <= 2 and len(dials) <= 34


def test_a_name_that_would_steer_a_terminal_is_shown_without() -> None:
    story = Story()
    story.joins(a_peer("worker", name="a \x1b[2J\u202eb"))
    assert story.membership.members["worker"].shown_name == "a_?[2J?b"


def test_an_honest_hint_behind_a_flood_of_others_is_dialled_once_these_have_had_their_turn() -> None:
    story = Story()
    for number in range(200):
        story.membership.hint(PeerHint(f"forged{number}", (f"10.9.0.{number}",), 7800), "mdns", story.now_s)
    story.membership.hint(PeerHint("honest", ("10.0.0.7",), 7800), "mdns", story.now_s)
    under_way = story.membership.due_dials(story.now_s)
    for _ in range(100):  # ten seconds, in which each dial of a forged address takes one
        if any(dial.key == "honest" for dial in under_way):
            return
        failed, under_way = under_way, []
        for _ in range(10):
            story.now_s += TICK_S
            under_way += story.membership.tick(story.now_s).dials
        for dial in failed:
            story.tell(story.membership.dial_failed(dial, False, story.now_s))
    raise AssertionError("it is never dialled")


def test_a_member_that_fell_silent_is_looked_out_for_however_often_others_tell_of_it() -> None:
    story = Story()
    story.joins(a_peer("sleeper"))
    under_way = story.passes(7.0).dials
    assert story.state("sleeper") is None
    story.membership.hint(PeerHint("sleeper", ("10.0.0.2",), 7800), "mdns", story.now_s)
    num_dials = 0
    for _ in range(300):
        story.now_s += 10 * TICK_S
        for dial in under_way:
            story.tell(story.membership.dial_failed(dial, False, story.now_s))
        under_way = story.membership.tick(story.now_s).dials
        num_dials += len(under_way)
    assert num_dials > 100, "for an hour, and not for a minute"


def test_requests_wait_for_a_peer_that_fell_silent_for_as_long_as_for_one_that_may_come_back() -> None:
    info = replace(a_peer("w", "decode"), is_draining=False)
    alive, silent = Member(info, True, 0.0, 0.0), Member(info, True, 0.0, 0.0, PeerState.SUSPECT, suspect_since_s=10.0)
    doubted = Member(info, True, 0.0, 0.0, doubted_for="another")
    leaving = Member(replace(info, is_draining=True), True, 0.0, 0.0, PeerState.SUSPECT, suspect_since_s=10.0)
    withdrawn = Member(replace(info, withdrawn=("decode",)), True, 0.0, 0.0, PeerState.SUSPECT, suspect_since_s=10.0)
    for member, role, now_s, expected in (
        (silent, "decode", 10.0, True),
        (silent, "decode", 11.4, True),
        (silent, "decode", 11.6, False),
        (silent, "prefill", 10.0, False),
        (doubted, "decode", 10.0, True),
        (alive, "decode", 10.0, False),  # it is not waited for: it is there
        (leaving, "decode", 10.0, False),
        (withdrawn, "decode", 10.0, False),
    ):
        assert is_awaited(member, role, now_s, 1.5) is expected
