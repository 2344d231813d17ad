"""Why peers do not see each other: from what was seen to causes, in words. Pure: gathering is the business of `meshserve doctor`."""
