"""The words that the dummy model speaks, by the part they play in a sentence."""


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


STARTS = _split("The A This That One Every Our Another Some Each My No Your Their Any Its")
DETERMINERS = _split("the a this that one every our another some each my no your their any its")
ADJECTIVES = _split(
    "quiet small bright round green silver distant gentle broad careful hidden warm pale narrow patient clear "
    "heavy simple golden curious silent northern wooden steady rapid local shared modest bold spare humble plain"
)
NOUNS = _split(
    "river garden window letter mountain kitchen harbor bridge forest lantern market teacher motor village "
    "valley library station meadow sailor captain signal barn mirror painter shelter promise message road "
    "neighbor compass morning stone"
)
VERBS = _split(
    "carries follows remembers crosses finds opens watches keeps leaves meets answers gathers builds moves "
    "holds passes reaches turns knows brings hears shows covers paints repairs sends visits guards draws "
    "welcomes lifts shapes"
)
PLACES = _split("under near behind beside above below across beyond along toward past around inside through outside against")
LINKS = _split("and while because so until although since but")
STOPS = (".", "!", "?", "...")
COMMAS = (",", ";", ":", " -")
