"""Entries of Nautilus' context menu (nautilus-python): convert pictures to .perco files and back."""

import json
import subprocess

from gi.repository import GObject, Nautilus

PERCO = json.loads(r"""@PERCO_ARGUMENTS@""")  # filled in when this file is installed, like RATES
RATES = json.loads(r"""@RATES@""")
PHOTOS = ("image/jpeg", "image/png", "image/webp", "image/tiff", "image/bmp", "image/gif")


def convert(_item, arguments, paths):
    subprocess.Popen([*PERCO, "desktop", "convert", *arguments, "--", *paths], start_new_session=True)


class PercoMenu(GObject.GObject, Nautilus.MenuProvider):
    def get_file_items(self, *arguments):  # 3.x has a window first, 4.x has not
        files = arguments[-1]
        paths = [file.get_location().get_path() for file in files]
        kinds = {file.get_mime_type() for file in files}
        if not files or None in paths:
            return []
        if kinds == {"image/x-perco"}:
            item = Nautilus.MenuItem(name="PercoMenu::png", label="Convert to PNG")
            item.connect("activate", convert, ["--to", "png"], paths)
            return [item]
        if not kinds <= set(PHOTOS):
            return []
        item = Nautilus.MenuItem(name="PercoMenu::perco", label="Convert to PerCo...")
        submenu = Nautilus.Menu()
        item.set_submenu(submenu)
        for label, bpp in RATES:
            entry = Nautilus.MenuItem(name="PercoMenu::" + bpp.replace(".", "_"), label=label)
            entry.connect("activate", convert, ["--bpp", bpp], paths)
            submenu.append_item(entry)
        return [item]

    def get_background_items(self, *arguments):
        return []
