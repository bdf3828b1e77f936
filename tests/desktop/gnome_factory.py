"""Has GNOME's thumbnail factory make a thumbnail: gnome_factory.py VERSION FILE OUTPUT (run by the system's Python)."""

import sys
from pathlib import Path

import gi

gi.require_version("GnomeDesktop", sys.argv[1])
from gi.repository import GnomeDesktop  # noqa: E402

path = Path(sys.argv[2])
factory = GnomeDesktop.DesktopThumbnailFactory.new(GnomeDesktop.DesktopThumbnailSize.LARGE)
assert factory.can_thumbnail(path.as_uri(), "image/x-perco", int(path.stat().st_mtime)), "no thumbnailer is known"
last = [] if sys.argv[1] == "3.0" else [None]
picture = factory.generate_thumbnail(path.as_uri(), "image/x-perco", *last)
assert picture is not None, "the thumbnailer failed"
picture.savev(sys.argv[3], "png", [], [])
