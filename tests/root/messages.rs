//! Bytes that are not a message, or too long, sent to every method.

use grpcio::RpcStatusCode;
use overlay_read_write_splitting_snapshotter::proto::snapshots::PrepareSnapshotRequest;
use protobuf::Message;
use registered::registered;

use crate::input::{refused_as, unharmed};
use crate::support::daemon::Split;

/// All methods of a snapshotter.
pub const METHODS: [&str; 10] = [
    "Prepare", "View", "Mounts", "Commit", "Remove", "Stat", "Update", "List", "Usage", "Cleanup",
];

#[registered(crate::Test)]
fn bytes_that_are_no_message() {
    let mut split = Split::start(&["--sync", "none"]);
    let pid = split.daemon.pid();
    let client = split.client();
    // Groups within groups, opened and never closed: 0x7b opens field 15.
    let nested = vec![0x7b; 1 << 20];
    let garbage: [&[u8]; 9] = [
        &[0xff; 7],
        &[0x12],
        &[0x12, 0x7f, b'k'],
        &[0x12, 0xff, 0xff, 0xff, 0xff, 0x0f],
        &[
            0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01,
        ],
        &[0x00, 0x00],
        &[0x16],
        b"GET / HTTP/1.1\r\n\r\n",
        &nested,
    ];
    for method in METHODS {
        for bytes in garbage {
            if method == "Update" && bytes == garbage[3] {
                // For the protobuf library, the end of the outer message may
                // end the inner one, too. So this is an Update of nothing.
                refused_as(client.send(method, bytes), RpcStatusCode::NOT_FOUND);
                continue;
            }
            let text = refused_as(client.send(method, bytes), RpcStatusCode::INVALID_ARGUMENT);
            assert!(text.contains(method) || text.contains("decode"), "{text}");
        }
        if method != "Cleanup" {
            // Field 2, a key or something similar, is not UTF-8.
            for bytes in [&[0x12, 1, 0xff][..], &[0x12, 3, b'a', 0xc3, 0x28]] {
                // An Update's field 2 is a message with the name in it.
                let update = [&[0x12, 4, 0x0a, 2][..], &[0xc3, 0x28]].concat();
                let bytes = if method == "Update" { &update } else { bytes };
                refused_as(client.send(method, bytes), RpcStatusCode::INVALID_ARGUMENT);
            }
        }
    }
    // Half of a message that would be valid.
    let request = PrepareSnapshotRequest {
        key: "whole".to_owned(),
        labels: crate::support::client::labels(&[("key", "value")]),
        ..Default::default()
    };
    let whole = request.write_to_bytes().unwrap();
    for length in 0..whole.len() {
        match client.prepare_raw(whole[..length].to_vec()) {
            Err((code, text)) => assert_eq!(code, RpcStatusCode::INVALID_ARGUMENT, "{text}"),
            // Cut between two fields, it is a request without labels.
            Ok(_) => {
                assert!(client.stat("whole").unwrap().labels.is_empty());
                client.remove("whole").unwrap();
            }
        }
    }
    // Unknown fields are skipped.
    let unknown = [0xf8, 0x3f, 9, 0xfa, 0x3f, 2, b'h', b'i'];
    let strange = [&unknown[..], &whole, &unknown].concat();
    client.prepare_raw(strange).unwrap();
    assert_eq!(client.stat("whole").unwrap().labels["key"], "value");
    client.remove("whole").unwrap();

    for unknown in ["Explode", "", "prepare"] {
        let (code, _) = client.send(unknown, b"").unwrap_err();
        assert_eq!(code, RpcStatusCode::UNIMPLEMENTED);
    }
    unharmed(&mut split, pid);
}

#[registered(crate::Test)]
fn messages_that_are_too_long() {
    let mut split = Split::start(&["--sync", "none"]);
    let pid = split.daemon.pid();
    let client = split.client();
    let long = vec![0; (4 << 20) + 1];
    for method in METHODS {
        refused_as(
            client.send(method, &long),
            RpcStatusCode::RESOURCE_EXHAUSTED,
        );
    }
    // Below the limit, a key may have any length.
    let key = "k".repeat((4 << 20) - 1024);
    client.prepare(&key, "", &[]).unwrap();
    refused_as(client.prepare(&key, "", &[]), RpcStatusCode::ALREADY_EXISTS);
    client.remove(&key).unwrap();
    unharmed(&mut split, pid);
}
