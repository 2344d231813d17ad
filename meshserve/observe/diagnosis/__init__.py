"""Why peers do not see each other: from facts to causes, in words. Pure: `meshserve doctor` gathers the facts and shows the findings."""

from meshserve.observe.diagnosis.facts import Facts, Finding, Severity
from meshserve.observe.diagnosis.machine import judge_alone, judge_machine
from meshserve.observe.diagnosis.mesh import judge_mesh, judge_strangers
from meshserve.observe.diagnosis.pairs import judge_pairs


def diagnose(facts: Facts) -> list[Finding]:
    """All findings, the worst first; of equal ones those nearest to a cause."""
    found = [*judge_strangers(facts), *judge_pairs(facts), *judge_mesh(facts), *judge_alone(facts), *judge_machine(facts)]
    return sorted(dict.fromkeys(found), key=lambda finding: list(Severity).index(finding.severity))
