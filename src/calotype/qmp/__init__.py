"""QMP as bytes: what QEMU's monitor reads and writes, without a socket; no I/O here.

A proxy stands between clients and QEMU, and must say what QEMU's own monitor would have said. So
this is no JSON reader that happens to be used for QMP, but QEMU's reader (qobject/json-lexer.c,
json-streamer.c, json-parser.c), its judgement of a request (qapi/qmp-dispatch.c, monitor/qmp.c) and
its writer (qobject/json-writer.c), each told anew, with QEMU's own words for what is wrong:

unicode     QEMU's notion of text: modified UTF-8
lexer       bytes to tokens, one table
parser      the tokens of one document to a value, or to QEMU's complaint
decoder     a stream to documents; strict JSON is read at C speed, to the same result
writer      values to bytes, members in the order in which QEMU would write them
server      the session that faces a client
client      the session that faces QEMU

and what may be said in it that is ours:

schema         how commands, actions and events are declared
vocabulary     our types
commands       our commands, actions and events: the one definition of each
visiting       arguments checked against a declaration, in QEMU's words
introspection  what `query-qmp-schema` says of them
examples       a conversation for each
reference      docs/qmp.md
"""
