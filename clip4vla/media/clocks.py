"""Correct the timestamps of packets where a file was joined to another, or changes its sampling rate."""

import math

import av

RESTART = 0.5  # s that timestamps go back where another file was joined
# Hz, by their number in an ADTS header
ADTS_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
ADTS_BLOCK = 1024  # samples


class JoinedClock:
    """Lets timestamps that begin again go on from the latest end before: those of all streams by the same time."""

    def __init__(self) -> None:
        self.shifts = [0.0]  # s, of each file that was joined
        self.file: dict[int, int] = {}  # by stream: number of the file that it has come to
        self.last: dict[int, float] = {}  # by stream: s of its last packet, as that had it
        self.end = 0.0

    def go_on(self, packet: av.Packet) -> av.Packet:
        """Return the next packet, with its timestamps corrected."""
        if packet.dts is None:
            return packet
        stream, unit = packet.stream.index, float(packet.time_base)
        time, file = packet.dts * unit, self.file.get(stream, 0)
        if time < self.last.get(stream, -math.inf) - RESTART:
            file += 1
            if file == len(self.shifts):
                self.shifts.append(self.end - time)
        self.file[stream], self.last[stream] = file, time
        self.end = max(self.end, time + self.shifts[file] + (packet.duration or 0) * unit)
        return shifted(packet, round(self.shifts[file] / unit))


class AdtsClock:
    """Gives packets of raw AAC the times of their own sampling rates; libavformat takes the first one for all."""

    def __init__(self) -> None:
        self.rates: set[int] = set()  # Hz, of all packets
        self.next = 0  # units of time

    def go_on(self, packet: av.Packet) -> av.Packet:
        """Return the next packet, with its timestamps corrected."""
        header = bytes(memoryview(packet)[:7])
        number = header[2] >> 2 & 15 if len(header) == 7 else len(ADTS_RATES)
        if number < len(ADTS_RATES):
            self.rates.add(ADTS_RATES[number])
            packet.pts = packet.dts = self.next
            packet.duration = round(ADTS_BLOCK * (1 + (header[6] & 3)) / ADTS_RATES[number] / packet.time_base)
            self.next += packet.duration
        return packet


def shifted(packet: av.Packet, units: int) -> av.Packet:
    """Return the packet, later by `units` of its time base."""
    if units and packet.dts is not None:
        packet.dts += units
    if units and packet.pts is not None:
        packet.pts += units
    return packet
