"""What is told of a command line holds no secret, and everything else of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype.errors import CommandLineError
from calotype.formats.argv import CommandLine, disks
from calotype.formats.options import parse_nested, unparse
from calotype.formats.secrets import REDACTED, redacted, redacted_log, redacted_pairs

HIDDEN = [
    ("object", "secret,id=s0,data=SECRET"),
    ("object", "secret,data=SECRET,id=s0"),
    ("object", "qom-type=secret,id=s0,format=base64,data=SECRET"),
    ("object", '{"qom-type": "secret", "id": "s", "data": "SECRET"}'),
    ("spice", "port=5930,password=SECRET"),
    ("spice", "x509-key-password=SECRET,port=1"),
    ("vnc", ":0,password=SECRET"),
    ("iscsi", "user=me,password=SECRET"),
    ("drive", "file.driver=iscsi,file.user=me,file.password=SECRET"),
    ("drive", "file=rbd:pool/image:id=me:key=SECRET:mon_host=a,if=virtio"),
    ("drive", "file=https://me:SECRET@host/disk.iso,media=cdrom"),
    ("drive", "file=iscsi://me%SECRET@host/iqn/0,media=cdrom"),
    ("cdrom", "ftp://me:SECRET@host/disk.iso"),
    ("cdrom", 'json:{"driver":"https","cookie":"SECRET"}'),
    ("blockdev", "driver=https,url=https://h/i,cookie=SECRET"),
    ("blockdev", '{"driver":"raw","file":{"driver":"https","cookie":"SECRET"}}'),
    ("blockdev", '{"driver":"raw","file.cookie":"SECRET"}'),
    ("netdev", "l2tpv3,id=n,src=a,dst=b,txcookie=SECRET,rxcookie=SECRET"),
    ("device", "isa-applesmc,osk=SECRET"),
    ("global", "isa-applesmc.osk=SECRET"),
    ("global", "driver=isa-applesmc,property=osk,value=SECRET"),
    ("prom-env", "security-password=SECRET"),
    ("smbios", "type=11,value=io.systemd.credential:name=SECRET,value=x"),
    ("fw_cfg", "name=opt/io.systemd.credentials/a,string=SECRET"),
    ("fw_cfg", "opt/com.coreos/config,string=SECRET"),
    ("append", "console=ttyS0 root_password=SECRET quiet"),
    ("append", "systemd.set_credential=SECRET"),
]
"""Option, and a value with a secret in the place that it has there."""

LEGIBLE = [
    ("object", "secret,id=s0,file=/etc/key"),
    ("object", "memory-backend-file,id=ram,mem-path=/data,size=1G"),
    ("vnc", ":0,password=on"),
    ("vnc", ":0,password=off,share=ignore"),
    ("vnc", ":0,password"),
    ("vnc", ":0,password-secret=s0"),
    ("drive", "file=disk.qcow2,if=virtio,encrypt.key-secret=s0"),
    ("blockdev", "driver=https,url=https://host/i,password-secret=s0,cookie-secret=s1"),
    ("blockdev", "driver=rbd,pool=p,image=i,key-secret=s0"),
    ("fw_cfg", "name=opt/mine,string=hello"),
    ("smbios", "type=1,serial=17"),
    ("append", "console=ttyS0 root=/dev/vda ro"),
    ("netdev", "user,id=n,hostfwd=tcp:127.0.0.1:2222-:22"),
    ("name", "a user@host://b"),
]


@pytest.mark.parametrize("secret", ["hunter2", "AQB0+x/=="])
@pytest.mark.parametrize(("option", "text"), HIDDEN)
def test_a_secret_is_told_as_one_word(option: str, text: str, secret: str) -> None:
    program, words = "qemu-system-x86_64", text.replace("SECRET", secret)
    told = text.replace("SECRET", REDACTED)
    if "://" in text and "/" in secret:
        return  # a URL cannot hold it
    assert redacted([program, f"-{option}", words]) == (program, f"-{option}", told)
    assert redacted([program, f"--{option}", words])[2] == told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("secret,data=a,,b,id=s0", "secret,data=REDACTED,id=s0"),
        ("secret,data=on,id=s0", "secret,data=REDACTED,id=s0"),
        ('{"qom-type":"secret","data":"a\\"b"}', '{"qom-type":"secret","data":"REDACTED"}'),
        ("{'qom-type':'secret','data':'ab'}", "{'qom-type':'secret','data':\"REDACTED\"}"),
    ],
)
def test_all_of_a_secret_goes(text: str, told: str) -> None:
    assert redacted(["qemu", "-object", text])[2] == told


@pytest.mark.parametrize(("option", "text"), LEGIBLE)
def test_what_only_names_a_secret_or_is_none_stays(option: str, text: str) -> None:
    assert redacted(["qemu", f"-{option}", text])[2] == text


@given(st.lists(st.text(max_size=30)))
def test_anything_is_searched_and_nothing_is_refused(argv: list[str]) -> None:
    assert len(redacted(argv)) == len(argv)
    assert redacted(redacted(argv)) == redacted(argv)


@given(st.text(alphabet="hunter2,=:@ \\\"'{}", min_size=1))
def test_no_secret_of_any_letters_is_left(secret: str) -> None:
    words = unparse([("qom-type", "secret"), ("id", "x"), ("data", secret)])
    assert redacted(["q", "-object", words])[2] == f"qom-type=secret,id=x,data={REDACTED}"


def test_a_definition_is_told_without_them() -> None:
    pairs = [("machine.type", "q35"), ("device", "driver=isa-applesmc,osk=hunter2")]
    told = (("machine.type", "q35"), ("device", "driver=isa-applesmc,osk=REDACTED"))
    assert redacted_pairs(pairs) == told


def test_what_qemu_repeats_of_its_arguments_is_told_without_them() -> None:
    argv = ["qemu", "-object", "secret,id=s0,data=hunter2", "-object", "secret,id=s0,data=hunter2x"]
    said = "qemu: -object secret,id=s0,data=hunter2x: attempt to add duplicate property 's0'"
    told = "qemu: -object secret,id=s0,data=REDACTED: attempt to add duplicate property 's0'"
    assert redacted_log(said, argv) == told
    assert redacted_log(said, ["qemu"]) == said


def test_an_error_about_an_argument_does_not_tell_them() -> None:
    with pytest.raises(CommandLineError) as caught:
        parse_nested("qom-type=secret,data=hunter2,x")
    assert "hunter2" not in f"{caught.value} {caught.value.data}"
    with pytest.raises(CommandLineError) as caught:
        disks(CommandLine.parse(["q", "-drive", "file=https://me:hunter2@h/i"]), "/")
    assert "hunter2" not in f"{caught.value} {caught.value.data}"
