"""Facts and a request in, a plan out: pure, total, printable. Nothing here does I/O."""
