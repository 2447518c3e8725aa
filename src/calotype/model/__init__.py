"""What we talk about: frozen values, no behaviour beyond themselves, no I/O."""
