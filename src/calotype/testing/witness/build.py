"""Makes what the witness guest is booted from: a kernel, and an initramfs with the witness.

The kernel is Debian's, unpacked by `scripts/setup`, or one that the environment names:

    CALOTYPE_KERNEL    a bzImage
    CALOTYPE_MODULES   the folder of its modules, lib/modules/RELEASE; not needed if they are beside
                       the kernel, or if drivers are built into it
    CALOTYPE_DEPS      where `scripts/setup` unpacked one; else .deps, in this tree or here

The initramfs is kept in a cache under the hash of all that goes into it, so it is made once and
never out of date. It is made in a folder of its own which is then renamed into place: of two
makers at one time both succeed, and the second one's work is thrown away.

A witness may have company: QEMU's guest agent, and a file system that is written to. Both are in an
initramfs of their own (`agent=True`), so that the ordinary witness boots as fast as without.

Hosts need no KVM: under TCG the guest's first tick comes after about three seconds. What the kernel
is told besides is worth a fifth of that, and keeps it from distrusting an emulated clock.
"""

import gzip
import hashlib
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from calotype.errors import HostError

_HERE = Path(__file__).parent
_SETUP = "run scripts/setup"

_AGENT = "usr/sbin/qemu-ga"
_COMPILE = ("cc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-static", "-s")
_DRIVERS = {
    "virtio": ("virtio_pci", "virtio_blk"),
    "scsi": ("sd_mod", "virtio_scsi", "ahci", "ata_piix"),
}
_WITH_AGENT = {**_DRIVERS, "agent": ("virtio_console",)}
_UNPACK: dict[str, Callable[[bytes], bytes]] = {
    ".ko": bytes,
    ".gz": gzip.decompress,
    ".xz": lzma.decompress,
}
_KERNEL_WORDS = (
    "console=ttyS0 quiet loglevel=1 panic=-1 "
    "nokaslr mitigations=off random.trust_cpu=on tsc=reliable no_timer_check cryptomgr.notests"
)


@dataclass(frozen=True)
class Witness:
    """What to boot: for QEMU's -kernel, -initrd and -append."""

    kernel: Path
    initrd: Path

    def append(
        self, disks: Sequence[str], ram_mib: int = 32, seed: int = 1, more: Sequence[str] = ()
    ) -> str:
        """The kernel's command line.

        Args:
            disks: Names of the disks as the guest has them, such as "vda"; the witness calls them
                by their place in this list.
            ram_mib: Size of the pool of RAM that it fills and checks.
            seed: What the pool's data is made from.
            more: Words for its company; see the script `company`.
        """
        words = (
            f"{_KERNEL_WORDS} witness.disks={','.join(disks)}",
            f"witness.ram={ram_mib} witness.seed={seed}",
            *more,
        )
        return " ".join(words)


def witness(cache: Path, *, agent: bool = False) -> Witness:
    """The witness, ready to boot; built into *cache* unless it is there already.

    Args:
        cache: Where it is kept.
        agent: Give it company: QEMU's guest agent, and a writer on a file system.

    Raises:
        HostError: A tool, the kernel or the agent is missing, or one of the tools failed.
    """
    kernel, modules = _kernel()
    parts = {
        "init": (_HERE / "init").read_bytes(),
        "bin/busybox": _tool("busybox").read_bytes(),
        **_driver_files(modules, _WITH_AGENT if agent else _DRIVERS),
        **({"company": (_HERE / "company").read_bytes(), **agent_files()} if agent else {}),
    }
    home = cache / f"witness-{_digest(parts)}"
    if not home.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as folder:
            _make_initramfs(Path(folder), parts)
            _rename_unless_there(Path(folder) / "home", home)
    return Witness(kernel=kernel, initrd=home / "initrd")


def _digest(parts: dict[str, bytes]) -> str:
    digest = hashlib.blake2b(repr(_COMPILE).encode(), digest_size=8)
    digest.update((_HERE / "witness.c").read_bytes())
    for name, content in parts.items():
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _rename_unless_there(made: Path, home: Path) -> None:
    try:
        made.rename(home)
    except OSError:
        if not home.is_dir():
            raise


# --- the kernel and its drivers -------------------------------------------------------------------


def _kernel() -> tuple[Path, Path | None]:
    """The kernel and the folder of its modules, None where it has none."""
    kernel = _named_kernel() or _unpacked_kernel()
    if named := os.environ.get("CALOTYPE_MODULES"):
        return kernel, Path(named)
    release = kernel.name.removeprefix("vmlinuz-")
    roots = (kernel.parent.parent, Path("/"))
    folders = [root / lib / release for root in roots for lib in ("lib/modules", "usr/lib/modules")]
    return kernel, next((folder for folder in folders if folder.is_dir()), None)


def _named_kernel() -> Path | None:
    named = os.environ.get("CALOTYPE_KERNEL")
    if named and not Path(named).is_file():
        raise HostError(f"no kernel at {named}", "let CALOTYPE_KERNEL name a bzImage")
    return Path(named) if named else None


def _unpacked_kernel() -> Path:
    kernels = [kernel for place in _deps() for kernel in place.glob("kernel/boot/vmlinuz-*")]
    if not kernels:
        raise HostError(
            "no kernel for the witness guest",
            f"{_SETUP}, or let CALOTYPE_KERNEL name a bzImage and CALOTYPE_MODULES its modules",
        )
    return max(kernels, key=lambda kernel: kernel.stat().st_mtime)


def _deps() -> list[Path]:
    """Where `scripts/setup` may have unpacked what it does not install."""
    named = os.environ.get("CALOTYPE_DEPS")
    return [Path(named)] if named else [_HERE.parents[3] / ".deps", Path.cwd() / ".deps"]


def _driver_files(modules: Path | None, families: Mapping[str, Sequence[str]]) -> dict[str, bytes]:
    """The modules as files of the initramfs, and in modules/FAMILY the order to load each in."""
    paths = {_name(path): path for path in sorted(modules.rglob("*.ko*"))} if modules else {}
    lists: dict[str, bytes] = {}
    loaded: dict[str, bytes] = {}
    for family, drivers in families.items():
        earlier = set(loaded)
        for driver in drivers:
            _collect(driver, paths, loaded)
        names = [name for name in loaded if name not in earlier]
        lists[f"modules/{family}"] = "".join(f"{name}\n" for name in names).encode()
    return lists | {f"modules/{name}.ko": content for name, content in loaded.items()}


def _collect(name: str, paths: dict[str, Path], loaded: dict[str, bytes]) -> None:
    """Add a module to *loaded* behind those it needs; one without a file is built in, or absent."""
    if name in loaded or name not in paths:
        return
    content = _unpacked(paths[name])
    for needed in _needs(content):
        _collect(needed, paths, loaded)
    loaded[name] = content


def _name(path: Path) -> str:
    return path.name.partition(".")[0].replace("-", "_")


def _needs(module: bytes) -> list[str]:
    # The field of its .modinfo section that depmod reads too; so no modules.dep is needed.
    field = re.search(rb"\0depends=([^\0]*)\0", module)
    names = field[1].decode().split(",") if field else []
    return [name.replace("-", "_") for name in names if name]


def _unpacked(path: Path) -> bytes:
    unpack = _UNPACK.get(path.suffix)
    if unpack is None:
        raise HostError(
            f"{path} is compressed in a way that is not known here",
            "unpack it, or let CALOTYPE_KERNEL name a kernel with its drivers built in",
        )
    return unpack(path.read_bytes())


# --- the guest agent ------------------------------------------------------------------------------


def agent_files() -> dict[str, bytes]:
    """QEMU's guest agent, what it is linked with and the loader that it names, for an initramfs.

    Raises:
        HostError: It was not unpacked, and is not installed either; or a library is missing.
    """
    roots = [*(place / "agent" for place in _deps()), Path("/")]
    root = next((root for root in roots if (root / _AGENT).is_file()), None)
    if root is None:
        raise HostError("there is no guest agent for the witness's company", _SETUP)
    found = {_AGENT: root / _AGENT}
    pending = [found[_AGENT]]
    while pending:
        for name in _linked_with(pending.pop()):
            if f"lib/{name}" not in found:
                found[f"lib/{name}"] = _library(root, name)
                pending.append(found[f"lib/{name}"])
    loader = next(name for name in found if name.startswith("lib/ld-linux"))
    return {name: path.read_bytes() for name, path in found.items()} | {
        loader.replace("lib/", "lib64/"): found[loader].read_bytes()
    }


def _linked_with(program: Path) -> list[str]:
    told = _run(["readelf", "-d", "-l", str(program)], cwd=_HERE).decode(errors="replace")
    named = re.findall(r"Shared library: \[([^]]+)\]", told)
    return named + re.findall(r"program interpreter: \S*/([^]/]+)\]", told)


def _library(root: Path, name: str) -> Path:
    for folder in ("lib", "usr/lib", "lib64", "usr/lib64"):
        for path in sorted((root / folder).glob(f"**/{name}")):
            return path
    raise HostError(f"the guest agent needs {name}, which is not there", _SETUP)


# --- the initramfs --------------------------------------------------------------------------------


def _make_initramfs(folder: Path, parts: dict[str, bytes]) -> None:
    """Make *folder*/home/initrd; not compressed, as emulated CPUs unpack more slowly than copy."""
    root, home = folder / "root", folder / "home"
    home.mkdir()
    for mount_point in ("dev", "proc", "sys"):
        (root / mount_point).mkdir(parents=True)
    for name, content in parts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o755)
    _run([*_COMPILE, "-o", str(root / "witness"), str(_HERE / "witness.c")], cwd=folder)
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))
    archive = _run(
        ["cpio", "--create", "--format=newc", "--owner=0:0", "--reproducible", "--quiet"],
        cwd=root,
        given="".join(f"{name}\n" for name in names).encode(),
    )
    (home / "initrd").write_bytes(archive)


def _tool(name: str) -> Path:
    path = shutil.which(name)
    if path is None:
        raise HostError(f"{name} is not installed", _SETUP)
    return Path(path)


def _run(words: Iterable[str], *, cwd: Path, given: bytes = b"") -> bytes:
    program, *arguments = words
    done = subprocess.run(
        [str(_tool(program)), *arguments], input=given, cwd=cwd, capture_output=True, check=False
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise HostError(f"{program} failed: {said}", _SETUP)
    return done.stdout
