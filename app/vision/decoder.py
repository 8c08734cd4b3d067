"""The program that decodes pictures from strangers, for decoding.py: confined, one picture at a time, until its socket
ends. Imports no torch, so that it starts quickly and is small.

A picture that takes more memory than allowed is refused here where its library says so; one that takes too long, or
breaks the decoder, ends the process, which is what it is for.
"""

import io
import json
import mmap
import resource
import signal
import socket
import struct
import sys

import numpy as np
from PIL import Image

from app.confinement import confine
from app.errors import ImageRefused
from app.vision.images import ImageLimits, decode, decoded_bytes

REQUEST = struct.Struct("<QI")  # bytes of the encoded picture, side
ANSWER = struct.Struct("<III")  # height and width of the pixels; or 0, 0 and the length of the reason behind it

# What libraries take at most while they decode: three or four components in 16 bits, and the pixels.
MOST_BYTES_PER_PIXEL = 12
TOO_MUCH_MEMORY = "takes more memory to decode than this server gives a picture"


def main() -> int:
    order = json.loads(sys.argv[1])
    limits = ImageLimits(**order["limits"] | {"extra_formats": frozenset(order["limits"]["extra_formats"])})
    connection = socket.socket(fileno=order["socket"])
    shared = mmap.mmap(order["shared"], order["shared_bytes"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to hear; it ends this by the socket
    _warm_up(limits)
    confine(more_bytes=order["memory_bytes"])
    # Nothing is opened or written to from here on.
    highest = max(order["socket"], order["shared"], 2) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, highest))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    connection.sendall(b"r")
    while request := connection.recv(REQUEST.size, socket.MSG_WAITALL):
        encoded_bytes, side = REQUEST.unpack(request)
        # The kernel's alarm ends the process in whatever it does; by its own time, so a busy machine refuses nothing.
        signal.setitimer(signal.ITIMER_PROF, order["cpu_seconds"])
        encoded = shared[:encoded_bytes]
        try:
            pixels = decode(encoded, side=side, limits=limits)
            height, width, _ = pixels.shape
            np.frombuffer(shared, np.uint8, pixels.size)[:] = pixels.reshape(-1)
            answer = ANSWER.pack(height, width, 0)
        except ImageRefused as refusal:
            answer = _refusal(_reason(refusal.detail, encoded, limits, memory_bytes=order["memory_bytes"]))
        except MemoryError:
            answer = _refusal(TOO_MUCH_MEMORY)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.sendall(answer)
    return 0


def _reason(detail: str, encoded: bytes, limits: ImageLimits, *, memory_bytes: int) -> str:
    """libjpeg and libwebp say of memory that they did not get what they say of damage."""
    if not detail.startswith("damaged"):
        return detail
    try:
        pixels = decoded_bytes(encoded, side=limits.max_side, limits=limits) // 3
    except ImageRefused:
        return detail
    return f"{detail}, or {TOO_MUCH_MEMORY}" if pixels * MOST_BYTES_PER_PIXEL > memory_bytes else detail


def _refusal(reason: str) -> bytes:
    encoded = reason.encode()[:1000]
    return ANSWER.pack(0, 0, len(encoded)) + encoded


def _warm_up(limits: ImageLimits) -> None:
    """Everything that Pillow imports or sets up at a first picture of a format."""
    for image_format in limits.formats:
        encoded = io.BytesIO()
        Image.new("RGB", (8, 8)).save(encoded, image_format)
        decode(encoded.getvalue(), side=4, limits=limits)


if __name__ == "__main__":
    sys.exit(main())
