"""The desktop: what `perco desktop` installs, for a user or the system, takes out again, and checks.

cli_desktop ─> install ─┬─> points        what goes where, from integrations/
                        ├─> thunar        merging into a file that the user owns
                        ├─> system        the folder that GNOME's sandbox can see
                        └─> manifest      what was there before
check                                     whether each point would really work (perco doctor)
menu                                      what a click on an entry runs
"""
