"""Which options QEMU has, and which of them take a value.

A command line cannot be split into options without this table: whether the word after `-foo` is
its value or a disk image stands nowhere in the line. It is the union of QEMU 7.2 to 10.0, of all
targets and builds, under the headings of QEMU's qemu-options.hx; a test compares it with the
QEMU that is installed. In QEMU `--foo` is `-foo`, and names are never abbreviated.
"""

# fmt: off
VALUED: frozenset[str] = frozenset({
    # Standard options
    "machine", "M", "cpu", "accel", "smp", "numa", "add-fd", "set", "global", "boot", "m",
    "mem-path", "k", "audio", "audiodev", "device", "name", "uuid",
    # Block device options
    "fda", "fdb", "hda", "hdb", "hdc", "hdd", "cdrom", "blockdev", "drive", "mtdblock", "sd",
    "fsdev", "virtfs", "iscsi",
    # USB convenience options
    "usbdevice",
    # Display options
    "display", "spice", "vga", "g", "vnc",
    "rotate",  # up to 9.1
    # i386 target only
    "acpitable", "smbios",
    # Network options
    "netdev", "nic", "net",
    # Character device options
    "chardev",
    # TPM device options
    "tpmdev",
    # Boot image or kernel specific
    "bios", "pflash", "kernel", "append", "initrd", "dtb",
    "shim",  # from 10.0
    # Debug and expert options
    "compat", "fw_cfg", "serial", "parallel", "monitor", "qmp", "qmp-pretty", "mon", "debugcon",
    "pidfile", "overcommit", "gdb", "d", "D", "dfilter", "seed", "L", "xen-domid", "action",
    "loadvm", "option-rom", "rtc", "icount", "watchdog-action", "echr", "incoming", "prom-env",
    "semihosting-config", "sandbox", "readconfig", "trace", "plugin", "qtest", "qtest-log", "msg",
    "dump-vmstate",
    "chroot",  # up to 8.2
    "run-with",  # from 8.1
    "runas",  # up to 9.2
    # Generic object creation
    "object",
})
"""The options that are followed by a value."""

FLAGS: frozenset[str] = frozenset({
    # Standard options
    "h", "help", "version", "mem-prealloc",
    "audio-help",  # up to 8.1
    # Block device options
    "snapshot",
    # USB convenience options
    "usb",
    # Display options
    "nographic", "full-screen",
    "portrait",  # up to 9.1
    # i386 target only
    "win2k-hack", "no-fd-bootchk",
    "no-acpi", "no-hpet",  # up to 8.2
    # Debug and expert options
    "preconfig", "S", "s", "enable-kvm", "xen-attach", "xen-domid-restrict", "no-reboot",
    "no-shutdown", "daemonize", "only-migratable", "nodefaults", "semihosting", "old-param",
    "no-user-config", "enable-sync-profile",
    "singlestep",  # up to 8.2
    "async-teardown",  # 8.0 to 8.2
    "perfmap", "jitdump",  # from 8.1
})
"""The options that stand alone."""
# fmt: on
