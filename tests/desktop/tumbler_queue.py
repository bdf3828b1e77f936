"""Asks tumbler over D-Bus for thumbnails: tumbler_queue.py FLAVOR FILE... (run by the system's Python)."""

import sys
from pathlib import Path

from gi.repository import Gio, GLib

NAME = "org.freedesktop.thumbnails.Thumbnailer1"
uris = [Path(name).as_uri() for name in sys.argv[2:]]
bus = Gio.bus_get_sync(Gio.BusType.SESSION)
loop = GLib.MainLoop()
failed = []


def heard(_bus, _sender, _path, _interface, signal, arguments, *_):
    if signal == "Error":
        failed.append(arguments.unpack())
    if signal == "Finished":
        loop.quit()


bus.signal_subscribe(NAME, NAME, None, None, None, Gio.DBusSignalFlags.NONE, heard)
request = GLib.Variant("(asasssu)", (uris, ["image/x-perco"] * len(uris), sys.argv[1], "default", 0))
bus.call_sync(NAME, "/org/freedesktop/thumbnails/Thumbnailer1", NAME, "Queue", request, None, 0, -1, None)
GLib.timeout_add_seconds(60, lambda: sys.exit("tumbler did not finish"))
loop.run()
print(len(failed))
