//! Malformed requests: good ones with flipped bits, with missing, doubled or
//! nested parts, and plain noise. Each gets an answer with a useful code, and
//! does not harm the daemon.
//!
//! `FUZZ_SEED` repeats a run, and `FUZZ_SECONDS` sets how long it runs.

use std::fs;

use grpcio::RpcStatusCode;
use overlay_read_write_splitting_snapshotter::proto::snapshots::{
    CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, PrepareSnapshotRequest,
    RemoveSnapshotRequest, UpdateSnapshotRequest, ViewSnapshotRequest,
};
use overlay_read_write_splitting_snapshotter::types::{
    LABEL_GID_MAPPING, LABEL_SNAPSHOT_REF, LABEL_UID_MAPPING, LABEL_VOLUME,
};
use protobuf::Message;
use protobuf::well_known_types::field_mask::FieldMask;
use registered::registered;

use crate::content::layer;
use crate::input::{refused_as, unharmed};
use crate::messages::METHODS;
use crate::support::client::{Client, labels};
use crate::support::daemon::Split;
use crate::support::fuzzing::{cases, spoil};
use crate::support::mounted::Mounted;
use crate::support::random::{Random, Seed};

const CASES: u64 = 1_000;
/// After this number of requests, snapshots that were made by accident are
/// removed.
const REMOVED_EVERY: u64 = 250;

#[registered(crate::Test)]
fn requests_that_nobody_meant() {
    let seed = Seed::of("FUZZ_SEED");
    let mut random = seed.random(0);
    let mut split = Split::start(&["--sync", "none", "--relocate-after", "0"]);
    let pid = split.daemon.pid();
    let client = split.client();
    let (mut done, mut undecoded) = (0, 0);
    for case in cases(CASES) {
        let method = METHODS[random.index(METHODS.len())];
        let mut bytes = sound(method, &mut random);
        if !random.is_one_in(8) {
            damage(&mut bytes, &mut random);
        }
        match client.send(method, &bytes) {
            Ok(_) => done += 1,
            Err((code, text)) => {
                let is_expected = matches!(
                    code,
                    RpcStatusCode::NOT_FOUND
                        | RpcStatusCode::ALREADY_EXISTS
                        | RpcStatusCode::INVALID_ARGUMENT
                        | RpcStatusCode::FAILED_PRECONDITION
                );
                bytes.truncate(4096);
                assert!(is_expected, "{code}: {text}: {method} {bytes:02x?}");
                undecoded += u64::from(text.contains("decode a "));
                refused_as::<()>(Err((code, text)), code);
            }
        }
        if case % REMOVED_EVERY == 0 {
            split.remove_everything();
        }
    }
    // The requests are neither all noise nor all valid.
    assert!(done > CASES / 20, "{done} were done");
    assert!(undecoded > CASES / 20, "{undecoded} were no messages");

    split.remove_everything();
    live(&client);
    unharmed(&mut split, pid);
}

/// The requests of a layer and a container, from the unpack to the removal.
fn live(client: &Client) {
    layer(client, "base", "", |top| {
        fs::write(top.join("file"), "base").unwrap();
    });
    let mounted = Mounted::new(&client.prepare("web", "base", &[]).unwrap());
    let read = fs::read_to_string(mounted.path().join("file")).unwrap();
    assert_eq!(read, "base");
    drop(mounted);
    assert_eq!(client.names(&[]).unwrap(), ["base", "web"]);
    client.remove("web").unwrap();
    client.remove("base").unwrap();
}

/// A valid request about one of a few snapshots, so that many of these exist.
fn sound(method: &str, random: &mut Random) -> Vec<u8> {
    let unpack = if random.is_one_in(2) { "extract-" } else { "" };
    let key = format!("{unpack}key-{}", random.below(3));
    let name = format!("layer-{}", random.below(3));
    let parent = match random.is_one_in(2) {
        true => name.clone(),
        false => String::new(),
    };
    let pairs: &[(&str, &str)] = match random.below(4) {
        0 => &[(LABEL_SNAPSHOT_REF, "sha256:1"), ("a", "1")],
        1 => &[
            (LABEL_UID_MAPPING, "0:1000:65536"),
            (LABEL_GID_MAPPING, "0:1000:65536"),
        ],
        2 => &[(LABEL_VOLUME, "image")],
        _ => &[],
    };
    let given = labels(pairs);
    let bytes = match method {
        "Prepare" => PrepareSnapshotRequest {
            key,
            parent,
            labels: given,
            ..Default::default()
        }
        .write_to_bytes(),
        "View" => ViewSnapshotRequest {
            key,
            parent,
            labels: given,
            ..Default::default()
        }
        .write_to_bytes(),
        "Commit" => CommitSnapshotRequest {
            key,
            name,
            labels: given,
            ..Default::default()
        }
        .write_to_bytes(),
        "Update" => UpdateSnapshotRequest {
            info: Some(Info {
                name: key,
                labels: given,
                ..Default::default()
            })
            .into(),
            update_mask: Some(FieldMask {
                paths: vec!["labels.a".to_owned()],
                ..Default::default()
            })
            .into(),
            ..Default::default()
        }
        .write_to_bytes(),
        "List" => ListSnapshotsRequest {
            filters: vec!["kind==active,labels.a".to_owned(), format!("name=={name}")],
            ..Default::default()
        }
        .write_to_bytes(),
        "Cleanup" => CleanupRequest::new().write_to_bytes(),
        // Mounts, Stat and Usage have the same fields.
        _ => RemoveSnapshotRequest {
            key: if random.is_one_in(2) { key } else { name },
            ..Default::default()
        }
        .write_to_bytes(),
    };
    bytes.unwrap()
}

/// Varints of lengths that no message has: 2^32 - 1, 2^63, 2^64 - 1, and a
/// varint that does not end.
const LENGTHS: &[&[u8]] = &[
    &[0xff, 0xff, 0xff, 0xff, 0x0f],
    &[0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01],
    &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
    &[0xff; 12],
];

fn damage(bytes: &mut Vec<u8>, random: &mut Random) {
    let any = |random: &mut Random| random.number().to_le_bytes()[0];
    match random.below(7) {
        0 => {
            for _ in 0..=random.below(3) {
                let at = random.index(bytes.len() + 1);
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
        }
        1 => {
            let at = random.index(bytes.len() + 1);
            bytes.splice(at..at, LENGTHS[random.index(LENGTHS.len())].iter().copied());
        }
        2 => {
            // A message within a message, or a string.
            for _ in 0..random.below(100) {
                let field = *random.pick(&[0x0a_u8, 0x12, 0x1a, 0x22]);
                let mut around = vec![field];
                let mut length = bytes.len();
                while length >= 0x80 {
                    around.push(u8::try_from(length & 0x7f).unwrap() | 0x80);
                    length >>= 7;
                }
                around.push(u8::try_from(length).unwrap());
                around.append(bytes);
                *bytes = around;
            }
        }
        3 => {
            // Groups that are opened, and sometimes closed.
            let depth = random.index(1 << 16);
            let closed = random.index(depth + 1);
            bytes.resize(bytes.len() + depth, 0x7b);
            bytes.resize(bytes.len() + closed, 0x7c);
        }
        4 => *bytes = (0..random.below(64)).map(|_| any(random)).collect(),
        5 => *bytes = sound(METHODS[random.index(METHODS.len())], random),
        _ => spoil(bytes, random, any),
    }
}
