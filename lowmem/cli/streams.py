"""Standard output and standard error where nobody may be left to read them: a pipe whose reader has gone (`| head`), a
terminal that was closed, a disk that is full. What is shown *is* the result of `ls` or `plan`, so that they end; a
training goes on without a word."""

from __future__ import annotations

import errno
import io
import os
import sys
import time
from typing import Any, TextIO

from lowmem.core.errors import DiskError, OutputClosed

_GONE = (errno.EPIPE, *([errno.EINVAL] if sys.platform == "win32" else []))
_BUSY_SECONDS = 0.01


class _Stream(io.RawIOBase):
    """What lies under a text stream. While `must_be_read`, the first that cannot be written raises OutputClosed or
    DiskError. All else that cannot be written is dropped, and the next is tried again: a full disk may have room by
    then."""

    def __init__(self, text: TextIO, *, must_be_read: bool) -> None:
        self._raw: Any = getattr(text.buffer, "raw", text.buffer)  # an unbuffered stream has none below
        self.must_be_read = must_be_read

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._raw.fileno())

    def isatty(self) -> bool:
        return bool(self._raw.isatty())

    def write(self, data: Any) -> int:
        try:
            while (written := self._raw.write(data)) is None:  # others have made the terminal non-blocking
                time.sleep(_BUSY_SECONDS)
            return int(written)
        except OSError as error:
            if not self.must_be_read:
                return len(data)
            self.must_be_read = False  # nor what still lies in the buffers
            if error.errno in _GONE:
                raise OutputClosed("nobody reads the output any more") from None
            raise DiskError(
                f"the output cannot be written ({error.strerror or error}): not all of it is there; free some space, "
                "or send it elsewhere"
            ) from None


def take_streams() -> None:
    """From here on output that cannot be written is OutputClosed or DiskError, until `unread_is_well`; errors that
    cannot be written are dropped. No character is too strange for either: a Windows console may be in an old code page.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us: the next file that is opened must not get its number
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif mode == "w" and stream is getattr(sys, f"__{name}__"):
            raw = _Stream(stream, must_be_read=name == "stdout")
            at_once = stream.line_buffering or stream.write_through
            below = io.BufferedWriter(raw)
            setattr(sys, name, io.TextIOWrapper(below, stream.encoding, "replace", line_buffering=at_once))
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def unread_is_well() -> None:
    """From here on what is done counts, and standard output only tells of it."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _Stream):
        raw.must_be_read = False
