"""A TCP proxy that cuts connections at random, as a bad line does: in good order, or with a reset."""

import random
import socket
import struct
import threading
from types import TracebackType

RESET = struct.pack("ii", 1, 0)  # of SO_LINGER


class CuttingProxy:
    """Cuts the first `cuts` connections, each after at most so many bytes in both directions together."""

    def __init__(self, target: tuple[str, int], *, cuts: int, most_bytes: int, seed: int) -> None:
        self._target = target
        self._chance = random.Random(seed)
        self._cuts_left = cuts
        self._most_bytes = most_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept)]
        self.cuts = 0

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self._listener.getsockname())

    def __enter__(self) -> "CuttingProxy":
        self._threads[0].start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            budget = None
            if self._cuts_left > 0:
                self._cuts_left -= 1
                budget = self._chance.randrange(self._most_bytes)
            server = socket.create_connection(self._target)
            connection = _Connection(client, server, budget, with_reset=self._chance.random() < 0.5)
            for source, sink in ((client, server), (server, client)):
                thread = threading.Thread(target=self._pump, args=(connection, source, sink))
                self._threads.append(thread)
                thread.start()

    def _pump(self, connection: "_Connection", source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(4096):
                if connection.spend(len(data)):
                    self.cuts += 1
                    return
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:  # cut by the other direction, or left
            connection.close()
        finally:
            connection.end_direction()


class _Connection:
    def __init__(self, client: socket.socket, server: socket.socket, budget: int | None, *, with_reset: bool) -> None:
        self._sockets = (client, server)
        self._budget = budget
        self._with_reset = with_reset
        self._lock = threading.Lock()
        self._directions = 2

    def spend(self, count: int) -> bool:
        """Whether that was too much, and the connection is cut now."""
        with self._lock:
            if self._budget is None:
                return False
            self._budget -= count
            is_cut = self._budget < 0
        if is_cut:
            self.close()
        return is_cut

    def end_direction(self) -> None:
        with self._lock:
            self._directions -= 1
            is_over = self._directions == 0
        if is_over:
            self.close()

    def close(self) -> None:
        for one in self._sockets:
            try:
                if self._with_reset:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            one.close()
