"""QMP: what is said on a monitor's wire, and what may be said; nothing here opens a socket."""
