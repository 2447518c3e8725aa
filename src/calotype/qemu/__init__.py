"""The shell around QEMU: monitor, processes, qemu-img. It acts and looks; it decides nothing."""
