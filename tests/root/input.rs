//! Bad requests: each is refused with the right code, nothing of it remains,
//! and the daemon goes on.

use grpcio::RpcStatusCode;
use overlay_read_write_splitting_snapshotter::proto::snapshots::UpdateSnapshotRequest;
use protobuf::Message;
use registered::registered;
use rustix::process::Pid;

use crate::content::layer;
use crate::support::client::{Client, Refusal};
use crate::support::daemon::{Split, is_empty};
use crate::support::mounted::Mounted;

/// Fails unless the request was refused with that code, and with a text that a
/// user can read on one line.
#[track_caller]
pub fn refused_as<T>(result: Result<T, Refusal>, expected: RpcStatusCode) -> String {
    let Err((code, text)) = result else {
        panic!("{expected} was expected");
    };
    assert_eq!(code, expected, "{text}");
    assert!(
        !text.is_empty() && text.len() < 4096,
        "{} bytes",
        text.len()
    );
    assert!(!text.contains(char::is_control), "{text:?}");
    text
}

/// Fails unless it is the same daemon as before, without snapshots, and its
/// memory has not grown.
#[track_caller]
pub fn unharmed(split: &mut Split, pid: Pid) {
    assert!(split.daemon.is_running() && split.daemon.pid() == pid);
    let client = split.client();
    assert_eq!(client.names(&[]).unwrap(), [""; 0]);
    for volume in [split.root(), split.writable()] {
        assert!(is_empty(volume.join("snapshots")), "{}", volume.display());
    }
    client.cleanup().unwrap();
    for volume in [split.root(), split.writable()] {
        assert!(is_empty(volume.join("trash")), "{}", volume.display());
    }
    let resident = split.daemon.resident_bytes();
    assert!(resident < 100 << 20, "{resident} bytes");
    client.prepare("last", "", &[]).unwrap();
    client.remove("last").unwrap();
    let log = split.daemon.log();
    assert!(!log.contains("panicked"), "{log}");
}

#[registered(crate::Test)]
fn odd_keys_work() {
    let mut split = Split::start(&["--sync", "none"]);
    let pid = split.daemon.pid();
    let client = split.client();
    let long = "k".repeat(100_000);
    let keys = [
        "a",
        " ",
        "\n",
        "two\nlines\r\n",
        "\"quoted\" 'both' `ways`",
        "'; DROP TABLE snapshot; --",
        "..",
        ".",
        "/",
        "../../../../etc/passwd",
        "/etc/passwd",
        "a/b/c/d/e/f/g/h/i/j/k/l/m",
        "////////",
        "1",
        "-1",
        "nul\0in the middle",
        "\0",
        "%s%n%00",
        "snapshots",
        "\u{1b}[31mred\u{7f}",
        "üñí 雪 \u{1f409} \u{202e}\u{feff}",
        "e\u{301}",
        "\u{e9}",
        "extract-",
        "default/1/extract-../..",
        "lowerdir=/etc:/,upperdir=/",
        long.as_str(),
    ];
    for key in keys {
        let shown = key.chars().take(40).collect::<String>();
        let mounts = client.prepare(key, "", &[("key", "value")]).unwrap();
        assert_eq!(client.mounts(key).unwrap(), mounts, "{shown:?}");
        std::fs::write(Mounted::new(&mounts).path().join("file"), "x").unwrap();
        let info = client.stat(key).unwrap();
        assert_eq!(info.name, key);
        assert_eq!(client.names(&[]).unwrap(), [key], "{shown:?}");
        client.usage(key).unwrap();
        client.update(key, &[], &[("key", "other")]).unwrap();
        refused_as(client.prepare(key, "", &[]), RpcStatusCode::ALREADY_EXISTS);
        refused_as(client.stat(&format!("{key}x")), RpcStatusCode::NOT_FOUND);
        // As the name of a layer, and as a parent.
        let name = format!("{key} committed");
        client.commit(key, &name, &[]).unwrap();
        client.view(key, &name, &[]).unwrap();
        assert_eq!(client.stat(key).unwrap().parent, name);
        refused_as(client.remove(&name), RpcStatusCode::FAILED_PRECONDITION);
        refused_as(client.mounts(&name), RpcStatusCode::FAILED_PRECONDITION);
        client.remove(key).unwrap();
        client.remove(&name).unwrap();
    }
    // All in one list, in the order of their bytes.
    for key in keys {
        client.prepare(key, "", &[]).unwrap();
    }
    let mut sorted = keys.map(str::to_owned);
    sorted.sort();
    assert_eq!(client.names(&[]).unwrap(), sorted);
    for key in keys {
        client.remove(key).unwrap();
    }
    unharmed(&mut split, pid);
}

#[registered(crate::Test)]
fn refusals_have_their_codes() {
    use RpcStatusCode as Code;
    let mut split = Split::start(&["--sync", "none"]);
    let pid = split.daemon.pid();
    let client = split.client();
    layer(&client, "base", "", |_| ());
    layer(&client, "upper", "base", |_| ());
    client.prepare("active", "upper", &[]).unwrap();
    client.view("view", "upper", &[]).unwrap();
    client.prepare("orphan", "", &[]).unwrap();
    let before = client.list_pages(&[]).unwrap();

    type Make = fn(&Client, &str, &str, &[(&str, &str)]) -> Result<(), Refusal>;
    let makers: [Make; 2] = [
        |client, key, parent, with| client.prepare(key, parent, with).map(drop),
        |client, key, parent, with| client.view(key, parent, with).map(drop),
    ];
    for make in makers {
        for key in ["active", "view", "base", "upper"] {
            let text = refused_as(make(&client, key, "base", &[]), Code::ALREADY_EXISTS);
            assert!(text.contains(key), "{text}");
            refused_as(make(&client, key, "", &[]), Code::ALREADY_EXISTS);
        }
        refused_as(make(&client, "new", "nobody", &[]), Code::NOT_FOUND);
        for parent in ["active", "view"] {
            let text = refused_as(make(&client, "new", parent, &[]), Code::INVALID_ARGUMENT);
            assert!(text.contains("committed") && text.contains("new"), "{text}");
        }
        refused_as(make(&client, "", "base", &[]), Code::INVALID_ARGUMENT);
        let wrong = [(
            "containerd.io/snapshot/overlay-read-write-splitting.volume",
            "tape",
        )];
        refused_as(make(&client, "new", "base", &wrong), Code::INVALID_ARGUMENT);
        for (uid, gid) in [
            ("0:1:0", "0:1:1"),
            ("0:1:1", "x"),
            ("0:1:4294967295", "0:1:1"),
            ("1:1:1", "0:1:1"),
            ("0:1:1,0:2:1", "0:1:1"),
            ("0:1:1", ""),
        ] {
            let with = [
                ("containerd.io/snapshot/uidmapping", uid),
                ("containerd.io/snapshot/gidmapping", gid),
            ];
            refused_as(make(&client, "new", "base", &with), Code::INVALID_ARGUMENT);
            refused_as(make(&client, "new", "", &with), Code::INVALID_ARGUMENT);
        }
    }

    refused_as(client.mounts("nobody"), Code::NOT_FOUND);
    refused_as(client.mounts("base"), Code::FAILED_PRECONDITION);

    refused_as(client.commit("active", "base", &[]), Code::ALREADY_EXISTS);
    refused_as(client.commit("active", "view", &[]), Code::ALREADY_EXISTS);
    refused_as(client.commit("active", "active", &[]), Code::ALREADY_EXISTS);
    // The check of the name comes first.
    refused_as(client.commit("nobody", "base", &[]), Code::ALREADY_EXISTS);
    refused_as(client.commit("nobody", "new", &[]), Code::NOT_FOUND);
    refused_as(client.commit("view", "new", &[]), Code::FAILED_PRECONDITION);
    refused_as(client.commit("base", "new", &[]), Code::FAILED_PRECONDITION);
    refused_as(client.commit("active", "", &[]), Code::INVALID_ARGUMENT);
    let onto = |key: &str, parent: &str| client.commit_onto(key, "new", parent, &[]);
    refused_as(onto("orphan", "nobody"), Code::NOT_FOUND);
    refused_as(onto("orphan", "view"), Code::FAILED_PRECONDITION);
    refused_as(onto("orphan", "active"), Code::FAILED_PRECONDITION);
    refused_as(onto("orphan", "orphan"), Code::FAILED_PRECONDITION);
    refused_as(onto("active", "base"), Code::INVALID_ARGUMENT);

    refused_as(client.remove("nobody"), Code::NOT_FOUND);
    for parent in ["base", "upper"] {
        refused_as(client.remove(parent), Code::FAILED_PRECONDITION);
    }
    refused_as(client.stat("nobody"), Code::NOT_FOUND);
    refused_as(client.usage("nobody"), Code::NOT_FOUND);
    refused_as(client.update("nobody", &[], &[]), Code::NOT_FOUND);

    assert_eq!(client.list_pages(&[]).unwrap(), before);
    let links = std::fs::read_dir(split.root().join("snapshots")).unwrap();
    assert_eq!(links.count(), 2, "no refused commit has left its link");
    for key in ["active", "view", "orphan", "upper", "base"] {
        client.remove(key).unwrap();
    }
    unharmed(&mut split, pid);
}

#[registered(crate::Test)]
fn bad_keys_and_labels() {
    const INVALID_ARGUMENT: RpcStatusCode = RpcStatusCode::INVALID_ARGUMENT;
    const NOT_FOUND: RpcStatusCode = RpcStatusCode::NOT_FOUND;
    let mut split = Split::start(&["--sync", "none"]);
    let pid = split.daemon.pid();
    let client = split.client();
    client.prepare("active", "", &[]).unwrap();
    let empty_or_unknown = |result: Result<(), Refusal>| {
        let (code, text) = result.unwrap_err();
        assert!([INVALID_ARGUMENT, NOT_FOUND].contains(&code), "{text}");
    };
    empty_or_unknown(client.mounts("").map(drop));
    empty_or_unknown(client.stat("").map(drop));
    empty_or_unknown(client.usage("").map(drop));
    empty_or_unknown(client.update("", &[], &[]).map(drop));
    empty_or_unknown(client.remove(""));
    empty_or_unknown(client.commit("", "new", &[]));

    let (longest, longer) = ("v".repeat(4093), "v".repeat(4094));
    let (long_key, huge) = ("k".repeat(4096), "v".repeat(1 << 20));
    for bad in [
        ("key", longer.as_str()),
        ("", "value"),
        (long_key.as_str(), "v"),
        ("key", huge.as_str()),
        (huge.as_str(), ""),
    ] {
        let with = [("fine", "1"), bad];
        refused_as(client.prepare("new", "", &with), INVALID_ARGUMENT);
        refused_as(client.prepare("extract-1", "", &with), INVALID_ARGUMENT);
        refused_as(client.view("new", "", &with), INVALID_ARGUMENT);
        refused_as(client.commit("active", "new", &with), INVALID_ARGUMENT);
        refused_as(client.update("active", &[], &with), INVALID_ARGUMENT);
        refused_as(
            client.update("active", &["labels"], &with),
            INVALID_ARGUMENT,
        );
    }
    let path = ["labels.key"];
    let with = [("key", longer.as_str())];
    refused_as(client.update("active", &path, &with), INVALID_ARGUMENT);
    assert!(client.stat("active").unwrap().labels.is_empty());

    client.prepare("longest", "", &[("key", &longest)]).unwrap();
    assert_eq!(client.stat("longest").unwrap().labels["key"], longest);
    client.remove("longest").unwrap();
    client.remove("active").unwrap();
    unharmed(&mut split, pid);
}

#[registered(crate::Test)]
fn labels_are_stored_as_given() {
    let mut split = Split::start(&["--sync", "none"]);
    let pid = split.daemon.pid();
    let client = split.client();
    let odd = [
        ("new\nline", "a\0b"),
        ("\"", "'"),
        ("a.b.c/d=e,f", "==,~=,!="),
        ("\u{1f409}", "\u{202e}"),
    ];
    let expected = crate::support::client::labels(&odd);
    let with = [odd.as_slice(), &[("empty", "")]].concat();
    client.prepare("web", "", &with).unwrap();
    assert_eq!(client.stat("web").unwrap().labels, expected);
    // A commit's labels replace all others.
    client.commit("web", "layer", &[("only", "this")]).unwrap();
    let labels = client.stat("layer").unwrap().labels;
    assert_eq!(labels, crate::support::client::labels(&[("only", "this")]));
    // As many labels as a message has room for.
    let many: Vec<_> = (0..10_000)
        .map(|number| format!("label-{number}"))
        .collect();
    let with: Vec<_> = many.iter().map(|key| (key.as_str(), "v")).collect();
    client.view("view", "layer", &with).unwrap();
    assert_eq!(client.stat("view").unwrap().labels.len(), many.len());
    let listed = client.list_pages(&["name==view"]).unwrap().concat();
    assert_eq!(listed[0].labels.len(), many.len());
    client.remove("view").unwrap();
    client.remove("layer").unwrap();
    unharmed(&mut split, pid);
}

#[registered(crate::Test)]
fn updates_and_their_masks() {
    let mut split = Split::start(&["--sync", "none"]);
    let pid = split.daemon.pid();
    let client = split.client();
    client
        .prepare("web", "", &[("a", "1"), ("b.c/d", "2")])
        .unwrap();
    let made = client.stat("web").unwrap();
    for wrong in [
        "name",
        "parent",
        "kind",
        "created_at",
        "labels.",
        "Labels",
        "",
        "labels/a",
        "*",
        "labels\0",
        "labels.a\n.",
    ] {
        // Next to a valid path: the request is refused as a whole.
        let result = client.update("web", &["labels.a", wrong], &[("a", "9")]);
        if wrong.starts_with("labels.a") {
            // Everything after the first dot is the key.
            assert_eq!(result.unwrap().labels["a"], "9");
            client.update("web", &["labels.a"], &[("a", "1")]).unwrap();
        } else {
            refused_as(result, RpcStatusCode::INVALID_ARGUMENT);
        }
        assert_eq!(client.stat("web").unwrap().labels, made.labels, "{wrong:?}");
    }
    let update = |mask: &[&str], with: &[(&str, &str)]| {
        let info = client.update("web", mask, with).unwrap();
        assert_eq!(client.stat("web").unwrap(), info);
        let mut labels: Vec<_> = info.labels.into_iter().collect();
        labels.sort();
        labels
    };
    let pairs = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
        let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        pairs.iter().map(owned).collect()
    };
    let set = update(&["labels.b.c/d"], &[("b.c/d", "3"), ("a", "ignored")]);
    assert_eq!(set, pairs(&[("a", "1"), ("b.c/d", "3")]));
    assert_eq!(update(&["labels.b.c/d"], &[]), pairs(&[("a", "1")]));
    assert_eq!(update(&["labels.a"], &[("a", "")]), []);
    assert_eq!(update(&["labels.none"], &[]), []);
    assert_eq!(update(&[], &[("x", "1"), ("y", "")]), pairs(&[("x", "1")]));
    assert_eq!(update(&["labels"], &[("z", "1")]), pairs(&[("z", "1")]));
    assert_eq!(update(&[], &[]), []);
    let info = client.stat("web").unwrap();
    assert_eq!(info.created_at, made.created_at);
    assert_ne!(info.updated_at, made.updated_at);
    // A request without info, and one without a name in it.
    let nothing = UpdateSnapshotRequest::new().write_to_bytes().unwrap();
    let (code, text) = client.send("Update", &nothing).unwrap_err();
    assert!(
        [RpcStatusCode::NOT_FOUND, RpcStatusCode::INVALID_ARGUMENT].contains(&code),
        "{text}"
    );
    client.remove("web").unwrap();
    unharmed(&mut split, pid);
}

#[registered(crate::Test)]
fn filters() {
    let mut split = Split::start(&["--sync", "none"]);
    let pid = split.daemon.pid();
    let client = split.client();
    client.prepare("web", "", &[("a.b", "1")]).unwrap();
    let (open, long) = (
        "(".repeat(100_000),
        format!("name=={}", "x".repeat(100_000)),
    );
    let repeated = format!("name~={}", "(a{1000})".repeat(100));
    for wrong in [
        "name==",
        "==x",
        "name~=[",
        "name~=(",
        ",",
        "name==web,",
        "name=web",
        "\"",
        "name==\"web",
        "labels.",
        "\0",
        open.as_str(),
        repeated.as_str(),
    ] {
        refused_as(client.names(&[wrong]), RpcStatusCode::INVALID_ARGUMENT);
        // The filter is also refused next to a valid one.
        let both = ["name==web", wrong];
        refused_as(client.names(&both), RpcStatusCode::INVALID_ARGUMENT);
    }
    assert_eq!(client.names(&[&long]).unwrap(), [""; 0]);
    assert_eq!(client.names(&["labels.\"a.b\"==1"]).unwrap(), ["web"]);
    assert_eq!(client.names(&["labels.a.b==1"]).unwrap(), ["web"]);
    assert_eq!(client.names(&["nonsense==1"]).unwrap(), [""; 0]);
    let many = vec!["name==nobody"; 20_000];
    assert_eq!(client.names(&many).unwrap(), [""; 0]);
    // A pattern with which backtracking would take for ever.
    client.prepare(&"a".repeat(10_000), "", &[]).unwrap();
    assert_eq!(
        client.names(&["name~=^(a+)+$,kind==view"]).unwrap(),
        [""; 0]
    );
    assert_eq!(client.names(&["name~=^(a+)+b$"]).unwrap(), [""; 0]);
    client.remove(&"a".repeat(10_000)).unwrap();
    client.remove("web").unwrap();
    unharmed(&mut split, pid);
}

/// Requests that can be repeated without end get a few lines in the log, and their
/// number.
#[registered(crate::Test)]
fn refused_requests_do_not_fill_the_log() {
    let mut split = Split::start(&["--sync", "none"]);
    let client = split.client();
    let label = ("containerd.io/snapshot/max-size", "much");
    for number in 0..300 {
        let key = format!("key {number}");
        client.prepare(&key, "", &[label]).unwrap_err();
    }
    // Another kind of error has lines of its own.
    client.view("view", "", &[label]).unwrap_err();
    split.daemon.stop();
    let log = split.daemon.log();
    // The daemons of tests log everything.
    let usual = || log.lines().filter(|line| !line.contains(" DEBUG]"));
    let lines = |text: &str| usual().filter(|line| line.contains(text)).count();
    assert_eq!(lines("key "), 10, "{log}");
    assert_eq!(
        lines("further failures of this kind are only counted"),
        1,
        "{log}"
    );
    assert_eq!(
        lines("Prepare: 290 more requests ended with INVALID_ARGUMENT"),
        1,
        "{log}"
    );
    assert_eq!(lines("View: "), 1, "{log}");
}
