//! Connections that break off, stall, send something other than gRPC, or come
//! by the thousand. The tests write HTTP/2 frame by frame (RFC 9113), because
//! no client sends what they need.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use futures_executor::block_on;
use futures_util::StreamExt;
use overlay_read_write_splitting_snapshotter::proto::snapshots::{
    ListSnapshotsResponse, PrepareSnapshotRequest,
};
use protobuf::Message;
use registered::registered;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::content::layer;
use crate::input::unharmed;
use crate::support::client::Client;
use crate::support::daemon::Split;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut bytes = length[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// The headers of a call, each as a literal that is not added to a table (RFC
/// 7541, 6.2.2).
fn headers(method: &str) -> Vec<u8> {
    let path = format!("/containerd.services.snapshots.v1.Snapshots/{method}");
    let mut block = Vec::new();
    for (name, value) in [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path.as_str()),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ] {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).unwrap());
            block.extend(text.as_bytes());
        }
    }
    frame(HEADERS, END_HEADERS, 1, &block)
}

/// A message in gRPC's frame: the flag for "not compressed", its length, its
/// bytes.
fn message(bytes: &[u8]) -> Vec<u8> {
    let mut framed = vec![0];
    framed.extend(u32::try_from(bytes.len()).unwrap().to_be_bytes());
    framed.extend(bytes);
    framed
}

/// A whole call.
fn call(method: &str, request: &[u8]) -> Vec<u8> {
    let settings = frame(SETTINGS, 0, 0, &[]);
    let data = frame(DATA, END_STREAM, 1, &message(request));
    [PREFACE, &settings, &headers(method), &data].concat()
}

fn connect(split: &Split) -> UnixStream {
    let stream = UnixStream::connect(split.daemon.address()).unwrap();
    let limit = Some(Duration::from_secs(60));
    stream.set_read_timeout(limit).unwrap();
    stream.set_write_timeout(limit).unwrap();
    stream
}

/// Reads the answer to the call on stream 1: its data, up to the trailers.
fn answer(stream: &mut UnixStream) -> Vec<u8> {
    let mut data = Vec::new();
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).unwrap();
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length.try_into().unwrap()];
        stream.read_exact(&mut payload).unwrap();
        let (kind, flags) = (head[3], head[4]);
        let number = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        if number == 1 && kind == DATA {
            data.extend(payload);
        }
        if number == 1 && flags & END_STREAM != 0 && kind <= HEADERS {
            return data;
        }
    }
}

/// Waits until the server has closed the connection.
fn is_closed_by_the_server(stream: &mut UnixStream) {
    let mut sink = [0; 4096];
    loop {
        match stream.read(&mut sink) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return,
            Err(error) => panic!("the connection stays open: {error}"),
        }
    }
}

fn prepare_request(key: &str) -> Vec<u8> {
    let request = PrepareSnapshotRequest {
        key: key.to_owned(),
        ..Default::default()
    };
    request.write_to_bytes().unwrap()
}

#[registered(crate::Test)]
fn other_protocols() {
    let mut split = Split::start(&["--sync", "none"]);
    let pid = split.daemon.pid();
    let zeros = vec![0; 1 << 20];
    let long_header = [b"GET / HTTP/1.1\r\nx: ".as_slice(), &vec![b'x'; 1 << 20]].concat();
    let bad_settings = [PREFACE, &frame(SETTINGS, 0, 0, &[1, 2, 3])].concat();
    let bad_stream = [
        PREFACE,
        &frame(SETTINGS, 0, 0, &[]),
        &frame(DATA, 0, 0, b"x"),
    ]
    .concat();
    let endless_frame = [PREFACE, &[0xff, 0xff, 0xff, 1, 4, 0, 0, 0, 1]].concat();
    let garbage: [&[u8]; 9] = [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /containerd.services.snapshots.v1.Snapshots/Prepare HTTP/1.1\r\n\r\nx",
        b"PRI * HTTP/2.1\r\n\r\nSM\r\n\r\n",
        // A TLS client's hello.
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        &zeros,
        &long_header,
        &bad_settings,
        &bad_stream,
        &endless_frame,
    ];
    for bytes in garbage {
        let mut stream = connect(&split);
        // The server may hang up before it has read all.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Shutdown::Write);
        is_closed_by_the_server(&mut stream);
    }
    // The connections are dropped at once, without ending them properly.
    for bytes in garbage {
        let _ = connect(&split).write_all(bytes);
    }
    unharmed(&mut split, pid);
}

#[registered(crate::Test)]
fn requests_that_break_off() {
    let mut split = Split::start(&["--sync", "none"]);
    let pid = split.daemon.pid();
    let client = split.client();
    let whole = call("Prepare", &prepare_request("never"));
    // A complete call by hand works, so the calls that are cut off below are
    // parts of a good one.
    let mut stream = connect(&split);
    let sound = call("Prepare", &prepare_request("sound"));
    stream.write_all(&sound).unwrap();
    assert!(!answer(&mut stream).is_empty());
    client.remove("sound").unwrap();

    // Calls cut off at any place. The connections hang up after all of them
    // were open.
    let mut open = Vec::new();
    for length in 0..whole.len() {
        let mut stream = connect(&split);
        stream.write_all(&whole[..length]).unwrap();
        if length % 2 == 0 {
            open.push(stream);
        }
    }
    // While they are silent, other clients are served.
    client.prepare("meanwhile", "", &[]).unwrap();
    client.remove("meanwhile").unwrap();
    drop(open);

    // A length that differs from the message's, and one that is too large for
    // any message.
    let settings = frame(SETTINGS, 0, 0, &[]);
    for head in [[0, 0, 0, 0, 200], [0, 0xff, 0xff, 0xff, 0xff]] {
        let data = [&head[..], &prepare_request("never")].concat();
        let bytes = [
            PREFACE,
            &settings,
            &headers("Prepare"),
            &frame(DATA, END_STREAM, 1, &data),
        ]
        .concat();
        let mut stream = connect(&split);
        stream.write_all(&bytes).unwrap();
        assert!(answer(&mut stream).is_empty(), "{head:?}");
    }
    unharmed(&mut split, pid);
}

/// Raises the limit of this process, which has as many connections as the
/// server.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).unwrap();
}

/// A state directory in memory, where many rows are made quickly because none
/// of them waits for a disk.
fn quick_state() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

#[registered(crate::Test)]
fn a_thousand_at_once() {
    let state = quick_state();
    let state_dir = state.path().to_str().unwrap();
    let mut split = Split::start(&["--sync", "none", "--state-dir", state_dir]);
    let pid = split.daemon.pid();
    // Raised after the daemon's start, because the daemon has to raise its own
    // limit.
    raise_descriptor_limit();
    let client = split.client();
    client.prepare("web", "", &[]).unwrap();
    let stat = call("Stat", &[0x12, 3, b'w', b'e', b'b']);
    let expected = {
        let mut stream = connect(&split);
        stream.write_all(&stat).unwrap();
        answer(&mut stream)
    };
    assert!(!expected.is_empty());
    let mut streams: Vec<_> = (0..1000).map(|_| connect(&split)).collect();
    for stream in &mut streams {
        stream.write_all(&stat).unwrap();
    }
    for stream in &mut streams {
        assert_eq!(answer(stream), expected);
    }
    // All connections are still open, and one more is served.
    split.client().stat("web").unwrap();
    let resident = split.daemon.resident_bytes();
    assert!(resident < 100 << 20, "{resident} bytes");
    drop(streams);
    // The same with a request that goes to the workers and waits for a disk.
    let mut streams: Vec<_> = (0..1000).map(|_| connect(&split)).collect();
    for (number, stream) in streams.iter_mut().enumerate() {
        let request = prepare_request(&format!("web-{number}"));
        stream.write_all(&call("Prepare", &request)).unwrap();
    }
    for stream in &mut streams {
        assert!(!answer(stream).is_empty());
    }
    assert_eq!(client.names(&[]).unwrap().len(), 1001);
    drop(streams);
    for name in client.names(&[]).unwrap() {
        client.remove(&name).unwrap();
    }
    unharmed(&mut split, pid);
}

#[registered(crate::Test)]
fn readers_that_stall() {
    const SNAPSHOTS: usize = 5000;
    const READERS: usize = 8;
    let state = quick_state();
    let state_dir = state.path().to_str().unwrap();
    let mut split = Split::start(&["--sync", "none", "--state-dir", state_dir]);
    let pid = split.daemon.pid();
    let client = split.client();
    layer(&client, "base", "", |_| ());
    // Views of a parent are only rows.
    let label = "x".repeat(100);
    std::thread::scope(|scope| {
        for part in 0..4 {
            let (split, label) = (&split, &label);
            scope.spawn(move || {
                let client = split.client();
                for number in (part..SNAPSHOTS - 1).step_by(4) {
                    let key = format!("view-{number:05}");
                    client.view(&key, "base", &[("filler", label)]).unwrap();
                }
            });
        }
    });
    // Each reader has a connection of its own, and two share one.
    let clients: Vec<Client> = (0..READERS).map(|_| split.client()).collect();
    let mut stalled: Vec<_> = clients
        .iter()
        .map(|client| client.begin_list(&[]))
        .collect();
    stalled.push(clients[0].begin_list(&[]));
    // The first message has come; the other messages wait.
    for reader in &mut stalled {
        let page = block_on(reader.next()).unwrap().unwrap();
        let page = ListSnapshotsResponse::parse_from_bytes(&page).unwrap();
        assert_eq!(page.info.len(), 100);
    }
    let begun = Instant::now();
    for other in [&split.client(), &client, &clients[0], &clients[1]] {
        other.prepare("web", "base", &[]).unwrap();
        other.mounts("web").unwrap();
        other.stat("base").unwrap();
        other.usage("web").unwrap();
        assert_eq!(other.names(&[]).unwrap().len(), SNAPSHOTS + 1);
        other.remove("web").unwrap();
        other.cleanup().unwrap();
    }
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "{:?}",
        begun.elapsed()
    );
    // One of the readers goes on, and gets the whole list as it was at the
    // beginning.
    let mut resumed = stalled.pop().unwrap();
    let mut told = 100;
    while let Some(page) = block_on(resumed.next()) {
        let page = ListSnapshotsResponse::parse_from_bytes(&page.unwrap()).unwrap();
        assert!(page.info.len() <= 100);
        told += page.info.len();
    }
    assert_eq!(told, SNAPSHOTS);
    let resident = split.daemon.resident_bytes();
    assert!(resident < 100 << 20, "{resident} bytes");
    // The other readers never come back.
    drop((stalled, clients));

    std::thread::scope(|scope| {
        for part in 0..4 {
            let split = &split;
            scope.spawn(move || {
                let client = split.client();
                for number in (part..SNAPSHOTS - 1).step_by(4) {
                    client.remove(&format!("view-{number:05}")).unwrap();
                }
            });
        }
    });
    client.remove("base").unwrap();
    unharmed(&mut split, pid);
}
