"""What workers report and routers tell each other: as it was said, or refused."""

from typing import Any

import pytest

from meshserve.errors import ProtocolError
from meshserve.wire.frames import pack_body, unpack_body
from meshserve.wire.routing import InFlightReservation, Share, WorkerLoad, WorkerReport
from meshserve.wire.structs import MAX_FIGURE

REPORT = WorkerReport(WorkerLoad(num_running=3, num_blocks=MAX_FIGURE - 1), (1, 2**64 - 1), (7,), ("r",), ("r",))
RESERVATION = InFlightReservation("r", (Share("w0", 1, 101), Share("p0", 1600, 101)), "alice")


def test_reports_and_reservations_arrive_as_they_were_sent() -> None:
    assert WorkerReport.from_wire(unpack_body(pack_body(REPORT.to_wire()))) == REPORT
    assert InFlightReservation.from_wire(unpack_body(pack_body(RESERVATION.to_wire()))) == RESERVATION


@pytest.mark.parametrize("figure", [-1, MAX_FIGURE, 2**64 - 1, 1.5, True, None, "1"])
def test_a_figure_that_no_worker_could_mean_is_refused(figure: Any) -> None:
    report, reservation = REPORT.to_wire(), RESERVATION.to_wire()
    report[0][0] = figure
    with pytest.raises(ProtocolError):
        WorkerReport.from_wire(report)
    reservation[1][1][1] = figure
    with pytest.raises(ProtocolError):
        InFlightReservation.from_wire(reservation)


@pytest.mark.parametrize("data", [None, [], ["r", [], ""], ["r", [["w", 1]], ""], ["r", [["w", 1, 1]], 1], ["r", [["w", 1, 1]] * 3, ""]])
def test_a_malformed_reservation_is_refused(data: Any) -> None:
    with pytest.raises(ProtocolError):
        InFlightReservation.from_wire(data)
