"""A server that exists on paper: workers that take batches from one queue and share processors, and clients in a closed
loop. Simulated event by event, so that throughput and latency follow from the settings as they do in a real one, traps
included: a batch size as large as the queue idles the other workers, a delay makes a lone request wait.
"""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from marina.load_stats import Interval
from marina.tune_search import Probe, Setting


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Milliseconds."""

    cores: int
    per_batch: float
    """Fixed cost of a batch: protocol, dispatch."""
    per_item: float
    """Processor time of one item."""
    efficiency: float
    """What a second core adds to a batch that has it to itself, as a share of a core."""
    contention: float
    """By how much each worker beyond the cores slows all of them."""
    noise: float = 0.0
    """Standard deviation of a measured throughput or latency, as a share."""
    jitter: float = 0.2
    """Largest deviation of a batch's work from its mean, as a share: without it clients and batches march in step."""
    requests: int = 400

    def probe(self, setting: Setting, in_flight: int, turn: int) -> Probe:
        """What a measurement would say; the same each time for the same arguments."""
        rate, latencies = self._simulate(setting, in_flight)
        draw = random.Random(f"{setting}/{in_flight}/{turn}/{self}")
        rate *= 1 + draw.gauss(0, self.noise)
        p99 = latencies[int(0.99 * (len(latencies) - 1))] * (1 + draw.gauss(0, self.noise))
        half = 2 * self.noise * rate
        return Probe(
            setting=setting,
            in_flight=in_flight,
            turn=turn,
            throughput=Interval(rate, rate - half, rate + half),
            p50_ms=latencies[len(latencies) // 2],
            p99_ms=Interval(p99, p99, p99),
            failed=0,
            seconds=1.0,
        )

    def true_value(self, setting: Setting, objective_ms: float, numbers: Sequence[int]) -> float:
        """The highest throughput within the objective over all numbers of requests in flight, without noise.

        Simulated again for longer where it is highest: the highest of many short runs is too high.
        """
        best, where = 0.0, 0
        for in_flight in numbers:
            rate, latencies = self._simulate(setting, in_flight)
            if latencies[int(0.99 * (len(latencies) - 1))] <= objective_ms and rate > best:
                best, where = rate, in_flight
        return dataclasses.replace(self, requests=10 * self.requests)._simulate(setting, where)[0] if where else 0.0

    def _simulate(self, setting: Setting, in_flight: int) -> tuple[float, list[float]]:
        """Answers per second, and the latencies in ascending order, once the first round of requests is over."""
        clients = deque(0.01 * client for client in range(in_flight))
        """When each sends its next request; all wait equally long, so they stay in order."""
        queue: deque[float] = deque()
        batches: list[list[float]] = []
        """Of each busy worker: work left, then the times at which its requests were sent."""
        draw = random.Random(f"{setting}/{in_flight}")
        collected_at = inf
        now = 0.0
        done: list[tuple[float, float]] = []
        warm = 2 * in_flight
        while len(done) < self.requests + warm:
            speed = self._speed(len(batches))
            finish = now + min(batch[0] for batch in batches) / speed if batches else inf
            following = min(clients[0] if clients else inf, finish, collected_at)
            for batch in batches:
                batch[0] -= (following - now) * speed
            now = following
            while clients and clients[0] <= now:
                queue.append(clients.popleft())
            for batch in [item for item in batches if item[0] <= 1e-9]:
                batches.remove(batch)
                done += [(sent, now) for sent in batch[1:]]
                clients += [now + 0.05] * (len(batch) - 1)
            # One worker collects at a time, as TorchServe holds the queue's lock; up to 1 ms means not waiting.
            while queue and len(batches) < setting.workers:
                full = len(queue) >= setting.batch_size
                if setting.delay_ms > 1 and not full and collected_at == inf:
                    collected_at = now + setting.delay_ms
                if setting.delay_ms > 1 and not full and collected_at > now:
                    break
                collected_at = inf
                size = min(len(queue), setting.batch_size)
                work = (self.per_batch + self.per_item * size) * draw.uniform(1 - self.jitter, 1 + self.jitter)
                batches.append([work, *(queue.popleft() for _ in range(size))])
        # From the end of one batch to the end of another, so that no part of a batch is counted.
        begin = done[warm - 1][1]
        kept = [item for item in done if item[1] > begin]
        seconds = (kept[-1][1] - begin) / 1e3
        return len(kept) / seconds, sorted(arrived - sent for sent, arrived in kept)

    def _speed(self, busy: int) -> float:
        """Work per millisecond of each busy worker."""
        if busy == 0:
            return 1.0
        alone = 1 + (max(1, self.cores // busy) - 1) * self.efficiency
        shared = min(1.0, self.cores / busy) / (1 + self.contention * max(0, busy - self.cores))
        return alone * shared
